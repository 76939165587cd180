"""What XLA has to be told, and tells: private (checked with TensorFlow 2.19 to 2.21)."""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_dot_v2
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

# `DotDimensionNumbers` of XLA, serialized, by the rank of the factors: of the left the last axis is
# summed, of the right the one before it; a first axis of three goes along.
_DIMENSIONS = {
    2: b"\x0a\x01\x01\x12\x01\x00",
    3: b"\x0a\x01\x02\x12\x01\x01\x1a\x01\x00\x22\x01\x00",
}
# `PrecisionConfig`: both factors in the highest.
_HIGHEST = b"\x0a\x02\x02\x02"


def compiling():
    """Whether XLA is going to compile what is being traced."""
    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(graph)


def exact_dot(x, kernel):
    """x·kernel in float32, of matrices [T, D] and [D, N] or as many on each side."""
    return xla_dot_v2(
        lhs=x,
        rhs=kernel,
        dimension_numbers=_DIMENSIONS[len(x.shape)],
        precision_config=_HIGHEST,
        preferred_element_type=tf.float32,
    )
