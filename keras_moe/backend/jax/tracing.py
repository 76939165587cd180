"""Which function is being traced, and in which: private (checked with JAX 0.6 to 0.12)."""

import jax
from jax._src import core


def current_graph():
    """What is being traced here; `None` where operations run at once."""
    trace = core.trace_ctx.trace
    return None if isinstance(trace, core.EvalTrace) else trace


def can_be_read(value):
    """Whether a tensor is a value here: not one of a loop, a branch or a function inside."""
    if not isinstance(value, jax.core.Tracer):
        return True
    trace = core.trace_ctx.trace
    while trace is not None and trace is not value._trace:
        trace = getattr(trace, "parent_trace", None)
    return trace is not None
