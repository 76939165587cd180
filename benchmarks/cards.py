"""The graphics card as each framework sees it: to wait for it, its memory, its rate.

Where there is none the same is told of the processor, so that the benchmark can be rehearsed.
"""

import math
import time

from measure import OWN, memory_bytes

LARGE, SMALL = 8192, 256  # Sizes of the product whose rate is measured, on a card and without.
SECONDS = 0.3


class TensorFlow:
    """TensorFlow's first GPU."""

    def __init__(self):
        import tensorflow as tf

        self._tf = tf
        # Else it takes all of the memory, and the peak tells nothing.
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        self.is_gpu = bool(tf.config.list_physical_devices("GPU"))

    def name(self):
        """What the card is called."""
        gpus = self._tf.config.list_physical_devices("GPU")
        details = [self._tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        return details[0].get("device_name", "GPU") if details else "CPU"

    def wait(self, results):
        """Waits until all that was started has been computed."""
        self._tf.test.experimental.sync_devices()

    def peak_bytes(self):
        """The most memory that was in use at a time."""
        if self.is_gpu:
            return self._tf.config.experimental.get_memory_info("GPU:0")["peak"]
        return memory_bytes("VmHWM", OWN)

    def reset_peak(self):
        """Forgets earlier peaks, where that is possible; returns the bytes in use."""
        if not self.is_gpu:
            return memory_bytes("VmRSS", OWN)
        self._tf.config.experimental.reset_memory_stats("GPU:0")
        return self._tf.config.experimental.get_memory_info("GPU:0")["current"]

    def product(self, size, dtype):
        """A function that multiplies two random matrices [size, size]."""
        a, b = (self._tf.cast(self._tf.random.normal([size, size]), dtype) for _ in range(2))
        multiply = self._tf.function(self._tf.matmul)
        return lambda: multiply(a, b)

    def recording(self, folder):
        """A context in which its profiler records to a folder."""
        return self._tf.profiler.experimental.Profile(folder)


class Torch:
    """PyTorch's first GPU."""

    def __init__(self):
        import torch

        self._torch = torch
        self.is_gpu = torch.cuda.is_available()

    def name(self):
        """What the card is called."""
        return self._torch.cuda.get_device_name(0) if self.is_gpu else "CPU"

    def wait(self, results):
        """Waits until all that was started has been computed."""
        if self.is_gpu:
            self._torch.cuda.synchronize()

    def peak_bytes(self):
        """The most memory that was in use at a time."""
        if self.is_gpu:
            return self._torch.cuda.max_memory_allocated()
        return memory_bytes("VmHWM", OWN)

    def reset_peak(self):
        """Forgets earlier peaks, where that is possible; returns the bytes in use."""
        if not self.is_gpu:
            return memory_bytes("VmRSS", OWN)
        self._torch.cuda.empty_cache()
        self._torch.cuda.reset_peak_memory_stats()
        return self._torch.cuda.memory_allocated()

    def product(self, size, dtype):
        """A function that multiplies two random matrices [size, size]."""
        options = {"dtype": getattr(self._torch, dtype), "device": "cuda" if self.is_gpu else "cpu"}
        a, b = (self._torch.randn(size, size, **options) for _ in range(2))
        return lambda: a @ b

    def recording(self, folder):
        """Its profiler writes other files."""
        raise NotImplementedError("gpu_profile.py doesn't read the recordings of PyTorch")


class Jax:
    """JAX's first GPU."""

    def __init__(self):
        import jax

        self._jax = jax
        self._device = jax.devices()[0]
        self.is_gpu = self._device.platform == "gpu"
        self._peak = 0

    def name(self):
        """What the card is called."""
        return self._device.device_kind if self.is_gpu else "CPU"

    def wait(self, results):
        """Waits until the last results have been computed, and so what was started before them."""
        self._jax.block_until_ready(results)

    def peak_bytes(self):
        """The most memory that was in use at a time; NaN if it was in use before the reset."""
        if not self.is_gpu:
            return memory_bytes("VmHWM", OWN)
        peak = self._device.memory_stats()["peak_bytes_in_use"]
        return peak if peak > self._peak else math.nan

    def reset_peak(self):
        """Remembers the peak so far, as JAX can't forget it; returns the bytes in use."""
        if not self.is_gpu:
            return memory_bytes("VmRSS", OWN)
        stats = self._device.memory_stats()
        self._peak = stats["peak_bytes_in_use"]
        return stats["bytes_in_use"]

    def product(self, size, dtype):
        """A function that multiplies two random matrices [size, size]."""
        random = self._jax.random
        a, b = (random.normal(key, (size, size), dtype) for key in random.split(random.key(0)))
        multiply = self._jax.jit(lambda a, b: a @ b)
        return lambda: multiply(a, b)

    def recording(self, folder):
        """A context in which its profiler records to a folder."""
        return self._jax.profiler.trace(folder)


def rate(card, dtype):
    """Operations per second of a large product of matrices."""
    size = LARGE if card.is_gpu else SMALL
    return 2 * size**3 / min(seconds(card, card.product(size, dtype), SECONDS))


def seconds(card, step, least, turns=3, each=False):
    """Seconds of a step, the mean of each turn; one step before doesn't count.

    Args:
        card: As above.
        step: Function without arguments, which returns all that it computes.
        least: How long all turns are to take together.
        turns: How many there are.
        each: Whether to wait after each step, as who asks for one answer does, or after each turn.

    Returns:
        A list of as many numbers as there are turns.
    """

    def turn(steps):
        start = time.perf_counter()
        for _ in range(steps):
            results = step()
            if each:
                card.wait(results)
        card.wait(results)
        return (time.perf_counter() - start) / steps

    turn(1)
    steps = max(1, round(least / turns / turn(1)))
    return [turn(min(steps, 1000)) for _ in range(turns)]
