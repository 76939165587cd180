"""Attention by products (equation 22), pair by pair, in float64 and with gradients by hand.

Written from the paper, not from the layer; see reference.py.
"""

import numpy as np


def product_attention(query, value, key, query_kernel, key_kernel, scale, mask=None):
    """Looks up queries, and returns the contexts, the weights and `backward`.

    Args:
        query: [B, T, D_query].
        value: [B, S, V].
        key: [B, S, D_key].
        query_kernel: W, [D_query, H].
        key_kernel: U, [D_key, H].
        scale: v, [H].
        mask: [B, S], False where nothing may be attended to; None for all True.

    Returns:
        Contexts [B, T, V], weights [B, T, S], and the function from the gradient of the contexts to
        the gradients of all that is above but the mask, by its name.
    """
    batch, steps, sources = len(query), query.shape[1], key.shape[1]
    mask = np.ones((batch, sources), bool) if mask is None else mask
    weights, contexts = np.zeros((batch, steps, sources)), np.zeros((batch, steps, value.shape[2]))
    for b in range(batch):
        for t in range(steps):
            scores = {
                s: np.sum(
                    scale * np.tanh(query[b, t] @ query_kernel) * np.tanh(key[b, s] @ key_kernel)
                )
                for s in np.flatnonzero(mask[b])
            }
            total = sum(np.exp(score) for score in scores.values())
            for s, score in scores.items():
                weights[b, t, s] = np.exp(score) / total
                contexts[b, t] += weights[b, t, s] * value[b, s]

    def backward(d_contexts):
        inputs = {"query": query, "value": value, "key": key}
        weight_names = {"query_kernel": query_kernel, "key_kernel": key_kernel, "scale": scale}
        d = {name: np.zeros(array.shape) for name, array in {**inputs, **weight_names}.items()}
        for b in range(batch):
            for t in range(steps):
                d_weights = {s: d_contexts[b, t] @ value[b, s] for s in np.flatnonzero(mask[b])}
                mean = sum(weights[b, t, s] * d_weight for s, d_weight in d_weights.items())
                hidden_query = np.tanh(query[b, t] @ query_kernel)
                for s, d_weight in d_weights.items():
                    d["value"][b, s] += weights[b, t, s] * d_contexts[b, t]
                    d_score = weights[b, t, s] * (d_weight - mean)  # of a softmax
                    hidden_key = np.tanh(key[b, s] @ key_kernel)
                    d["scale"] += d_score * hidden_query * hidden_key
                    d_query = d_score * scale * hidden_key * (1 - hidden_query**2)
                    d_key = d_score * scale * hidden_query * (1 - hidden_key**2)
                    d["query"][b, t] += query_kernel @ d_query
                    d["query_kernel"] += np.outer(query[b, t], d_query)
                    d["key"][b, s] += key_kernel @ d_key
                    d["key_kernel"] += np.outer(key[b, s], d_key)
        return d

    return contexts, weights, backward
