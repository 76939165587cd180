"""Text from a trained language model, word by word."""

import keras
import numpy as np
from keras import ops

from keras_moe.arguments import check_positive, check_size
from keras_moe.backend import STATIC_SHAPES


def generate(
    model, prompts, eos_id, *, excluded=(), max_words=40, temperature=1.0, top_k=None, seed=None
):
    """Continues prompts with words that a language model draws.

    Word by word from its distribution over the next one, until it draws the end of the sentence.

    Example:
    ```python
    prompts = [[5, 6], []]
    texts = keras_moe.models.generate(model, prompts, eos_id=2, excluded=[0, 1], max_words=4)
    ```

    Args:
        model: A `LanguageModel`, or any other function from tokens [B, L] to the logits or
            log-probabilities [B, L, V] of the word after each, which may depend on that word and
            those before it alone.
        prompts: A list of B lists of ids, the first words of the sentences; empty ones leave the
            whole sentence to the model.
        eos_id: The id of the end of a sentence, which the model also reads before the first word.
        excluded: Ids that are never drawn, as those of padding and of unknown words.
        max_words: The most words to draw for a sentence.
        temperature: Divides the logits: below 1 likely words become likelier.
        top_k: Draws from this many likeliest words alone. With 1 nothing is random. Default: from
            all of them.
        seed: Integer: equal seeds draw equal words for equal prompts.

    Returns:
        A list of B lists of ids: the words of the prompts and those drawn, without `eos_id`.

    Raises:
        ValueError: If `max_words` or `top_k` is not an integer of at least 1, or the temperature
            not above 0.
    """
    check_size("max_words", max_words)
    check_positive("temperature", temperature)
    if top_k is not None:
        check_size("top_k", top_k)
    random = np.random.default_rng(seed)
    lengths = np.array([1 + len(prompt) for prompt in prompts], int)
    # Not in the type of `eos_id`, which may be too small for the other ids.
    tokens = np.full((len(prompts), lengths.max(initial=1) + max_words), eos_id, "int32")
    for row, prompt in zip(tokens, prompts, strict=True):
        row[1 : 1 + len(prompt)] = prompt

    ends = lengths + max_words
    for position in range(lengths.min(initial=1), tokens.shape[1]):
        if np.all(position >= ends):
            break
        logits = _of_next_words(model, tokens, position)
        drawn = _draw(logits, excluded, temperature, top_k, random)
        drawing = (lengths <= position) & (position < ends)
        tokens[drawing, position] = drawn[drawing]
        ends[drawing & (drawn == eos_id)] = position
    return [row[1:end].tolist() for row, end in zip(tokens, ends, strict=True)]


def _of_next_words(model, tokens, position):
    """What the model says of the words [B] behind the first ones of each row."""
    length = position
    if STATIC_SHAPES:  # Each length is compiled: powers of two, as later words change nothing.
        length = 1 << (position - 1).bit_length()
        tokens = np.pad(tokens, [(0, 0), (0, length)], mode="edge")
        model = model.predict_on_batch if isinstance(model, keras.Model) else model
    return ops.convert_to_numpy(model(tokens[:, :length]))[:, position - 1]


def _draw(logits, excluded, temperature, top_k, random):
    """Draws one of V from each row of logits [B, V]."""
    logits = logits.astype("float64") / temperature
    logits[:, np.array(list(excluded), int)] = -np.inf
    if top_k is not None:
        others = np.argsort(-logits, axis=1, kind="stable")[:, top_k:]
        np.put_along_axis(logits, others, -np.inf, axis=1)
    # With Gumbel noise the largest is i with probability softmax(logits)_i.
    return np.argmax(logits + random.gumbel(size=logits.shape), axis=1)
