"""A text as one stream of words, read from ids that another run has kept."""

import pathlib

import experiment
import numpy as np
import plain_vocabulary
from word_ids import EOS_ID


def read(args):
    """Reads the words, by the cache if there is one.

    Returns:
        The sentences as ids by part.
    """
    cache = pathlib.Path(args.cache)
    if not cache.is_file():
        words, _ = experiment.read_words(args)
        if args.cache:
            arrays = {}
            for part, sentences in words.items():
                arrays[f"{part}/ids"] = np.asarray(sentences.flat_values)
                arrays[f"{part}/lengths"] = np.asarray(sentences.row_lengths())
            np.savez_compressed(cache, vocabulary_size=args.vocabulary_size, **arrays)
        return words
    with np.load(cache) as arrays:
        if arrays["vocabulary_size"] != args.vocabulary_size:
            raise ValueError(
                f"The words in {args.cache} must be of as large a vocabulary; another --cache "
                f"keeps them apart. Received: {arrays['vocabulary_size']}, now "
                f"{args.vocabulary_size}"
            )
        return {
            part: plain_vocabulary.Sentences(arrays[f"{part}/ids"], arrays[f"{part}/lengths"])
            for part in ("train", "validation", "test")
        }


def as_stream(sentences):
    """Returns sentences as a single one, with their ends in it, which batches cut into even rows.

    So all rows are of one length: next to nothing is padded, and with JAX there is one program.
    """
    between = np.cumsum(sentences.row_lengths())[:-1]
    words = np.insert(np.asarray(sentences.flat_values), between, EOS_ID)
    return plain_vocabulary.Sentences(words, [len(words)])
