import os
import subprocess
import sys

import keras_moe.backend


def imported_with(backend, folder):
    """What `import keras_moe` says in a process of its own, whatever this one runs on."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = [str(folder), os.getcwd(), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run(
        [sys.executable, "-c", "import keras_moe"], env=environment, capture_output=True, text=True
    )


def test_other_backends_are_refused_at_import(tmp_path):
    # NumPy is always there, PyTorch and JAX may not be: Keras itself then fails to import them.
    (tmp_path / "torch.py").write_text('raise ImportError("No module named torch")')
    (tmp_path / "jax.py").write_text('raise ImportError("No module named jax")')
    for backend in ("numpy", "torch", "jax"):
        assert backend not in keras_moe.backend.SUPPORTED_BACKENDS
        done = imported_with(backend, tmp_path)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: keras_moe runs on these backends of Keras: tensorflow")
        assert "KERAS_BACKEND" in last
        assert last.endswith(f"Received: backend {backend!r}")
