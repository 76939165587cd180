"""Experts that are any Keras layers: `LayerExperts`."""

import contextlib
import copy

import keras
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.backend import STATIC_SHAPES, indices, pieces
from keras_moe.contract.freezing import FreezableParts, call_once, copy_trainable
from keras_moe.contract.inputs import as_input, as_numbers
from keras_moe.contract.own_losses import added_losses, counts_calls, layers_by_name
from keras_moe.experts import in_memory
from keras_moe.experts.initializers import derived_seeds
from keras_moe.saving import CheckedExperts


@keras.saving.register_keras_serializable("keras_moe")
class LayerExperts(FreezableParts, CheckedExperts, keras.layers.Layer):
    """A bank whose experts are clones of a Keras layer or model.

    Every expert has weights of its own, newly drawn: an integer seed in the layer's configuration
    is replaced by another for each clone. Losses and metrics of the experts count as usual.

    An expert sees its own rows [rows, D] alone. One without rows is called with a row of zeros
    whose output is thrown away, since a loss that is a mean over no rows would be NaN; with a
    capacity an expert is called with its C places, zeros in the empty ones. Under JAX, where no
    shape depends on the load, each is without a capacity called with as many rows as all have
    together, zeros behind its own, whose outputs are thrown away: N times the operations.

    Example:
    ```python
    expert = keras.Sequential([keras.layers.Dense(64, "gelu"), keras.layers.Dense(32)])
    keras_moe.SparseMoE(8, experts=expert, k=2)  # the same as experts=LayerExperts(8, expert)
    ```

    Args:
        num_experts: N, the number of experts.
        layer: The layer or model to clone: from [rows, D] to [rows, output_dim], each row by
            itself. It is not used itself, and its weights are not copied. A class of your own has
            to be registered, by `keras.saving.register_keras_serializable`.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        layers: List of the N experts.

    Call arguments:
        rows: Float tensor [M, D], sorted by expert, or [N, C, D].
        rows_per_expert: int32 [N], their sum at most M; `None` with [N, C, D].

    Returns:
        Float tensor [M, output_dim] or [N, C, output_dim] in the compute dtype.

    Raises:
        ValueError: If `num_experts` is not an integer of at least 1, or `layer` not a Keras layer
            whose output has one row for each row of the input. In a call under JAX without a
            capacity, if an expert has losses, metrics, or in training statistics of a batch.
    """

    def __init__(self, num_experts, layer, **kwargs):
        changes = kwargs.pop("changes", None)  # of each expert, from `get_config`
        super().__init__(**kwargs)
        self.num_experts = check_size("num_experts", num_experts)
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"`layer` must be a Keras layer or model. Received: {layer!r}")
        self._template = _bare(keras.saving.serialize_keras_object(layer))
        if not isinstance(layer, keras.Model):
            self._template.pop("build_config", None)  # Another input may be as wide as it likes.
        self._made_with = changes
        with contextlib.nullcontext() if changes else in_memory.trusted():
            self.layers = [self._clone(i) for i in range(self.num_experts)]
        # Under TensorFlow the number of rows of an expert depends on the data.
        self.supports_jit = STATIC_SHAPES
        self.freeze_parts()

    def _clone(self, i):
        clone = self._config(i)
        clone["config"]["name"] += f"_{i}"
        return keras.saving.deserialize_keras_object(clone)

    def _config(self, i):
        config = _reseeded(self._template, i)
        return _with_changes(config, self._made_with[i]) if self._made_with else config

    def build(self, rows_shape):
        self.input_spec = keras.InputSpec(min_ndim=2, max_ndim=3, axes={-1: rows_shape[-1]})
        rows = keras.KerasTensor((None, rows_shape[-1]), self.compute_dtype)
        for layer in self.layers:
            y = call_once(layer, rows)
        if len(y.shape) != 2 or y.shape[0] is not None or y.shape[1] is None:
            raise ValueError(
                "An expert must turn rows [rows, D] into rows [rows, output_dim] of known width. "
                f"Received: {layer.name!r}, which turns {rows.shape} into {y.shape}"
            )
        self.output_dim = y.shape[1]
        for i, layer in enumerate(self.layers):
            _keep_lora_alpha(layer, self._config(i))
        for variable in self.weights:
            # By it optimizers know them. An expert that is a mixture itself has set it already.
            variable.expert_rank = getattr(variable, "expert_rank", len(variable.shape))

    def call(self, rows, rows_per_expert=None, training=None):
        rows, rows_per_expert = as_input(self, rows), as_numbers(rows_per_expert)
        if rows_per_expert is None:
            experts = zip(self.layers, ops.unstack(rows), strict=True)
            return ops.stack([self._call_expert(layer, piece) for layer, piece in experts])
        *parts, rest = pieces.split(rows, rows_per_expert)
        experts = zip(self.layers, parts, strict=True)
        y = pieces.join([self._call_expert(layer, piece) for layer, piece in experts], rest)
        if STATIC_SHAPES:
            self._check_rows_by_themselves(training)
        return y

    def _check_rows_by_themselves(self, training):
        """Raises ValueError where more depends on the number of rows than the rows' outputs."""
        for layer in self.layers:
            parts = layers_by_name(layer, keras.layers.BatchNormalization).values()
            counting = {
                "statistics of a batch": training and any(part.trainable for part in parts),
                "losses": added_losses(layer),
                "metrics": counts_calls(layer, training),
            }
            found = [name for name, there in counting.items() if there]
            if found:
                raise ValueError(
                    "Under JAX an expert is called with its own rows and as many zeros as there "
                    "are rows of others, which losses, as those of activities, metrics, as those "
                    "of a mixture, and statistics of a batch would count. Set `capacity_factor`, "
                    "with which an expert has few empty places in training, or leave them out, as "
                    "evaluation, which drops nothing, always needs it. `predict` has no metrics. "
                    f"Received: expert {layer.name!r} with {', '.join(found)}"
                )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` each expert is recomputed for itself, which keeps its losses."""
        return layer_call

    def _call_expert(self, layer, piece):
        num_rows = ops.shape(piece)[0]
        filler = ops.zeros((indices.at_least(0, 1 - num_rows), piece.shape[-1]), piece.dtype)
        y = layer(ops.concatenate([piece, filler]))
        return ops.cast(y[:num_rows], self.compute_dtype)

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        if not self.built:
            self.build(rows_shape)
        return (*rows_shape[:-1], self.output_dim)

    def copy_experts(self, bank, origins):
        """Makes each expert i a copy of expert origins[i] of another bank."""
        for layer, origin in zip(self.layers, origins, strict=True):
            layer.set_weights(bank.layers[origin].get_weights())
            copy_trainable(bank.layers[origin], layer)

    def get_config(self):
        # The experts as they are, so that what is made from it can load their weights.
        changes = [self._changes(layer) for layer in self.layers]
        config = {**super().get_config(), "num_experts": self.num_experts, "layer": self._template}
        if all(change == changes[0] for change in changes):
            config["layer"] = _with_changes(self._template, changes[0])
        else:
            config["changes"] = changes
        return config

    def _changes(self, layer):
        """What an expert has that it was not cloned with: dict by the names of the layers in it."""
        config = keras.saving.serialize_keras_object(layer)
        config["config"]["name"] = self._template["config"]["name"]
        before, changes = _changeable(self._template), {}
        for name, now in _changeable(config).items():
            # A Sequential has a layer more once it is built, for its input.
            old = before.get(name, now)
            new = {key: value for key, value in now.items() if value != old.get(key)}
            if new:
                changes[name] = new
        return changes

    @classmethod
    def from_config(cls, config):
        # Of a copy: Keras empties the configuration of a functional model that it reads.
        layer = keras.saving.deserialize_keras_object(copy.deepcopy(config["layer"]))
        _keep_lora_alpha(layer, config["layer"])
        return super().from_config({**config, "layer": layer})


def _bare(config):
    """A copy of a configuration without what is of one object alone, and not of all its clones.

    While Keras loads a model it marks what it sees twice, and tells objects apart by their place in
    memory, which may have had another one before (checked with Keras 3.10 to 3.15). And clones of a
    compiled model would be compiled, and their empty metrics among those of the model around them.
    """
    if isinstance(config, dict):
        of_one = ("shared_object_id", "compile_config")
        return {k: _bare(value) for k, value in config.items() if k not in of_one}
    if isinstance(config, (list, tuple)):
        return type(config)(_bare(value) for value in config)
    return config


def _reseeded(config, number):
    """A copy of a configuration, each integer seed in it replaced by that of clone `number`."""
    if isinstance(config, dict):
        return {
            key: derived_seeds(value, number, 1)[0]
            if key == "seed" and isinstance(value, int)
            else _reseeded(value, number)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_reseeded(value, number) for value in config)
    return config


# What `quantize` and `enable_lora` change in the configuration of a layer.
_CHANGEABLE = ("dtype", "quantization_config", "lora_rank", "lora_alpha", "changes")


def _changeable(config):
    """What of the configurations of layers may change, by the name of the layer."""
    if isinstance(config, (list, tuple)):
        return {name: found for value in config for name, found in _changeable(value).items()}
    if not isinstance(config, dict):
        return {}
    found = _changeable(list(config.values()))
    if _is_of_layer(config):
        found[str(config["name"])] = {key: config[key] for key in _CHANGEABLE if key in config}
    return found


def _is_of_layer(config):
    # In a functional model the entry around a layer's configuration has the name as well.
    return "name" in config and "class_name" not in config


def _with_changes(config, changes):
    """A copy of a configuration, each layer in it with the changes of its name."""
    if isinstance(config, dict):
        own = changes.get(str(config["name"]), {}) if _is_of_layer(config) else {}
        return {key: _with_changes(value, changes) for key, value in config.items()} | own
    if isinstance(config, (list, tuple)):
        return type(config)(_with_changes(value, changes) for value in config)
    return config


def _keep_lora_alpha(layer, config):
    """Sets what Keras forgets when it builds a layer with LoRA (3.15): it takes the rank again."""
    found = _changeable(config)
    for name, part in layers_by_name(layer, keras.layers.Layer).items():
        alpha = found.get(config["config"]["name"] if part is layer else name, {}).get("lora_alpha")
        if alpha is not None and getattr(part, "lora_enabled", False):
            part.lora_alpha = alpha
