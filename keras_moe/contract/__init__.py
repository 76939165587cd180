"""What Keras promises of a layer, kept in one place for all layers of the package."""
