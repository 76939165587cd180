"""Speed and memory of one layer on a graphics card, beside dense layers and other products.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --seconds 180 --dtypes bfloat16 --contenders keras_moe dense
    python benchmarks/gpu.py --small  # a rehearsal, also without a card

Each case is measured by one framework after the other, the most telling cases first, until the time
is over. A figure is given as a multiple of two dense layers of as many operations, in the same
framework, as TFLOP/s, and as a share of the card's rate: that of the product of two matrices
[8192, 8192] of the dtype, the best that any of the frameworks reached in this run. float32 is
multiplied by TensorFloat-32, the frameworks' common way on a card. How: `gpu_measure.py`.
"""

import argparse
import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import statistics
import sys
import time

from cases import Case
from gpu_contenders import CARDS, LAYERS, STEPS, of
from gpu_measure import TURNS, Job, measure

GIB = 2**30
PACKAGES = ("keras_moe", "tensorflow", "keras", "torch", "transformers", "jax")
WORKS = {
    "gradients": "Forward and backward pass, all gradients",
    "step": "A whole training step with its optimizer",
    "forward": "Forward pass of inference",
}
WIDE, NARROW = {"width": 1024, "hidden_units": 8192}, {"width": 512, "hidden_units": 1024}


def make_cases():
    """All cases, the most telling first."""
    cases = []

    def add(num_experts, examples, sizes, dtype="bfloat16", work="gradients", skew=0.0):
        batches = 8 if examples <= 16 else 1
        options = {"skew": skew, "batches": batches, "dtype": dtype, **sizes}
        cases.append(Case(num_experts, 4, examples, work, **options))

    add(256, 65536, WIDE)
    add(256, 16384, WIDE)
    add(32, 16384, WIDE)
    add(256, 16384, NARROW)
    add(256, 16384, NARROW, work="step", dtype="mixed_bfloat16")
    add(256, 1, WIDE, work="forward")
    add(256, 16, WIDE, work="forward")
    add(256, 16384, WIDE, dtype="float32")
    add(256, 16384, WIDE, work="forward")
    add(1024, 65536, NARROW)
    add(256, 4096, WIDE)
    add(256, 16384, NARROW, dtype="float32")
    add(256, 16384, NARROW, skew=0.5)
    add(256, 16384, WIDE, work="step", dtype="mixed_bfloat16")
    add(256, 1, NARROW, work="forward", dtype="float32")
    add(256, 16, NARROW, work="forward", dtype="float32")
    for dtype in ("bfloat16", "float32"):
        for sizes, numbers in ((WIDE, (32, 256)), (NARROW, (32, 256, 1024))):
            for num_experts in numbers:
                for examples in (16384, 65536, 4096):
                    add(num_experts, examples, sizes, dtype)
    return list(dict.fromkeys(cases))


def main(arguments=None):
    """Measures, prints and writes the tables; returns the outcomes of each case, by contender."""
    options = parse(arguments)
    cases = [case for case in make_cases() if case.dtype in options.dtypes]
    if options.small:
        cases = list(dict.fromkeys(map(smaller, cases)))
    cases = cases[: options.cases]
    started, cards, rates, outcomes = time.monotonic(), {}, {}, {}
    jobs = make_jobs(cases, options.contenders)
    try:
        for job, rate, card, found in measure(jobs, options.seconds):
            if card == "CPU" and not options.small:
                sys.exit(f"{job.card} has no graphics card here. A rehearsal without one: --small")
            if card:
                cards[job.card] = card
                rates[job.case.compute_dtype] = max(rate, rates.get(job.case.compute_dtype, 0))
            known = outcomes.setdefault(job.case, {})
            new = [name for name in found if name not in known]
            known.update(with_ratios(found))
            print(f"{time.monotonic() - started:.0f} s, {title(job.case)}", file=sys.stderr)
            for name in new:
                print(f"  {' | '.join(cells(job.case, name, outcomes, rates))}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted: what was measured before is kept.", file=sys.stderr)

    text = "\n".join([*describe(cards, rates), *tables(outcomes, rates)])
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.md").write_text(text + "\n")
    plot(outcomes, rates, options.output / "gpu.png")
    return outcomes


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=900, help="after which no case begins")
    parser.add_argument("--small", action="store_true", help="tiny cases, for a rehearsal")
    parser.add_argument("--cases", type=int, help="how many, the most telling first")
    dtypes = ["bfloat16", "mixed_bfloat16", "float32"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    names = list(dict.fromkeys(contender.name for contender in [*LAYERS, *STEPS]))
    parser.add_argument("--contenders", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--output", type=pathlib.Path, default="results", help="folder")
    return parser.parse_args(arguments)


def smaller(case):
    """A case that takes no time, on a card or without."""
    return case._replace(
        num_experts=max(case.num_experts // 16, 4),
        examples=max(case.examples // 128, 1),
        batches=1,
        width=case.width // 16,
        hidden_units=case.hidden_units // 64,
    )


def make_jobs(cases, names):
    """For each case and framework its contenders; the first, dense, is always there."""
    for case in cases:
        for module, card in CARDS.items():
            dense, *others = [each for each in of(case) if each.module == module] or [None]
            others = [other for other in others if other.name in names]
            if dense and (others or dense.name in names):
                yield Job(case, card, [dense, *others])


def with_ratios(outcomes):
    """The outcomes of a framework, as multiples of its first one."""
    dense, *_ = outcomes.values()
    if dense.failure:
        return outcomes
    base = statistics.median(dense.seconds)
    return {
        name: outcome._replace(ratios=[seconds / base for seconds in outcome.seconds])
        for name, outcome in outcomes.items()
    }


def describe(cards, rates):
    """Command, card, versions, date and the card's rates."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield f"`{shlex.join(['python', *sys.argv])}`"
    yield ""
    yield (
        f"{datetime.date.today()}, {' and '.join(dict.fromkeys(cards.values()))}, Python "
        f"{platform.python_version()}, {', '.join(versions)}. K = 4. Median of {TURNS} turns."
    )
    found = ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    yield f"The card's rate: {found}."


def title(case):
    """What is computed, and of how many examples."""
    sizes = f"{case.width}→{case.hidden_units}→{case.width}"
    skew = f" skew {case.skew}" if case.skew else ""
    return f"{sizes} N={case.num_experts} T={case.examples}{skew} {case.dtype} {case.work}"


def rows_per_expert(case):
    """The mean over the experts."""
    return case.k * case.examples / case.num_experts


def share(case, outcome, rates):
    """Of the card's rate."""
    return case.operations / statistics.median(outcome.seconds) / rates[case.compute_dtype]


def cells(case, name, outcomes, rates):
    """A line of a table."""
    outcome = outcomes[case][name]
    if outcome.failure:
        return [name, outcome.failure, "–", "–", "–", "–"]
    taken = statistics.median(outcome.seconds)
    return [
        name,
        f"{1000 * taken:.3g} ms",
        f"{statistics.median(outcome.ratios):.2f}" if outcome.ratios else "–",
        f"{case.operations / taken / 1e12:.3g}",
        f"{100 * share(case, outcome, rates):.1f} %",
        f"{outcome.peak_bytes / GIB:.2f}",
    ]


def tables(outcomes, rates):
    """A table for each kind of work and dtype, and what the contenders' work is."""
    for work, heading in WORKS.items():
        for dtype in dict.fromkeys(case.dtype for case in outcomes):
            cases = [case for case in outcomes if (case.work, case.dtype) == (work, dtype)]
            if not cases:
                continue
            yield from ("", f"### {heading}, {dtype}", "")
            yield "| case | | time | × dense | TFLOP/s | share | peak GiB |"
            yield "|---" * 7 + "|"
            for case in cases:
                first = title(case).removesuffix(f" {dtype} {work}")
                first += f", {rows_per_expert(case):.3g} rows per expert"
                for name in outcomes[case]:
                    yield f"| {' | '.join([first, *cells(case, name, outcomes, rates)])} |"
                    first = ""
    yield ""
    for contender in [*LAYERS, *STEPS]:
        yield f"- {contender.name}: {contender.note}."


def plot(outcomes, rates, path):
    """Draws the share of the card's rate against the rows of an expert, forward and backward."""
    from matplotlib.figure import Figure

    dtypes = dict.fromkeys(case.dtype for case in outcomes if case.work == "gradients")
    columns = max(len(dtypes), 1)
    figure = Figure(figsize=(7 * columns, 5), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False).flat
    for axis, dtype in zip(axes, dtypes, strict=False):
        for contender in LAYERS:
            points = sorted(
                (rows_per_expert(case), share(case, found[contender.name], rates))
                for case, found in outcomes.items()
                if (case.work, case.dtype) == ("gradients", dtype)
                and contender.name in found
                and not found[contender.name].failure
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=contender.name)
        axis.set_xscale("log", base=2)
        axis.set(title=dtype, xlabel="rows per expert", ylabel="share of the card's rate")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
