"""What a layer is called with, made into what it computes with.

Keras casts floats to the compute dtype of a layer. It leaves integers and booleans as they are, and
with `autocast=False` floats as well; a sparse tensor stays sparse; and from a generator or
`tf.numpy_function` comes a tensor of which nobody knows the width. So each layer's `call` begins
with `as_input` of what it is given, and no layer turns its weights into the dtype of its rows.
"""

import keras
from keras import ops

from keras_moe.backend import indices


def as_input(layer, x):
    """Returns an input dense, in the layer's compute dtype, and as wide as the layer was built for.

    Args:
        layer: The layer that is called. Its `input_spec` tells the width, if it knows one.
        x: Tensor or array [..., D] of any dtype that holds numbers, dense or sparse. In a graph D
            may be unknown; another width than that of the layer is then an error as the graph runs.

    Returns:
        Tensor [..., D].

    Raises:
        ValueError: If `x` is ragged, or holds no real numbers.
    """
    refuse_ragged(layer, x)
    x = ops.convert_to_tensor(x, sparse=False)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype == "string" or dtype.startswith("complex"):  # A cast would drop the imaginary part.
        raise ValueError(
            f"{type(layer).__name__} takes floats, integers or booleans. Received: {dtype} of "
            f"shape {x.shape}"
        )
    x = ops.cast(x, layer.compute_dtype)
    axes = getattr(layer.input_spec, "axes", None) or {}
    if x.shape[-1] is None and -1 in axes:
        x = indices.ensure_shape(x, [*x.shape[:-1], axes[-1]])
    return x


def as_mask(mask, x):
    """Returns a mask as booleans that have one entry for each position of an input, or `None`.

    Args:
        mask: Tensor, array or list [...] of booleans or numbers, or `None`. In a graph its shape
            may be unknown.
        x: Tensor [..., D], by `as_input`.

    Raises:
        ValueError: If the mask has another shape.
    """
    if mask is None:
        return None
    mask, positions = ops.convert_to_tensor(mask, "bool"), x.shape[:-1]
    shape = None if _of_unknown_rank(mask) else tuple(mask.shape)
    if shape is not None and not _may_be_equal(shape, tuple(positions)):
        raise ValueError(
            "The mask must have one entry for each position of the input: its shape without "
            f"the last dimension. Received: x of shape {x.shape}, mask of shape {mask.shape}"
        )
    return indices.ensure_shape(mask, positions) if shape is None else mask


def _of_unknown_rank(tensor):
    return getattr(tensor.shape, "rank", 0) is None  # As TensorFlow has them in a graph.


def _may_be_equal(shape, other):
    known = [{*sizes} - {None} for sizes in zip(shape, other, strict=False)]
    return len(shape) == len(other) and all(len(sizes) < 2 for sizes in known)


def as_examples(x, mask):
    """Returns an input [..., D] as [T, D], zeros where masked, and the mask as [T] or `None`."""
    examples = ops.reshape(x, (-1, x.shape[-1]))
    if mask is None:
        return examples, None
    mask = ops.reshape(as_mask(mask, x), (-1,))
    # A zero in place of a NaN: 0·NaN would carry it into the gradients.
    return ops.where(mask[:, None], examples, ops.zeros_like(examples)), mask


def as_numbers(numbers):
    """Returns numbers of rows or experts as an int32 tensor, or `None`."""
    return None if numbers is None else ops.convert_to_tensor(numbers, "int32")


def refuse_ragged(layer, x):
    """Raises ValueError for a ragged input, symbolic ones included."""
    if hasattr(x, "row_splits") or getattr(x, "ragged", False):
        raise ValueError(
            f"{type(layer).__name__} takes no ragged input; give it `x.to_tensor()` and a mask. "
            f"Received: {type(x).__name__} of shape {x.shape}"
        )


def check_positions(layer, shape):
    """Raises ValueError unless a shape is that of positions [..., D], D known.

    Args:
        layer: The layer. Once built it takes no other width than that of its `input_spec`.
        shape: Tuple of integers and `None`.
    """
    if not 2 <= len(shape) <= 4 or shape[-1] is None:
        raise ValueError(
            f"{type(layer).__name__} takes inputs of rank 2 to 4 whose last dimension is known. "
            f"Received: shape {tuple(shape)}"
        )
    if layer.built and shape[-1] != layer.input_spec.axes[-1]:
        raise ValueError(
            f"The layer was built for inputs of width {layer.input_spec.axes[-1]}. "
            f"Received: shape {tuple(shape)}"
        )
