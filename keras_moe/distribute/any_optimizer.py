"""`ExpertParallel` where every optimizer can update what is divided: under `keras.distribution`.

Slots have the layout of their variable, so each device updates what it holds.
"""

import keras

from keras_moe.distribute.wrapped_optimizer import WrappedOptimizer


@keras.saving.register_keras_serializable("keras_moe")
class ExpertParallel(WrappedOptimizer):
    """Wraps an optimizer for models with `expert_parallel=True`, and changes nothing.

    Under `tf.distribute` the wrapper is needed. With JAX it is there for programs and files that
    run on both.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`.
        name: Name of the wrapper.
    """
