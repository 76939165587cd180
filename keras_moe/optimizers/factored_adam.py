"""The paper's optimizer, whose state for the experts is small."""

import re

import keras
from keras import ops

from keras_moe.arguments import check_decay_rate, check_patterns, check_positive
from keras_moe.backend import compilation, indices, squares


@keras.saving.register_keras_serializable("keras_moe")
class FactoredAdam(keras.optimizers.Optimizer):
    """Adam with next to no state for the parameters of experts (appendix D of the paper).

    A matrix [D, F] of an expert has no first moment (β_1 = 0), and of the second moment only the
    means of its rows and of its columns. With R [D] and C [F], moving averages of the means of
    the squared gradient g² over each row and over each column, both by β_2,

        v_ij = R_i · C_j / mean(R),   w_ij -= α · g_ij / (sqrt(v_ij) + epsilon),

    where α = learning_rate · sqrt(1 - β_2^t) corrects the bias in step t, as in
    `keras.optimizers.Adam`, and mean(R) = mean(C). A bank [N, D, F] so has slots [N, D] and
    [N, F]: of 512 x 1024 matrices 1/683 of Adam's. The vectors of an expert, its biases, have a
    whole second moment and no first one, as there is nothing to factor: so an expert that no
    example reaches stays as it is, weight decay apart, and momentum moves none of its parts. All
    other parameters get ordinary Adam with both moments.

    Parameters of experts are all of the layers `FeedForwardExperts` and `LayerExperts`, thus also
    of `SparseMoE` and `HierarchicalMoE`, shared experts included, but not of their gating. They
    are known by an attribute that these layers give them: `expert_rank`, the rank of one expert's
    part of the variable. Give it to the variables of a bank of your own, or name them by
    `expert_parameters`.

    Slots and arithmetic are float32 where the variable is narrower: in bfloat16 β_2 = 0.999 is 1.

    Example:
    ```python
    model.compile(keras_moe.optimizers.FactoredAdam(1e-3), "sparse_categorical_crossentropy")
    ```

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        beta_1: Decay rate of the first moment, which parameters of experts do not have.
        beta_2: Decay rate of the second moment.
        epsilon: Added to the root of the second moment, without correction of its bias, as in
            `keras.optimizers.Adam`.
        expert_parameters: `None` for the parameters named above, or a list of regular expressions:
            then the parameters of experts are those in whose path one of them is found, as
            `["experts/", "decoder/ffn"]`. The last two axes of such a variable are its matrix,
            unless it has an `expert_rank` below 2. An empty list makes this ordinary Adam.
        **kwargs: Keyword arguments of `keras.optimizers.Optimizer`, as `weight_decay`, `clipnorm`,
            `use_ema`, `gradient_accumulation_steps` or `name`.

    Raises:
        ValueError: If a decay rate is not at least 0 and below 1, epsilon not above 0, or
            `expert_parameters` not a list of regular expressions.
    """

    def __init__(
        self,
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        expert_parameters=None,
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta_1 = check_decay_rate("beta_1", beta_1)
        self.beta_2 = check_decay_rate("beta_2", beta_2)
        self.epsilon = check_positive("epsilon", epsilon)
        self.expert_parameters = check_patterns("expert_parameters", expert_parameters)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._slots = [self._make_slots(variable) for variable in variables]

    def _make_slots(self, variable):
        shape = tuple(variable.shape)
        path = getattr(variable, "path", variable.name)  # A tf.Variable has none.
        axes = tuple(range(len(shape)))  # of the variable, that a slot has as well
        if not self._is_of_experts(variable, path):
            slots = {"momentum": axes, "velocity": axes}
        elif getattr(variable, "expert_rank", len(shape)) < 2:
            slots = {"velocity": axes}
        else:
            slots = {"row_means": axes[:-1], "column_means": (*axes[:-2], axes[-1])}
        prefix = re.sub("[/:]", "_", path)
        # Held where the variable is, so that of experts in shards the slots are in shards as well.
        with compilation.beside(variable):
            return {
                name: self.add_variable(
                    tuple(shape[axis] for axis in axes),
                    dtype=_slot_dtype(variable),
                    layout=compilation.layout_of(variable, axes),
                    name=f"{prefix}_{name}",
                )
                for name, axes in slots.items()
            }

    def _is_of_experts(self, variable, path):
        if self.expert_parameters is None:
            return hasattr(variable, "expert_rank")
        return any(re.search(pattern, path) for pattern in self.expert_parameters)

    def update_step(self, gradient, variable, learning_rate):
        slots = self._slots[self._get_variable_index(variable)]
        dtype = _slot_dtype(variable)
        # That of an embedding comes as slices, of one row perhaps several: their sum is squared.
        gradient = ops.cast(indices.tensor(gradient), dtype)
        step = ops.cast(self.iterations + 1, dtype)
        alpha = ops.cast(learning_rate, dtype) * ops.sqrt(1 - ops.power(self.beta_2, step))

        if "row_means" in slots:
            self._update_factored(gradient, variable, alpha, **slots)
            return
        self._average(slots["velocity"], ops.square(gradient), self.beta_2)
        if "momentum" in slots:
            self._average(slots["momentum"], gradient, self.beta_1)
            gradient = slots["momentum"]
            alpha /= 1 - ops.power(self.beta_1, step)
        self.assign_sub(variable, alpha * gradient / (ops.sqrt(slots["velocity"]) + self.epsilon))

    def _update_factored(self, gradient, variable, alpha, row_means, column_means):
        slots = map(indices.tensor, (row_means, column_means))
        changes = _factored_changes(gradient, *slots, alpha, self.beta_2, self.epsilon)
        for changed, change in zip((row_means, column_means, variable), changes, strict=True):
            self.assign_add(changed, change)

    def _average(self, slot, value, beta):
        self.assign_add(slot, (value - slot) * (1 - beta))

    def get_config(self):
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "expert_parameters": self.expert_parameters,
        }


# Compiled, as one operation after the other would move twice as many bytes.
@compilation.compiled
def _factored_changes(gradient, row_means, column_means, alpha, beta_2, epsilon):
    """What is to be added to the means and to the variable."""
    row_squares, column_squares = squares.means(gradient)
    row_change = (row_squares - row_means) * (1 - beta_2)
    column_change = (column_squares - column_means) * (1 - beta_2)
    row_means, column_means = row_means + row_change, column_means + column_change

    # The root of an outer product is that of its vectors. These are divided by alpha as well,
    # which needs no pass over the matrices; where a schedule begins at 0, by next to nothing.
    alpha = ops.where(alpha == 0, 1e-30, alpha)
    mean = ops.mean(row_means, axis=-1, keepdims=True)  # 0 where no example ever came
    by_row = ops.sqrt(ops.divide_no_nan(row_means, mean)) / alpha
    by_column = ops.sqrt(column_means)
    divisor = by_row[..., None] * by_column[..., None, :] + epsilon / alpha
    return row_change, column_change, -gradient / divisor


def _slot_dtype(variable):
    return keras.backend.result_type(variable.dtype, "float32")
