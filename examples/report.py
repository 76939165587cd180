"""What the language-model example shows: progress, table, pictures."""

import time

import keras
import matplotlib
import numpy as np

matplotlib.use("Agg")  # Pictures go to files; no screen is needed.
import matplotlib.pyplot as plt  # noqa: E402


class Progress(keras.callbacks.Callback):
    """Prints a line now and then: with two models Keras' own bar is wider than a terminal.

    Args:
        names: The models of a `SideBySide`, the mixture first.
        steps: Training steps in all.
        every: Steps between two lines.
    """

    def __init__(self, names, steps, every=50):
        super().__init__()
        self.names, self.steps, self.every, self.step = names, steps, every, 0

    def on_train_begin(self, logs=None):
        self.start = time.time()
        print(
            "Perplexity; in training that of the sampled softmax, which is lower than the whole's"
        )

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % self.every == 0:
            self._print("training  ", logs)

    def on_epoch_end(self, epoch, logs=None):
        self._print("validation", logs, prefix="val_")

    def _print(self, part, logs, prefix=""):
        perplexities = "  ".join(
            f"{name} {logs[f'{prefix}{name}/perplexity']:6.1f}" for name in self.names
        )
        load = logs[f"{prefix}{self.names[0]}/max_over_mean_load"]
        print(
            f"{time.time() - self.start:4.0f} s  step {self.step:5,}/{self.steps:,}  {part}  "
            f"{perplexities}  max/mean load {load:.2f}",
            flush=True,
        )


def print_table(results):
    """Prints a row per model from {model: {column: number or `None`}}."""
    columns = list(next(iter(results.values())))
    width = max(len(name) for name in results)
    print(" " * width, *columns, sep="  ")
    for name, row in results.items():
        cells = [_format(row[column]).rjust(len(column)) for column in columns]
        print(name.ljust(width), *cells, sep="  ")


def _format(number):
    if number is None:
        return "–"
    return f"{number:,}" if isinstance(number, int) else f"{number:.2f}"


def plot_perplexity(history, results, path):
    """Draws validation perplexity over training steps, one curve per model."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in results.items():
        label = f"{name}, {row['parameters'] / 1e6:.2f}M parameters"
        axes.plot(history.steps, history.history[f"val_{name}/perplexity"], "o-", label=label)
    axes.set(xlabel="training step", ylabel="validation perplexity")
    axes.set_title("Equal operations per word, equal batches")
    axes.legend()
    return _save(figure, path)


def plot_load(load, path):
    """Draws the words per expert, sorted, beside the even share."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.bar(np.arange(len(load)), np.sort(load)[::-1])
    axes.axhline(load.mean(), color="black", linestyle="--", label="even share")
    axes.set(xlabel="experts, by load", ylabel="words of the test text")
    axes.set_title(f"Load: max/mean {load.max() / load.mean():.2f}")
    axes.legend()
    return _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
