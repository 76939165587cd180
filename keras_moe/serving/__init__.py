"""From a trained model to what a server runs."""

from keras_moe.serving.export import export_saved_model
from keras_moe.serving.token_signature import token_signature

__all__ = ["export_saved_model", "token_signature"]
