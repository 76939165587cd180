"""How `tf.vectorized_map`, `jacobian` and `batch_jacobian` get through a mixture.

They turn a loop into one graph, operation by operation: each then works on the values of all turns,
stacked. Sorted rows don't stack, as experts have other numbers of rows in every turn. So what goes
from expert to expert stands in the graph as one operation, which such a loop runs turn by turn.

`pfor_converter` of an operation, where TensorFlow looks before it asks its own registry, is private
(checked with TensorFlow 2.19 to 2.21); tests fail where it has changed.
"""

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor


def turn_by_turn(result):
    """Has a vectorised loop run one operation turn by turn.

    Args:
        result: A tensor, the result of the operation.

    Returns:
        The same.
    """
    if not tf.executing_eagerly():  # Only graphs are vectorised.
        result.op.pfor_converter = _run_turn_by_turn
    return result


def as_one_operation(function, *arguments):
    """Calls a function of tensors, in a graph as one operation, which isn't vectorised.

    Args:
        function: Of tensors; returns a tensor. Other tensors that it uses are found.
        *arguments: The tensors.

    Returns:
        The function's result.
    """
    if tf.executing_eagerly():  # Only graphs are vectorised.
        return function(*arguments)
    return turn_by_turn(tf.function(function, autograph=False)(*arguments))


def largest_of_turns(size):
    """A size that depends on the data; where turns are stacked, the largest of all of them.

    Args:
        size: Integer scalar tensor.

    Returns:
        Integer scalar tensor.
    """
    size = tf.identity(size)
    if not tf.executing_eagerly():
        size.op.pfor_converter = _largest
    return size


def refuse_vectorising(tensor, what):
    """Has a vectorised loop raise ValueError where it needs `tensor`, the result of `what`."""

    def refuse(operation):
        raise ValueError(
            f"A vectorised loop, as tf.vectorized_map makes one, can't go through {what}. "
            "Use tf.map_fn, or `experimental_use_pfor=False`."
        )

    if not tf.executing_eagerly():
        tensor.op.pfor_converter = refuse


def matmul_each(a, b, **transposed):
    """As `tf.matmul` of two matrices, or of as many on each side.

    A batch of a single matrix, in a vectorised loop one [turns, 1, M, D], writes beyond its result
    and takes the process down (TensorFlow 2.21 with oneDNN, on CPUs that have AMX).
    """
    if len(b.shape) == 3 and b.shape[0] == 1:
        return tf.matmul(a[0], b[0], **transposed)[None]
    return tf.matmul(a, b, **transposed)


def _run_turn_by_turn(operation):
    # What TensorFlow then does, unless it is forbidden.
    raise pfor.ConversionNotImplementedError(
        "Rows on their way through experts can't be vectorised, but only run turn by turn: leave "
        "`fallback_to_while_loop` on."
    )


def _largest(operation):
    size, stacked, _ = operation.input(0)
    return pfor.wrap(tf.reduce_max(size) if stacked else size, False)
