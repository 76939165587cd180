"""Beam search as in GNMT (Wu et al., 2016, arXiv:1609.08144, equation 14), in the graph.

Axis letters: B sources, W the width of the beam, V words, S steps of a source, L words of the
longest hypothesis.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_moe.arguments import check_size, check_weight
from keras_moe.backend.requirements import need_tensorflow

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
    ids_of_steps: Any  # TensorArray of `ids`
    parents_of_steps: Any  # TensorArray of int32 [B, W], the places that they continue


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
        return tf.gather(log_probs, ids), state, None

    start = tf.fill([batch_size], end_id)
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

    Returns:
        `Hypotheses`.

    Raises:
        ValueError: If `beam_width` is not an integer of at least 1, a penalty negative, or there
            is a coverage penalty without `source_mask`.
    """
    need_tensorflow("Beam search", "Translate where KERAS_BACKEND=tensorflow.")
    import tensorflow as tf

    check_size("beam_width", beam_width)
    alpha = check_weight("length_penalty", length_penalty)
    beta = check_weight("coverage_penalty", coverage_penalty)
    if isinstance(max_length, int):
        check_size("max_length", max_length)
    if beta and source_mask is None:
        raise ValueError(
            "The coverage penalty needs `source_mask`; without, set `coverage_penalty=0.0`. "
            f"Received: coverage_penalty={coverage_penalty}"
        )
    start_ids, end_id = tf.cast(start_ids, tf.int32), tf.cast(end_id, tf.int32)
    size = tf.shape(start_ids)[0]
    max_length = tf.broadcast_to(tf.cast(max_length, tf.int32), [size])
    mask = (
        tf.zeros([size, 0], tf.bool) if source_mask is None else tf.convert_to_tensor(source_mask)
    )
    beam = tf.broadcast_to(tf.range(beam_width), [size, beam_width])

    def score(log_probs, lengths, coverage):
        normalisation = ((5.0 + tf.cast(lengths, tf.float32)) / 6.0) ** alpha
        covered = tf.math.log(tf.clip_by_value(coverage, _LEAST_COVERAGE, 1.0))
        penalty = tf.reduce_sum(tf.where(mask[:, None], covered, 0.0), axis=-1)
        return tf.where(log_probs > NEVER, log_probs / normalisation + beta * penalty, NEVER)

    def go_on(search):
        log_probs, state, attention = step(search.ids, search.state)
        num_words = tf.shape(log_probs)[-1]
        log_probs = search.log_probs[..., None] + tf.cast(log_probs, tf.float32)
        # Twice as many as go on: up to W of them end.
        log_probs, candidates = tf.math.top_k(
            tf.reshape(log_probs, [size, beam_width * num_words]),
            tf.minimum(2, num_words) * beam_width,
        )
        log_probs = tf.maximum(log_probs, NEVER)  # as many as there have been
        parents, ids = candidates // num_words, candidates % num_words
        coverage = search.coverage
        if source_mask is not None:
            coverage += tf.cast(attention, tf.float32)

        first = [part[:, :beam_width] for part in (log_probs, ids, parents)]
        ended = (first[1] == end_id) & (first[0] > NEVER) & ~search.done[:, None]
        new_scores = score(first[0], search.step + 1, _take(coverage, first[2]))
        new_scores = tf.where(ended, new_scores, NEVER)
        scores, best = tf.math.top_k(tf.concat([search.scores, new_scores], axis=1), beam_width)
        ends = tf.concat([search.ends, tf.fill(tf.shape(beam), search.step)], axis=1)
        ending_parents = tf.concat([search.parents, first[2]], axis=1)
        num_finished = search.num_finished + tf.reduce_sum(tf.cast(ended, tf.int32), axis=1)

        log_probs = tf.where(ids == end_id, NEVER, log_probs)
        log_probs, best_alive = tf.math.top_k(log_probs, beam_width)
        # Where a source was done before, everything stays as it is.
        was_done = search.done[:, None]
        parents = tf.where(was_done, beam, _take(parents, best_alive))
        ids = tf.where(was_done, 0, _take(ids, best_alive))
        full = search.step + 1 >= max_length
        return _Search(
            step=search.step + 1,
            ids=ids,
            log_probs=tf.where(was_done, search.log_probs, log_probs),
            state=tf.nest.map_structure(lambda part: _take(part, parents), state),
            coverage=tf.where(was_done[..., None], search.coverage, _take(coverage, parents)),
            done=search.done | full | (num_finished >= beam_width),
            num_finished=num_finished,
            scores=scores,
            ends=_take(ends, best),
            parents=_take(ending_parents, best),
            ids_of_steps=search.ids_of_steps.write(search.step, ids),
            parents_of_steps=search.parents_of_steps.write(search.step, parents),
        )

    # All hypotheses of a source begin alike: the others would be copies of the first.
    nothing = tf.fill([size, beam_width], NEVER)
    search = _Search(
        step=tf.constant(0),
        ids=tf.repeat(start_ids[:, None], beam_width, axis=1),
        log_probs=tf.where(beam == 0, 0.0, nothing),
        state=tf.nest.map_structure(lambda part: tf.repeat(part, beam_width, axis=1), state),
        coverage=tf.zeros([size, beam_width, tf.shape(mask)[1]]),
        done=tf.fill([size], False),
        num_finished=tf.zeros([size], tf.int32),
        scores=nothing,
        ends=tf.zeros_like(beam),
        parents=beam,
        ids_of_steps=_steps_of(beam_width),
        parents_of_steps=_steps_of(beam_width),
    )
    (search,) = tf.while_loop(
        lambda search: (search.step == 0) | ~tf.reduce_all(search.done),
        lambda search: (go_on(search),),
        [search],
        shape_invariants=[tf.nest.map_structure(_any_batch, search)],
    )

    # Whole hypotheses first, then those that go on.
    lengths = tf.minimum(search.step, max_length)[:, None]
    rest, order = tf.math.top_k(score(search.log_probs, lengths, search.coverage), beam_width)
    num_finished = tf.minimum(search.num_finished, beam_width)[:, None]
    place = tf.where(beam < num_finished, beam, beam_width + beam - num_finished)
    scores = _take(tf.concat([search.scores, rest], axis=1), place)
    found = scores > NEVER
    never = tf.fill(tf.shape(beam), search.step)
    ends = _take(tf.concat([search.ends, never], axis=1), place)
    lengths = tf.where(beam < num_finished, ends + 1, lengths)
    lengths = tf.where(found, lengths, 0)
    place = _take(tf.concat([search.parents, order], axis=1), place)
    ids = _trace_back(search, place, ends, end_id)
    return Hypotheses(tf.where(found[..., None], ids, 0), lengths, scores)


def _trace_back(search, place, ends, end_id):
    """The words [B, W, L] of hypotheses whose last but the end have these places in the beam."""
    import tensorflow as tf

    def step(i, place, ids):
        i -= 1
        going_on = i < ends
        last = tf.where(i == ends, end_id, 0)
        word = tf.where(going_on, _take(search.ids_of_steps.read(i), place), last)
        place = tf.where(going_on, _take(search.parents_of_steps.read(i), place), place)
        return i, place, ids.write(i, word)

    ids = tf.TensorArray(tf.int32, search.step, element_shape=place.shape)
    _, _, ids = tf.while_loop(lambda i, *_: i > 0, step, (search.step, place, ids))
    return tf.transpose(ids.stack(), [1, 2, 0])


def _take(part, places):
    """Entries of [B, W, ...] at places [B, W']."""
    import tensorflow as tf

    return tf.gather(part, places, batch_dims=1)


def _steps_of(beam_width):
    """An array that grows with the steps, of int32 [B, W]."""
    import tensorflow as tf

    return tf.TensorArray(
        tf.int32, 0, dynamic_size=True, clear_after_read=False, element_shape=[None, beam_width]
    )


def _any_batch(part):
    """The shape of a part in every step: B may be known before the first alone."""
    import tensorflow as tf

    if isinstance(part, tf.TensorArray):
        return tf.TensorShape(None)
    return tf.TensorShape([None, *part.shape[1:]][: part.shape.rank])
