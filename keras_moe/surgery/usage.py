"""Which experts a text needs."""

import numpy as np

from keras_moe.arguments import check_weight
from keras_moe.mixture import inspection
from keras_moe.surgery.resizing import size_in_units


def used_experts(model, x, min_share=0.0):
    """Finds the experts of a model that some data use, for `prune` to keep.

    Example:
    ```python
    used = keras_moe.used_experts(model, x_val)
    print({name: len(experts) for name, experts in used.items()})  # of each mixture
    ```

    Args:
        model: A built model.
        x: One batch, as the model takes it, or batches as in `callbacks.ExpertLoadReport`; no
            labels are needed.
        min_share: An expert counts as used if it gets more than this part of the even share of
            rows, K·T/N. 0: if it gets any.

    Returns:
        Dict from the name of each `SparseMoE` to an integer array, the used experts in order of
        index; of a `HierarchicalMoE` the groups with a used expert. Where a model calls a layer
        several times, its calls are summed.

    Raises:
        ValueError: If the model has no `SparseMoE`, `min_share` is negative, or `x` can be read
            only once or never ends.
    """
    check_weight("min_share", min_share)
    watch = inspection.watch(model)
    loads = watch.load(inspection.check_batches(x))
    used = {}
    for name, load in loads.items():
        _, unit_size = size_in_units(watch.mixtures[name])
        units = (load > min_share * load.mean()).reshape(-1, unit_size)
        used[name] = np.flatnonzero(units.any(axis=1))
    return used
