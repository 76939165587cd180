"""What is being traced: `save_context` is private in TensorFlow (checked with 2.21)."""

import tensorflow as tf
from tensorflow.python.saved_model import save_context


def tracing_saved_model():
    """Whether what is traced goes into a SavedModel, for which functions are traced anew."""
    return save_context.in_save_context() and not tf.executing_eagerly()
