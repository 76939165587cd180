"""Where the backend has no expert parallelism: what says so."""

from keras_moe.backend import NAME

_REFUSAL = (
    "Experts are divided among replicas by tf.distribute, so under Keras' backend TensorFlow: set "
    "KERAS_BACKEND=tensorflow, or leave this out; keras.distribution.DataParallel divides the "
    "batch. Received: {} under the backend {!r}"
)


def check_expert_parallel(value):
    """Returns `value`, or raises ValueError where it is asked for and the backend has none."""
    if value and NAME != "tensorflow":
        raise ValueError(_REFUSAL.format(f"expert_parallel={value!r}", NAME))
    return value


class RefusedExpertParallel:
    """Stands for `ExpertParallel` on backends that have no `tf.distribute`."""

    def __init__(self, *args, **kwargs):
        raise ValueError(_REFUSAL.format("ExpertParallel", NAME))
