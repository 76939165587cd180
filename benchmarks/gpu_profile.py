"""Where the time of a step goes on a graphics card: operations, copies, gaps.

    python benchmarks/gpu_profile.py
    python benchmarks/gpu_profile.py --case 4 --contenders keras_moe "keras_moe, JAX"
    python benchmarks/gpu_profile.py --small  # a rehearsal, also without a card

The cases are those of `gpu.py`. Of each contender a few steps are recorded by its framework's own
profiler. Reading the recording takes JAX, whoever made it.
"""

import argparse
import collections
import importlib
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import cards
from gpu import make_cases, smaller, title
from gpu_contenders import CARDS, LAYERS, STEPS, of
from measure import SPAWN, failure_of

TAKEN = 5  # Steps.
SHOWN = 20  # Operations.
LIMIT_SECONDS = 180
# By which names of statistics the profilers tell of what operation a kernel is.
OPERATION = ("tf_op", "hlo_op", "annotation", "kernel_annotation")


class Event(NamedTuple):
    """What the card did: times in nanoseconds."""

    operation: str
    kernel: str
    start: float
    duration: float


class Summary(NamedTuple):
    """What a step took, on average.

    Attributes:
        span: Milliseconds from the first to the last event of the card, over the steps.
        busy: In how many of them something ran.
        counts: `Counter` of kernels and copies.
        operations: `Counter` of milliseconds, by operation and kernel.
    """

    span: float
    busy: float
    counts: Any
    operations: Any


def main(arguments=None):
    """Prints where the time goes, one contender after the other."""
    options = parse(arguments)
    case = make_cases()[options.case]
    case = smaller(case) if options.small else case
    print(f"## {title(case)}")
    for contender in of(case):
        if contender.name not in options.contenders:
            continue
        process = SPAWN.Process(target=_tell, args=(case, contender), daemon=True)
        process.start()
        process.join(LIMIT_SECONDS)
        if process.is_alive():
            process.kill()
            print(f"\n{contender.name}: no answer within {LIMIT_SECONDS} s")
        elif process.exitcode:
            print(f"\n{contender.name}: ended with exit code {process.exitcode}")


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=int, default=1, help="its number in gpu.py, from 0")
    parser.add_argument("--small", action="store_true", help="a tiny case, for a rehearsal")
    names = list(dict.fromkeys(contender.name for contender in [*LAYERS, *STEPS]))
    ours = [name for name in names if name.startswith("keras_moe")]
    parser.add_argument("--contenders", nargs="+", default=ours, choices=names, metavar="NAME")
    return parser.parse_args(arguments)


def _tell(case, contender):
    try:
        module = importlib.import_module(contender.module)
        card = getattr(cards, CARDS[contender.module])()
        step = getattr(module, contender.function)(case, **contender.options)
        times = cards.seconds(card, step, least=1)
        with tempfile.TemporaryDirectory() as folder:
            with card.recording(folder):
                for _ in range(TAKEN):
                    results = step()
                card.wait(results)
            summary = summarize(read(folder), TAKEN)
        lines = [f"{1000 * min(times):.3g} ms a step, not recorded", *describe(summary)]
    except Exception as error:
        lines = [str(failure_of(error))]
    print("", f"### {contender.name}", "", *lines, sep="\n", flush=True)


def read(folder):
    """The `Event`s of the card in a recording; without a card, those of the processor."""
    from jax.profiler import ProfileData

    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = list(ProfileData.from_file(str(path)).planes)
    of_cards = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    events = []
    for plane in of_cards or planes:
        for line in plane.lines:
            # The other lines of a card sum up what its streams did.
            if of_cards and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                told = {name: value for name, value in event.stats if name in OPERATION}
                operation = next((str(told[name]) for name in OPERATION if name in told), "")
                events.append(Event(operation, event.name, event.start_ns, event.duration_ns))
    return events


def summarize(events, steps):
    """The `Summary` of so many steps."""
    counts, operations = collections.Counter(), collections.Counter()
    busy = end = 0.0
    events = sorted(events, key=lambda event: event.start)
    for event in events:
        copy = re.match("(?i)mem(cpy|set)[a-z0-9]*", event.kernel.replace(" ", ""))
        counts[copy[0].lower() if copy else "kernel"] += 1
        operations[event.operation, shortened(event.kernel)] += event.duration / 1e6 / steps
        # Streams may run at the same time.
        busy += max(event.start + event.duration - max(end, event.start), 0)
        end = max(end, event.start + event.duration)
    span = end - events[0].start if events else 0
    return Summary(span / 1e6 / steps, busy / 1e6 / steps, counts, operations)


def shortened(kernel):
    """What a name in C++ tells: Eigen's begin alike for hundreds of characters."""
    telling = re.findall(r"scalar_\w+_op|\w*(?:Reducer|ConversionOp|PaddingOp|SlicingOp)", kernel)
    if "Eigen" in kernel and telling:
        return f"Eigen: {', '.join(dict.fromkeys(telling))}"
    return re.sub(r"<.*", "", kernel.removeprefix("void "))[:80]


def describe(summary):
    """The lines of a `Summary`."""
    yield f"{summary.span:.3g} ms a step recorded, the card busy for {summary.busy:.3g} ms of them"
    yield ", ".join(f"{number / TAKEN:.3g} {kind}" for kind, number in summary.counts.items())
    yield ""
    yield "| ms | operation | kernel |"
    yield "|---|---|---|"
    for (operation, kernel), taken in summary.operations.most_common(SHOWN):
        yield f"| {taken:.3f} | {operation} | {kernel} |"


if __name__ == "__main__":
    main()
