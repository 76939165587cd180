"""Trains a small Transformer with mixtures of experts, beside its dense twin.

    python examples/transformer.py                            # State of the Union addresses
    python examples/transformer.py --text my_book.txt         # any UTF-8 text
    python examples/transformer.py --seeds 3                  # three trainings, and their mean

Both are decoder-only Transformers of plain Keras layers, with layer normalization at the beginning
of each block, and see the same batches. In one, every other feed-forward block is a `SparseMoE`, of
whose experts every word uses k, as in GShard. The twin has dense blocks alone: where the other has
a mixture, one k times as wide as an expert and a little wider still, which makes up for the
operations of the gating.

The script prints the perplexity of held-out text beside the operations per word and the parameters,
and draws the perplexity of the validation text.
"""

import math
import pathlib
import time
import types

import batching
import experiment
import keras
import numpy as np
import report
from experiment import SideBySide, heading, read_words
from keras import ops
from word_ids import PADDING_ID

import keras_moe

ROOT = pathlib.Path(__file__).parents[1]
MAX_LENGTH = 64  # Of a sentence; a longer one is cut by `batching.batches`.


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("num-blocks", 4, "blocks of attention and feed-forward layers"),
        ("num-heads", 2, "heads of the attention"),
        ("num-experts", 32, "experts of each mixture"),
        ("hidden-units", 64, "hidden units of an expert"),
        ("k", 2, "experts per word"),
        ("balance-loss-weight", 0.01, "weight of the importance loss and of the load loss"),
        ("seeds", 1, "trainings: with the seed given, and those after it"),
        ("output", ROOT / "results" / "transformer", "folder for the picture"),
    )
    return experiment.parse_arguments(
        __doc__,
        options,
        arguments,
        words_per_batch=2048,
        epochs=1,
        learning_rate=0.008,
        evaluations=4,
    )


def main(args):
    """Does all that the script does and returns the rows of the table."""
    start = time.time()
    words, lookup = read_words(args)
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        heading(f"Training, seed {seed}")
        runs.append(run(words, len(lookup.get_vocabulary()), seed, args))
        if args.seeds > 1:
            report.print_table(runs[-1][0])

    heading("Held-out text: perplexity per word, end of sentence counted")
    rows, history = summarise(runs)
    report.print_table(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"wrote {report.plot_perplexity(history, rows, args.output / 'transformer.png')}")
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return rows


class Block(keras.layers.Layer):
    """Attention to the words before, then a feed-forward layer, each with a residual connection.

    Args:
        feed_forward: A layer from [B, L, D] to [B, L, D].
        num_heads: Heads of the attention.
        dropout: Part of the output of either to drop.
    """

    def __init__(self, feed_forward, num_heads, dropout, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.feed_forward = feed_forward
        self.num_heads = num_heads
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.dropout = keras.layers.Dropout(dropout)

    def build(self, input_shape):
        width = input_shape[-1]
        self.attention = keras.layers.MultiHeadAttention(self.num_heads, width // self.num_heads)
        self.attention.build(input_shape, input_shape)
        for layer in (*self.norms, self.feed_forward):
            layer.build(input_shape)

    def call(self, x, mask=None, training=None):
        y = self.norms[0](x)
        # Padding stands behind the words, which don't look there.
        x += self.dropout(self.attention(y, y, use_causal_mask=True), training=training)
        y = self.norms[1](x)
        if isinstance(self.feed_forward, keras_moe.SparseMoE):
            y = self.feed_forward(y, mask=mask, training=training)  # No expert gets padding.
        else:
            y = self.feed_forward(y)
        return x + self.dropout(y, training=training)


class Transformer(keras.Model):
    """Words [B, L] to log-probabilities [B, L, V] of the next ones, in training to hidden states.

    Args:
        vocabulary_size: V.
        width: D.
        blocks: The layers between embedding and softmax.
        dropout: Part of the embedding to drop.
        num_sampled: Words that the training's softmax draws per batch.
        seed: Integer, seed of the draws.
    """

    def __init__(self, vocabulary_size, width, blocks, dropout, num_sampled, seed, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.words = keras.layers.Embedding(vocabulary_size, width)
        self.positions = keras.layers.Embedding(MAX_LENGTH, width)
        self.dropout = keras.layers.Dropout(dropout)
        self.blocks = blocks
        self.norm = keras.layers.LayerNormalization()
        self.softmax = keras_moe.layers.SampledSoftmax(vocabulary_size, num_sampled, seed)

    def build(self, tokens_shape):
        for layer in (self.words, self.positions):
            layer.build(tokens_shape)
        for layer in (*self.blocks, self.norm, self.softmax):
            layer.build((None, None, self.width))

    def call(self, tokens, training=None):
        x = self.words(tokens) + self.positions(ops.arange(ops.shape(tokens)[1]))
        x = self.dropout(x, training=training)
        for block in self.blocks:
            x = block(x, mask=tokens != PADDING_ID, training=training)
        x = self.norm(x)
        return x if training else self.softmax(x)

    def cross_entropy(self, targets, outputs, training):
        """Loss of each word of targets [B, L] that isn't padding, from what `call` returned.

        With JAX, where no shape depends on data, of each position, 0 where there is no word.
        """
        words = ops.reshape(targets != PADDING_ID, (-1,))
        targets = ops.reshape(ops.cast(targets, "int32"), (-1,))
        outputs = ops.reshape(outputs, (-1, outputs.shape[-1]))
        if not batching.STATIC:
            targets, outputs = targets[words], outputs[words]
        if training:
            losses = self.softmax.sampled_loss(outputs, targets)
        else:
            losses = -ops.take_along_axis(outputs, targets[:, None], axis=-1)[:, 0]
        return ops.where(words, losses, 0.0) if batching.STATIC else losses


def make_pair(vocabulary_size, seed, args):
    """Returns the Transformer with mixtures and its dense twin, by name."""
    usual = args.k * args.hidden_units
    # The gating's two matrices [width, num_experts] cost what num_experts hidden units do.
    wide = usual + args.num_experts
    models = {}
    for name in ("mixture", "dense"):
        keras.utils.set_random_seed(seed)
        blocks = []
        for i in range(args.num_blocks):
            if i % 2 == 0:
                feed_forward = dense_block(usual, args)
            elif name == "dense":
                feed_forward = dense_block(wide, args)
            else:
                feed_forward = make_mixture(f"mixture_{i}", seed, args)
            blocks.append(Block(feed_forward, args.num_heads, args.dropout))
        options = {"dropout": args.dropout, "num_sampled": args.num_sampled, "seed": seed}
        models[name] = Transformer(vocabulary_size, args.width, blocks, **options, name=name)
    return models


def dense_block(units, args):
    """Returns a feed-forward block."""
    return keras.Sequential(
        [
            keras.layers.Dense(units, "relu", use_bias=False),
            keras.layers.Dense(args.width, use_bias=False),
        ]
    )


def make_mixture(name, seed, args):
    """Returns the mixture that stands in the place of such a block."""
    return keras_moe.SparseMoE(
        args.num_experts,
        args.hidden_units,
        args.k,
        importance_loss_weight=args.balance_loss_weight,
        load_loss_weight=args.balance_loss_weight,
        seed=seed,
        name=name,
    )


def run(words, vocabulary_size, seed, args):
    """Trains both models with one seed; returns the rows of the table and the history."""
    models = make_pair(vocabulary_size, seed, args)
    together = SideBySide(models)
    together.build((None, None))
    batches = batching.batches(
        words["train"], args.words_per_batch, MAX_LENGTH, seed=seed, epochs=args.epochs
    )
    history = experiment.fit(
        together,
        batches,
        batching.batches(words["validation"], args.words_per_batch, MAX_LENGTH),
        experiment.make_optimizer(args, len(batches)),
        args.evaluations,
        [report.Progress(list(models), len(batches))],
    )
    test = batching.batches(words["test"], args.words_per_batch, MAX_LENGTH)
    logs = together.evaluate(test, return_dict=True, verbose=0)
    rows = {}
    for name, model in models.items():
        mixtures = [block.feed_forward for block in model.blocks if is_mixture(block.feed_forward)]
        loads = [logs[f"{mixture.name}/max_over_mean_load"] for mixture in mixtures]
        rows[name] = {
            "perplexity": logs[f"{name}/perplexity"],
            "ops/timestep": sum(map(count_operations, model.blocks)),
            "parameters": sum(block.count_params() for block in model.blocks),
            "max/mean load": float(np.mean(loads)) if loads else None,
        }
    return rows, history


def is_mixture(layer):
    """Whether a feed-forward layer is a mixture."""
    return isinstance(layer, keras_moe.SparseMoE)


def count_operations(block):
    """Multiply-adds of a block for one word, but for the product of each word with others."""
    matrices = [w for w in block.attention.weights if w.name == "kernel"]
    layer, of_experts = block.feed_forward, 0
    if is_mixture(layer):
        matrices += layer.gating.weights
        kernels = sum(math.prod(kernel.shape) for kernel in layer.experts.kernels)
        of_experts = kernels * layer.k // layer.num_experts
    else:
        matrices += layer.weights
    return sum(math.prod(matrix.shape) for matrix in matrices) + of_experts


def summarise(runs):
    """Returns the means over several seeds: rows of the table, and the history of validation."""
    rows, histories = zip(*runs, strict=True)
    table = {}
    for name, first in rows[0].items():
        perplexities = [row[name]["perplexity"] for row in rows]
        loads = [row[name]["max/mean load"] for row in rows]
        table[name] = {
            **first,
            "perplexity": float(np.mean(perplexities)),
            "lowest": min(perplexities),
            "highest": max(perplexities),
            "max/mean load": None if None in loads else float(np.mean(loads)),
        }
    columns = [f"val_{name}/perplexity" for name in table]
    means = {key: np.mean([h.history[key] for h in histories], axis=0) for key in columns}
    return table, types.SimpleNamespace(steps=histories[0].steps, history=means)


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
