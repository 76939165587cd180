"""Products of parameters of which `make test` tries a part that has every value of each."""

import itertools

import pytest


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
