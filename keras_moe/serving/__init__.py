"""From a trained model to what a server runs."""

from keras_moe.backend import NAME, requirements

if NAME == "tensorflow":
    from keras_moe.serving.export import export_saved_model
    from keras_moe.serving.token_signature import token_signature
else:

    def export_saved_model(*args, **kwargs):
        """Refuses: TensorFlow can't run what JAX writes (StableHLO 1.15, TensorFlow 2.21 has 1.13).

        Raises:
            RuntimeError: Whatever it is called with.
        """
        requirements.need_tensorflow("`export_saved_model`", _INSTEAD)

    def token_signature(*args, **kwargs):
        """Refuses, as `export_saved_model` does, of which it makes a signature."""
        requirements.need_tensorflow("`token_signature`", _INSTEAD)


_INSTEAD = (
    'Save the model, `model.save("model.keras")`, load it where KERAS_BACKEND=tensorflow, and '
    "export it there."
)

__all__ = ["export_saved_model", "token_signature"]
