"""Activations whose gradient needs no more than their result."""


def lean(activation):
    """The function itself: TensorFlow's gradients of relu, tanh and sigmoid are such ones."""
    return activation
