"""Beam search as in GNMT (Wu et al., 2016, arXiv:1609.08144, equation 14), in the graph.

Axis letters: B sources, W the width of the beam, V words, S steps of a source, L words of the
longest hypothesis.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.arguments import check_size, check_weight
from keras_moe.backend import indices

# The log-probability of what is none: finite, as `tf.debugging.enable_check_numerics` stops at
# infinity, and so that two of them can be added.
NEVER = np.finfo(np.float32).min / 4
# A source step that nothing attended to would have the logarithm of 0.
_LEAST_COVERAGE = 1e-10


class Hypotheses(NamedTuple):
    """What a beam search found for each source, the best first.

    Attributes:
        ids: int32 [B, W, L], the words with the end, padded with 0. Words without the end, where
            the search ended before they did, stand behind all whole hypotheses.
        lengths: int32 [B, W], the number of words, the end counted; 0 where there are less than W
            hypotheses.
        scores: float32 [B, W]; `NEVER`, below -1e37, where there are less than W hypotheses.
    """

    ids: Any
    lengths: Any
    scores: Any


class _Search(NamedTuple):
    """All that a step changes; its size doesn't depend on the steps before."""

    step: Any  # int32, the number of steps made
    ids: Any  # int32 [B, W], the last words
    log_probs: Any  # float32 [B, W], of all words so far; `NEVER` for no hypothesis
    state: Any  # of the caller, [B, W, ...]
    coverage: Any  # float32 [B, W, S], the attention that source steps have had
    done: Any  # bool [B]
    num_finished: Any  # int32 [B]
    scores: Any  # float32 [B, W], of the best whole hypotheses
    ends: Any  # int32 [B, W], the steps that ended them
    parents: Any  # int32 [B, W], their places in the beam before that
    ids_of_steps: Any  # the `ids` of each step, as `_written` has them
    parents_of_steps: Any  # the places that they continue


def beam_search(
    step,
    state,
    start_ids,
    *,
    end_id,
    max_length,
    beam_width=4,
    length_penalty=0.6,
    coverage_penalty=0.2,
    source_mask=None,
    max_steps=None,
):
    """Looks for the hypotheses Y with the best scores s(Y, X) for each source X.

    s(Y, X) = log P(Y | X) / lp(Y) + cp(X, Y), with the length normalisation
    lp(Y) = (5 + |Y|)^α / (5 + 1)^α and the coverage penalty
    cp(X, Y) = β · Σ_i log(min(Σ_j p_ij, 1)), where p_ij is the attention of target word j to source
    step i. The end is one of the words.

    Each step continues the W likeliest hypotheses by every word. Of the W likeliest results those
    with the end are whole; the W likeliest of those without it go on. A source is done when W
    hypotheses are whole, or have `max_length` words. So width 1 is greedy decoding, and the result
    for a source doesn't depend on the others. Sources of different length may stand together. What
    a step costs doesn't depend on the number of words before: they stay where they were written,
    and only the last ones and the state move.

    Example:
    ```python
    def step(ids, state):  # a language of pairs of words
        return ops.take(log_probs, ids, axis=0), state, None

    start = ops.full((batch_size,), end_id)
    found = beam_search(step, (), start, end_id=end_id, max_length=10, coverage_penalty=0.0)
    ```

    Args:
        step: Function of the last words, int32 [B, W], and the state. Returns the log-probabilities
            of the next words [B, W, V], the next state, of the same structure, types and shapes,
            and the attention of these next words to the source, [B, W, S]. A word with `NEVER` or
            -inf is never taken. Without `source_mask` the attention may be `None`. Where a source
            is done its last words may be 0.
        state: Structure of tensors [B, 1, ...], the same for all hypotheses of a source.
        start_ids: Integer tensor [B], what stands before the first word.
        end_id: The id of the end.
        max_length: Integer or tensor [B]: the most words of a hypothesis, the end counted; at
            least 1.
        beam_width: W.
        length_penalty: α, not negative; 0 compares the log-probabilities as they are.
        coverage_penalty: β, not negative.
        source_mask: Boolean tensor [B, S], `False` for what isn't part of the source.
        max_steps: Integer or scalar, the most steps of the search, for all sources. Default: the
            largest `max_length`. Where JAX compiles the search, and `max_length` is no integer, it
            has to be given: results have this many places for words there.

    Returns:
        `Hypotheses`.

    Raises:
        ValueError: If `beam_width` is not an integer of at least 1, a penalty negative, there is a
            coverage penalty without `source_mask`, or the most steps are not known where they have
            to be.
    """
    check_size("beam_width", beam_width)
    alpha = check_weight("length_penalty", length_penalty)
    beta = check_weight("coverage_penalty", coverage_penalty)
    for name, most in {"max_length": max_length, "max_steps": max_steps}.items():
        if isinstance(most, int):
            check_size(name, most)
    if beta and source_mask is None:
        raise ValueError(
            "The coverage penalty needs `source_mask`; without, set `coverage_penalty=0.0`. "
            f"Received: coverage_penalty={coverage_penalty}"
        )
    if max_steps is None:
        max_steps = _largest(max_length)
    start_ids, end_id = ops.cast(start_ids, "int32"), ops.cast(end_id, "int32")
    size = ops.shape(start_ids)[0]
    max_length = ops.broadcast_to(ops.cast(max_length, "int32"), (size,))
    max_length = ops.minimum(max_length, max_steps)
    if source_mask is None:
        mask = ops.zeros((size, 0), "bool")
    else:
        mask = ops.cast(source_mask, "bool")
    beam = ops.broadcast_to(ops.arange(beam_width, dtype="int32"), (size, beam_width))

    def score(log_probs, lengths, coverage):
        normalisation = ((5.0 + ops.cast(lengths, "float32")) / 6.0) ** alpha
        covered = ops.log(ops.clip(coverage, _LEAST_COVERAGE, 1.0))
        penalty = ops.sum(ops.where(mask[:, None], covered, 0.0), axis=-1)
        return ops.where(log_probs > NEVER, log_probs / normalisation + beta * penalty, NEVER)

    def go_on(search):
        log_probs, state, attention = step(search.ids, search.state)
        num_words = ops.shape(log_probs)[-1]
        log_probs = search.log_probs[..., None] + ops.cast(log_probs, "float32")
        # Twice as many as go on: up to W of them end.
        log_probs, candidates = ops.top_k(
            ops.reshape(log_probs, (size, beam_width * num_words)),
            indices.at_most(2, num_words) * beam_width,
        )
        log_probs = ops.maximum(log_probs, NEVER)  # as many as there have been
        parents, ids = candidates // num_words, candidates % num_words
        coverage = search.coverage
        if source_mask is not None:
            coverage += ops.cast(attention, "float32")

        first = [part[:, :beam_width] for part in (log_probs, ids, parents)]
        ended = (first[1] == end_id) & (first[0] > NEVER) & ~search.done[:, None]
        new_scores = score(first[0], search.step + 1, _take(coverage, first[2]))
        new_scores = ops.where(ended, new_scores, NEVER)
        new_scores = ops.concatenate([search.scores, new_scores], axis=1)
        scores, best = ops.top_k(new_scores, beam_width)
        now = ops.broadcast_to(search.step, (size, beam_width))
        ends = ops.concatenate([search.ends, now], axis=1)
        ending_parents = ops.concatenate([search.parents, first[2]], axis=1)
        num_finished = search.num_finished + ops.sum(ops.cast(ended, "int32"), axis=1)

        log_probs = ops.where(ids == end_id, NEVER, log_probs)
        log_probs, best_alive = ops.top_k(log_probs, beam_width)
        # Where a source was done before, everything stays as it is.
        was_done = search.done[:, None]
        parents = ops.where(was_done, beam, _take(parents, best_alive))
        ids = ops.where(was_done, 0, _take(ids, best_alive))
        full = search.step + 1 >= max_length
        return _Search(
            step=search.step + 1,
            ids=ids,
            log_probs=ops.where(was_done, search.log_probs, log_probs),
            state=keras.tree.map_structure(lambda part: _take(part, parents), state),
            coverage=ops.where(was_done[..., None], search.coverage, _take(coverage, parents)),
            done=search.done | full | (num_finished >= beam_width),
            num_finished=num_finished,
            scores=scores,
            ends=_take(ends, best),
            parents=_take(ending_parents, best),
            ids_of_steps=_written(search.ids_of_steps, search.step, ids),
            parents_of_steps=_written(search.parents_of_steps, search.step, parents),
        )

    # All hypotheses of a source begin alike: the others would be copies of the first.
    nothing = ops.full((size, beam_width), NEVER, "float32")
    no_steps = ops.zeros((max_steps, size * beam_width + 1), "int32")
    search = _Search(
        step=ops.convert_to_tensor(0, "int32"),
        ids=ops.repeat(start_ids[:, None], beam_width, axis=1),
        log_probs=ops.where(beam == 0, 0.0, nothing),
        state=keras.tree.map_structure(lambda part: ops.repeat(part, beam_width, axis=1), state),
        coverage=ops.zeros((size, beam_width, ops.shape(mask)[1]), "float32"),
        done=ops.zeros((size,), "bool"),
        num_finished=ops.zeros((size,), "int32"),
        scores=nothing,
        ends=ops.zeros_like(beam),
        parents=beam,
        ids_of_steps=no_steps,
        parents_of_steps=no_steps,
    )
    (search,) = ops.while_loop(
        lambda search: (search.step == 0) | ~ops.all(search.done),
        lambda search: (go_on(search),),
        [search],
    )

    # Whole hypotheses first, then those that go on.
    lengths = ops.minimum(search.step, max_length)[:, None]
    rest, order = ops.top_k(score(search.log_probs, lengths, search.coverage), beam_width)
    num_finished = ops.minimum(search.num_finished, beam_width)[:, None]
    place = ops.where(beam < num_finished, beam, beam_width + beam - num_finished)
    scores = _take(ops.concatenate([search.scores, rest], axis=1), place)
    found = scores > NEVER
    never = ops.broadcast_to(search.step, (size, beam_width))
    ends = _take(ops.concatenate([search.ends, never], axis=1), place)
    lengths = ops.where(beam < num_finished, ends + 1, lengths)
    lengths = ops.where(found, lengths, 0)
    place = _take(ops.concatenate([search.parents, order], axis=1), place)
    ids = _trace_back(search, place, ends, end_id)
    return Hypotheses(ops.where(found[..., None], ids, 0), lengths, scores)


def _largest(max_length):
    largest = indices.largest(max_length)
    if largest is None:
        raise ValueError(
            "Where JAX compiles the search, the most steps have to be known: give `max_steps`, or "
            f"an integer as `max_length`. Received: max_length={max_length!r}, max_steps=None"
        )
    return largest


def _trace_back(search, place, ends, end_id):
    """The words [B, W, L] of hypotheses whose last but the end have these places in the beam."""

    def step(i, place, ids):
        i -= 1
        going_on = i < ends
        last = ops.where(i == ends, end_id, 0)
        word = _take(_read(search.ids_of_steps, i, place), place)
        parent = _take(_read(search.parents_of_steps, i, place), place)
        ids = _written(ids, i, ops.where(going_on, word, last))
        return i, ops.where(going_on, parent, place), ids

    start = (search.step, place, ops.zeros_like(search.ids_of_steps))
    _, _, ids = ops.while_loop(lambda i, *_: i > 0, step, start)
    ids = ops.transpose(ids[: indices.largest(search.step), :-1])
    return ops.reshape(ids, (*ops.shape(place), ops.shape(ids)[-1]))


def _take(part, places):
    """Entries of [B, W, ...] at places [B, W']."""
    (size, number), (width, *others) = ops.shape(places), ops.shape(part)[1:]
    first = width * ops.arange(size, dtype="int32")
    rows = ops.reshape(part, (size * width, *others))
    taken = indices.gather(rows, ops.reshape(first[:, None] + places, (size * number,)))
    return ops.reshape(taken, (size, number, *others))


def _written(steps, step, part):
    """Steps [L, B·W + 1], never empty, which TensorFlow does not write into; [B, W] is now one."""
    row = ops.pad(ops.reshape(part, (ops.size(part),)), [(0, 1)])
    return ops.scatter_update(steps, ops.reshape(step, (1, 1)), row[None])


def _read(steps, step, like):
    """One of those steps, in the shape of another."""
    return ops.reshape(indices.gather(steps, step)[:-1], ops.shape(like))
