"""Which inputs single experts like best.

N experts, T examples, K experts chosen per example, as in `routing.py`.
"""

from typing import NamedTuple

import keras
import numpy as np

from keras_moe.mixture import inspection


class ExpertExample(NamedTuple):
    """A token that went to an expert, and the text around it.

    Attributes:
        gate: The expert's gate at this token.
        line: Which sequence of all batches the token stands in.
        position: Where in that sequence.
        before: Text before the token.
        token: The token's own text.
        after: Text behind it.
    """

    gate: float
    line: int
    position: int
    before: str
    token: str
    after: str


class ExpertExamples(keras.callbacks.Callback):
    """Shows the inputs with the largest gates of single experts (Table 9).

    Prints them at the end of training. Without training:

    ```python
    examples = ExpertExamples(tokens, vocabulary)
    examples.find(model)
    examples.print_best()
    ```

    Args:
        x: Integer tokens [B, L], or batches of them as in `ExpertLoadReport`.
        vocabulary: What turns tokens into text: the list of all words, in which "" is shown as
            nothing, such as `StringLookup.get_vocabulary()`; or a function from a list of integers
            to a string, such as a tokeniser's `decode`.
        layer: The `SparseMoE` or its name. Default: the only one of the model.
        tokens: Which of the model's inputs are the tokens, where it takes several: an index or a
            key, such as 0 for the encoder of a `TranslationModel`, 1 for its decoder. Several
            inputs come in batches, `[((source, target), words)]`.
        experts: How many experts to print, first those whose examples have the largest gates;
            `None` prints all.
        examples: How many examples to keep of each expert.
        before: Tokens to show before an example.
        after: Tokens to show behind it.
        each_epoch: Whether to print at the end of each epoch.

    Attributes:
        best: List of N lists of `ExpertExample`, the largest gates first.
        load: Float array [N], the rows per expert.

    Raises:
        ValueError: If `x` can be read only once, never ends, or is not integer tokens [B, L]; if
            the layer's positions are not those of the tokens, the model has no such layer, `x` no
            such part, or the vocabulary doesn't have a token.
    """

    def __init__(
        self,
        x,
        vocabulary,
        layer=None,
        *,
        tokens=None,
        experts=3,
        examples=6,
        before=6,
        after=2,
        each_epoch=False,
    ):
        super().__init__()
        self.x = inspection.check_batches(x)
        self.vocabulary = vocabulary
        self.layer = layer
        self.tokens = tokens
        self.experts = experts
        self.examples = examples
        self.before = before
        self.after = after
        self.each_epoch = each_epoch
        self._watch = None

    def on_epoch_end(self, epoch, logs=None):
        if self.each_epoch:
            self.find(self.model)
            self.print_best()

    def on_train_end(self, logs=None):
        if not self.each_epoch:
            self.find(self.model)
            self.print_best()

    def find(self, model):
        """Calls the model on all of `x` without training, and sets `best` and `load`."""
        self._watch = inspection.watch(model, self._watch)
        name, layer = self._pick(self._watch.mixtures)
        self.load = np.zeros(layer.num_experts)
        best = [[] for _ in self.load]  # of each expert, (gate, line, position, tokens of the line)
        first_line = 0
        for x in inspection.batches(self.x):
            tokens = _check_tokens(_part(x, self.tokens))
            for routing in self._watch.routings(x)[name]:
                if len(routing.gates) != tokens.size:
                    raise ValueError(
                        "The positions of the layer must be those of the tokens [B, L], for a gate "
                        f"to belong to a token. Received: tokens of shape {tokens.shape}, for "
                        f"which {name!r} routed {len(routing.gates)} examples. Other inputs can be "
                        "matched by hand, from `SparseMoE.recorded_routings`."
                    )
                example, expert, gate = inspection.choices(routing)
                self.load += np.bincount(expert, minlength=len(self.load))
                line, position = np.divmod(example, tokens.shape[1])
                for found, mine in zip(best, _by_expert(expert, gate, len(best)), strict=True):
                    found += [
                        (gate[i], first_line + line[i], position[i], tokens[line[i]].tolist())
                        for i in mine[: self.examples]
                    ]
                    found.sort(key=lambda candidate: -candidate[0])
                    del found[self.examples :]
            first_line += len(tokens)
        self.best = [[self._show(*candidate) for candidate in found] for found in best]

    def print_best(self):
        """Prints the examples of the experts that are surest of theirs."""
        used = [i for i in range(len(self.best)) if self.best[i]]
        used.sort(key=lambda i: -sum(example.gate for example in self.best[i]))
        for i in used[: self.experts]:
            print(f"expert {i}, {self.load[i]:,.0f} tokens")
            for gate, _, _, before, token, after in self.best[i]:
                print(f"  {gate:.2f}  {' '.join(filter(None, (before, f'[{token}]', after)))}")

    def _pick(self, mixtures):
        """The name and the layer that `layer` means."""
        if self.layer is None and len(mixtures) == 1:
            return next(iter(mixtures.items()))
        for name, layer in mixtures.items():
            if self.layer is layer or self.layer == name:
                return name, layer
        raise ValueError(
            "`layer` must be a SparseMoE of the model or its name; where there are several, it has "
            f"to be given. Received: {self.layer!r}, for a model with {', '.join(mixtures)}"
        )

    def _show(self, gate, line, position, tokens):
        return ExpertExample(
            float(gate),
            int(line),
            int(position),
            self._text(tokens[max(position - self.before, 0) : position]),
            self._text(tokens[position : position + 1]),
            self._text(tokens[position + 1 : position + 1 + self.after]),
        )

    def _text(self, tokens):
        if callable(self.vocabulary):
            return self.vocabulary(tokens)
        missing = [token for token in tokens if not 0 <= token < len(self.vocabulary)]
        if missing:
            raise ValueError(
                "The vocabulary must have a word for every token. Received: "
                f"{len(self.vocabulary)} words, token {missing[0]}"
            )
        return " ".join(filter(None, (self.vocabulary[token] for token in tokens)))


def _by_expert(expert, gate, num_experts):
    """Indices of the choices of each expert, the largest finite gates first."""
    order = np.lexsort((-gate, expert))  # stable: of equal gates the earlier token
    order = order[np.isfinite(gate[order])]
    return np.split(order, np.searchsorted(expert[order], np.arange(1, num_experts)))


def _part(x, key):
    """The input of that index or key; where there is only one, its key is `None`."""
    if hasattr(x, "shape"):
        inputs = {None: x}
    else:
        inputs = x if isinstance(x, dict) else dict(enumerate(x))
    if key not in inputs:
        raise ValueError(
            "`tokens` must say which of the model's inputs are the tokens, and be `None` where "
            f"there is one. Received: tokens={key!r}, where there are {list(inputs)}"
        )
    return inputs[key]


def _check_tokens(x):
    """Tokens as an integer array [B, L]."""
    tokens = np.array(x)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(
            "`x` must be batches of integer tokens [B, L]. Received: "
            f"{type(x).__name__} of shape {tokens.shape}, dtype {tokens.dtype}"
        )
    return tokens
