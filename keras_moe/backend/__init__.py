"""What Keras' backends do each in their own way: the one place where this package tells them apart.

`tensorflow/` and `jax/` have modules of the same names, of which one of them alone is imported; all
else in the package is `keras.ops`. To run on another backend, bring these:

* `gradients`: `with_gradient`, a function with a gradient of its own.
* `indices`: the dtype of indices, ranges and gathers by them, sizes that may not be known yet.
* `sorting`: `sort`, entries by expert.
* `choices`: `top_k`, `rank` and `sum_by_expert`, for the gatings.
* `exact`: `matmul`, products in float32 that no device rounds further.
* `grouped_products`: products of sorted rows, each with the matrix of its expert, and `apply`, a
  whole expert on its rows. What makes the layer sparse.
* `one_example`: the experts of a single example, without sorting.
* `pieces`: `split` and `join`, each expert's rows by themselves.
* `recomputation`: `recomputed`, memory for time.
* `activations`: `lean`, activations that keep little for the backward pass.
* `vocabulary`: samples of words, and the cross-entropy beside them.
* `recurrence`: `over_time`, steps one after the other.
* `devices`: a choice between two ways by the device that runs it.
* `vectorization`: what goes through vectorised loops in a way of its own.
* `collectives`: what replicas tell each other in the middle of a step, and who writes the files.
* `tracing`: which graph is being traced, and whether a value of another can be read there.
* `outer_recomputation`: layers inside of functions that others recompute.
* `layer_metrics`: metrics that the call of a layer updates.
* `squares`: the means of squares over rows and columns, for the optimizer.
* `compilation`: functions that are compiled by themselves, and where and how variables are made.

What a backend doesn't bring refuses by `requirements`, in one sentence with the way round.
"""

import os

SUPPORTED_BACKENDS = ("tensorflow", "jax")


def _refusal(backend):
    return ImportError(
        f"keras_moe runs on these backends of Keras: {', '.join(SUPPORTED_BACKENDS)}. Choose one "
        "before the first import of Keras, by the environment variable KERAS_BACKEND or by "
        f'"backend" in ~/.keras/keras.json. Received: backend {backend!r}'
    )


try:
    import keras
except ImportError as error:  # Keras imports its backend, which need not be installed.
    if os.environ.get("KERAS_BACKEND", SUPPORTED_BACKENDS[0]) in SUPPORTED_BACKENDS:
        raise
    raise _refusal(os.environ["KERAS_BACKEND"]) from error

NAME = keras.config.backend()
if NAME not in SUPPORTED_BACKENDS:
    raise _refusal(NAME)

# Whether all shapes are known before a function runs, as where every step is compiled.
STATIC_SHAPES = NAME == "jax"

# isort: split
from keras_moe.backend import requirements  # noqa: E402

if NAME == "jax":
    from keras_moe.backend.jax import (
        activations,
        choices,
        collectives,
        compilation,
        devices,
        exact,
        gradients,
        grouped_products,
        indices,
        layer_metrics,
        one_example,
        outer_recomputation,
        pieces,
        recomputation,
        recurrence,
        sorting,
        squares,
        tracing,
        vectorization,
        vocabulary,
    )
else:
    from keras_moe.backend.tensorflow import (
        activations,
        choices,
        collectives,
        compilation,
        devices,
        exact,
        gradients,
        grouped_products,
        indices,
        layer_metrics,
        one_example,
        outer_recomputation,
        pieces,
        recomputation,
        recurrence,
        sorting,
        squares,
        tracing,
        vectorization,
        vocabulary,
    )

__all__ = [
    "NAME",
    "STATIC_SHAPES",
    "SUPPORTED_BACKENDS",
    "activations",
    "choices",
    "collectives",
    "compilation",
    "devices",
    "exact",
    "gradients",
    "grouped_products",
    "indices",
    "layer_metrics",
    "one_example",
    "outer_recomputation",
    "pieces",
    "recomputation",
    "recurrence",
    "requirements",
    "sorting",
    "squares",
    "tracing",
    "vectorization",
    "vocabulary",
]
