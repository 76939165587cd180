"""The oracle's experts: feed-forward networks, and their sum weighted by the gates (Eq 1)."""

import math

import numpy as np

ROOT_2, ROOT_2_PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)


def normal_cdf(z):
    """Φ, the cumulative distribution of the standard normal."""
    return np.array([0.5 * math.erfc(-value / ROOT_2) for value in z])


def sigmoid(z):
    """1 / (1 + exp(-z)), which overflows nowhere."""
    return np.exp(-np.logaddexp(0.0, -z))


# Name: (function, derivative), both of the pre-activation.
ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(np.float64)),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "gelu": (
        lambda z: z * normal_cdf(z),
        lambda z: normal_cdf(z) + z * np.exp(-0.5 * z**2) / ROOT_2_PI,
    ),
    "silu": (
        lambda z: z * sigmoid(z),
        lambda z: sigmoid(z) * (1.0 + z * sigmoid(-z)),
    ),
}

# The gated linear units of Shazeer (2020, arXiv:2002.05202): what is done to the first half of the
# pre-activation before it multiplies the second half.
GATED_ACTIVATIONS = {
    "glu": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "bilinear": (lambda z: z, np.ones_like),
    "reglu": ACTIVATIONS["relu"],
    "geglu": ACTIVATIONS["gelu"],
    "swiglu": ACTIVATIONS["silu"],
}


def activate(z, activation):
    """What a hidden layer makes of its pre-activation: [F], or [2F] when it is gated, to [F]."""
    if activation in GATED_ACTIVATIONS:
        function, derivative = GATED_ACTIVATIONS[activation]
        gate, value = np.split(z, 2)

        def backward(d_hidden):
            return np.concatenate([d_hidden * value * derivative(gate), d_hidden * function(gate)])

        return function(gate) * value, backward

    function, derivative = ACTIVATIONS[activation]
    return function(z), lambda d_hidden: d_hidden * derivative(z)


def feed_forward(x, kernels, biases, activation):
    """One expert on one example [D]: `activation` after every layer but the last."""
    last = len(kernels) - 1
    inputs, activation_backwards = [], []
    hidden = x
    for layer, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        inputs.append(hidden)
        hidden = hidden @ kernel + bias
        if layer < last:
            hidden, backward_one = activate(hidden, activation)
            activation_backwards.append(backward_one)

    def backward(d_hidden):
        d_kernels, d_biases = [], []
        for layer in range(last, -1, -1):
            d_pre = d_hidden if layer == last else activation_backwards[layer](d_hidden)
            d_kernels.insert(0, np.outer(inputs[layer], d_pre))
            d_biases.insert(0, d_pre)
            d_hidden = kernels[layer] @ d_pre
        return d_hidden, d_kernels, d_biases

    return hidden, backward


def mixture(x, gates, kernels, biases, activation):
    """The output (Eq 1): an expert whose gate is 0 is never computed."""
    y = np.zeros([len(x), kernels[-1].shape[-1]])
    computed = {}
    for t in range(len(x)):
        for i in np.flatnonzero(gates[t]):
            output, backward_one = feed_forward(
                x[t], [kernel[i] for kernel in kernels], [bias[i] for bias in biases], activation
            )
            y[t] += gates[t, i] * output
            computed[t, i] = output, backward_one

    def backward(d_y):
        d_x, d_gates = np.zeros_like(x), np.zeros_like(gates)
        d_kernels = [np.zeros_like(kernel) for kernel in kernels]
        d_biases = [np.zeros_like(bias) for bias in biases]
        for (t, i), (output, backward_one) in computed.items():
            d_gates[t, i] = d_y[t] @ output
            d_x_one, d_kernels_one, d_biases_one = backward_one(gates[t, i] * d_y[t])
            d_x[t] += d_x_one
            for layer in range(len(kernels)):
                d_kernels[layer][i] += d_kernels_one[layer]
                d_biases[layer][i] += d_biases_one[layer]
        return d_x, d_gates, d_kernels, d_biases

    return y, backward
