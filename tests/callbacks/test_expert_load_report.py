"""`ExpertLoadReport`: the load of every layer, in `fit` and in event files."""

import collections

import keras
import numpy as np
import pytest
from compiled_once import way_back
from helpers import CROSS_ENTROPY, WIDTH, assign_random_weights, language_model, next_words
from keras.ops import convert_to_numpy as numpy

from keras_moe import HierarchicalMoE, SparseMoE
from keras_moe.callbacks import ExpertExamples, ExpertLoadReport
from keras_moe.callbacks.tensorboard import load_picture

BLACK, GREY, DEEP_RED, DEEP_BLUE = (0, 0, 0), (240, 240, 240), (185, 25, 45), (33, 90, 170)
# One operation after the other, each of which JAX would compile for itself.
EAGERLY = keras.config.backend() == "tensorflow"


def rows_per_expert(layer, x, mask=None):
    """Counted choice by choice."""
    routing = layer.route(x, mask=mask)
    load = np.zeros(layer.num_experts)
    for experts, gates in zip(numpy(routing.expert_index), numpy(routing.gates), strict=True):
        for expert, gate in zip(experts, gates, strict=True):
            load[expert] += gate > 0
    return load


def events(folder):
    """{tag: {step: (plugin, array)}} of all event files in a folder."""
    import tensorflow as tf

    found = collections.defaultdict(dict)
    for path in sorted(folder.iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert event.step not in found[value.tag]
                plugin = value.metadata.plugin_data.plugin_name
                found[value.tag][event.step] = plugin, tf.make_ndarray(value.tensor)
    return found


def decoded(png):
    """A picture as integers [height, width, 3]."""
    import tensorflow as tf

    return tf.io.decode_png(png).numpy().astype(int)


def test_the_event_file_shows_the_load_after_every_epoch(tmp_path):
    x, y = next_words()
    model = language_model()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY, run_eagerly=EAGERLY)

    def load():
        return rows_per_expert(model.layers[1], model.layers[0](x), mask=x > 0)

    expected = [load()]
    after_epoch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: expected.append(load())
    )
    report = ExpertLoadReport(x, tmp_path / "logs")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[after_epoch, report])

    # Kernels of zeros send all to experts 0 and 1. Training changes that.
    np.testing.assert_array_equal(expected[0], [np.sum(x > 0)] * 2 + [0] * 6)
    assert np.any(expected[1] != expected[0]) and np.any(expected[2] != expected[1])
    assert report.load.keys() == {"moe"}
    np.testing.assert_array_equal(report.load["moe"], expected)

    found = events(tmp_path / "logs")
    assert found.keys() == {
        f"moe/{name}" for name in ("load", "load_over_even_share", "cv_load", "max_over_mean_load")
    }
    for step, rows in enumerate(expected):
        plugin, value = found["moe/max_over_mean_load"][step]
        assert plugin == "scalars"
        np.testing.assert_allclose(value, rows.max() / rows.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            found["moe/cv_load"][step][1], rows.std() / rows.mean(), rtol=1e-5
        )
        plugin, buckets = found["moe/load"][step]
        assert plugin == "histograms"
        for i, (left, right, count) in enumerate(buckets):
            last = i == len(buckets) - 1
            assert count == np.sum((left <= rows) & ((rows <= right) if last else (rows < right)))
        assert buckets[0, 0] == 0 and buckets[:, 2].sum() == 8

        plugin, (width, height, png) = found["moe/load_over_even_share"][step]
        assert plugin == "images"
        picture = decoded(png)
        assert picture.shape == (int(height), int(width), 3) == (8 * 16 + 1, (step + 1) * 16 + 1, 3)
        for (expert, time), count in np.ndenumerate(np.transpose(expected[: step + 1])):
            cell = picture[expert * 16 + 1 : expert * 16 + 16, time * 16 + 1 : time * 16 + 16]
            assert np.all(cell == cell[0, 0])
            red, _, blue = cell[0, 0]
            share = np.mean(expected[time])
            assert np.sign(red - blue) == np.sign(count - share) * (count > 0)
            assert (tuple(cell[0, 0]) == BLACK) == (count == 0)


def test_the_colours_of_the_picture():
    # Even shares 1, 4 and 0. log2(0.5) = -1 and log2(2) = 1 are in the middle of the scale.
    picture = load_picture(np.array([[1, 1, 1, 1.0], [16, 0, 0, 0.0], [0, 0, 0, 0.0]]))
    cells = [[tuple(picture[8 + 16 * i, 8 + 16 * j]) for i in range(4)] for j in range(3)]
    assert cells == [[GREY] * 4, [DEEP_RED, BLACK, BLACK, BLACK], [BLACK] * 4]
    eight = load_picture(np.array([[1000, 2, 100, 198.0], [800, 400, 200, 200.0]]))
    cells = [[tuple(eight[8 + 16 * i, 8 + 16 * j].astype(int)) for i in range(4)] for j in range(2)]
    assert cells[0][1] == DEEP_BLUE  # 2 of an even share of 325
    assert cells[1] == [(240, 150, 110), GREY, (130, 180, 220), (130, 180, 220)]
    assert load_picture(np.ones((2, 300))).shape == (300 * 5 + 1, 2 * 5 + 1, 3)


def report_once(report, model):
    """What `fit` has a callback do before the first epoch."""
    report.set_model(model)
    report.on_train_begin()
    report.on_epoch_begin(0)
    report.on_train_end()


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        x, y = next_words()
        return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]


def dataset(data):
    """A `tf.data.Dataset` of examples, which Keras takes under every backend."""
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data)


@pytest.fixture(scope="module")
def counted():
    """Sequences, a model, and the rows that each of its experts gets of them."""
    x, _ = next_words()
    model = language_model()
    model.build((None, None))
    assign_random_weights(model.layers[1], np.random.default_rng(0))
    return x, model, rows_per_expert(model.layers[1], model.layers[0](x), mask=x > 0)


@pytest.mark.parametrize(
    "batches",
    [
        keras.ops.convert_to_tensor,
        lambda x: dataset(x).batch(24),
        lambda x: dataset((x, x, x > 0)).batch(24),
        lambda x: [x[:8], (x[8:16],), (x[16:24], None), x[24:]],
        lambda x: Pairs(),
    ],
    ids=["tensor", "dataset", "dataset with targets", "list", "PyDataset"],
)
def test_batches_of_every_kind_count_alike(batches, counted, tmp_path):
    x, model, expected = counted
    report = ExpertLoadReport(batches(x), tmp_path)
    report_once(report, model)
    np.testing.assert_array_equal(report.load["moe"][0], expected)


class Wrapped(keras.layers.Layer):
    """A layer with a layer inside, called twice."""

    def __init__(self):
        super().__init__()
        self.inner = SparseMoE(4, 8, k=1, name="moe")

    def call(self, x):
        return self.inner(x) + self.inner(3.0 - x)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.Sequential([keras.Input((WIDTH,)), SparseMoE(4, 8, k=1, name="moe")])
        self.second = Wrapped()
        self.third = HierarchicalMoE(2, 3, 8, k=(1, 2), name="deep")

    def call(self, inputs, training=None):
        return self.third(self.second(self.first(inputs["x"])))


def test_all_layers_of_a_subclassed_model_are_counted(tmp_path):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, WIDTH)).astype("float32")
    model = Subclassed()
    model({"x": x})
    moe, wrapped, deep = model.first.layers[0], model.second.inner, model.third
    for layer in (moe, wrapped, deep):
        assign_random_weights(layer, rng)
    middle = moe(x)
    expected = {
        id(moe): rows_per_expert(moe, x),
        id(wrapped): rows_per_expert(wrapped, middle) + rows_per_expert(wrapped, 3.0 - middle),
        id(deep): rows_per_expert(deep, model.second(middle)),
    }
    report = ExpertLoadReport({"x": x}, tmp_path)
    report_once(report, model)
    # The first two have the same name; both K = 1, one with 20 rows and one with twice as many.
    assert report.load.keys() == {"moe", "moe_1", "deep"}
    one, other = sorted((report.load["moe"][0], report.load["moe_1"][0]), key=np.sum)
    np.testing.assert_array_equal(one, expected[id(moe)])
    np.testing.assert_array_equal(other, expected[id(wrapped)])
    np.testing.assert_array_equal(report.load["deep"][0], expected[id(deep)])
    assert [np.sum(one), np.sum(other)] == [20, 40]
    assert len(events(tmp_path)) == 3 * 4


def test_reports_leave_training_and_its_logs_alone(tmp_path):
    x, y = next_words()
    model = language_model(seed=1)
    model.build((None, None))
    model.compile("adam", CROSS_ENTROPY)
    go_back = way_back(model)

    def history(*callbacks):
        go_back()
        return model.fit(x, y, epochs=2, verbose=0, shuffle=False, callbacks=callbacks).history

    reports = ExpertLoadReport(x[:8], tmp_path), ExpertExamples(x[:8], str, each_epoch=True)
    expected = history()
    assert expected["loss"][1] != expected["loss"][0]
    assert history(*reports) == expected


def test_a_second_fit_goes_on_where_the_first_ended(tmp_path):
    x, y = next_words()
    model = language_model()
    model.compile("adam", CROSS_ENTROPY, run_eagerly=EAGERLY)
    report = ExpertLoadReport(x, tmp_path)
    import tensorflow as tf

    with tf.summary.record_if(False):  # As the TensorBoard callback may do.
        model.fit(x, y, epochs=2, verbose=0, callbacks=[report])
    model.fit(x, y, initial_epoch=2, epochs=3, verbose=0, callbacks=[report])
    assert list(events(tmp_path)["moe/load"]) == [0, 1, 2, 3]
    assert report.load["moe"].shape == (4, 8)


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, i):
        return np.ones((2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: iter([np.ones((2, 3))]), "can be read once"),
        (lambda: dataset(np.ones((2, 3))).repeat(), "repeats for ever"),
        (Endless, "repeats for ever"),
    ],
)
def test_batches_that_cannot_be_read_again_are_refused(make, message, tmp_path):
    x = make()
    with pytest.raises(ValueError, match=message):
        ExpertLoadReport(x, tmp_path)
    with pytest.raises(ValueError, match=message):
        ExpertExamples(x, str)


def test_a_model_without_a_mixture_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must have a SparseMoE layer"):
        model.fit(
            np.ones((2, 3)), np.ones((2, 2)), verbose=0, callbacks=[ExpertLoadReport([], tmp_path)]
        )
