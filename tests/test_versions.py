"""Which versions the package was checked with, which it asks for, and which are here.

What it takes of others and is not public may change with any version, so that each file with such
says which ones it was checked with. A newer one than these fails here: run the tests with it, look
at what those files say, then give them and `CHECKED` its number.
"""

import configparser
import importlib.metadata
import pathlib
import re

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The oldest and the newest, both included.
CHECKED = {"TensorFlow": ("2.19", "2.21"), "Keras": ("3.10", "3.15"), "JAX": ("0.6", "0.12")}
PACKAGES = {
    "TensorFlow": ["tensorflow", "tensorflow-text", "tensorflow-serving-api"],
    "Keras": ["keras"],
    "JAX": ["jax"],
}
NOTE = re.compile(r"[Cc]hecked\s+with\s+(TensorFlow|Keras|JAX)\s+([\d.]+\d)(?:\s+to\s+([\d.]+\d))?")
# How a file takes what is not public.
PRIVATE = {
    "TensorFlow": r"from tensorflow\.(python|compiler)",
    "Keras": r"from keras\.src|\._(flatten_layers|layers|tracker)\b",
    "JAX": r"from jax\._src",
}
MODULES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "keras_moe").rglob("*.py"))


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def numbers(version):
    return tuple(int(part) for part in version.split(".")[:2])


def installed():
    """The versions that are here, by library; TensorFlow's package has several names."""
    versions = {"Keras": keras.__version__}
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        versions["TensorFlow"] = tf.__version__
    try:
        versions["JAX"] = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        pass
    return versions


@pytest.mark.parametrize("library", sorted(installed()))
def test_what_is_installed_was_checked(library):
    oldest, newest = CHECKED[library]
    assert numbers(oldest) <= numbers(installed()[library]) <= numbers(newest)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_private_has_its_versions(name):
    source = text(name)
    noted = {library: (oldest, newest) for library, oldest, newest in NOTE.findall(source)}
    assert noted == {library: CHECKED[library] for library in noted}
    taken = {library for library, pattern in PRIVATE.items() if re.search(pattern, source)}
    assert taken <= noted.keys()


def test_the_oldest_versions_are_those_that_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    asked = [
        setup["options"]["install_requires"],
        *(extras[e] for e in ("examples", "jax", "serving")),
    ]
    asked = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(asked), re.MULTILINE))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text(".ci/oldest.txt"), re.MULTILINE))
    page = " ".join(text("docs/guides/getting_started.md").split())
    for library, names in PACKAGES.items():
        oldest, _ = CHECKED[library]
        for name in names:
            assert numbers(pinned[name]) == numbers(asked[name]) == numbers(oldest), name
        assert f"{library} {oldest} or later" in page
