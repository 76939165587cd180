"""HierarchicalMoE as a layer among others: fit, saving, export, its config, what it refuses."""

import keras
import numpy as np
import pytest
from helpers import CROSS_ENTROPY, WIDTH, examples, language_model, next_words

from keras_moe import FeedForwardExperts, HierarchicalGating, HierarchicalMoE, NoisyTopKGating

KERNELS = ("primary", "secondary", "primary_noise", "secondary_noise")


def hierarchical_model(**kwargs):
    return language_model(moe=HierarchicalMoE(4, 3, 16, name="moe", **kwargs))


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = hierarchical_model(), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    model.fit(x, y, batch_size=16, verbose=0)
    return model


@pytest.mark.parametrize(("k", "epochs"), [((2, 2), 8), ((1, 1), 16)])
def test_fit_learns(k, epochs):
    model, (x, y) = hierarchical_model(k=k), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    # With k = 1 twice the gates begin at 1/12, and the outputs as small: that takes longer.
    history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert np.isfinite(history["moe/cv_load"]).all()
    for name in KERNELS:
        assert np.any(getattr(model.layers[1].gating, name)), f"{name} has not moved"


def test_saved_model_weights_and_clone_come_back(trained, tmp_path):
    x, _ = next_words()
    expected = trained.predict(x, verbose=0)
    trained.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert loaded.layers[1].get_config() == trained.layers[1].get_config()

    trained.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(trained)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(clone.predict(x, verbose=0), expected)


@pytest.mark.tensorflow("exports are TensorFlow's")
def test_export_writes_no_state(trained, tmp_path):
    import tensorflow as tf
    from exports import assert_keeps_no_state

    x, _ = next_words()
    trained.export(tmp_path / "1", verbose=False)
    served = tf.saved_model.load(tmp_path / "1")
    np.testing.assert_allclose(
        served.serve(tf.constant(x, "float32")), trained.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    assert_keeps_no_state(served)


@pytest.mark.parametrize(
    "parts",
    [
        {"hidden_units": [4, 3], "k": [1, 2], "use_bias": True, "seed": 4},
        {
            "experts": FeedForwardExperts(6, 4),
            "gating": HierarchicalGating(2, 3, (1, 3), noise=False, noise_epsilon=0.1, seed=9),
        },
        {"hidden_units": 4, "gating": NoisyTopKGating(6, k=2)},
    ],
    ids=["defaults", "hierarchical", "flat"],
)
def test_config_round_trip(parts):
    layer = HierarchicalMoE(2, 3, **parts)
    y = layer(examples())
    clone = HierarchicalMoE.from_config(layer.get_config())
    clone.build((None, WIDTH))
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(examples()), y)
    assert clone.get_config() == layer.get_config()
    assert type(clone.gating) is type(layer.gating)
    assert clone.gating.get_config() == layer.gating.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (4, 2)}, r"k=\(4, 2\), num_groups=3, experts_per_group=4"),
        ({"k": (2, 5)}, r"k=\(2, 5\), num_groups=3, experts_per_group=4"),
        ({"k": (0, 2)}, r"k=\(0, 2\), num_groups=3"),
        ({"k": 2}, "`k` must be a pair of integers.*Received: 2"),
        ({"k": (2,)}, r"pair of integers.*Received: \(2,\)"),
        ({"k": (2.0, 2)}, r"pair of integers.*Received: \(2.0, 2\)"),
        ({"num_groups": 0}, "`num_groups` must be .* Received: 0"),
        ({"experts_per_group": -1}, "`experts_per_group` must be .* Received: -1"),
        ({"gating": "softmax"}, "`gating` must be .*Received: 'softmax'"),
        ({"gating": HierarchicalGating(4, 3)}, "`num_groups=3`.* made for 4"),
        ({"gating": NoisyTopKGating(8)}, "`num_experts=12`.* made for 8"),
        ({"hidden_units": None}, "either `hidden_units`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalMoE(**{"num_groups": 3, "experts_per_group": 4, "hidden_units": 8, **arguments})


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="HierarchicalMoE takes inputs of rank 2 to 4"):
        HierarchicalMoE(3, 4, 8)(keras.KerasTensor((3,)))
