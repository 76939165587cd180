"""Which backends of Keras the package runs on, and what it imports of each."""

import os
import subprocess
import sys

import keras_moe.backend
from keras_moe.backend import NAME


def run_with(backend, code, *folders):
    """Runs Python in a process of its own, whatever backend this one has."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = [*map(str, folders), os.getcwd(), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_other_backends_are_refused_at_import(tmp_path):
    # NumPy is always there, PyTorch may not be: Keras itself then fails to import it.
    (tmp_path / "torch.py").write_text('raise ImportError("No module named torch")')
    for backend in ("numpy", "torch"):
        assert backend not in keras_moe.backend.SUPPORTED_BACKENDS
        done = run_with(backend, "import keras_moe", tmp_path)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "ImportError: keras_moe runs on these backends of Keras: tensorflow, jax."
        )
        assert "KERAS_BACKEND" in last
        assert last.endswith(f"Received: backend {backend!r}")


def test_only_one_backend_is_imported():
    other = {"tensorflow": "jax", "jax": "tensorflow"}[NAME]
    # Keras with TensorFlow imports JAX itself, where it is installed.
    code = f"""
import sys, keras
before = set(sys.modules) if {NAME == "tensorflow"} else set()
import keras_moe
print({{{other!r}, "keras_moe.backend.{other}"}} & (set(sys.modules) - before))
"""
    done = run_with(NAME, code)
    assert done.stdout.strip() == "set()", done.stderr
