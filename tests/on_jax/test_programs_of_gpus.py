"""What XLA makes of a mixture on a GPU, compiled where none is.

It needs `pip install "jax[cuda12]"`, which `make test` leaves out.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
from jax.experimental import topologies
from programs import Program
from training_steps import compiled_step

from keras_moe.backend.jax import places

# As XLA's description of an H100 has it, without what these programs don't depend on.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
"""
N, K, T, D, F = 16, 2, 2048, 32, 64
ROWS = K * T


@pytest.fixture(scope="module")
def program():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip('needs `pip install "jax[cuda12]"`')
    # JAX looks for a driver as it starts, unless it is told not to.
    environment = {
        **os.environ,
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, __file__]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_a_gpu_computes_little_more_than_the_rows_of_the_chosen_experts(program):
    # A mean of 256 rows, an eighth more, up to the next multiple of 64. No expert has more.
    size = places.block_size(ROWS, N)
    assert size == 320
    # Forward and twice backward, 2 operations for each pair of numbers, 2 matrices.
    of_places = 12 * N * size * D * F
    # The gating has N columns for the logits and N for the noise, and up to as much twice backward.
    of_gating = 12 * T * D * N
    found = Program(program, turns=0).operations()
    assert of_places <= found <= of_places + of_gating
    assert of_places == 1.25 * 12 * ROWS * D * F


if __name__ == "__main__":
    h100 = topologies.get_topology_desc(
        "cuda:1", platform="cuda", target_config=H100, topology="1x1x1"
    ).devices[0]
    print(compiled_step(N, F, K, T, D, h100).as_text())
