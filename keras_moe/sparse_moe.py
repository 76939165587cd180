"""The sparsely-gated mixture-of-experts layer."""

import contextlib
import inspect

import keras
from keras import ops

from keras_moe import dispatch, losses
from keras_moe.arguments import check_size, check_weight
from keras_moe.experts import FeedForwardExperts
from keras_moe.routing import NoisyTopKGating, SoftmaxGating, check_routing


@keras.saving.register_keras_serializable("keras_moe")
class SparseMoE(keras.layers.Layer):
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
    Table 6 in the paper. Any call with `training` given updates them, so leave it out of a model's
    call that you export by hand, as `model.export` does.

    Args:
        num_experts: N, the number of experts.
        hidden_units: Hidden units of each expert: an integer, or a sequence of integers for
            several hidden layers. Not with `experts`.
        k: K, the number of experts per example, from 1 to N. `"softmax"` and a gating layer of
            your own have their own.
        activation: Activation of the experts' hidden layers.
        output_dim: Width of the output. Defaults to the width of the input.
        use_bias: Whether the experts' layers add biases.
        gating: `"noisy_top_k"` (`NoisyTopKGating`), `"softmax"` (`SoftmaxGating`: every expert
            computes every example), or a gating layer that supports masking: called with x
            [T, D], in which masked examples are zeros, `training` and `mask` [T], it returns a
            `Routing`.
        experts: A bank of experts to use in place of `FeedForwardExperts`: a layer with an
            attribute `num_experts`, called with `rows` [M, D], sorted by expert, and
            `rows_per_expert` [N], that returns [M, output_dim], zeros in the rows behind the
            last expert's. Its `compute_output_shape` takes the shape of `rows` alone.
        importance_loss_weight: w_importance.
        load_loss_weight: w_load.
        kernel_initializer: Initializer of each expert's kernels.
        bias_initializer: Initializer of each expert's biases.
        kernel_regularizer: Regularizer of the experts' kernels.
        bias_regularizer: Regularizer of the experts' biases.
        seed: Integer, seed of the gating's noise.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        gating: The gating layer; `gating.gate_kernel` and `gating.noise_kernel` [D, N].
        experts: The bank of experts; `experts.kernels` is a list of [N, D, F], …, [N, F, D_out].

    Call arguments:
        x: Float tensor of rank 2 to 4, [..., D]: every position is an example. The width D has to
            be known, all else may be unknown.
        training: Whether to add noise to the gating.
        mask: Boolean tensor [...] or `None`. A position with `False` reaches no expert, takes no
            part in the balance, and gives zeros.

    Returns:
        Tensor [..., output_dim] in the compute dtype. `losses` then holds the weighted importance
        loss and load loss, in that order.

    Raises:
        ValueError: If a size is not an integer of at least 1, K not between 1 and N, a loss weight
            negative; if the gating or the bank has another number of experts; if `experts` and
            `hidden_units` are both given or both missing; if the gating's `Routing`, the mask or
            the input has a wrong shape.
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
        importance_loss_weight=0.1,
        load_loss_weight=0.1,
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
        self.seed = seed
        self.supports_masking = True
        self.supports_jit = False  # The number of rows of an expert depends on the data.

        self._record = None
        self._gating_name = gating if isinstance(gating, str) else None
        self.gating = self._make_gating(gating, k)
        self.k = getattr(self.gating, "k", k)
        self._feed_forward = experts is None
        self.experts = self._make_experts(
            experts,
            hidden_units,
            {
                "output_dim": output_dim,
                "activation": activation,
                "use_bias": use_bias,
                "kernel_initializer": kernel_initializer,
                "bias_initializer": bias_initializer,
                "kernel_regularizer": kernel_regularizer,
                "bias_regularizer": bias_regularizer,
            },
        )
        for part in (self.gating, self.experts):
            if getattr(part, "num_experts", num_experts) != num_experts:
                raise ValueError(
                    f"The layer has {num_experts} experts, but its part {part.name!r} is made for "
                    f"{part.num_experts}. Give both the same `num_experts`."
                )

        self._balance = {
            name: keras.metrics.Mean(name=f"{self.name}/{name}")
            for name in ("cv_importance", "cv_load", "max_over_mean_load")
        }

    def _default_name(self):
        """Like Keras' own, which would be "sparse_mo_e" and stand in every log."""
        name = type(self).__name__.replace("MoE", "_moe").lower()
        number = keras.backend.get_uid(name)
        return name if number == 1 else f"{name}_{number - 1}"

    def _make_experts(self, experts, hidden_units, options):
        if (hidden_units is None) == (experts is None):
            raise ValueError(
                "Give either `hidden_units`, for feed-forward experts, or `experts`, a bank of "
                f"your own. Received: hidden_units={hidden_units}, experts={experts}"
            )
        if experts is None:
            return FeedForwardExperts(
                self.num_experts, hidden_units, **options, dtype=self.dtype_policy, name="experts"
            )
        if not isinstance(experts, keras.layers.Layer) or not hasattr(experts, "num_experts"):
            raise ValueError(
                "`experts` must be a bank: a layer with an attribute `num_experts`. "
                f"Received: {experts!r}"
            )
        defaults = inspect.signature(FeedForwardExperts.__init__).parameters
        idle = [name for name, value in options.items() if value != defaults[name].default]
        if idle:
            raise ValueError(
                "These arguments describe feed-forward experts; a bank of your own has to be given "
                f"them itself. Received, beside `experts`: {', '.join(idle)}"
            )
        return experts

    def _make_gating(self, gating, k):
        if gating == "noisy_top_k":
            return NoisyTopKGating(self.num_experts, k, seed=self.seed, name="gating")
        if gating == "softmax":
            return SoftmaxGating(self.num_experts, name="gating")
        if isinstance(gating, keras.layers.Layer):
            return gating
        raise ValueError(
            f'`gating` must be "noisy_top_k", "softmax" or a gating layer. Received: {gating!r}'
        )

    def build(self, input_shape):
        self._check_shape(input_shape)
        width = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, max_ndim=4, axes={-1: width})
        # By a symbolic call, since a part of the user's own may have no `build`.
        rows = keras.KerasTensor((None, width), self.compute_dtype)
        if not self.gating.built:
            self.gating(rows)
        if not self.experts.built:
            self.experts(rows, keras.KerasTensor((self.num_experts,), "int32"))

    def _check_shape(self, shape):
        if not 2 <= len(shape) <= 4 or shape[-1] is None:
            raise ValueError(
                f"{type(self).__name__} takes inputs of rank 2 to 4 whose last dimension is known. "
                f"Received: shape {tuple(shape)}"
            )
        if self.built and shape[-1] != self.input_spec.axes[-1]:
            raise ValueError(
                f"The layer was built for inputs of width {self.input_spec.axes[-1]}. "
                f"Received: shape {tuple(shape)}"
            )

    def call(self, x, training=None, mask=None):
        examples, mask = self._flatten(x, mask)
        routing = self.gating(examples, training=training, mask=mask)
        check_routing(routing, self.num_experts)
        if self._record is not None:
            self._record(routing)
        plan = dispatch.make_plan(routing, self.num_experts)
        rows = self.experts(dispatch.dispatch(examples, plan), plan.rows_per_expert)
        y = ops.cast(dispatch.combine(rows, routing.gates, plan), self.compute_dtype)
        self._add_balance(routing, training)
        return ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))

    def route(self, x, training=False, mask=None):
        """Returns the `Routing` of an input, the positions flattened to T examples.

        Args:
            x: Float tensor [..., D], as for a call.
            training: Whether to add noise.
            mask: Boolean tensor [...] or `None`.
        """
        x = ops.convert_to_tensor(x, self.compute_dtype)
        self._check_shape(x.shape)
        if not self.built:
            self.build(x.shape)
        examples, mask = self._flatten(x, mask)
        return self.gating(examples, training=training, mask=mask)

    @contextlib.contextmanager
    def recorded_routings(self):
        """Collects the `Routing` of every call that a model makes of this layer.

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
        routings = []
        self._record = routings.append
        try:
            yield routings
        finally:
            self._record = None

    def _flatten(self, x, mask):
        """[..., D] and [...] to [T, D] and [T]."""
        x_flat = ops.reshape(x, (-1, x.shape[-1]))
        if mask is None:
            return x_flat, None
        mask = ops.convert_to_tensor(mask, "bool")
        positions = x.shape[:-1]
        if len(mask.shape) != len(positions) or any(
            None not in sizes and sizes[0] != sizes[1]
            for sizes in zip(mask.shape, positions, strict=True)
        ):
            raise ValueError(
                "The mask must have one entry for each position of the input: its shape without "
                f"the last dimension. Received: x of shape {x.shape}, mask of shape {mask.shape}"
            )
        mask = ops.reshape(mask, (-1,))
        # A zero in place of a NaN: 0·NaN would carry it into the gradients.
        return ops.where(mask[:, None], x_flat, ops.zeros_like(x_flat)), mask

    def _add_balance(self, routing, training):
        cv2_importance = losses.cv_squared(routing.importance)
        cv2_load = losses.cv_squared(routing.load)
        self.add_loss(self.importance_loss_weight * cv2_importance)
        self.add_loss(self.load_loss_weight * cv2_load)
        if training is None:
            return  # A bare call or `model.export`; `fit`, `evaluate` and `predict` say which.
        self._balance["cv_importance"].update_state(ops.sqrt(cv2_importance))
        self._balance["cv_load"].update_state(ops.sqrt(cv2_load))
        self._balance["max_over_mean_load"].update_state(losses.max_over_mean(routing.load))

    def compute_output_shape(self, input_shape):
        width = self.experts.compute_output_shape((None, input_shape[-1]))[-1]
        return (*input_shape[:-1], width)

    def get_config(self):
        config = {
            **super().get_config(),
            "num_experts": self.num_experts,
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "seed": self.seed,
        }
        if self._gating_name:
            config.update(gating=self._gating_name, k=self.k)
        else:
            config["gating"] = keras.saving.serialize_keras_object(self.gating)
        if not self._feed_forward:
            return {**config, "experts": keras.saving.serialize_keras_object(self.experts)}
        bank = self.experts.get_config()
        return {**config, **{name: bank[name] for name in _FEED_FORWARD_ARGUMENTS}}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for part in ("gating", "experts"):
            if isinstance(config.get(part), dict):
                # Not built yet: `build` does that, also for a part without a `build` of its own.
                unbuilt = {key: v for key, v in config[part].items() if key != "build_config"}
                config[part] = keras.saving.deserialize_keras_object(unbuilt)
        return cls(**config)


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
)
