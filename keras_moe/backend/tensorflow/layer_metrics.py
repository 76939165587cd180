"""Metrics that the call of a layer updates: here there is nothing to it."""


class StateOfLayer:
    """What a metric inherits from that a layer updates when it is called."""

    def current(self, variable):
        """The value of a variable of the metric."""
        return variable.value


class HasStateOfMetrics:
    """What a layer with such a metric inherits from."""
