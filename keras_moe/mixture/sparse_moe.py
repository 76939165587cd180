"""The sparsely-gated mixture-of-experts layer."""

import keras
from keras import ops

from keras_moe.arguments import check_capacity_factor, check_size, check_weight
from keras_moe.backend import devices, outer_recomputation
from keras_moe.contract.freezing import FreezableParts, build_once
from keras_moe.contract.inputs import as_examples, as_input, check_positions, refuse_ragged
from keras_moe.contract.symbolic_calls import empty_output, is_symbolic, number_of_rows
from keras_moe.gating.routing import check_routing
from keras_moe.mixture.balance_metric import CountsBalance
from keras_moe.mixture.mix import mix
from keras_moe.mixture.outer_recomputation import RecomputesExperts
from keras_moe.mixture.parts import (
    capacity_of,
    check_parts,
    config_of_parts,
    make_experts,
    make_gating,
    make_shared_experts,
    with_parts,
)
from keras_moe.mixture.recorded_routings import RecordsRoutings


@keras.saving.register_keras_serializable("keras_moe")
class SparseMoE(FreezableParts, RecomputesExperts, RecordsRoutings, CountsBalance, keras.Layer):
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

    The logs of `fit` and `evaluate` show the balance of the experts, averaged over the batches, of
    training with the gating's noise and of validation without: `<layer>/cv_importance`,
    `<layer>/cv_load` and `<layer>/max_over_mean_load`, the columns of Table 6; with a capacity also
    `<layer>/fraction_dropped`. A call with `training` given counts once the `losses` of the layer
    or its model are read, as `fit` and `evaluate` do; in a loop of a graph it always counts.

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
        expert_parallel: Whether each of R replicas holds N/R of the experts, and all send each
            other the rows for them (section 3.1); all else is mirrored. Replicas are those of a
            `tf.distribute` strategy, with the optimizer wrapped by `distribute.ExpertParallel`, or
            with JAX those of a `keras.distribution`, set before the layer is built. Experts of your
            own: a bank made with `expert_parallel`.
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
        self.router_z_loss_weight = check_weight("router_z_loss_weight", router_z_loss_weight)
        self.num_shared_experts = check_size("num_shared_experts", num_shared_experts, least=0)
        self.capacity_factor = check_capacity_factor(capacity_factor)
        self.expert_parallel = expert_parallel
        self.seed = seed
        self.supports_masking = True
        self._gating_name = gating if isinstance(gating, str) else None
        self.gating = self._make_gating(gating, k)
        self.k = getattr(self.gating, "k", k)
        self._feed_forward = experts is None
        self.experts = self._make_experts(
            experts,
            hidden_units,
            output_dim=output_dim,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            recompute=recompute,
        )
        check_parts(self)
        self.shared_experts = make_shared_experts(self.experts, self.num_shared_experts)
        self.supports_jit = self.gating.supports_jit and self.experts.supports_jit
        self.set_balance(importance_loss_weight, load_loss_weight, self.capacity_factor is not None)
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

    def _make_experts(self, experts, hidden_units, **options):
        return make_experts(
            experts,
            self.num_experts,
            hidden_units,
            options,
            static_shapes=self.capacity_factor is not None,
            expert_parallel=self.expert_parallel,
            dtype=self.dtype_policy,
        )

    def __call__(self, x, *args, **kwargs):
        refuse_ragged(self, x)  # Before Keras builds the layer, and also where `x` is symbolic.
        with outer_recomputation.recording(x):
            return super().__call__(x, *args, **kwargs)

    def build(self, input_shape):
        check_positions(self, input_shape)
        width = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, max_ndim=4, axes={-1: width})
        rows = keras.KerasTensor((number_of_rows(), width), self.compute_dtype)
        build_once(self.gating, rows)
        for bank in (self.experts, self.shared_experts):
            if bank is not None:
                build_once(bank, rows, keras.KerasTensor((bank.num_experts,), "int32"))

    def call(self, x, training=None, mask=None):
        if is_symbolic(x):
            return empty_output(self, x)
        with devices.for_any_device(training):
            return self._call(x, training, mask)

    def _call(self, x, training, mask):
        x = as_input(self, x)
        examples, mask = as_examples(x, mask)
        routing = self.gating(examples, training=training, mask=mask)
        check_routing(routing, self.num_experts)
        self.record(routing)
        drops = training and self.capacity_factor is not None
        with self.unrecorded_experts():
            y, fraction_dropped = mix(
                self.experts,
                examples,
                routing,
                training=bool(training),
                capacity=capacity_of(self, routing) if drops else None,
                expert_parallel=self.expert_parallel,
            )
            y = ops.cast(y, self.compute_dtype)
            if self.shared_experts is not None:
                y += self._call_shared_experts(examples, mask)
        self.add_balance(routing, fraction_dropped, training)
        if training:
            self.refuse_lost_losses()
        return ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))

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
        examples, mask = as_examples(x, mask)
        return self.gating(examples, training=training, mask=mask)

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
        return {**config, **config_of_parts(self)}

    @classmethod
    def from_config(cls, config):
        config = with_parts(config)
        shared_experts = config.pop("shared_experts", None)
        if shared_experts is None:
            return super().from_config(config)
        layer = super().from_config({**config, "num_shared_experts": 0})
        layer.num_shared_experts = shared_experts.num_experts
        layer.shared_experts = shared_experts
        return layer
