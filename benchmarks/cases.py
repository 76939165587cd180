"""What is measured: a case, and the data that all contenders compute it on.

T examples, D width, N experts, K experts chosen per example, F hidden units.
"""

from typing import NamedTuple

import numpy as np

WIDTH, HIDDEN_UNITS = 512, 1024


class Case(NamedTuple):
    """One cell of a table.

    Attributes:
        num_experts: N.
        k: K.
        examples: T.
        work: "gradients": forward and backward pass, with the gradients with respect to the input
            and all weights; "forward": the forward pass of inference; "step": a whole training
            step with its optimizer.
        skew: The fraction of the examples that have expert 0 among their choices. 0: as many as
            any other expert, K/N on average.
        groups: A, the groups of a hierarchical mixture, which chooses √K groups and √K experts in
            each; 1: not hierarchical.
        batches: How many batches take turns. Other examples need other experts, which the
            processor's caches then don't hold.
        width: D.
        hidden_units: F.
        dtype: A dtype policy of Keras: "float32", "bfloat16" or "mixed_bfloat16".
    """

    num_experts: int
    k: int
    examples: int
    work: str = "gradients"
    skew: float = 0.0
    groups: int = 1
    batches: int = 1
    width: int = WIDTH
    hidden_units: int = HIDDEN_UNITS
    dtype: str = "float32"

    @property
    def weight_bytes(self):
        """Bytes of the experts' weights."""
        item = 2 if self.dtype == "bfloat16" else 4
        return item * 2 * self.num_experts * self.width * self.hidden_units

    @property
    def gated_hidden_units(self):
        """Hidden units of gated experts, which have three kernels in place of two.

        So they have as many operations, less 0.4 % at most: it is a multiple of 8.
        """
        return self.hidden_units * 2 // 3 // 8 * 8

    @property
    def compute_dtype(self):
        """The dtype of inputs, outputs and products."""
        return self.dtype.removeprefix("mixed_")

    @property
    def operations(self):
        """Floating-point operations of the products of the experts: a step has three passes."""
        passes = 1 if self.work == "forward" else 3
        return passes * 4 * self.k * self.examples * self.width * self.hidden_units


def batches(case):
    """Pairs of an input and its upstream gradient, float32 [T, D], to be taken in turn."""
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(case.batches):
        x, upstream = rng.normal(size=(2, case.examples, case.width)).astype("float32")
        if case.skew:
            x[:, 0] = np.where(rng.permutation(case.examples) < case.skew * case.examples, 1, -1)
        pairs.append((x, upstream))
    return pairs


def gate_kernels(case):
    """The kernels of the gating: float32 [D, N]; of a hierarchical one [D, A] and [A, D, N/A].

    All columns are random and of length 1, so that the experts are chosen about equally often.
    With a skew, feature 0 decides about expert 0, beyond all other logits and their noise.
    """
    rng = np.random.default_rng(2)
    shapes = [(case.width, case.num_experts)]
    if case.groups > 1:
        shapes = [
            (case.width, case.groups),
            (case.groups, case.width, case.num_experts // case.groups),
        ]
    kernels = [rng.normal(size=shape) for shape in shapes]
    if case.skew:
        kernels[0][0] = 0
    kernels = [kernel / np.linalg.norm(kernel, axis=-2, keepdims=True) for kernel in kernels]
    if case.skew:
        kernels[0][0, 0] = 10
    return [kernel.astype("float32") for kernel in kernels]
