#!/usr/bin/env bash
# Everything that is to be tried on a graphics card, the most telling first. Each part has its share of
# the time and a log, so that what was cut off is worth keeping.
#
#     benchmarks/on_a_card.sh [PYTHON [SECONDS [FOLDER]]]
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${1:-.venv/bin/python} seconds=${2:-900} folder=${3:-results/card}
mkdir -p "$folder"
export TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Its plugin warns wherever tests run in several processes, and warnings are errors.
export PYTEST_ADDOPTS="-p no:benchmark"

part() {  # name, share of the time in percent, command
    local name=$1 limit=$((seconds * $2 / 100)) start=$SECONDS
    # Interrupted, pytest still tells which tests have failed so far.
    timeout --signal INT --kill-after 30 "$limit" "${@:3}" >"$folder/$name.log" 2>&1
    echo "$name: exit status $? after $((SECONDS - start)) of $limit s: $(tail -n 1 "$folder/$name.log")"
}

part benchmark 40 "$python" benchmarks/gpu.py --seconds $((seconds * 35 / 100)) --output "$folder"
part profile 12 "$python" benchmarks/gpu_profile.py --case 1
part numerics 20 "$python" -m pytest -q --numprocesses 8 --dist loadfile tests/test_gpu.py \
    tests/test_losses.py tests/gating tests/dispatch tests/mixture tests/experts tests/backend
part two_gpus 13 "$python" -m pytest -q --numprocesses 4 --dist loadfile --gpus 2 \
    tests/test_gpu.py tests/distribute/test_distribute*.py
# As exact as a CPU, where JAX would round float32 to TensorFloat-32.
part jax_numerics 15 env KERAS_BACKEND=jax JAX_DEFAULT_MATMUL_PRECISION=highest \
    XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m pytest -q --numprocesses 4 tests/on_jax \
    --ignore tests/on_jax/test_distribution.py
