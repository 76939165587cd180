"""Whether TensorFlow multiplies matrices by oneDNN: no public function tells.

Checked with TensorFlow 2.19 to 2.21. Where the private one is gone, oneDNN is taken for granted:
results don't depend on it, and a test fails.
"""

try:
    from tensorflow.python.util import _pywrap_util_port
except ImportError:
    _pywrap_util_port = None


def is_in_use():
    """True by default on x86 with AVX-512 VNNI, False on older CPUs or as the environment says."""
    return getattr(_pywrap_util_port, "IsMklEnabled", lambda: True)()
