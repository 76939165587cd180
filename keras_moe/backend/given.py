"""Variables that have other values for a while, within a function that is traced."""

import keras


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
