"""What the callbacks write for TensorBoard: numbers, histograms, pictures of the load."""

import numpy as np


def load_picture(load):
    """Draws the load per expert over time.

    A cell's colour is its load over the even share of its report: light grey where they are equal,
    red from above that to four times as much and more, blue from below to a quarter and less,
    black without a row.

    Args:
        load: Float array [reports, N].

    Returns:
        uint8 array [height, width, 3] of square cells with a line around each, experts from top to
        bottom, reports from left to right.
    """
    share = load.T / np.maximum(load.mean(axis=1), 1e-10)
    level = np.log2(np.maximum(share, 1e-10))
    cells = np.stack([np.interp(level, _LEVELS, channel) for channel in _COLOURS.T], axis=-1)
    cells[share == 0] = _NO_ROW
    size = int(np.clip(512 // len(cells), 5, 16))  # with the line
    height, width = cells.shape[0] * size + 1, cells.shape[1] * size + 1
    picture = np.full((height, width, 3), _LINE)
    picture[1:, 1:] = cells.repeat(size, axis=0).repeat(size, axis=1)
    picture[::size] = picture[:, ::size] = _LINE
    return np.round(picture).astype(np.uint8)


# log2 of the load over the even share, and its colour.
_LEVELS = (-2, -1, 0, 1, 2)
_COLOURS = np.array(
    [(33, 90, 170), (130, 180, 220), (240, 240, 240), (240, 150, 110), (185, 25, 45)]
)
_NO_ROW = (0, 0, 0)
_LINE = (255, 255, 255)
_DESCRIPTION = (
    "Experts from top to bottom, reports from left to right. Red: more rows than the even share, "
    "up to 4 times and more. Grey: just as many. Blue: fewer, down to a quarter and less. "
    "Black: none."
)


def write_scalar(tag, value):
    """Writes a number."""
    _write(tag, np.float32(value), "scalars")


def write_histogram(tag, values):
    """Writes how often each value from 0 on occurs, in 30 buckets.

    They begin at 0, so that in every report the first has the experts without a row.
    """
    counts, edges = np.histogram(values, bins=30, range=(0.0, max(values.max(), 1.0)))
    _write(tag, np.stack([edges[:-1], edges[1:], counts], axis=-1), "histograms")


def write_load_picture(tag, load):
    """Writes `load_picture(load)`, and what its colours mean."""
    import tensorflow as tf

    picture = load_picture(load)
    height, width, _ = picture.shape
    png = tf.io.encode_png(picture).numpy()
    _write(tag, [str(width).encode(), str(height).encode(), png], "images", _DESCRIPTION)


def _write(tag, value, plugin, description=""):
    """Writes what `tf.summary.scalar`, `.histogram` and `.image` write at the writer's step.

    Those need the package tensorboard, which TensorFlow 2.21 doesn't install; a machine that only
    trains can do without.
    """
    import tensorflow as tf

    metadata = tf.compat.v1.SummaryMetadata(summary_description=description)
    metadata.plugin_data.plugin_name = plugin
    tf.summary.write(tag, value, metadata=metadata)
