"""What the language-model examples show: progress, table, pictures."""

import re
import time

import keras
import numpy as np
from matplotlib.figure import Figure  # No pyplot: no figure stays open, none needs a screen.


class Progress(keras.callbacks.Callback):
    """Prints a line now and then: with two models Keras' own bar is wider than a terminal.

    Args:
        names: The models of a `SideBySide`.
        steps: Training steps in all.
        every: Steps between two lines.
        sampled: Whether the softmax of the training is sampled.
    """

    def __init__(self, names, steps, every=50, sampled=True):
        super().__init__()
        self.names, self.steps, self.every, self.step = names, steps, every, 0
        self.sampled = sampled

    def on_train_begin(self, logs=None):
        self.start = time.time()
        note = "; in training that of the sampled softmax, which is lower than the whole's"
        print("Perplexity" + (note if self.sampled else ""))

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
        # Of its mixture, or of those whose names begin with its own, each by what its name adds, as
        # Keras sorts its logs: in a translation model the decoder's comes first.
        key = re.compile(rf"{prefix}{re.escape(self.names[0])}(?:_([^/]+))?/max_over_mean_load")
        found = [(key.fullmatch(name), load) for name, load in logs.items()]
        loads = [
            f"{match[1]}: {load:.2f}" if match[1] else f"{load:.2f}"
            for match, load in found
            if match
        ]
        print(
            f"{time.time() - self.start:4.0f} s  step {self.step:5,}/{self.steps:,}  {part}  "
            f"{perplexities}" + (f"  max/mean load {', '.join(loads)}" if loads else ""),
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
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in results.items():
        label = f"{name}, {row['parameters'] / 1e6:.2f}M parameters"
        axes.plot(history.steps, history.history[f"val_{name}/perplexity"], "o-", label=label)
    axes.set(xlabel="training step", ylabel="validation perplexity")
    axes.set_title("Trained on the same batches")
    axes.legend()
    return _save(figure, path)


def plot_load(load, path):
    """Draws the words per expert, sorted, beside the even share."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(load)), np.sort(load)[::-1])
    axes.axhline(load.mean(), color="black", linestyle="--", label="even share")
    axes.set(xlabel="experts, by load", ylabel="words of the test text")
    axes.set_title(f"Load: max/mean {load.max() / load.mean():.2f}")
    axes.legend()
    return _save(figure, path)


def plot_settings(tables, path):
    """Draws each column of Table 6 by setting, a bar for each table that has it.

    Args:
        tables: {name: {(w_importance, w_load): {column: figure}}}, the last with every column.
        path: The file to write.
    """
    *_, complete = tables.values()
    columns = list(next(iter(complete.values())))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2)
    place = np.arange(len(complete))
    for axes, column in zip(grid.flat, columns, strict=True):
        for side, (name, rows) in enumerate(tables.items()):
            figures = np.array([row[column] for row in rows.values() if column in row])
            if column == "perplexity" and len(figures):
                # Of texts so different that only the ratio compares.
                figures = 100 * (figures / figures.min() - 1)
            if len(figures):
                axes.bar(place + 0.28 * (side - 1), figures, 0.28, color=f"C{side}", label=name)
        axes.set_xticks(place, ["{:g}\n{:g}".format(*setting) for setting in complete])
        if column == "perplexity":
            axes.set_title("perplexity, % above the best setting's")
        else:
            axes.set_title(column)
            axes.set_yscale("log")
    grid[0, 1].legend()
    figure.supxlabel("w_importance (above) and w_load (below)")
    return _save(figure, path)


def plot_capacity(rows, path):
    """Draws test perplexity over parameters, as Figure 2, left.

    Args:
        rows: {model: {"perplexity", "parameters": figure}}, of several seeds also "lowest" and
            "highest", where the names of hierarchical mixtures end in "-h" and those of flat ones
            are "MoE-" and a number.
        path: The file to write.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = {"flat": [], "hierarchical": [], "without a mixture": []}
    for name, row in rows.items():
        last = name.removeprefix("MoE-")
        kind = "flat" if last.isdigit() else "hierarchical" if name.endswith("-h") else None
        kinds[kind or "without a mixture"].append((name, row))
    for (kind, members), style in zip(kinds.items(), ("o-", "s--", "^"), strict=True):
        if not members:
            continue
        x = [row["parameters"] for _, row in members]
        y, low, high = (
            np.array([row.get(column, row["perplexity"]) for _, row in members])
            for column in ("perplexity", "lowest", "highest")
        )
        # In lists: before 3.11 matplotlib takes an array of one for a number, of which NumPy warns.
        errors = [(y - low).tolist(), (high - y).tolist()]
        axes.errorbar(x, y, errors, fmt=style, capsize=4, label=kind)
        # Beside the points: above those of one kind and below those of the other, left of the rest.
        offset, side = {"o-": ((5, -11), "left"), "s--": ((5, 5), "left")}.get(
            style, ((-8, -3), "right")
        )
        for (name, _), *point in zip(members, x, y, strict=True):
            axes.annotate(
                name, point, xytext=offset, textcoords="offset points", fontsize=8, ha=side
            )
    axes.set_xscale("log")
    axes.margins(x=0.17)
    axes.set(xlabel="parameters without embedding and softmax", ylabel="test perplexity")
    axes.set_title("Equal operations per word, equal batches")
    axes.legend()
    return _save(figure, path)


def plot_curves(curves, path):
    """Draws perplexity over training steps: of the test text solid, of validation dotted.

    Args:
        curves: {model: list of {"step", "validation", "test": figure}}.
        path: The file to write.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, lines) in enumerate(curves.items()):
        steps = [line["step"] for line in lines]
        for part, style in (("test", "-"), ("validation", ":")):
            label = name if part == "test" else None
            perplexities = [line[part] for line in lines]
            axes.plot(steps, perplexities, style, color=f"C{i}", label=label)
    axes.set_yscale("log")
    axes.set(xlabel="training step", ylabel="perplexity: test, and dotted validation")
    axes.set_title("Trained on the same batches")
    axes.legend()
    return _save(figure, path)


def plot_collapse(found, path):
    """Draws the loads of mixtures over training steps, with noise dashed and without it solid.

    Args:
        found: {panel: {mixture: list of {"step", "load", "load, noisy": figure}}}.
        path: The file to write.
    """
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (panel, mixtures) in zip(grid.flat, found.items(), strict=False):
        for i, (name, looks) in enumerate(mixtures.items()):
            steps = [row["step"] for row in looks]
            for column, style in (("load", "o-"), ("load, noisy", "o--")):
                label = name if column == "load" else f"{name}, with noise"
                loads = [row[column] for row in looks]
                axes.plot(steps, loads, style, color=f"C{i}", label=label)
        axes.set_title(panel)
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    figure.supxlabel("training step")
    figure.supylabel("max/mean load")
    return _save(figure, path)


def plot_attention(translations, path):
    """Draws what each word piece of some translations attends to, dark for much.

    Args:
        translations: List of triples: the pieces of a source, S strings, those of its translation,
            T strings, and the attention, an array [T, S].
        path: The file to write.
    """
    columns = min(2, len(translations))
    rows = -(-len(translations) // columns)
    figure = Figure(figsize=(6 * columns, 5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(translations) :]:
        axes.set_axis_off()
    for axes, (source, words, attention) in zip(grid.flat, translations, strict=False):
        axes.imshow(attention, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        # No formulas: a "$" is a "$".
        axes.set_xticks(range(len(source)), source, rotation=90, parse_math=False)
        axes.set_yticks(range(len(words)), words, parse_math=False)
    figure.supxlabel("source")
    figure.supylabel("translation")
    return _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=120)
    return path
