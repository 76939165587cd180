"""What the logs of a model show of how evenly a mixture uses its experts."""

import weakref

import keras
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_weight
from keras_moe.backend import STATIC_SHAPES, collectives, layer_metrics, tracing
from keras_moe.contract.own_losses import OwnLosses, called_model, layers_by_name


class CountsBalance(layer_metrics.HasStateOfMetrics, OwnLosses):
    """Counts the balance of a layer's calls once the losses of these calls are read.

    A class that a layer inherits from before `keras.layers.Layer`. Training and evaluation read the
    losses; `predict` does not, nor do most callbacks that call a model in between, whose calls are
    to leave the logs of `fit` as they are.
    """

    def set_balance(self, importance_loss_weight, load_loss_weight, drops):
        """Makes the metric, and checks the weights of the losses; `drops`: if choices may be."""
        self.importance_loss_weight = check_weight("importance_loss_weight", importance_loss_weight)
        self.load_loss_weight = check_weight("load_loss_weight", load_loss_weight)
        names = ["cv_importance", "cv_load", "max_over_mean_load"]
        self._balance = Balance(self.name, [*names, "fraction_dropped"] if drops else names)
        self._uncounted = _Uncounted()

    def add_balance(self, routing, fraction_dropped, training):
        """Adds the balance losses of a call, and has its balance logged where `training` is given.

        Args:
            routing: The `Routing`.
            fraction_dropped: The part of the choices that found no place, or `None`.
            training: As the layer is called.
        """
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
        self._add_to_metric(balance)

    def _add_to_metric(self, values):
        self._balance_has_own_name()
        if tracing.current_graph() is self._uncounted.graph:
            self._uncounted.calls.append(values)
        elif not STATIC_SHAPES:  # A loop or a branch, which state alone can leave, under JAX none.
            self._balance.update_state(values)

    def on_call_begins(self):
        self._uncounted.begin(tracing.current_graph())

    def on_losses_read(self):
        if tracing.current_graph() is self._uncounted.graph:
            for values in self._uncounted.calls:
                self._balance.update_state(values)
            self._uncounted.calls.clear()

    def _balance_has_own_name(self):
        """Names the metrics of a model apart where layers have equal names, as in two clones."""
        model = called_model()
        if model is None or self._uncounted.named_for() is model:
            return
        self._uncounted.named_for = weakref.ref(model)
        layers = layers_by_name(model, CountsBalance)
        names = [layer.name for layer in layers.values()]
        for name, layer in layers.items():
            if names.count(layer.name) > 1:
                layer._balance.layer_name = name


class _Uncounted:
    """The values of the calls that are not in the metric yet, and the graph that they are of."""

    def __init__(self):
        self.named_for = lambda: None
        self.begin(None)

    def begin(self, graph):
        self.graph = graph
        self.calls = []


class Balance(layer_metrics.StateOfLayer, keras.metrics.Metric):
    """Several numbers, averaged over the batches.

    A single metric for all of them, whose result is a dict: `evaluate` lists a layer's metrics once
    for each layer around it, but the entries of a dict once.

    Args:
        layer_name: What the names of the numbers begin with.
        names: List of the names.

    Attributes:
        layer_name: May be set later.
    """

    def __init__(self, layer_name, names):
        # At least float32: bfloat16 counts no further than 256 batches.
        dtype = keras.backend.result_type(keras.config.floatx(), "float32")
        super().__init__(name=f"{layer_name}/balance", dtype=dtype)
        self.layer_name = layer_name
        self.names = names
        shape = (len(names),)
        self.total = self.add_variable(shape, "zeros", dtype, name="total")
        self.count = self.add_variable(shape, "zeros", dtype, name="count")

    def update_state(self, values):
        """Adds the values of a batch, a dict; a name that is not in it has none in this batch."""
        counts = [float(name in values) for name in self.names]
        values = [ops.cast(values.get(name, 0.0), self.dtype) for name in self.names]
        self.total.assign_add(ops.stack(values))
        self.count.assign_add(ops.convert_to_tensor(counts, self.dtype))

    def result(self):
        """Returns a dict from `<layer>/<name>` to the average, 0 where there is none."""
        means = ops.unstack(ops.divide_no_nan(self.current(self.total), self.current(self.count)))
        return {
            f"{self.layer_name}/{name}": mean for name, mean in zip(self.names, means, strict=True)
        }
