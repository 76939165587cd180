"""Metrics that the call of a layer updates.

With JAX Keras knows metrics while it computes the loss, but not while it calls the layers (keras
issue 21639, checked with Keras 3.10 to 3.15). So here they are state of the layer, as the seeds of
its noise are: no file has them, and every step hands them on. They are known at the end of an
epoch, of `evaluate` and of `predict`; in the middle of a step, and so in the progress bar and in
what `train_on_batch` returns, they are NaN.
"""

import jax
from keras import ops

from keras_moe.backend.jax import tracing


class StateOfLayer:
    """What a metric inherits from that a layer updates when it is called.

    A class before `keras.metrics.Metric`.
    """

    @property
    def variables(self):
        return []

    @property
    def state(self):
        """List of the variables, which belong to the layer."""
        return super().variables

    def current(self, variable):
        """The value of a variable of the metric, NaN in the middle of a step."""
        unknown = ops.full(variable.shape, float("nan"), variable.dtype)
        try:
            value = variable.value
        except TypeError:  # Keras has taken the value away, and hands it to the layers alone.
            return unknown
        # What is no tensor of the step is from when it was traced, and would be so at each step.
        stale = tracing.current_graph() is not None and not isinstance(value, jax.core.Tracer)
        return unknown if stale else value

    def reset_state(self):
        for variable in self.state:
            variable.assign(ops.zeros(variable.shape, variable.dtype))


class HasStateOfMetrics:
    """What a layer with such a metric inherits from, before `keras.layers.Layer`."""

    @property
    def variables(self):
        """List of all variables, those of the metrics among them."""
        own = [v for metric in self._metrics for v in getattr(metric, "state", ())]
        return [*super().variables, *own]
