"""What serving takes of Keras that is not public (checked with Keras 3.10 to 3.15)."""


def layers_within(layer):
    """The layer and all layers inside of it, however deep; nothing public finds those."""
    return list(layer._flatten_layers())
