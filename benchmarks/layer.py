"""Speed and memory of one layer, beside the other implementations that pip installs.

    make bench
    .venv-bench/bin/python benchmarks/layer.py --tables gradients --cells 256,4,4096 --rounds 5

Figures are multiples of "dense", two dense layers of as many operations as an example's K experts:
the median over the rounds and its quartiles. How it is measured: `measure.py`. Linux only.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
from typing import NamedTuple

from cases import HIDDEN_UNITS, WIDTH, Case
from contenders import DENSE, OTHERS
from measure import measure, memory_bytes

CELLS = ("32,2,1024", "32,4,4096", "256,4,4096", "1024,4,4096")
PACKAGES = (
    "keras_moe",
    "tensorflow",
    "keras",
    "jax",
    "torch",
    "transformers",
    "tensor2tensor",
    "tf-models-official",
    "mixture-of-experts",
    "keras-hub",
)
TRAFFIC = "moving the weights alone"
LAYERS = [other.name for other in OTHERS if "optimizer" not in other.options]
GIB = 2**30


class Table(NamedTuple):
    """What to measure and how to show it.

    Attributes:
        title: Its heading.
        columns: Dict from headings to `Case`s.
        contenders: Names of contenders; "dense" is always there.
        milliseconds: Whether to show the time beside its ratio.
        quotient: Heading of a further column, the last one over the first one.
    """

    title: str
    columns: dict
    contenders: list
    milliseconds: bool = False
    quotient: str = ""


def make_tables(cells):
    """The tables by name; `cells` are those of the first, as (N, K, T)."""
    flat = Case(256, 4, 4096)
    forward = flat._replace(work="forward")
    return {
        "gradients": Table(
            "Forward and backward pass, all gradients",
            {"N={} K={} T={}".format(*cell): Case(*cell) for cell in cells},
            LAYERS,
        ),
        "forward": Table(
            "Forward pass, N=256 K=4",
            {
                "T=1, again and again": forward._replace(examples=1),
                "T=1, 64 in turn": forward._replace(examples=1, batches=64),
                "T=16": forward._replace(examples=16),
                "T=4096": forward,
            },
            [name for name in LAYERS if name != TRAFFIC],
            milliseconds=True,
        ),
        "skewed": Table(
            "One expert among the choices of 60% of the examples, N=256 K=4 T=4096, all gradients",
            {"balanced": flat, "skewed": flat._replace(skew=0.6)},
            ["keras_moe", "original (tensor2tensor)", "transformers Mixtral, grouped_mm"],
            quotient="skewed ÷ balanced",
        ),
        "hierarchical": Table(
            "16 groups of 16 experts, K=2·2 T=4096, all gradients",
            {"flat": flat, "hierarchical": flat._replace(groups=16)},
            ["keras_moe", "mixture-of-experts (lucidrains)"],
        ),
        "step": Table(
            "A whole training step, N=256 K=4 T=4096",
            {"step": flat._replace(work="step")},
            [other.name for other in OTHERS if "optimizer" in other.options],
        ),
        "sweep": Table(
            "Number of experts at constant K·T = 16384, all gradients",
            {f"N={2**i}": Case(2**i, min(4, 2**i), 16384 // min(4, 2**i)) for i in range(11)},
            ["keras_moe", "original (tensor2tensor)", TRAFFIC],
        ),
    }


def main(arguments=None):
    """Measures, prints and writes the tables; returns the outcomes of each case, by contender."""
    options = parse(arguments)
    tables = make_tables(options.cells)
    tables = {name: tables[name] for name in options.tables}
    wanted = {}  # In one go, as tables share cases.
    for table in tables.values():
        for case in table.columns.values():
            names = [name for name in table.contenders if name in options.contenders]
            wanted.setdefault(case, {}).update(dict.fromkeys(names))
    outcomes = {}
    for case, names in wanted.items():
        print(case, file=sys.stderr)
        others = [other for other in OTHERS if other.name in names]
        outcomes[case] = measure(case, DENSE, others, options.rounds)

    text = "\n".join([*describe(), *(line for t in tables.values() for line in show(t, outcomes))])
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "layer.md").write_text(text + "\n")
    if "sweep" in tables:
        plot(tables["sweep"], outcomes, options.output / "layer_sweep.png")
    return outcomes


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="N,K,T of the table gradients")
    names = list(make_tables([]))
    parser.add_argument("--tables", nargs="+", default=names, choices=names)
    names = [other.name for other in OTHERS]
    parser.add_argument("--contenders", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--output", type=pathlib.Path, default="results", help="folder")
    options = parser.parse_args(arguments)
    options.cells = [tuple(map(int, cell.split(","))) for cell in options.cells]
    return options


def describe():
    """Command, machine, versions and date."""
    processor = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    memory = memory_bytes("MemTotal") / GIB
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield f"`{shlex.join(['python', *sys.argv])}`"
    yield ""
    yield (
        f"{datetime.date.today()}, {os.cpu_count()} cores of {processor}, {memory:.0f} GiB of "
        f"memory, Python {platform.python_version()}, {', '.join(versions)}."
    )
    yield (
        f"float32, experts {WIDTH}→{HIDDEN_UNITS}→{WIDTH}. Time as a multiple of dense in the same "
        "round: median over the rounds (quartiles)."
    )


def show(table, outcomes):
    """The lines of a table: time, peak memory, and why a figure is missing."""
    rows = [DENSE, *(other for other in OTHERS if other.name in table.contenders)]
    columns = {heading: outcomes[case] for heading, case in table.columns.items()}
    rows = [row for row in rows if any(row.name in column for column in columns.values())]

    def lines(title, cell, further):
        yield from ("", f"### {title}", "")
        yield f"| | {' | '.join([*columns, *further])} |"
        yield "|---" * (1 + len(columns) + len(further)) + "|"
        for row in rows:
            found = [measured(column.get(row.name)) for column in columns.values()]
            cells = [cell(row, outcome) if outcome else "–" for outcome in found]
            cells += [function(row, found) for function in further.values()]
            yield f"| {' | '.join([row.name, *cells])} |"

    def measured(outcome):
        return None if outcome is None or outcome.failure else outcome

    def time_cell(row, outcome):
        milliseconds = f"{1000 * statistics.median(outcome.seconds):.3g} ms"
        if row is DENSE:
            return milliseconds
        ratio = "{:.2f} ({:.2f}–{:.2f})".format(*quartiles(outcome.ratios))
        return f"{milliseconds}, {ratio}" if table.milliseconds else ratio

    def memory_cell(row, outcome):
        return f"{outcome.peak_bytes / GIB:.2f}"

    def quotient(row, found):
        if None in found:
            return "–"
        first, last = (statistics.median(outcome.ratios) for outcome in found)
        return f"{last / first:.2f}"

    further = {table.quotient: quotient} if table.quotient else {}
    further["differences"] = lambda row, found: row.note
    yield from lines(table.title, time_cell, further)
    yield from lines("Peak memory of that, GiB", memory_cell, {})
    weights = [f"{2 * case.weight_bytes / GIB:.2f}" for case in table.columns.values()]
    yield f"| *the experts' weights twice, for their gradients* | {' | '.join(weights)} |"
    yield ""
    for heading, column in columns.items():
        for row in rows:
            if row.name in column and column[row.name].failure:
                yield f"- {row.name}, {heading}: {column[row.name].failure}"


def quartiles(values):
    """Median, first and third quartile."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, first, third


def plot(table, outcomes, path):
    """Draws time against N, beside the time that moving the experts' weights alone would add."""
    from matplotlib.figure import Figure

    def draw(name, style, label, offset=0):
        measured = {
            case.num_experts: offset + statistics.median(outcomes[case][name].ratios)
            for case in table.columns.values()
            if name in outcomes[case] and not outcomes[case][name].failure
        }
        if measured:
            axes.plot(*zip(*measured.items(), strict=True), style, label=label)

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in table.contenders:
        if name != TRAFFIC:
            draw(name, "o-", name)
    draw(TRAFFIC, "k:", "1 + bytes of expert weights moved, at the rate of moving them alone", 1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="experts N, at K·T = 16384", ylabel="time of forward + backward, × dense")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
