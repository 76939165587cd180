"""Banks of experts that recompute while a layer around them is called."""

import functools


def recomputing(layer_call, banks):
    """A layer's call, during which banks of experts recompute."""

    @functools.wraps(layer_call)
    def call(*args, **kwargs):
        before = [bank.recompute for bank in banks]
        try:
            for bank in banks:
                bank.recompute = True
            return layer_call(*args, **kwargs)
        finally:
            for bank, recompute in zip(banks, before, strict=True):
                bank.recompute = recompute

    return call
