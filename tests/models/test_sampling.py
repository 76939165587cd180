"""Sampling of text: from a small chain of words whose chances are known."""

import numpy as np
import pytest

from keras_moe.models.sampling import generate

PADDING, UNKNOWN, EOS, A, B, C = range(6)

# Chances of the next word (columns) after each word (rows).
CHANCES = np.array(
    [
        #  pad  unk  eos  a    b    c
        (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.5, 0.0, 0.4, 0.1, 0.0),  # after the end: a begins 4 times as often as b
        (0.0, 0.0, 0.0, 0.0, 1.0, 0.0),  # a b
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),  # b c
        (0.0, 0.0, 1.0, 0.0, 0.0, 0.0),  # c, the end
    ]
)


def chain(tokens):
    with np.errstate(divide="ignore"):
        return np.log(CHANCES)[tokens].astype("float32")


def test_prompts_are_continued_up_to_the_end_of_the_sentence():
    prompts = [[A], [], [B, C], [C, C, A]]
    sentences = generate(chain, prompts, EOS, excluded=[UNKNOWN], top_k=1)
    assert sentences == [[A, B, C], [A, B, C], [B, C], [C, C, A, B, C]]


def test_max_words_counts_the_words_drawn():
    for max_words, drawn in ((1, [B]), (2, [B, C]), (3, [B, C])):
        assert generate(chain, [[A, A], [A]], EOS, max_words=max_words) == [
            [A, A, *drawn],
            [A, *drawn],
        ]
    assert generate(chain, [], EOS) == []


@pytest.mark.parametrize(
    "settings, share_of_a",
    [
        # Without the unknown word a : b = 0.4 : 0.1; at temperature T the ratio is 4^(1/T).
        ({}, 4 / 5),
        ({"temperature": 0.5}, 16 / 17),
        ({"temperature": 2.0}, 2 / 3),
        ({"top_k": 1}, 1.0),
        ({"top_k": 100}, 4 / 5),
    ],
)
def test_words_are_drawn_by_their_chances(settings, share_of_a):
    sentences = generate(
        chain, [[]] * 4000, EOS, excluded=[UNKNOWN], max_words=1, seed=0, **settings
    )
    share = np.mean([sentence == [A] for sentence in sentences])
    # Four deviations √(p(1 - p) / 4000).
    assert abs(share - share_of_a) <= 4 * np.sqrt(share_of_a * (1 - share_of_a) / 4000)
    assert all(sentence in ([A], [B]) for sentence in sentences)


def test_an_excluded_word_is_left_out_before_the_likeliest_are_taken():
    # Unknown is the likeliest; of the two likeliest others, a is one and b the other.
    sentences = generate(chain, [[]] * 100, EOS, excluded=[UNKNOWN], top_k=2, max_words=1, seed=0)
    assert {tuple(sentence) for sentence in sentences} == {(A,), (B,)}


def test_equal_seeds_draw_equal_words():
    def draw(seed):
        return generate(chain, [[]] * 50, EOS, seed=seed)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 0}, {"max_words": 0}], ids=str
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be.*Received: 0"):
        generate(chain, [[]], EOS, **settings)
