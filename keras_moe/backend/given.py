"""Variables that have other values for a while, or none at all."""

import contextlib

import keras
from keras.src.backend.common import global_state


class Given(keras.StatelessScope):
    """Inside, some variables have these values; others have those that they had before.

    Args:
        variables: List of variables.
        values: List of tensors, that need not have the shapes of the variables.
    """

    def __init__(self, variables, values):
        super().__init__(initialize_variables=False)
        # Not by the constructor: it would convert what an export stores in another precision.
        self.state_mapping.update(zip(map(id, variables), values, strict=True))

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value


@contextlib.contextmanager
def without_values():
    """Inside, variables are made that have shapes alone: they take no memory, and never will.

    Keras has them wait for their values in a list, which is private
    (checked with Keras 3.10 to 3.15).
    """
    waiting = global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True)
    number = len(waiting)
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        del waiting[number:]
