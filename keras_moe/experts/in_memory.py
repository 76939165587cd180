"""Copies of layers by their configurations, for which Keras' rules about files are not meant."""

from keras.src.saving.serialization_lib import SafeModeScope


def trusted():
    """A context inside which the configuration of a layer that is there makes another like it.

    Keras refuses configurations with a Python function in them, as that of a `Lambda` layer, unless
    told otherwise: a file could run any code. So nothing that was read from a file may be made
    inside. Private, but in public there is a switch for the whole process alone (checked with
    Keras 3.10 to 3.15).
    """
    return SafeModeScope(False)
