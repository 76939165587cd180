"""Every public name has its place in the reference, and an example that `test_pages.py` runs."""

import inspect
import re

import pages
import pytest

import keras_moe

# Of `losses`, which names no `__all__`: what the package uses itself.
INTERNAL = {"keras_moe.losses.in_floatx", "keras_moe.losses.normal_cdf"}


def public_names():
    """The names of the package, and in place of a module those in it."""
    for name in keras_moe.__all__:
        thing = getattr(keras_moe, name)
        if not inspect.ismodule(thing):
            yield f"keras_moe.{name}"
        elif hasattr(thing, "__all__"):
            yield from (f"keras_moe.{name}.{member}" for member in thing.__all__)
        else:
            for member, function in inspect.getmembers(thing, inspect.isfunction):
                if function.__module__ == thing.__name__ and not member.startswith("_"):
                    yield f"keras_moe.{name}.{member}"


PUBLIC = sorted(set(public_names()) - INTERNAL)
PAGES = {page: list(pages.names(page)) for page in pages.pages()}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_one_place_and_an_example(name):
    places = [page for page, names in PAGES.items() if name in names]
    assert len(places) == 1, f"`::: {name}` must stand on one page of docs/reference/"
    word = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    examples = [code.source for code in pages.code(places[0])]
    assert any(map(word.search, examples)), f"no code of {places[0].name} uses {name}"


def test_the_reference_has_public_names_alone():
    methods = [f"{name}." for name in PUBLIC]
    documented = [name for names in PAGES.values() for name in names]
    assert [
        name for name in documented if name not in PUBLIC and not name.startswith(tuple(methods))
    ] == []
