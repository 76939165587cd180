"""What is being traced: `save_context` is private (checked with TensorFlow 2.19 to 2.21)."""

import tensorflow as tf
from tensorflow.python.saved_model import save_context


def tracing_saved_model():
    """Whether what is traced goes into a SavedModel, for which functions are traced anew."""
    return save_context.in_save_context() and not tf.executing_eagerly()


def current_graph():
    """The graph that is being traced here; `None` where operations run at once."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def can_be_read(value):
    """Whether a tensor is a value here: not one of a loop, a branch or a function inside."""
    reader, owner = current_graph(), getattr(value, "graph", None)
    if reader is None or owner is None:
        return True
    while reader is not None:
        if reader is owner:
            return True
        reader = getattr(reader, "outer_graph", None)
    return False
