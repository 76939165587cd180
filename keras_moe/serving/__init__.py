"""From a trained model to what a server runs."""

from keras_moe.serving.export import export_saved_model

__all__ = ["export_saved_model"]
