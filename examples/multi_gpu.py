"""Trains a mixture-of-experts language model on one device or on many: one flag.

    python examples/multi_gpu.py                              # one device
    python examples/multi_gpu.py --devices 4                  # four
    python examples/multi_gpu.py --devices 8 --dataset lm1b --width 512 --hidden-units 1024

The devices are the first GPUs of the machine, or where there are none, so many logical CPUs, which
share its cores. Each has a copy of the embedding, the LSTMs, the softmax and the gating, and a part
of the experts, to which all send each other their words (section 3.1). So `--num-experts` has to be
a multiple of `--devices`. Each device trains on `--words-per-batch` positions at the same time, and
experts see the words of all.
"""

import pathlib

import batching
import experiment
import keras
import tensorflow as tf
from experiment import heading, read_words

from keras_moe.callbacks import Throughput
from keras_moe.distribute import ExpertParallel
from keras_moe.models import footprint

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("devices", 1, "GPUs, or without one logical CPUs, to train on"),
        *experiment.MIXTURE_OPTIONS,
        ("capacity-factor", 0.0, "bounds the words of an expert in training; 0 drops none"),
        ("output", ROOT / "results" / "multi_gpu", "folder for the model"),
    )
    args = experiment.parse_arguments(__doc__, options, arguments)
    if args.devices < 1 or args.num_experts % args.devices:
        raise ValueError(
            "The experts must be a multiple of the devices. Received: "
            f"{args.num_experts} experts, {args.devices} devices"
        )
    return args


def main(args):
    """Trains, evaluates and saves; returns the history of `fit`."""
    strategy = tf.distribute.MirroredStrategy(find_devices(args.devices))
    words, lookup = read_words(args)
    batches = filled_up(
        batching.batches(
            words["train"], args.words_per_batch * args.devices, seed=args.seed, epochs=args.epochs
        ),
        args.devices,
    )
    steps = len(batches)
    if steps < args.evaluations:
        raise ValueError(
            "The text must be long enough for a batch before each evaluation. Received: "
            f"{steps} batches for {args.evaluations} evaluations"
        )

    def held_out(part):
        return filled_up(batching.batches(words[part], args.words_per_batch), args.devices)

    words_per_epoch = int(words["train"].flat_values.shape[0] + words["train"].nrows())

    heading(f"Training on {args.devices} devices, {args.num_experts // args.devices} experts each")
    keras.utils.set_random_seed(args.seed)
    with strategy.scope():
        mixture = experiment.make_mixture(
            args, capacity_factor=args.capacity_factor or None, expert_parallel=True
        )
        model = experiment.make_model(len(lookup.get_vocabulary()), mixture, args)
        model.compile(ExpertParallel(experiment.make_optimizer(args, steps)))
    throughput = Throughput(
        footprint(model).ops_per_timestep,
        words_per_step=args.epochs * words_per_epoch / steps,
        softmax_ops_per_timestep=args.width * (args.num_sampled + 1),
        num_devices=args.devices,
    )
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print_epoch(epoch, logs, args.devices)
    )
    history = model.fit(
        batches,
        epochs=args.evaluations,
        steps_per_epoch=steps // args.evaluations,
        validation_data=held_out("validation"),
        shuffle=False,  # The batches are shuffled.
        callbacks=[throughput, show],
        verbose=0,
    ).history

    heading("Held-out text")
    logs = model.evaluate(held_out("test"), return_dict=True, verbose=0)
    print(f"perplexity {logs['perplexity']:.1f}")
    args.output.mkdir(parents=True, exist_ok=True)
    model.save(args.output / "model.keras")
    print(f"wrote {args.output / 'model.keras'}, which loads on any number of devices")
    return history


def find_devices(number):
    """Returns the names of so many GPUs, or of logical CPUs where there are no GPUs.

    Raises:
        ValueError: If there are fewer GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * number
        tf.config.set_logical_device_configuration(cpu, logical)
        return [f"CPU:{i}" for i in range(number)]
    if number > len(gpus):
        raise ValueError(f"There are {len(gpus)} GPUs. Received: --devices {number}")
    return [f"GPU:{i}" for i in range(number)]


def filled_up(batches, devices):
    """Adds sentences without words: of a first batch, Keras wants as many rows on each device."""

    def fill_up(*parts):
        missing = -tf.shape(parts[0])[0] % devices
        return tuple(tf.pad(part, [[0, missing], [0, 0]]) for part in parts)

    return batches.map(fill_up)


def print_epoch(epoch, logs, devices):
    """Prints a line of the logs."""
    print(
        f"evaluation {epoch + 1}:  perplexity {logs['val_perplexity']:.1f}, max/mean load "
        f"{logs['val_mixture/max_over_mean_load']:.2f};  per device "
        f"{logs['words_per_second'] / devices:,.0f} words per second, "
        f"{logs['tflops_per_device']:.4f} TFLOPS",
        flush=True,
    )


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
