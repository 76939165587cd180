"""The oracle's optimizer (appendix D): Adam for a single matrix or vector, element by element."""

import numpy as np


def adam(w, gradients, learning_rates, beta_1, beta_2, epsilon):
    """Kingma and Ba (2015), in the form before section 2.1, where ε is added to sqrt(v_t).

    One gradient and one learning rate for each step. Returns `w` after every step.
    """
    w = np.array(w, np.float64)
    m, v, steps = np.zeros_like(w), np.zeros_like(w), []
    for t, (g, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        alpha = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        for place in np.ndindex(w.shape):
            m[place] = beta_1 * m[place] + (1 - beta_1) * g[place]
            v[place] = beta_2 * v[place] + (1 - beta_2) * g[place] ** 2
            w[place] -= alpha * m[place] / (np.sqrt(v[place]) + epsilon)
        steps.append(w.copy())
    return steps


def factored_adam(w, gradients, learning_rates, beta_2, epsilon):
    """Appendix D for one matrix: no first moment, means of rows and columns for the second.

    Arguments and result are those of `adam`.
    """
    w = np.array(w, np.float64)
    rows, columns, steps = np.zeros(w.shape[0]), np.zeros(w.shape[1]), []
    for t, (g, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        alpha = rate * np.sqrt(1 - beta_2**t)
        for i in range(w.shape[0]):
            rows[i] = beta_2 * rows[i] + (1 - beta_2) * np.mean(g[i] ** 2)
        for j in range(w.shape[1]):
            columns[j] = beta_2 * columns[j] + (1 - beta_2) * np.mean(g[:, j] ** 2)
        np.testing.assert_allclose(rows.mean(), columns.mean())  # so that either will do
        for i, j in np.ndindex(w.shape):
            v = rows[i] * columns[j] / rows.mean() if rows.mean() > 0 else 0.0
            w[i, j] -= alpha * g[i, j] / (np.sqrt(v) + epsilon)
        steps.append(w.copy())
    return steps
