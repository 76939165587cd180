"""One worker of several: run by test_multi_worker.py as a process, and imported for one alone.

    python multi_worker_process.py FOLDER [OTHER_FOLDER]

The worker trains together with the others that TF_CONFIG names. What it then has goes to FOLDER,
where the chief also puts checkpoints. Then, without OTHER_FOLDER, it trains on, until the death of
another worker ends it. With OTHER_FOLDER it restores the last checkpoint there, trains on a little,
and then does what may not be done: the last worker reads all experts alone.
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from replicas import BATCH, CLASSES, data, flat, make_model, state

import keras_moe

STEPS = 5


class Training:
    """A model with experts divided among the replicas, and a step of a loop of one's own.

    Args:
        strategy: A strategy, or 0 for a single device.
    """

    def __init__(self, strategy):
        layers = [flat(name="mixture")]
        self.model = model = make_model(
            strategy, lambda: layers, lambda: keras.optimizers.Adam(0.01)
        )
        self.strategy = strategy = model.distribute_strategy
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        self.checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        x, y = map(tf.constant, data())
        num_replicas = strategy.num_replicas_in_sync

        @tf.function
        def step(number):
            def of_replica():
                replica = tf.distribute.get_replica_context().replica_id_in_sync_group
                inputs, targets = (part[:number][replica::num_replicas] for part in (x, y))
                with tf.GradientTape() as tape:
                    errors = tf.square(model(inputs, training=True) - targets)
                    loss = tf.reduce_sum(errors) / (BATCH * 2 * CLASSES)
                    loss += sum(model.losses) / num_replicas
                gradients = tape.gradient(loss, model.trainable_variables)
                model.optimizer.apply(gradients, model.trainable_variables)
                return loss

            return strategy.reduce("SUM", strategy.run(of_replica), axis=None)

        self._step = step

    def train(self, steps):
        """Returns the losses. Every second batch has one example: all replicas but one get none."""
        losses = []
        for _ in range(steps):
            number = 1 if self.model.optimizer.iterations.numpy() % 2 else BATCH
            losses.append(self._step(tf.constant(number)).numpy())
        return losses

    def restore(self, folder):
        """Restores the last checkpoint and returns the number of steps that led to it."""
        path = tf.train.latest_checkpoint(folder / "checkpoints")
        self.checkpoint.restore(path).assert_consumed()
        return int(self.model.optimizer.iterations.numpy())


def held(model):
    """This worker's part of what is held in shards, by name."""
    variables = [*model.weights, *model.optimizer.variables]
    sharded = [v for v in variables if hasattr(v.value, "shards")]
    return {v.path: shard for v in sharded for (shard,) in [v.value.shards]}


def noise(strategy):
    """What each of this process's replicas draws in two steps, [2, replicas, 3]."""
    with strategy.scope():
        generator = keras_moe.NoisyTopKGating(8, 2, seed=1).seed_generator
    draw = tf.function(lambda: strategy.run(lambda: keras.random.normal((3,), seed=generator)))
    return np.array([strategy.experimental_local_results(draw()) for _ in range(2)])


def main(folder, other_folder=None):
    """See above."""
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=100)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    resolver = strategy.cluster_resolver
    chief, own = keras_moe.distribute.is_chief(strategy), folder / str(resolver.task_id)

    training = Training(strategy)
    losses = training.train(STEPS)
    np.savez(own.with_suffix(".state.npz"), losses, *state(training.model))
    np.savez(own.with_suffix(".held.npz"), **held(training.model))
    np.savez(own.with_suffix(".noise.npz"), noise(strategy))
    np.savez(own.with_suffix(".chief.npz"), chief)
    keras_moe.save_weights(training.model, folder / "model.weights.h5")
    kernel = training.model.get_layer("mixture").experts.kernels[0]

    if other_folder is None:
        target = folder / "checkpoints" if chief else own
        manager = tf.train.CheckpointManager(training.checkpoint, target, max_to_keep=1)
        manager.save()
        own.with_suffix(".ready").touch()
        while True:
            training.train(1)
            manager.save()

    steps = training.restore(other_folder)
    np.savez(own.with_suffix(".restored.npz"), steps, *state(training.model))
    losses = training.train(2)
    np.savez(own.with_suffix(".trained_on.npz"), losses, *state(training.model))
    if resolver.task_id == strategy.num_replicas_in_sync - 1:
        kernel.numpy()
    training.train(1)  # Where the others wait.


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
