"""Compiles JAX's training step for TPUs that are not there; prints what a chip's program does.

    python benchmarks/tpu_programs.py --models MoE-256 --topologies v5e:4x4 --capacities 1.25 none

Each of R chips has N/R experts, as `expert_parallel=True` divides them, and 4096 words. Operations
and memory of the compiled program stand beside what formulas say, and what the chips send each
other beside one kernel of the experts that a chip holds. Nothing runs on a TPU.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
from typing import NamedTuple
from unittest import mock

# A TPU belongs to one process, and libtpu would ask the network who it is. Here there is none.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import keras
import tpu_formulas
import tpu_models
from jax.experimental import topologies
from programs import Program
from tpu_models import BLOCK, BLOCK_WIDTH, WORDS

from keras_moe.optimizers import FactoredAdam

MIB = 2**20


def make_topology(name):
    """The chips of a TPU, as "v5e:2x4" or "v4:2x2x2"; the two cores of a v4 work as one."""
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    return topologies.get_topology_desc(name, "tpu", **options).devices


@contextlib.contextmanager
def without_values():
    """Inside, variables know their shape and where they would be, and have no values.

    By two methods of Keras' that are private (checked with 3.15).
    """

    def initialize(self, value):
        self._shape = self._validate_shape(value.shape)
        with_initializer(self, None)

    def with_initializer(self, initializer):
        self._initialize_layout()
        sharding = None if self._layout is None else self._layout.backend_layout
        self._value = jax.ShapeDtypeStruct(self._shape, self._dtype, sharding=sharding)

    with (
        mock.patch.object(keras.Variable, "_initialize", initialize),
        mock.patch.object(keras.Variable, "_initialize_with_initializer", with_initializer),
    ):
        yield


def build(name, capacity, devices):
    """A model without values, divided among devices that need not be there; its distribution."""
    mesh = keras.distribution.DeviceMesh((len(devices),), ["batch"], devices)
    distribution = keras.distribution.DataParallel(device_mesh=mesh, auto_shard_dataset=False)
    with distribution.scope(), without_values():
        model = tpu_models.make_model(name, capacity)
        model.compile(FactoredAdam(), "mse" if name == BLOCK else None, jit_compile=False)
        model.optimizer.build(model.trainable_variables)
    return model, distribution


def lower(name, capacity, devices):
    """The training step of a model of `build`: model, lowered step."""
    model, distribution = build(name, capacity, devices)
    mesh = distribution.device_mesh.backend_mesh
    with distribution.scope(), without_values():
        tokens = jax.ShapeDtypeStruct(
            (tpu_models.SENTENCES * len(devices), WORDS, *([BLOCK_WIDTH] if name == BLOCK else [])),
            "float32" if name == BLOCK else "int32",
            sharding=jax.sharding.NamedSharding(mesh, jax.P("batch")),
        )
        parts = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        state = tuple([variable._value for variable in part] for part in parts)

        for part in parts:  # As `fit` does: a step has the values of its state alone.
            for variable in part:
                variable._value = None
        shardings = jax.tree.map(lambda value: value.sharding, state)
        step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
        return model, step.lower(state, (tokens, tokens))


def compile_step(lowered):
    """Compiles what `lower` returns: the compiled step, and its text as libtpu writes it.

    jaxlib can't read all that runs on the SparseCores of a v6e, so `as_text()` may fail there.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (path,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


class Measured(NamedTuple):
    """What a chip does in a step, and what formulas say.

    Attributes:
        operations: Of all products of the program.
        arguments: Bytes of what the step is given.
        temporaries: Bytes of all else while it runs.
        expected: The same three by the formulas.
        collectives: What chips send each other, as of `Program`.
        kernels: How many of them carry matrices of experts.
    """

    operations: int
    arguments: int
    temporaries: int
    expected: tuple
    collectives: list
    kernels: int


def measure(name, capacity, devices):
    """Compiles the step of a model for devices; returns its `Measured`."""
    model, lowered = lower(name, capacity, devices)
    compiled, text = compile_step(lowered)
    # Without a capacity kernels have room for the rows of all chips. An even load fills a chip's
    # share, and so with a capacity that of the gatings of groups, which drop nothing.
    program = Program(text, share=1 / len(devices))
    collectives = program.collectives()
    shapes = {kernel.shape[1:] for kernel in model.middle.experts.kernels}
    shapes |= {shape[::-1] for shape in shapes}
    memory = compiled.memory_analysis()
    return Measured(
        program.operations(),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        (
            tpu_formulas.operations(name, model),
            tpu_formulas.arguments(name, model, len(devices)),
            tpu_formulas.temporaries(name, model, len(devices)),
        ),
        collectives,
        sum(sizes[-2:] in shapes for _, _, sizes in collectives),
    )


def heads():
    """The first two lines of the table."""
    names = ["model", "TPU", "capacity", "operations", "× formula", "arguments MiB", "formula"]
    names += ["temporaries MiB", "formula", "kernels sent", "collectives, the largest first"]
    return f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|"


def row(names, measured):
    """A line of the table: model, TPU and capacity, then what was measured."""
    operations, *sizes = measured.expected
    cells = [*names, f"{measured.operations:.3g}", f"{measured.operations / operations:.2f}"]
    for pair in zip((measured.arguments, measured.temporaries), sizes, strict=True):
        cells += [f"{size / MIB:.1f}" for size in pair]
    cells += [str(measured.kernels), describe(measured.collectives)]
    return f"| {' | '.join(cells)} |"


def describe(collectives, most=4):
    """The largest few in words, each once, with how often it is there."""
    counts = {}
    for each in collectives:
        counts[each] = counts.get(each, 0) + 1
    parts = [
        f"{count} {name} {dtype}{list(sizes)}"
        for (name, dtype, sizes), count in list(counts.items())[:most]
    ]
    return "; ".join(parts) + (f"; {len(counts) - most} smaller kinds" * (len(counts) > most))


def main(arguments=None):
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["MoE-256", "MoE-1024-h", BLOCK])
    parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v6e:4x4", "v4:2x2x4"])
    parser.add_argument("--capacities", nargs="+", default=["1.25", "none"])
    parser.add_argument("--dtype", default="mixed_bfloat16", help="dtype policy")
    options = parser.parse_args(arguments)
    keras.config.set_dtype_policy(options.dtype)
    print(heads(), flush=True)
    for name in options.models:
        for capacity in options.capacities:
            factor = None if capacity == "none" else float(capacity)
            for topology in options.topologies:
                measured = measure(name, factor, make_topology(topology))
                print(row((name, topology, capacity), measured), flush=True)


if __name__ == "__main__":
    main()
