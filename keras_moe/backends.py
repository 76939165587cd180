"""Which of Keras' backends the package runs on; whoever has another one is told at import."""

import os

SUPPORTED_BACKENDS = ("tensorflow",)


def _refusal(backend):
    return ImportError(
        f"keras_moe runs on these backends of Keras: {', '.join(SUPPORTED_BACKENDS)}. Choose one "
        "before the first import of Keras, by the environment variable KERAS_BACKEND or by "
        f'"backend" in ~/.keras/keras.json. Received: backend {backend!r}'
    )


try:
    import keras
except ImportError as error:  # Keras imports its backend, which need not be installed.
    if os.environ.get("KERAS_BACKEND", SUPPORTED_BACKENDS[0]) in SUPPORTED_BACKENDS:
        raise
    raise _refusal(os.environ["KERAS_BACKEND"]) from error

if keras.config.backend() not in SUPPORTED_BACKENDS:
    raise _refusal(keras.config.backend())
