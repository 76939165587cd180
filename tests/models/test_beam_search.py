"""Beam search on languages so small that every hypothesis can be written down."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy as numpy
from reference_beam_search import beam_search as reference
from reference_beam_search import every_hypothesis

from keras_moe.models.beam_search import beam_search

PADDING, END, A, B, VOCABULARY = range(5)
SOURCES, STEPS, MAX_LENGTH = 6, 3, 4
# Words are the digits of a number in base 4, behind a 1: as many as there are prefixes.
CODES = VOCABULARY ** (MAX_LENGTH + 1)
LENGTHS = np.array([3, 1, 2, 3, 3, 2])  # of the sources
MASK = np.arange(STEPS) < LENGTHS[:, None]


@pytest.fixture(scope="module")
def language():
    """Log-probabilities and attention after every prefix, for each source."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(SOURCES, CODES, VOCABULARY))
    logits[..., PADDING] = -np.inf
    logits[..., END] -= 1
    chances = np.exp(logits)
    attention = np.exp(3 * rng.normal(size=(SOURCES, CODES, STEPS))) * MASK[:, None]
    with np.errstate(divide="ignore"):
        log_probs = np.log(chances / chances.sum(axis=-1, keepdims=True))
    return log_probs, attention / attention.sum(axis=-1, keepdims=True)


@functools.cache
def graph(**options):
    """Beam search in a graph that knows no sizes but the width; with JAX, all of them."""

    def run(log_probs, attention, start, mask, max_length):
        def step(ids, state):
            (code,) = state
            # The code of what stands before the first word is 1.
            code = ops.where(ids == -1, 1, code * VOCABULARY + ids)
            known = ops.minimum(code, CODES - 1)[..., None]
            rows = [ops.take_along_axis(table, known, axis=1) for table in (log_probs, attention)]
            return rows[0], (code,), rows[1]

        state = (ops.zeros((ops.shape(start)[0], 1), "int32"),)
        arguments = {"end_id": END, "max_length": max_length, "source_mask": mask}
        if keras.config.backend() == "jax":
            arguments["max_steps"] = MAX_LENGTH
        return beam_search(step, state, start, **arguments, **options)

    if keras.config.backend() == "jax":
        import jax

        return jax.jit(run)
    import tensorflow as tf

    signature = [
        tf.TensorSpec([None, None, None]),
        tf.TensorSpec([None, None, None]),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, None], tf.bool),
        tf.TensorSpec([None], tf.int32),
    ]
    return tf.function(run, input_signature=signature, autograph=False)


def search(language, rows=slice(None), max_length=None, **options):
    tables = [table[rows].astype("float32") for table in language]
    size = len(tables[0])
    max_length = np.full(size, MAX_LENGTH) if max_length is None else max_length
    arguments = (np.full(size, -1, "int32"), MASK[rows], max_length.astype("int32"))
    return graph(**options)(*tables, *arguments)


def following(language, source):
    """The same tables, asked by words."""

    def ask(words):
        code = 1
        for word in words:
            code = code * VOCABULARY + word
        return language[0][source, code], language[1][source, code, : LENGTHS[source]]

    return ask


def as_pairs(found, row):
    """The hypotheses for a source as pairs of words and score."""
    parts = list(zip(*(numpy(part)[row] for part in found), strict=True))
    assert all(np.all(ids[length:] == PADDING) for ids, length, _ in parts)
    return [(tuple(ids[:length]), score) for ids, length, score in parts if length]


def assert_same(ours, wanted):
    assert [words for words, _ in ours] == [words for words, _ in wanted]
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in wanted], rtol=1e-4, atol=1e-5)


PENALTIES = [(0.0, 0.0), (0.8, 0.0), (0.6, 0.4)]


@pytest.mark.parametrize(("alpha", "beta"), PENALTIES)
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_it_equals_the_reference(language, width, alpha, beta):
    found = search(language, beam_width=width, length_penalty=alpha, coverage_penalty=beta)
    sizes = {"end_id": END, "max_length": MAX_LENGTH, "width": width}
    for source in range(SOURCES):
        asked = following(language, source)
        wanted = reference(asked, LENGTHS[source], **sizes, alpha=alpha, beta=beta)
        assert_same(as_pairs(found, source), wanted)


@pytest.mark.parametrize(("alpha", "beta"), PENALTIES)
def test_a_wide_beam_finds_the_best_of_all_hypotheses_and_all_others(language, alpha, beta):
    # Of two words and the end: 1 + 2 + 4 + 8 hypotheses. The last step has 8·3 candidates, so that
    # with this width none is lost.
    found = search(language, beam_width=24, length_penalty=alpha, coverage_penalty=beta)
    for source in range(SOURCES):
        asked = following(language, source)
        wanted = every_hypothesis(
            asked, LENGTHS[source], end_id=END, max_length=MAX_LENGTH, alpha=alpha, beta=beta
        )
        assert len(wanted) == 15
        ours = as_pairs(found, source)
        assert_same(ours[:15], wanted)
        # Behind them stand some of the 16 that don't end.
        assert len(ours) == 24 and {words[-1] for words, _ in ours[15:]} == {A, B}


def test_width_1_takes_the_likeliest_word_each_time(language):
    found = search(language, beam_width=1)
    ended = []
    for source in range(SOURCES):
        words = ()
        while len(words) < MAX_LENGTH and END not in words:
            words += (int(np.argmax(following(language, source)(words)[0])),)
        ended.append(END in words)
        assert [pair[0] for pair in as_pairs(found, source)] == [words]
    assert set(ended) == {True, False}


@pytest.mark.parametrize("width", [1, 3])
def test_a_source_alone_has_the_result_that_it_has_among_others(language, width):
    most = np.array([4, 1, 3, 2, 4, 4])  # words, by source
    together = search(language, max_length=most, beam_width=width)
    for source in range(SOURCES):
        rows = slice(source, source + 1)
        alone = search(language, rows, max_length=most[rows], beam_width=width)
        assert_same(as_pairs(alone, 0), as_pairs(together, source))
        assert as_pairs(alone, 0)
        assert max(len(words) for words, _ in as_pairs(alone, 0)) <= most[source]


@pytest.mark.parametrize(("chance_of_the_end", "steps"), [(0.1, 7), (0.9, 1)])
def test_all_steps_are_alike_and_none_is_made_once_all_sources_are_done(chance_of_the_end, steps):
    chances = [1e-9, chance_of_the_end, 1 - chance_of_the_end]
    shapes = []

    def step(ids, count):  # Eagerly each step is a call, but not with JAX.
        shapes.append((tuple(ids.shape), tuple(count.shape)))
        return ops.log(ops.convert_to_tensor([[chances]])), count + 1, None

    found = beam_search(
        step,
        ops.zeros((1, 1), "int32"),
        [END],
        end_id=END,
        max_length=7,
        beam_width=1,
        coverage_penalty=0.0,
    )
    assert set(shapes) == {((1, 1), (1, 1))}
    if keras.config.backend() == "tensorflow":
        assert len(shapes) == steps
    assert found.ids.shape == (1, 1, steps)


def test_no_sources_have_no_hypotheses(language):
    found = search(language, slice(0, 0), beam_width=2)
    assert found.lengths.shape == found.scores.shape == (0, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"beam_width": 0},
        {"length_penalty": -1.0},
        {"coverage_penalty": -0.5},
        {"max_length": 0},
        {"max_steps": 0},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options):
    arguments = {"end_id": END, "max_length": 3, **options}
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be.*Received: "):
        beam_search(None, (), [END], **arguments)


def test_a_coverage_penalty_needs_to_know_the_source():
    with pytest.raises(ValueError, match="needs `source_mask`.*Received: coverage_penalty=0.2"):
        beam_search(None, (), [END], end_id=END, max_length=3)


def test_no_search_takes_more_steps_than_it_is_given(language):
    bounded = search(language, beam_width=2, max_length=np.full(SOURCES, 3))
    options = {"end_id": END, "coverage_penalty": 0.0, "beam_width": 2}
    log_probs = ops.log(ops.convert_to_tensor([[[0.0, 0.0, 0.6, 0.4]]]))  # never an end
    step = lambda ids, state: (ops.repeat(log_probs, 2, axis=1), state, None)  # noqa: E731
    found = beam_search(step, (), [END, END], max_length=[7, 2], max_steps=3, **options)
    assert numpy(found.lengths).tolist() == [[3, 3], [2, 2]]
    assert numpy(bounded.lengths).max() == 3


def test_a_compiled_search_of_jax_has_to_know_the_most_steps():
    if keras.config.backend() == "tensorflow":
        pytest.skip("a graph of TensorFlow grows as it runs")
    import jax

    def run(most):
        return beam_search(None, (), [END], end_id=END, max_length=most, coverage_penalty=0.0)

    with pytest.raises(ValueError, match="give `max_steps`, or an integer as `max_length`.*Rec"):
        jax.jit(run)(np.array([3]))
