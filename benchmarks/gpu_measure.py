"""Measures contenders on a graphics card, one after the other.

Unlike processors (`measure.py`), a card is nobody else's, and its memory has room for one large
layer. So a process measures all contenders of one framework in one case, then ends, which is the
only way to have the memory back from every framework. The next process does its imports meanwhile.
"""

import gc
import importlib
import os
import time
from typing import NamedTuple

import cards
from cases import Case
from measure import SPAWN, Failure, Outcome, failure_of

START_SECONDS, ANSWER_SECONDS = 120, 90  # How long to wait for a process, and a contender.
TURN_SECONDS, TURNS = 0.5, 5
FEW = 64  # Up to so many examples the time of one answer counts.


class Job(NamedTuple):
    """What one process does.

    Attributes:
        case: A `Case`.
        card: Name of a class in `cards.py`.
        contenders: List of `Contender`s, of that framework.
    """

    case: Case
    card: str
    contenders: list


def measure(jobs, seconds):
    """Measures until the time is over.

    Args:
        jobs: List of `Job`s, the most telling first.
        seconds: After so many no job begins.

    Yields:
        As soon as there is one more outcome: a job, the card's rate and name as its framework has
        them (`None` if it came to that not), and a dict from the names of its contenders so far to
        `Outcome`s, whose `ratios` are empty.
    """
    end = time.monotonic() + seconds
    jobs = list(jobs)
    following = _Worker(jobs[0]) if jobs else None
    for i, job in enumerate(jobs):
        worker, following = following, None
        if time.monotonic() > end:
            worker.stop()
            return
        worker.begin()
        if i + 1 < len(jobs):
            following = _Worker(jobs[i + 1])
        for results in worker.results():
            yield job, *results


class _Worker:
    """A process, as seen from outside."""

    def __init__(self, job):
        self._job = job
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_work, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self):
        """Gives it the card."""
        try:
            self._pipe.send("begin")
        except OSError:
            pass  # It has ended; `results` tells why.

    def results(self):
        """Rate, name of the card, and the outcomes so far; at the end the process has ended."""
        about, outcomes = (None, None), {}
        try:
            about = self._answer(START_SECONDS)
            for contender in self._job.contenders:
                outcomes[contender.name] = self._answer(ANSWER_SECONDS)
                yield *about, dict(outcomes)
        except Failure as failure:
            for contender in self._job.contenders:
                outcomes.setdefault(contender.name, Outcome(failure=str(failure)))
            yield *about, outcomes
        finally:
            self.stop()

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
        except (EOFError, OSError):
            self._process.join()
            raise Failure(f"ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, Failure):
            raise answer
        return answer


def _work(pipe, job):
    """What the process does."""
    os.dup2(2, 1)  # What contenders print is no part of the tables.
    try:
        for contender in job.contenders:
            importlib.import_module(contender.module)
        pipe.recv()
        card = getattr(cards, job.card)()
        pipe.send((cards.rate(card, job.case.compute_dtype), card.name()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(failure_of(error))
        return
    for contender in job.contenders:
        try:
            outcome = _outcome(card, job.case, contender)
        except Exception as error:
            outcome = Outcome(failure=str(failure_of(error)))
        pipe.send(outcome)
        gc.collect()


def _outcome(card, case, contender):
    make = getattr(importlib.import_module(contender.module), contender.function)
    before = card.reset_peak()
    step = make(case, **contender.options)
    step()
    taken = cards.seconds(card, step, TURN_SECONDS, TURNS, each=case.examples <= FEW)
    return Outcome(taken, peak_bytes=card.peak_bytes() - before)
