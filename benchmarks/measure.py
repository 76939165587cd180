"""Times contenders against each other, fairly on a machine that is never quite the same.

Each contender lives in a process of its own, with its own framework and its own peak of memory. All
of them stay alive while a case is measured and take turns, in another order every round, so
that whatever changes the machine's speed for a while meets them all. What counts is the ratio to
the reference in the same round.
"""

import importlib
import multiprocessing
import os
import pathlib
import random
import re
import resource
import time
from typing import Any, NamedTuple

OWN = "/proc/self/status"
SPAWN = multiprocessing.get_context("spawn")

WARM_UP_STEPS = 2
TURN_SECONDS = 0.2  # A turn repeats short steps for so long.
REST_SECONDS = 0.05  # Between turns, in which the last one's threads go to sleep.
BUILD_SECONDS, ANSWER_SECONDS = 300, 120  # How long to wait for a contender.
SLOW_SECONDS, FEWEST_ROUNDS = 30, 3  # Whoever has taken so long stops after so many rounds.
SPARE_BYTES = 2**30  # Left to the rest of the machine.


class Contender(NamedTuple):
    """Someone to measure.

    Attributes:
        name: Its name in the tables.
        module: The module that has `function`. Only the contender's own process imports it.
        function: Name of a function that takes a `Case` and returns a step: a function without
            arguments that does the work of the case and returns all that it computed. It raises
            NotImplementedError, with the reason, for what the contender cannot do.
        note: How its work differs from what the table is about.
        options: Further keyword arguments of the function.
    """

    name: str
    module: str
    function: str
    note: str = ""
    options: dict = {}


class Outcome(NamedTuple):
    """What a contender did.

    Attributes:
        seconds: Seconds of a step, one entry per round.
        ratios: The same, as multiples of the reference in the same round.
        peak_bytes: The largest memory of the process, without what its imports need.
        failure: Why there is nothing to tell; else `None`.
    """

    seconds: Any = ()
    ratios: Any = ()
    peak_bytes: int = 0
    failure: Any = None


class Failure(Exception):
    """Why a contender takes no further part."""


class OutOfMemory(Failure):
    """There was too little memory, at least beside all others."""


def measure(case, reference, contenders, rounds):
    """Measures a case.

    Args:
        case: A `Case`.
        reference: The `Contender` that all others are compared with.
        contenders: The other `Contender`s. Where memory is short they are measured some at a time,
            each time together with the reference.
        rounds: How many turns each gets.

    Returns:
        A dict from the names, that of the reference included, to `Outcome`s.

    Raises:
        Failure: If the reference itself fails.
    """
    outcomes = {}
    while not outcomes or any(contender.name not in outcomes for contender in contenders):
        waiting = [contender for contender in contenders if contender.name not in outcomes]
        measured = _measure_together(case, [reference, *waiting], rounds)
        base = measured[reference.name]
        if base.failure:
            raise Failure(f"{reference.name}: {base.failure}")
        for name, outcome in measured.items():
            pairs = zip(outcome.seconds, base.seconds, strict=False)
            ratios = [seconds / reference for seconds, reference in pairs]
            outcomes.setdefault(name, outcome._replace(ratios=ratios))
    return outcomes


def _measure_together(case, contenders, rounds):
    """The outcomes of the first two contenders, and of as many more as memory has room for."""
    outcomes, workers = {}, {}
    try:
        for contender in contenders:
            crowded = len(workers) > 1
            # Enough for weights, gradients, what building leaves behind, and activations.
            if crowded and memory_bytes("MemAvailable") < 4 * case.weight_bytes + 2 * SPARE_BYTES:
                break
            worker = workers[contender.name] = Worker(contender, case)
            try:
                worker.get_ready()
            except Failure as failure:
                workers.pop(contender.name).stop()
                if crowded and isinstance(failure, OutOfMemory):
                    break  # The next time it comes first.
                outcomes[contender.name] = Outcome(failure=str(failure))

        seconds = {name: [] for name in workers}
        for _ in range(rounds):
            for name in random.sample(list(workers), len(workers)):
                if len(seconds[name]) >= FEWEST_ROUNDS and sum(seconds[name]) > SLOW_SECONDS:
                    continue
                time.sleep(REST_SECONDS)
                try:
                    taken, peak = workers[name].take_turn()
                except Failure as failure:
                    workers.pop(name).stop()
                    outcomes[name] = Outcome(failure=str(failure))
                else:
                    seconds[name].append(taken)
                    outcomes[name] = Outcome(seconds[name], peak_bytes=peak)
    finally:
        for worker in workers.values():
            worker.stop()
    return outcomes


class Worker:
    """The process of a contender, as seen from outside."""

    def __init__(self, contender, case):
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_work, args=(theirs, contender, case), daemon=True)
        self._process.start()
        theirs.close()

    def get_ready(self):
        """Waits until the contender is built and warmed up."""
        self._answer(BUILD_SECONDS)
        self._answer(ANSWER_SECONDS)

    def take_turn(self):
        """Returns the seconds of a step, and the peak of memory so far."""
        self._pipe.send("turn")
        return self._answer(ANSWER_SECONDS)

    def stop(self):
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _answer(self, patience):
        if not self._pipe.poll(patience):
            raise Failure(f"no answer within {patience} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise OutOfMemory(f"ended with exit code {code}, out of memory?") from None
        if isinstance(answer, Failure):
            raise answer
        return answer


def _work(pipe, contender, case):
    """What the process of a contender does."""
    os.dup2(2, 1)  # What contenders print is no part of the tables.
    try:
        _limit_memory()
        make = getattr(importlib.import_module(contender.module), contender.function)
        before = memory_bytes("VmRSS", OWN)
        step = make(case, **contender.options)
        pipe.send("built")
        for _ in range(WARM_UP_STEPS):
            step()
        pipe.send("warm")
        while pipe.recv():
            pipe.send((_time(step), memory_bytes("VmHWM", OWN) - before))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(failure_of(error))


def _time(step):
    """Seconds of a step: the mean of as many as fit in a turn."""
    start, steps = time.perf_counter(), 0
    while True:
        step()
        steps += 1
        elapsed = time.perf_counter() - start
        if elapsed >= TURN_SECONDS:
            return elapsed / steps


def _limit_memory():
    """Lets allocations fail, of which the table can tell, before the machine runs out of memory."""
    limit = memory_bytes("MemAvailable") - SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")  # Should it do so nevertheless.


def failure_of(error):
    """The `Failure` that tells of an error."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        return Failure(f"not installed: {error.name}")
    if isinstance(error, NotImplementedError):
        return Failure(str(error))
    if re.search("(?i)memory|OOM|bad_alloc|ResourceExhausted", message):
        return OutOfMemory("out of memory")
    return Failure(message.splitlines()[0][:200])


def memory_bytes(field, path="/proc/meminfo"):
    """A field of /proc/meminfo, or of /proc/self/status, in bytes."""
    return int(re.search(rf"{field}:\s*(\d+) kB", pathlib.Path(path).read_text())[1]) * 1024
