"""Variables under `keras.distribution` of which each replica holds a part of the rows."""

import contextlib

import keras

from keras_moe.backend import collectives
from keras_moe.distribute.support import check_divides


class _Rows(keras.distribution.ModelParallel):
    """A distribution like another, under which variables are divided along the batch axis.

    Keras asks the distribution for the layout of each variable that is made, and gives the slots of
    an optimizer that of their variable.
    """

    def __init__(self, distribution):
        layout_map = keras.distribution.LayoutMap(distribution.device_mesh)
        super().__init__(layout_map=layout_map, batch_dim_name=distribution.batch_dim_name)
        self._like = distribution

    def get_variable_layout(self, variable):
        axes = (self.batch_dim_name, *[None] * (len(variable.shape) - 1))
        asked = tuple(self._like.get_variable_layout(variable).axes)
        if any(asked) and asked != axes:
            raise ValueError(
                "With `expert_parallel=True` a layer divides its experts among the replicas by "
                f"itself, here as {axes}: leave its variables out of the layout map. Received: a "
                f"layout {asked} for {variable.path!r}"
            )
        return keras.distribution.TensorLayout(axes, self.device_mesh)


@contextlib.contextmanager
def sharded_rows(number, unit="experts"):
    """Inside, variables [number, ...] are divided among replicas, where there are several.

    Args:
        number: The number of rows.
        unit: What one row stands for, for the error message.

    Raises:
        ValueError: If the replicas cannot hold as many rows each, or a layout map has these
            variables otherwise.
    """
    replicas = collectives.num_replicas()
    if replicas == 1:
        yield
        return
    check_divides(replicas, number, unit)
    with _Rows(keras.distribution.distribution()).scope():
        yield


def over_shards(regularizer):
    """The regularizer: it sees all rows."""
    return regularizer
