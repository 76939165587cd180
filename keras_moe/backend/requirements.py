"""What runs under TensorFlow alone, and says so."""

import keras


def need_tensorflow(what, instead):
    """Raises RuntimeError under another backend than TensorFlow.

    Args:
        what: What needs it: the subject of a sentence.
        instead: What to do: a sentence.
    """
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            f"{what} needs Keras' backend TensorFlow. {instead} "
            f"Received: backend {keras.config.backend()!r}"
        )
