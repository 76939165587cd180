"""Trains the language model on several machines, each of which holds a part of the experts.

    python examples/multi_worker.py --workers 2     # two processes on the CPU of this machine

On machines host-a and host-b, with the index 0 on the first and 1 on the second:

    export TF_CONFIG='{"cluster": {"worker": ["host-a:2222", "host-b:2222"]},
                       "task": {"type": "worker", "index": 0}}'
    python examples/multi_worker.py --checkpoints /a/folder/that/all/machines/see

Each process is a worker, and each of its GPUs, or its CPU, a replica. Of a batch every replica
takes the same number of sentences. It has a copy of the whole model but the experts: of these it
holds its part alone, and computes them for the words of all replicas (section 3.1 of the paper). So
`--num-experts` has to be a multiple of the number of replicas.

Every --save-every steps the workers save a checkpoint together. When one of them dies, the others
end with an error. The same command again goes on from the last checkpoint, also with another number
of workers, or with one: --workers 1.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import batching
import experiment
import keras
import numpy as np
import tensorflow as tf
from experiment import heading, read_words

from keras_moe.distribute import ExpertParallel, is_chief

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("workers", 0, "processes to start on this machine; 0 to be the one that TF_CONFIG says"),
        *experiment.MIXTURE_OPTIONS,
        ("steps", 0, "steps to end after; 0 for all of the epochs"),
        ("show-every", 20, "steps between two lines of output"),
        ("save-every", 100, "steps between two checkpoints"),
        ("checkpoints", ROOT / "results" / "multi_worker", "folder that all workers see"),
        ("timeout", 300, "seconds to wait for other workers, longer than a checkpoint takes"),
    )
    return experiment.parse_arguments(__doc__, options, arguments)


def start_workers(args):
    """Starts workers on this machine and ends when they do; one that fails ends all."""
    read_words(args)  # Once, before all do: a dataset may have to be prepared.
    sockets = [socket.create_server(("localhost", 0)) for _ in range(args.workers)]
    addresses = [f"localhost:{a_socket.getsockname()[1]}" for a_socket in sockets]
    for a_socket in sockets:
        a_socket.close()
    workers = []
    for index in range(args.workers):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        # Workers can't share a GPU.
        environment = {**os.environ, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": "-1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--workers=0"]
        workers.append(subprocess.Popen(command, env=environment))
    print("processes:", *[worker.pid for worker in workers], flush=True)

    deadline = None
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
        if deadline is None and any(worker.poll() for worker in workers):
            deadline = time.time() + args.timeout
        if deadline is not None and time.time() > deadline:
            for worker in workers:
                worker.kill()
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        sys.exit(f"error: a worker has failed. The exit statuses: {statuses}")


def main(args):
    """Starts the workers, or is one of them."""
    if args.workers:
        start_workers(args)
        return
    # Before anything else of TensorFlow, which it connects to the other workers.
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=args.timeout)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    try:
        train(strategy, args)
    except tf.errors.OpError as error:
        sys.exit(
            "error: the workers have lost each other. Start all of them again, and they go on from "
            f"the last checkpoint. Received: {type(error).__name__}: {error}"
        )


def train(strategy, args):
    """Trains, from the last checkpoint on, and evaluates."""
    chief = is_chief(strategy)
    if not chief:
        sys.stdout = open(os.devnull, "w")  # One worker is enough to tell.
    words, lookup = read_words(args)
    batches = batching.batches(
        words["train"], args.words_per_batch, seed=args.seed, epochs=args.epochs
    )
    num_steps = args.steps or len(batches)

    num_replicas = strategy.num_replicas_in_sync
    heading(f"Training on {num_replicas} replicas")
    keras.utils.set_random_seed(args.seed)  # Of the experts, too, each worker makes its own.
    with strategy.scope():
        mixture = experiment.make_mixture(args, expert_parallel=True)
        model = experiment.make_model(len(lookup.get_vocabulary()), mixture, args)
        optimizer = ExpertParallel(experiment.make_optimizer(args, len(batches)))
        optimizer.build(model.trainable_variables)

    # All workers save, as each has experts that the others lack. The file of one has everything.
    # The variables include the states of all seeds, so that noise and dropout go on where they
    # were. Only the words that the softmax draws have no state that could be saved.
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, variables=model.variables)
    folder = args.checkpoints if chief else tempfile.mkdtemp()
    manager = tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)
    latest = tf.train.latest_checkpoint(args.checkpoints)
    if latest:
        checkpoint.restore(latest).assert_consumed()
        print(f"going on from {latest}")
    first_step = check_all_are_at_the_same_step(strategy, optimizer)

    def of_replica(batch):
        """Every R-th sentence."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return [part[replica::num_replicas] for part in batch]

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2)
    def train_step(*batch):
        """Returns the mean cross-entropy of the words of a batch of all replicas."""
        num_words = tf.math.count_nonzero(batch[1], dtype=tf.float32)

        def step():
            inputs, targets = of_replica(batch)
            with tf.GradientTape() as tape:
                hidden = model(inputs, training=True)
                losses = model.cross_entropy(targets, hidden, training=True)
                cross_entropy = tf.reduce_sum(losses) / num_words
                # The balance is that of the whole batch, on every replica.
                loss = cross_entropy + sum(model.losses) / num_replicas
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return cross_entropy

        return strategy.reduce("SUM", strategy.run(step), axis=None)

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2)
    def evaluation_step(*batch):
        """Returns the sum of the cross-entropy of all words."""

        def step():
            inputs, targets = of_replica(batch)
            predictions = model(inputs, training=False)
            return tf.reduce_sum(model.cross_entropy(targets, predictions, training=False))

        return strategy.reduce("SUM", strategy.run(step), axis=None)

    cross_entropies, start = [], time.time()
    for step, batch in enumerate(batches.skip(first_step).take(num_steps - first_step), first_step):
        cross_entropies.append(train_step(*batch))
        if (step + 1) % args.show_every == 0 or step + 1 == num_steps:
            perplexity = np.exp(np.mean(cross_entropies))  # of the softmax over a sample of words
            speed = len(cross_entropies) / (time.time() - start)
            print(f"step {step + 1:6,}  perplexity {perplexity:9.2f}", end="")
            print(f"  {speed:6.2f} steps/s", flush=True)
            cross_entropies, start = [], time.time()
        if (step + 1) % args.save_every == 0 or step + 1 == num_steps:
            print(f"wrote {manager.save(checkpoint_number=step + 1)}", flush=True)

    heading("Held-out text: perplexity per word, end of sentence counted")
    total = num_words = 0
    for batch in batching.batches(words["validation"], args.words_per_batch):
        total += evaluation_step(*batch).numpy()
        num_words += np.count_nonzero(batch[1])
    print(f"perplexity {np.exp(total / num_words):.2f}")


def check_all_are_at_the_same_step(strategy, optimizer):
    """Returns the number of steps taken; workers that can't see the checkpoints took none."""

    @tf.function
    def gather():
        steps = strategy.run(lambda: tf.reshape(optimizer.iterations, [1]))
        return strategy.gather(steps, axis=0)

    steps = gather().numpy()
    if len(set(steps)) > 1:
        raise ValueError(
            "All workers must see the same folder of checkpoints; --checkpoints names it. "
            f"Received: replicas at the steps {steps.tolist()}"
        )
    return steps[0]


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
