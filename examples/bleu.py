"""BLEU as the paper reports it."""

import sacrebleu

_METRIC = sacrebleu.BLEU(tokenize="13a", smooth_method="none")


def bleu(translations, references):
    """Returns the BLEU of a corpus, from 0 to 100, with one reference for each translation.

    The paper's figures are those of `multi-bleu.perl`, which counts the words of text that is
    already tokenised, case kept, without smoothing. sacreBLEU's "13a" is the tokenisation of
    `mteval-v13a.pl`, so the same for everybody: words, punctuation marks and numbers of European
    languages come apart as by the Moses tokeniser in front of `multi-bleu.perl`. Placeholders such
    as "%(name)s" come apart as well.

    Args:
        translations: List of strings.
        references: List of as many strings.

    Raises:
        ValueError: There are none, or not as many of one as of the other.
    """
    if not translations or len(translations) != len(references):
        raise ValueError(
            "There must be a reference for each translation, and at least one. Received: "
            f"{len(translations)} translations, {len(references)} references"
        )
    return _METRIC.corpus_score(translations, [references]).score


def signature():
    """How sacreBLEU names the way the figure was computed, to report beside it."""
    _METRIC.corpus_score(["."], [["."]])  # Only then does it know the number of references.
    return str(_METRIC.get_signature())
