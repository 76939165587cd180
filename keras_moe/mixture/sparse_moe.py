"""The sparsely-gated mixture-of-experts layer."""

import contextlib
import functools
import math
import threading

import keras
from keras import ops

from keras_moe import dispatch, losses
from keras_moe.arguments import check_capacity_factor, check_size, check_weight
from keras_moe.contract import outer_recomputation
from keras_moe.contract.freezing import FreezableParts, call_once
from keras_moe.contract.inputs import as_input, as_mask, check_positions, refuse_ragged
from keras_moe.contract.own_losses import OwnLosses, added_losses
from keras_moe.dispatch.recomputation import recomputing
from keras_moe.distribute import collectives
from keras_moe.experts.feed_forward import FeedForwardExperts
from keras_moe.gating.routing import check_routing
from keras_moe.mixture.balance_metric import CountsBalance
from keras_moe.mixture.mix import mix
from keras_moe.mixture.parts import (
    check_number,
    check_parallel,
    make_experts,
    make_gating,
    make_shared_experts,
)


@keras.saving.register_keras_serializable("keras_moe")
class SparseMoE(FreezableParts, CountsBalance, OwnLosses, keras.layers.Layer):
    """Sparsely-gated mixture of experts (Shazeer et al., 2017, equation 1).

    y = Σ_i G(x)_i · E_i(x), at every position of the input: a gating network G picks K of the N
    experts E for each example, and only those are computed. Two losses keep the experts equally
    used: `importance_loss_weight`·CV(Importance)² (equation 7) and
    `load_loss_weight`·CV(Load)² (equation 11).

    Example:
    ```python
    model = keras.Sequential([
        keras.layers.Embedding(10_000, 128),
        keras_moe.SparseMoE(num_experts=64, hidden_units=256, k=4),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2, activation="softmax"),
    ])
    model.compile("adam", "sparse_categorical_crossentropy")
    ```

    The logs of `fit` and `evaluate` show the balance of the experts, averaged over the batches:
    `<layer>/cv_importance`, `<layer>/cv_load` and `<layer>/max_over_mean_load`, the columns of
    Table 6 in the paper; with a capacity also `<layer>/fraction_dropped`. A call with `training`
    given counts once `losses` of the layer, or of the model around it, are read: so training and
    evaluation do, and neither `predict` nor a call by a callback changes what `fit` logs. In a loop
    of a graph, as of `keras.layers.RNN`, every call counts that has `training` given.

    Args:
        num_experts: N, the number of experts.
        hidden_units: Hidden units of each expert: an integer, or a sequence of integers for
            several hidden layers. Not with `experts`.
        k: K, the number of experts per example, from 1 to N. `"softmax"` and a gating layer of
            your own have their own.
        activation: Activation of the experts' hidden layers, also a gated one, as `"swiglu"`: see
            `FeedForwardExperts`.
        output_dim: Width of the output. Defaults to the width of the input.
        use_bias: Whether the experts' layers add biases.
        gating: `"noisy_top_k"` (`NoisyTopKGating`), `"softmax"` (`SoftmaxGating`: every expert
            computes every example), `"strictly_balanced"` (`StrictlyBalancedGating`), or a gating
            layer that supports masking: called with x [T, D], in which masked examples are zeros,
            `training` and `mask` [T], it returns a `Routing`.
        experts: What to use in place of `FeedForwardExperts`: any layer or model, from [rows, D]
            to [rows, output_dim], of which each expert becomes a clone (`LayerExperts`); or a bank
            of experts, a layer with an attribute `num_experts`, called with `rows` [M, D], sorted
            by expert, and `rows_per_expert` [N], that returns [M, output_dim], zeros in the rows
            behind the last expert's. For a capacity or shared experts it also has to take `rows`
            [N, C, D] alone. Its `compute_output_shape` takes the shape of `rows` alone.
        num_shared_experts: Number of experts more that compute every example, beside the N. Their
            outputs are added as they are.
        importance_loss_weight: w_importance.
        load_loss_weight: w_load.
        router_z_loss_weight: Weight of `losses.router_z_loss`, which keeps the gating's logits
            small.
        capacity_factor: Bounds the rows of an expert in training at
            C = ceil(capacity_factor·K·T / N), so that all shapes are static, as XLA and TPUs need
            them. What finds no place is dropped and adds nothing to the output: later choices
            before earlier ones, later rows before earlier ones. Evaluation never drops. `None`
            drops nothing anywhere.
        recompute: Whether the backward pass computes the experts' hidden activations again instead
            of storing them (appendix D): memory for time.
        expert_parallel: Whether each of the R replicas of a `tf.distribute` strategy holds N/R of
            the experts, and all send each other the rows for them (section 3.1). Wrap the optimizer
            by `distribute.ExpertParallel`. Everything but the experts is mirrored; without a
            strategy nothing changes. Experts of your own: a bank made with `expert_parallel`.
        kernel_initializer: Initializer of each expert's kernels.
        bias_initializer: Initializer of each expert's biases.
        kernel_regularizer: Regularizer of each expert's kernels.
        bias_regularizer: Regularizer of each expert's biases.
        seed: Integer, seed of the gating's noise.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        gating: The gating layer; `gating.gate_kernel` and `gating.noise_kernel` [D, N].
        experts: The bank of experts; `experts.kernels` is a list of [N, D, F], …, [N, F, D_out].
        shared_experts: The bank of shared experts, or `None`.
        supports_jit: Whether the layer compiles under XLA: with a capacity, unless its parts are
            your own and don't.

    Call arguments:
        x: Tensor of rank 2 to 4, [..., D], dense or sparse: every position is an example. Whatever
            its dtype, the layer computes in its own. D has to be known when the layer is built.
        training: Whether to add noise to the gating.
        mask: Boolean tensor [...] or `None`. A position with `False` reaches no expert, takes no
            part in the balance, and gives zeros.

    Returns:
        Tensor [..., output_dim] in the compute dtype. `losses` then holds the weighted importance
        loss and load loss, in that order, then any other. With both weights 0 neither is there.

    Raises:
        ValueError: If a size is not an integer of at least 1, K not between 1 and N, a loss weight
            negative, the capacity factor not above 0; if the gating or the bank has another number
            of experts; if `experts` and `hidden_units` are both given or both missing; if the
            gating's `Routing`, the mask or the input has a wrong shape.
    """

    def __init__(
        self,
        num_experts,
        hidden_units=None,
        k=4,
        *,
        activation="relu",
        output_dim=None,
        use_bias=False,
        gating="noisy_top_k",
        experts=None,
        num_shared_experts=0,
        importance_loss_weight=0.1,
        load_loss_weight=0.1,
        router_z_loss_weight=0.0,
        capacity_factor=None,
        recompute=False,
        expert_parallel=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        seed=None,
        **kwargs,
    ):
        if kwargs.get("name") is None:
            kwargs["name"] = self._default_name()
        super().__init__(**kwargs)
        self.num_experts = check_size("num_experts", num_experts)
        self.importance_loss_weight = check_weight("importance_loss_weight", importance_loss_weight)
        self.load_loss_weight = check_weight("load_loss_weight", load_loss_weight)
        self.router_z_loss_weight = check_weight("router_z_loss_weight", router_z_loss_weight)
        self.num_shared_experts = check_size("num_shared_experts", num_shared_experts, least=0)
        self.capacity_factor = check_capacity_factor(capacity_factor)
        self.expert_parallel = expert_parallel
        self.seed = seed
        self.supports_masking = True

        self._recording = threading.local()
        self._gating_name = gating if isinstance(gating, str) else None
        self.gating = self._make_gating(gating, k)
        self.k = getattr(self.gating, "k", k)
        self._feed_forward = experts is None
        self.experts = make_experts(
            experts,
            self.num_experts,
            hidden_units,
            {
                "output_dim": output_dim,
                "activation": activation,
                "use_bias": use_bias,
                "kernel_initializer": kernel_initializer,
                "bias_initializer": bias_initializer,
                "kernel_regularizer": kernel_regularizer,
                "bias_regularizer": bias_regularizer,
                "recompute": recompute,
            },
            static_shapes=self.capacity_factor is not None,
            expert_parallel=self.expert_parallel,
            dtype=self.dtype_policy,
        )
        for part in (self.gating, self.experts):
            check_number(part, "num_experts", self.num_experts)
        if self.expert_parallel:
            check_parallel(self.gating)
        self.shared_experts = make_shared_experts(self.experts, self.num_shared_experts)
        self.supports_jit = self.gating.supports_jit and self.experts.supports_jit

        names = ["cv_importance", "cv_load", "max_over_mean_load"]
        if self.capacity_factor is not None:
            names.append("fraction_dropped")
        self.log_balance(names)
        self.freeze_parts()

    def _default_name(self):
        """Like Keras' own, which would be "sparse_mo_e" and stand in every log."""
        name = type(self).__name__.replace("MoE", "_moe").lower()
        number = keras.backend.get_uid(name)
        return name if number == 1 else f"{name}_{number - 1}"

    def _make_gating(self, gating, k):
        return make_gating(
            gating,
            self.num_experts,
            k,
            static_shapes=self.capacity_factor is not None,
            router_z_loss_weight=self.router_z_loss_weight,
            seed=self.seed,
        )

    def __call__(self, x, *args, **kwargs):
        refuse_ragged(self, x)  # Before Keras builds the layer, and also where `x` is symbolic.
        with outer_recomputation.recording(x):
            return super().__call__(x, *args, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` the backward pass computes the experts again, and no more.

        Keras would run all of `call` again: the balance losses would have no gradient.
        """
        if super().rematerialized_call(layer_call, *args, **kwargs) is layer_call:
            return layer_call
        banks = [self.experts, self.shared_experts]
        return recomputing(layer_call, [bank for bank in banks if hasattr(bank, "recompute")])

    def build(self, input_shape):
        check_positions(self, input_shape)
        width = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, max_ndim=4, axes={-1: width})
        # By a symbolic call, since a part of the user's own may have no `build`.
        rows = keras.KerasTensor((None, width), self.compute_dtype)
        if not self.gating.built:
            call_once(self.gating, rows)
        if not self.experts.built:
            call_once(self.experts, rows, keras.KerasTensor((self.num_experts,), "int32"))
        if self.shared_experts is not None and not self.shared_experts.built:
            numbers = keras.KerasTensor((self.num_shared_experts,), "int32")
            call_once(self.shared_experts, rows, numbers)

    def call(self, x, training=None, mask=None):
        x = as_input(self, x)
        examples, mask = self._flatten(x, mask)
        routing = self.gating(examples, training=training, mask=mask)
        check_routing(routing, self.num_experts)
        for routings in getattr(self._recording, "lists", ()):
            routings.append(routing)
        drops = training and self.capacity_factor is not None
        with self._unrecorded():
            y, fraction_dropped = mix(
                self.experts,
                examples,
                routing,
                training=bool(training),
                capacity=functools.partial(self._capacity, routing) if drops else None,
                expert_parallel=self.expert_parallel,
            )
            y = ops.cast(y, self.compute_dtype)
            if self.shared_experts is not None:
                y += self._call_shared_experts(examples, mask)
        self._add_balance(routing, fraction_dropped, training)
        if training and outer_recomputation.is_lost():
            self._refuse_losses()
        return ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))

    def _unrecorded(self):
        """Where others recompute the layer, they do the experts; whose losses must be recorded."""
        adds_losses = not isinstance(self.experts, FeedForwardExperts)
        return contextlib.nullcontext() if adds_losses else outer_recomputation.unrecorded()

    def _refuse_losses(self):
        if added_losses(self):
            raise ValueError(
                "Inside of `tf.recompute_grad`, `keras.remat` or a model made in a "
                f"`keras.RematScope` the losses of {self.name!r} only have gradients where its "
                "input is an argument of what is recomputed; recompute what is before the layer "
                "apart, and the layer's experts by `recompute=True`, or set the weights of all its "
                "losses to 0. Received: an input that is computed inside"
            )

    def _capacity(self, routing, num_examples):
        # Of pairs the product; a gating of the user's own need not have the attribute.
        k = getattr(self.gating, "k", ops.shape(routing.expert_index)[1])
        k = math.prod(k) if isinstance(k, (tuple, list)) else k
        return dispatch.expert_capacity(self.capacity_factor, k, num_examples, self.num_experts)

    def _call_shared_experts(self, examples, mask):
        shape = (self.num_shared_experts, *ops.shape(examples))
        y = ops.sum(self.shared_experts(ops.broadcast_to(examples, shape)), axis=0)
        return y if mask is None else ops.where(mask[:, None], y, ops.zeros_like(y))

    def route(self, x, training=False, mask=None):
        """Returns the `Routing` of an input, the positions flattened to T examples.

        Args:
            x: Tensor [..., D], as for a call, or an array or list.
            training: Whether to add noise.
            mask: Boolean tensor [...] or `None`.
        """
        x = as_input(self, x)
        check_positions(self, x.shape)
        if not self.built:
            self.build(x.shape)
        examples, mask = self._flatten(x, mask)
        return self.gating(examples, training=training, mask=mask)

    @contextlib.contextmanager
    def recorded_routings(self):
        """Collects the `Routing` of every call that a model makes of this layer in this thread.

        Call the model eagerly inside (`model(x)`, not `model.predict(x)`): a graph would give
        symbolic tensors.

        Example:
        ```python
        with layer.recorded_routings() as routings:
            model(x)
        print(routings[0].load)
        ```

        Yields:
            A list, to which each call appends.
        """
        routings, before = [], getattr(self._recording, "lists", ())
        self._recording.lists = (*before, routings)
        try:
            yield routings
        finally:
            self._recording.lists = before

    def _flatten(self, x, mask):
        """[..., D] and [...] to [T, D] and [T]."""
        x_flat = ops.reshape(x, (-1, x.shape[-1]))
        if mask is None:
            return x_flat, None
        mask = ops.reshape(as_mask(mask, x), (-1,))
        # A zero in place of a NaN: 0·NaN would carry it into the gradients.
        return ops.where(mask[:, None], x_flat, ops.zeros_like(x_flat)), mask

    def _add_balance(self, routing, fraction_dropped, training):
        # The balance of the batch of all replicas: the mean of theirs would be another (a square).
        balance = ops.stack([routing.importance, routing.load])
        importance, load = ops.unstack(collectives.all_sum(balance))
        cv2_importance, cv2_load = losses.cv_squared(importance), losses.cv_squared(load)
        if self.importance_loss_weight or self.load_loss_weight:
            self.add_loss(losses.in_floatx(self.importance_loss_weight * cv2_importance))
            self.add_loss(losses.in_floatx(self.load_loss_weight * cv2_load))
        if training is None:
            return  # A bare call or `model.export`; `fit`, `evaluate` and `predict` say which.
        balance = {
            "cv_importance": ops.sqrt(cv2_importance),
            "cv_load": ops.sqrt(cv2_load),
            "max_over_mean_load": losses.max_over_mean(load),
        }
        if fraction_dropped is not None:
            balance["fraction_dropped"] = fraction_dropped
        self.add_to_balance(balance)

    def compute_output_shape(self, input_shape):
        width = self.experts.compute_output_shape((None, input_shape[-1]))[-1]
        return (*input_shape[:-1], width)

    def get_config(self):
        config = {
            **super().get_config(),
            "num_experts": self.num_experts,
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "num_shared_experts": self.num_shared_experts,
            "capacity_factor": self.capacity_factor,
            "expert_parallel": self.expert_parallel,
            "seed": self.seed,
        }
        if self._gating_name:
            config.update(
                gating=self._gating_name, k=self.k, router_z_loss_weight=self.router_z_loss_weight
            )
        else:
            config["gating"] = keras.saving.serialize_keras_object(self.gating)
        # A bank in int8 can't be made by the arguments of this layer.
        if not self._feed_forward or self.experts.quantization_mode is not None:
            parts = {"experts": self.experts, "shared_experts": self.shared_experts}
            serialize = keras.saving.serialize_keras_object
            return config | {name: serialize(p) for name, p in parts.items() if p is not None}
        bank = self.experts.get_config()
        return {**config, **{name: bank[name] for name in _FEED_FORWARD_ARGUMENTS}}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for part in ("gating", "experts", "shared_experts"):
            if isinstance(config.get(part), dict):
                # Not built yet: `build` does that, also for a part without a `build` of its own.
                unbuilt = {key: v for key, v in config[part].items() if key != "build_config"}
                config[part] = keras.saving.deserialize_keras_object(unbuilt)
        shared_experts = config.pop("shared_experts", None)
        if shared_experts is None:
            return super().from_config(config)
        layer = super().from_config({**config, "num_shared_experts": 0})
        layer.num_shared_experts = shared_experts.num_experts
        layer.shared_experts = shared_experts
        return layer


# What `SparseMoE` hands on to its default bank.
_FEED_FORWARD_ARGUMENTS = (
    "hidden_units",
    "output_dim",
    "activation",
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "recompute",
)
