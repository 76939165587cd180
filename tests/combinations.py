"""Tests marked `covering` run as many combinations of their parameters as show each pair of values.

Under JAX, where each is compiled anew, as many as show each value. The others are exhaustive.
"""

import itertools

import keras
import pytest


def left_out(tests, strength):
    """Names the tests that can be left out.

    Args:
        tests: List with a dict for each test, from its parameters to their values.
        strength: 1 if the others are to have each value, 2 if each pair of values.

    Returns:
        List of positions in `tests`.
    """
    parts = [
        {size: set(itertools.combinations(sorted(test.items()), size)) for size in (1, 2)}
        for test in tests
    ]
    unseen = {size: set().union(*(part[size] for part in parts)) for size in (1, 2)}
    others = list(range(len(tests)))
    while unseen[1] or unseen[strength]:
        # Values have to be new before pairs are, so that few tests mix them well.
        best = max(others, key=lambda i: [len(parts[i][size] & unseen[size]) for size in (1, 2)])
        others.remove(best)
        for size in (1, 2):
            unseen[size] -= parts[best][size]
    return others


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what can be left out."""
    strength = 1 if keras.config.backend() == "jax" else 2
    marked = [item for item in items if item.get_closest_marker("covering")]
    for _, tests in itertools.groupby(marked, lambda item: item.nodeid.partition("[")[0]):
        tests = list(tests)
        if len(tests) > 1:
            for i in left_out(list(map(values, tests)), strength):
                tests[i].add_marker("exhaustive")


def values(test):
    """The values of a test; what one `parametrize` sets together is one value."""
    found = {}
    for mark in test.iter_markers("parametrize"):
        names = mark.args[0]
        names = names.split(",") if isinstance(names, str) else names
        found[str(names)] = tuple(id(test.callspec.params[name.strip()]) for name in names)
    return found
