"""`ExpertParallel`: makes an optimizer of Keras update variables that are held in shards."""

import keras
import tensorflow as tf

from keras_moe.distribute import collectives
from keras_moe.distribute.sharded_variable import ShardedVariable, sharded_like_references


@keras.saving.register_keras_serializable("keras_moe")
class ExpertParallel(keras.optimizers.Optimizer):
    """Wraps an optimizer for models with `expert_parallel=True`.

    Each replica holds a part of the experts, and that part of the optimizer's slots. The gradient
    of a part is complete where it is: the rows of all replicas have been there. So only the
    gradients of what is mirrored are summed over the replicas, and then each replica updates what
    it holds. Gradients are clipped, accumulated and averaged after they are summed, so that R
    replicas do what one device would: `clipnorm` takes the norm over a whole bank, and
    `global_clipnorm` that over all parameters of the model.

    Example:
    ```python
    with tf.distribute.MirroredStrategy().scope():
        model = keras.Sequential([..., keras_moe.SparseMoE(64, 256, expert_parallel=True), ...])
        model.compile(keras_moe.distribute.ExpertParallel(keras.optimizers.Adam()), "mse")
    ```

    Where there is one replica, and for models without such layers, it changes nothing. Loss scaling
    goes around it: `LossScaleOptimizer(ExpertParallel(optimizer))`, as `compile` does it by itself.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`. All settings, as the learning rate or
            `clipnorm`, are its own.
        name: Name of the wrapper.

    Raises:
        ValueError: If `inner_optimizer` is not an optimizer, a `LossScaleOptimizer`, or one that
            computes with a variable as a whole: `Lamb`, `Adafactor` and `Muon`.
    """

    def __init__(self, inner_optimizer, name=None):
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Loss scaling goes around the wrapper: "
                "`LossScaleOptimizer(ExpertParallel(optimizer))`. Received: "
                f"{inner_optimizer.name!r}, a LossScaleOptimizer"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    def build(self, variables):
        if self.built:
            return
        with sharded_like_references():
            self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    def apply(self, grads, trainable_variables=None):
        inner = self.inner_optimizer
        if collectives.num_replicas() == 1:
            inner.apply(grads, trainable_variables)
            return
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        self.build(trainable_variables)
        with keras.name_scope(inner.name):
            pairs = [
                (gradient, variable)
                for gradient, variable in zip(grads, trainable_variables, strict=True)
                if gradient is not None
            ]
            grads, variables = (list(part) for part in zip(*pairs, strict=True))
            grads = _sum_over_replicas(grads, variables)
            if inner.loss_scale_factor is not None:
                grads = [gradient / inner.loss_scale_factor for gradient in grads]
            self._update(grads, variables)
        inner._iterations.assign_add(1)

    def _update(self, grads, variables):
        inner = self.inner_optimizer
        for gradient, variable in zip(grads, variables, strict=True):
            inner.update_step(gradient, _of_replica(variable), inner.learning_rate)

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def get_config(self):
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(inner, name=config["name"])


def _of_replica(variable):
    """What this replica holds of a Keras variable, or of one of TensorFlow."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value.shard if isinstance(value, ShardedVariable) else value


def _is_sharded(variable):
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return isinstance(value, ShardedVariable)


def _sum_over_replicas(grads, variables):
    """Sums the gradients of what is mirrored. The others are complete already."""
    mirrored = [g for g, v in zip(grads, variables, strict=True) if not _is_sharded(v)]
    if not mirrored:
        return grads
    replica = tf.distribute.get_replica_context()
    sums = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, mirrored))
    return [g if _is_sharded(v) else next(sums) for g, v in zip(grads, variables, strict=True)]
