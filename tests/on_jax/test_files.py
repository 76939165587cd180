"""Files both ways: what is written under one backend goes on under the other, slots included."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from courses import COURSES, STEPS, course, second_half, translated

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("courses")


@pytest.fixture(scope="module")
def here(folder):
    """The losses of each course under JAX."""
    return {name: course(make, name, folder) for name, make in COURSES.items()}


@pytest.fixture(scope="module")
def there(folder, here):
    """What TensorFlow makes of the same weights, and of JAX' files."""
    path = [str(TESTS.parent), str(TESTS), str(TESTS / "on_jax")]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "PYTHONPATH": os.pathsep.join(path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "",  # TensorFlow does not know all of JAX's.
    }
    command = [sys.executable, TESTS / "on_jax" / "courses.py", folder]
    subprocess.run(command, env=environment, check=True)
    return np.load(folder / "tensorflow.npz")


@pytest.mark.parametrize("name", COURSES)
def test_equal_weights_have_equal_losses_under_both(name, here, there):
    losses = here[name]
    assert len(losses) == STEPS[name] and losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, there[name], rtol=1e-4)


@pytest.mark.parametrize("name", COURSES)
def test_what_jax_wrote_goes_on_under_tensorflow_as_if_never_stopped(name, here, there):
    np.testing.assert_allclose(there[f"{name} of jax"], here[name][STEPS[name] // 2 :], rtol=1e-4)


@pytest.mark.parametrize("name", COURSES)
def test_what_tensorflow_wrote_goes_on_under_jax_as_if_never_stopped(name, folder, there):
    losses = second_half(COURSES[name], name, folder, "tensorflow")
    np.testing.assert_allclose(losses, there[name][STEPS[name] // 2 :], rtol=1e-4)


def test_translations_are_equal_word_by_word(folder, there):
    received = translated(folder)
    np.testing.assert_array_equal(received, there["ids"])
    assert len(np.unique(received)) > 1  # They have learned more than one word.
