"""Adam that takes smaller steps where an expert's layer has many inputs."""

import keras


@keras.saving.register_keras_serializable("keras_moe_examples")
class WidthScaledAdam(keras.optimizers.Adam):
    """Adam whose learning rate for the kernels of experts falls with their inputs.

    The experts are `FeedForwardExperts`, or clones of dense layers.

    Adam moves each weight by about the learning rate. What a unit computes is a sum over its
    inputs, so with 1024 of them it moves up to four times as far as with 256, and a rate that is
    right for narrow experts is too high for wide ones. Of hidden layers in general: Yang et al.
    2022, arXiv 2203.03466.

    Args:
        learning_rate: A number or a schedule.
        full_rate_inputs: Inputs up to which a layer of an expert has the whole learning rate. With
            more of them it has `learning_rate * full_rate_inputs / inputs`.
        **kwargs: Keyword arguments of `keras.optimizers.Adam`.

    Raises:
        ValueError: If `full_rate_inputs` is below 1.
    """

    def __init__(self, learning_rate, full_rate_inputs, **kwargs):
        super().__init__(learning_rate, **kwargs)
        if full_rate_inputs < 1:
            raise ValueError(f"`full_rate_inputs` must be at least 1. Received: {full_rate_inputs}")
        self.full_rate_inputs = full_rate_inputs

    def build(self, variables):
        super().build(variables)
        self._shares = [self._share(variable) for variable in variables]

    def _share(self, variable):
        if getattr(variable, "expert_rank", 0) < 2:  # No kernel of experts.
            return 1.0
        return min(1.0, self.full_rate_inputs / variable.shape[-2])

    def update_step(self, gradient, variable, learning_rate):
        share = self._shares[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * share)

    def get_config(self):
        return {**super().get_config(), "full_rate_inputs": self.full_rate_inputs}
