"""Of products of parameters `make test` tries a part that covers them; the rest is exhaustive.

Tests marked `covering` run as many combinations as show each pair of values; under JAX, where each
is compiled anew, as many as show each value. `covering(...)` takes combinations chosen by hand.
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
    marked = [item for item in marked if not item.get_closest_marker("exhaustive")]
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


def covering(usual=None, indirect=False, **axes):
    """Parametrizes a test by all combinations, of which all but the usual ones are exhaustive.

    Args:
        usual: Combinations, by their ids. If `None`, the first values together, the second ones,
            and so on, those of shorter axes over and over again.
        indirect: As of `pytest.mark.parametrize`.
        axes: The values of each argument of the test, in a list, or in a dict by their ids.
    """
    axes = {
        name: values if isinstance(values, dict) else {str(value): value for value in values}
        for name, values in axes.items()
    }
    if usual is None:
        number = max(map(len, axes.values()))
        cycles = [itertools.cycle(values) for values in axes.values()]
        usual = itertools.islice(zip(*cycles, strict=True), number)
    usual = {tuple(map(str, ids)) for ids in usual}
    for values, chosen in zip(axes.values(), zip(*usual, strict=True), strict=True):
        assert set(chosen) <= set(values), f"No value of this id: {set(chosen) - set(values)}"
    cases = [
        pytest.param(
            *(values[name] for values, name in zip(axes.values(), ids, strict=True)),
            id="-".join(ids),
            marks=() if ids in usual else pytest.mark.exhaustive,
        )
        for ids in itertools.product(*axes.values())
    ]
    return pytest.mark.parametrize(list(axes), cases, indirect=indirect)


def usually(usual, others):
    """Values of a parameter: `usual` ones, and others that are exhaustive."""
    return [*usual, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in others)]


def few_in_jax(values, usual):
    """Values of a parameter, by their ids; under JAX all but the usual ones are exhaustive.

    For tests that compile for seconds there what other tests have tried of each value by itself.
    """
    assert set(usual) <= set(values), f"No value of this id: {set(usual) - set(values)}"
    left_out = set(values) - set(usual) if keras.config.backend() == "jax" else set()
    return [
        pytest.param(value, id=name, marks=[pytest.mark.exhaustive] if name in left_out else [])
        for name, value in values.items()
    ]


def draws(number, in_jax):
    """How many examples hypothesis tries: fewer under JAX, where each is compiled anew."""
    return in_jax if keras.config.backend() == "jax" else number
