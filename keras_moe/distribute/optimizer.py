"""`ExpertParallel`: makes an optimizer of Keras update variables that are held in shards.

What Keras does with gradients before and after `update_step` is done here, by settings and slots of
the inner optimizer; `internals.py` tells why.
"""

import keras
import tensorflow as tf

from keras_moe.backend import collectives
from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.distribute.sharded_variable import ShardedVariable, sharded_like_references
from keras_moe.distribute.wrapped_optimizer import WrappedOptimizer


@keras.saving.register_keras_serializable("keras_moe")
class ExpertParallel(WrappedOptimizer):
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
        moe = keras_moe.SparseMoE(64, 256, expert_parallel=True)
        model = keras.Sequential([keras.Input((8,)), moe])
        model.compile(keras_moe.distribute.ExpertParallel(keras.optimizers.Adam()), "mse")
    ```

    Where there is one replica, and for models without such layers, it changes nothing. Loss scaling
    goes around it: `LossScaleOptimizer(ExpertParallel(optimizer))`, as `compile` does it by itself.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`. All settings, as the learning rate or
            `clipnorm`, are its own.
        name: Name of the wrapper.

    Raises:
        ValueError: If `inner_optimizer` cannot work on a part of a variable, or wraps others.
    """

    def __init__(self, inner_optimizer, name=None):
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        _check(inner_optimizer)
        super().__init__(inner_optimizer, name=name)

    def build(self, variables):
        with sharded_like_references():
            super().build(variables)

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
            pairs = zip(grads, trainable_variables, strict=True)
            pairs = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
            if not pairs:
                raise ValueError("No gradients provided for any variable.")
            grads, variables = (list(part) for part in zip(*pairs, strict=True))
            grads = _sum_over_replicas(grads, variables)
            if inner.loss_scale_factor is not None:
                grads = [gradient / inner.loss_scale_factor for gradient in grads]
            if inner.gradient_accumulation_steps:
                self._accumulate(grads, variables)
            else:
                self._update(grads, variables)
            if inner.use_ema:
                self._average()
            for variable in variables:
                if variable.constraint is not None:
                    value = _of_replica(variable)
                    value.assign(variable.constraint(value))
        internals.iterations(inner).assign_add(1)

    def _accumulate(self, grads, variables):
        inner = self.inner_optimizer
        steps = inner.gradient_accumulation_steps
        slots = list(map(_of_replica, internals.accumulated_gradients(inner, variables)))

        def update():
            sums = [gradient + slot for gradient, slot in zip(grads, slots, strict=True)]
            self._update([gradient / steps for gradient in sums], variables)
            for slot in slots:
                slot.assign(tf.zeros_like(slot))

        def wait():
            for gradient, slot in zip(grads, slots, strict=True):
                slot.assign_add(tf.convert_to_tensor(gradient))

        tf.cond((internals.iterations(inner) + 1) % steps == 0, update, wait)

    def _update(self, grads, variables):
        """Each replica updates what it holds, by the whole gradients of that."""
        inner = self.inner_optimizer
        grads = _clip(inner, grads, variables)
        if inner.weight_decay is not None:
            for variable in variables:
                if not internals.has_weight_decay(inner, variable):
                    continue
                value = _of_replica(variable)
                rate = tf.cast(inner.learning_rate, value.dtype) * inner.weight_decay
                value.assign_sub(value * rate)
        internals.begin_step(inner)
        for gradient, variable in zip(grads, variables, strict=True):
            inner.update_step(gradient, _of_replica(variable), inner.learning_rate)

    def _average(self):
        inner = self.inner_optimizer
        # The first average is the value itself.
        momentum = tf.where(tf.equal(inner.iterations, 0), 0.0, inner.ema_momentum)
        pairs = [tuple(map(_of_replica, pair)) for pair in internals.moving_averages(inner)]
        for value, average in pairs:
            average.assign_add((1 - tf.cast(momentum, value.dtype)) * (value - average))

        def overwrite():
            for value, average in pairs:
                value.assign(average)

        if inner.ema_overwrite_frequency:
            tf.cond(
                (inner.iterations + 1) % inner.ema_overwrite_frequency == 0,
                overwrite,
                lambda: None,
            )

    def finalize_variable_values(self, var_list):
        inner = self.inner_optimizer
        if not any(map(_is_sharded, var_list)):
            inner.finalize_variable_values(var_list)
        elif inner.use_ema:
            for variable, average in internals.moving_averages(inner):
                _value(variable).assign(_value(average))


def _check(optimizer):
    """Raises ValueError where the parts of a variable can't be updated one by one."""
    if isinstance(optimizer, (keras.optimizers.LossScaleOptimizer, ExpertParallel)):
        raise ValueError(
            "Loss scaling goes around the wrapper, and once is enough: "
            "`LossScaleOptimizer(ExpertParallel(optimizer))`. Received: "
            f"{type(optimizer).__name__}"
        )
    if isinstance(optimizer, _OF_WHOLE_VARIABLES):
        raise ValueError(
            "ExpertParallel takes an optimizer that computes each expert's update from that "
            "expert's gradient; this one takes norms or means over whole variables. Take another, "
            f"as Adam or keras_moe.optimizers.FactoredAdam. Received: {type(optimizer).__name__}"
        )
    if internals.has_step_of_its_own(optimizer) and optimizer.gradient_accumulation_steps:
        raise ValueError(
            "This optimizer cannot accumulate gradients under ExpertParallel. Received: "
            f"{type(optimizer).__name__} with `gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}`"
        )


_OF_WHOLE_VARIABLES = (
    keras.optimizers.Adafactor,
    keras.optimizers.Lamb,
    keras.optimizers.Muon,
)


def _value(variable):
    """TensorFlow's variable of Keras' one."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _is_sharded(variable):
    return isinstance(_value(variable), ShardedVariable)


def _of_replica(variable):
    """What this replica holds of a variable."""
    value = _value(variable)
    if isinstance(value, ShardedVariable):
        return value.shard
    if internals.on_tpu():
        return internals.component_on_tpu(value)
    return tf.distribute.get_strategy().experimental_local_results(value)[internals.local_replica()]


def _sum_over_replicas(grads, variables):
    """Sums the gradients of what is mirrored. The others are complete already."""
    mirrored = [g for g, v in zip(grads, variables, strict=True) if not _is_sharded(v)]
    if not mirrored:
        return grads
    context = tf.distribute.get_replica_context()
    sums = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, mirrored))
    return [g if _is_sharded(v) else next(sums) for g, v in zip(grads, variables, strict=True)]


def _clip(optimizer, grads, variables):
    """Clips as Keras does, by the norms of whole gradients."""
    if optimizer.clipnorm:
        norms = [tf.sqrt(square) for square in _squared_norms(grads, variables)]
        factors = [optimizer.clipnorm / tf.maximum(norm, optimizer.clipnorm) for norm in norms]
    elif optimizer.global_clipnorm:
        limit = optimizer.global_clipnorm
        norm = tf.sqrt(tf.add_n(_squared_norms(grads, variables)))
        # The difference is 0, but NaN where the norm is not finite.
        factors = [limit / tf.maximum(norm, limit) + (norm - norm)] * len(grads)
    elif optimizer.clipvalue:
        limit = optimizer.clipvalue
        return [tf.clip_by_value(gradient, -limit, limit) for gradient in grads]
    else:
        return grads
    return [_scaled(gradient, factor) for gradient, factor in zip(grads, factors, strict=True)]


def _squared_norms(grads, variables):
    """One float32 scalar for each gradient, over all replicas' parts of it."""
    squares = [
        tf.reduce_sum(tf.square(tf.cast(_entries(gradient), tf.float32))) for gradient in grads
    ]
    in_shards = [i for i, variable in enumerate(variables) if _is_sharded(variable)]
    if in_shards:
        sums = collectives.all_sum(tf.stack([squares[i] for i in in_shards]))
        for i, total in zip(in_shards, tf.unstack(sums), strict=True):
            squares[i] = total
    return squares


def _entries(gradient):
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _scaled(gradient, factor):
    entries = _entries(gradient) * tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(entries, gradient.indices, gradient.dense_shape)
    return entries
