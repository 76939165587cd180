"""How fast a model that predicts words trains."""

import time

import keras

from keras_moe.arguments import check_positive, check_size, check_weight


class Throughput(keras.callbacks.Callback):
    """Puts the speed of training into the logs of each epoch.

    - `words_per_second`: words predicted per second, on all devices together;
    - `tflops_per_device`: the last column of Table 7. The backward pass of a matrix product is two
      such products, and a multiply-add is two operations, so that a word has

          2 · 3 · (ops_per_timestep + softmax_ops_per_timestep)

      operations in a training step.

    An epoch is timed from the end of its first step, in which graphs are traced and the pipeline
    of batches fills, to the end of its last: neither that nor validation counts. An epoch of one
    step is timed whole.

    Example:
    ```python
    operations = keras_moe.models.footprint(model).ops_per_timestep
    speed = Throughput(operations, words_per_step=4000, softmax_ops_per_timestep=513 * 512)
    model.fit(batches, callbacks=[speed])
    ```

    Args:
        ops_per_timestep: Multiply-adds of the forward pass per word, without embedding and softmax,
            as `keras_moe.models.footprint` counts them.
        words_per_step: Words that a training step predicts on average, padding left out, on all
            devices together.
        softmax_ops_per_timestep: Multiply-adds of the softmax per word in training: the width times
            the classes that a word is compared with. Those are the vocabulary, or of a sampled
            softmax the words drawn and the target.
        num_devices: Devices that train together.

    Raises:
        ValueError: If `ops_per_timestep` or `words_per_step` is not above 0,
            `softmax_ops_per_timestep` negative, or `num_devices` not an integer of at least 1.
    """

    def __init__(self, ops_per_timestep, words_per_step, softmax_ops_per_timestep=0, num_devices=1):
        super().__init__()
        self.ops_per_timestep = check_positive("ops_per_timestep", ops_per_timestep)
        self.words_per_step = check_positive("words_per_step", words_per_step)
        self.softmax_ops_per_timestep = check_weight(
            "softmax_ops_per_timestep", softmax_ops_per_timestep
        )
        self.num_devices = check_size("num_devices", num_devices)

    def on_epoch_begin(self, epoch, logs=None):
        self._marks = [(0, time.perf_counter())]  # Steps done and when: none, the first, the last.

    def on_train_batch_end(self, batch, logs=None):
        del self._marks[2:]
        self._marks.append((batch + 1, time.perf_counter()))

    def on_epoch_end(self, epoch, logs=None):
        (first, start), (last, end) = self._marks[-2:]
        words_per_second = self.words_per_step * (last - first) / (end - start)
        ops_per_word = 2 * 3 * (self.ops_per_timestep + self.softmax_ops_per_timestep)
        logs["words_per_second"] = words_per_second
        logs["tflops_per_device"] = ops_per_word * words_per_second / self.num_devices / 1e12
