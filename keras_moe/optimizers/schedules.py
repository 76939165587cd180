"""The paper's schedule of the learning rate."""

import keras
from keras import ops

from keras_moe.arguments import check_positive, check_size


@keras.saving.register_keras_serializable("keras_moe")
class WarmupInverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """Linear up, held if asked for, then proportional to 1/√step (appendices C and E).

    With s = step + 1 from the first update, W warm-up steps and H steps held, it is

        peak · s / W            for s ≤ W,
        peak                    for W ≤ s ≤ W + H,
        peak · √((W + H) / s)   from there on.

    The paper's language models have W = 1000 and H = 0, its translation models W = 2000 and
    H = 8000.

    Example:
    ```python
    model.compile(keras.optimizers.Adam(keras_moe.optimizers.WarmupInverseSqrt(1e-3, 1000)))
    ```

    Args:
        peak: The highest learning rate.
        warmup_steps: W, at least 1.
        hold_steps: H, at least 0.

    Raises:
        ValueError: If `peak` is not above 0, or a number of steps not such an integer.
    """

    def __init__(self, peak, warmup_steps, hold_steps=0):
        self.peak = check_positive("peak", peak)
        self.warmup_steps = check_size("warmup_steps", warmup_steps)
        self.hold_steps = check_size("hold_steps", hold_steps, least=0)

    def __call__(self, step):
        step = ops.cast(step, "float32") + 1.0
        up = step / self.warmup_steps
        down = ops.sqrt((self.warmup_steps + self.hold_steps) / step)
        return self.peak * ops.minimum(ops.minimum(up, 1.0), down)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "hold_steps": self.hold_steps,
        }
