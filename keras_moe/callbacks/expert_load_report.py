"""How loaded the experts are, for TensorBoard."""

import keras
import numpy as np

from keras_moe import losses
from keras_moe.callbacks import tensorboard
from keras_moe.mixture import inspection


class ExpertLoadReport(keras.callbacks.Callback):
    """Writes the load of the experts during training for TensorBoard.

    Before the first epoch and after each, the model is called on `x`, without training. For every
    `SparseMoE` in it, the report has

    - the histogram `<layer>/load`: how many experts received how many rows;
    - the scalars `<layer>/max_over_mean_load` and `<layer>/cv_load`, of all of `x` together;
    - the picture `<layer>/load_over_even_share`: experts from top to bottom, reports from left to
      right. Red has more rows than the even share, blue has fewer, and black has none.

    The step of a report is the number of epochs done: 0 before training. (The first epoch of
    `keras.callbacks.TensorBoard` is 0 as well, but seen at its end.)

    Example:
    ```python
    model.fit(x, y, epochs=10, callbacks=[ExpertLoadReport(x_val, "logs")])
    # pip install tensorboard; tensorboard --logdir logs
    ```

    Args:
        x: One batch, an array, a tensor or a dict of them as the model takes it; or a
            `tf.data.Dataset`, `keras.utils.PyDataset` or list of batches x, (x, y) or
            (x, y, sample_weight), as `fit` takes them, of which y and sample_weight are not used.
        log_dir: Folder for the event file.

    Attributes:
        load: Dict from each layer's name to a float array [reports, N], the rows per expert in
            every report so far. Where a model calls a layer several times, its calls are summed.

    Raises:
        ValueError: If `x` can be read only once or never ends, or the model has no `SparseMoE`.
    """

    def __init__(self, x, log_dir):
        super().__init__()
        self.x = inspection.check_batches(x)
        self.log_dir = str(log_dir)
        self.load = {}
        self._step = self._watch = None

    def on_train_begin(self, logs=None):
        import tensorflow as tf

        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch != self._step:  # Else the epoch before has just reported, maybe in another `fit`.
            self._report(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._report(epoch + 1)

    def on_train_end(self, logs=None):
        self._writer.close()

    def _report(self, step):
        import tensorflow as tf

        self._watch = inspection.watch(self.model, self._watch)
        load = self._watch.load(self.x)
        # Under `record_if`, since the TensorBoard callback may have told others to write nothing.
        with self._writer.as_default(step), tf.summary.record_if(True):
            for name, rows in load.items():
                self.load[name] = np.vstack([*self.load.get(name, ()), rows])
                tensorboard.write_scalar(f"{name}/max_over_mean_load", losses.max_over_mean(rows))
                tensorboard.write_scalar(f"{name}/cv_load", losses.cv_squared(rows) ** 0.5)
                tensorboard.write_histogram(f"{name}/load", rows)
                tensorboard.write_load_picture(f"{name}/load_over_even_share", self.load[name])
        self._writer.flush()
        self._step = step
