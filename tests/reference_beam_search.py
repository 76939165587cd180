"""Beam search (GNMT, equation 14), hypothesis by hypothesis; and the best of all hypotheses.

Written from the papers, not from the function; see reference.py. Both ask a function from the words
so far, a tuple, to the log-probabilities of the next word [V] and its attention to the source [S].
"""

import numpy as np


def score(log_prob, length, coverage, alpha, beta):
    """s(Y, X) of a hypothesis whose attention sums up to `coverage` [S]."""
    penalty = sum(np.log(max(min(attention, 1.0), 1e-10)) for attention in coverage)
    return log_prob / ((5 + length) ** alpha / (5 + 1) ** alpha) + beta * penalty


def beam_search(following, num_steps, *, end_id, max_length, width, alpha, beta):
    """Returns up to `width` pairs of words and score for a source of `num_steps` steps."""
    alive, whole = [((), 0.0, np.zeros(num_steps))], []
    for _ in range(max_length):
        candidates = []
        for words, log_prob, coverage in alive:
            log_probs, attention = following(words)
            candidates += [
                ((*words, word), log_prob + more, coverage + attention)
                for word, more in enumerate(log_probs)
                if more > -np.inf
            ]
        candidates.sort(key=lambda candidate: -candidate[1])
        whole += [c for c in candidates[:width] if c[0][-1] == end_id]
        alive = [c for c in candidates if c[0][-1] != end_id][:width]
        if len(whole) >= width:
            break

    def ranked(hypotheses):
        scores = [(words, score(p, len(words), c, alpha, beta)) for words, p, c in hypotheses]
        return sorted(scores, key=lambda pair: -pair[1])

    return (ranked(whole) + ranked(alive))[:width] if len(whole) < width else ranked(whole)[:width]


def every_hypothesis(following, num_steps, *, end_id, max_length, alpha, beta):
    """All pairs of words that end and their score, the best first."""
    found, unfinished = [], [((), 0.0, np.zeros(num_steps))]
    while unfinished:
        words, log_prob, coverage = unfinished.pop()
        log_probs, attention = following(words)
        for word, more in enumerate(log_probs):
            longer = ((*words, word), log_prob + more, coverage + attention)
            if word == end_id:
                found.append((longer[0], score(longer[1], len(longer[0]), longer[2], alpha, beta)))
            elif more > -np.inf and len(longer[0]) < max_length:
                unfinished.append(longer)
    return sorted(found, key=lambda pair: -pair[1])
