"""`FactoredAdam`: what it keeps for which parameter, and how much memory that takes."""

import keras
import pytest
from helpers import EVERY_LAYER, WIDTH, examples
from keras.ops import convert_to_numpy as numpy

import keras_moe
from keras_moe import FeedForwardExperts, HierarchicalMoE, LayerExperts, SparseMoE
from keras_moe.optimizers import FactoredAdam


def slots(optimizer):
    """Shapes of all variables but the counter and the learning rate."""
    return [tuple(variable.shape) for variable in optimizer.variables[2:]]


def built(layer, optimizer=None, width=WIDTH):
    if not layer.built:
        layer.build((None, width))
    optimizer = optimizer or FactoredAdam()
    optimizer.build(layer.trainable_variables)
    return slots(optimizer)


def test_slots_of_a_bank():
    bank = FeedForwardExperts(3, [4, 5], use_bias=True)
    rows_and_columns = [(3, WIDTH), (3, 4), (3, 4), (3, 5), (3, 5), (3, WIDTH)]
    biases = [(3, 4), (3, 5), (3, WIDTH)]
    assert sorted(built(bank)) == sorted(rows_and_columns + biases)


def test_slots_of_experts_that_are_layers():
    layer = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(WIDTH, use_bias=False)])
    # Each of two clones: kernel [D, 4] and bias [4], then kernel [4, D].
    assert built(LayerExperts(2, layer)) == [(WIDTH,), (4,), (4,), (4,), (WIDTH,)] * 2


def test_slots_of_experts_that_are_mixtures_themselves():
    inner = SparseMoE(2, 4, k=1, use_bias=True)
    optimizer = FactoredAdam()
    built(LayerExperts(1, inner), optimizer)
    by_name = {v.name.rpartition("experts_")[2]: tuple(v.shape) for v in optimizer.variables[2:]}
    assert by_name["kernel_0_row_means"] == (2, WIDTH)
    assert by_name["bias_0_velocity"] == (2, 4)


def test_gating_and_other_layers_have_both_moments():
    layer = HierarchicalMoE(2, 3, 4, num_shared_experts=1)
    D, F, N, A, B = WIDTH, 4, 6, 2, 3
    gating = 2 * [(D, A), (A, D, B), (D, A), (A, D, B)]  # two moments of kernels and of noise
    banks = [(N, D), (N, F), (N, F), (N, D), (1, D), (1, F), (1, F), (1, D)]
    assert sorted(built(layer)) == sorted(gating + banks)

    attention = keras.layers.MultiHeadAttention(2, 3)
    attention.build((None, 4, WIDTH), (None, 4, WIDTH))
    optimizer = FactoredAdam()
    optimizer.build(attention.trainable_variables)
    shapes = [tuple(v.shape) for v in attention.trainable_variables]
    assert (WIDTH, 2, 3) in shapes and sorted(slots(optimizer)) == sorted(2 * shapes)


def test_parameters_of_experts_by_name():
    dense = keras.layers.Dense(4, name="ffn")
    # The kernel [D, 4] by its row and column means, the bias by a second moment alone.
    assert built(dense, FactoredAdam(expert_parameters=["ffn/"])) == [(WIDTH,), (4,), (4,)]
    assert built(dense, FactoredAdam(expert_parameters=["ffn/k"])) == [(WIDTH,), (4,), (4,), (4,)]
    # A list replaces the rule, and a bank's biases remain one vector for each expert.
    bank = FeedForwardExperts(3, 4, use_bias=True, name="bank")
    shapes = [(3, WIDTH, 4), (3, 4), (3, 4, WIDTH), (3, WIDTH)]
    assert built(bank, FactoredAdam(expert_parameters=[])) == [s for s in shapes for _ in "mv"]
    assert built(bank, FactoredAdam(expert_parameters=("bank/bias_0",)))[2:3] == [(3, 4)]


def test_state_of_a_bank_takes_a_fiftieth_of_adams_memory():
    def state(optimizer):
        bank = FeedForwardExperts(2, 1024)
        bank.build((None, 512))
        optimizer.build(bank.trainable_variables)
        return sum(numpy(variable).nbytes for variable in optimizer.variables)

    ours, adams = state(FactoredAdam()), state(keras.optimizers.Adam())
    # 2·2·(512 + 1024) floats for two kernels of 2·512·1024, of which Adam has two each: 1/683. Both
    # have a counter, of int64 or under JAX of int32, and a learning rate.
    others = 4 + (8 if keras.config.backend() == "tensorflow" else 4)
    assert ours == 4 * 2 * 2 * (512 + 1024) + others
    assert adams == 4 * 2 * 2 * 2 * 512 * 1024 + others
    assert ours <= adams / 50


@pytest.mark.parametrize(
    "surgery",
    [
        lambda layer: keras_moe.grow(layer, 8),
        lambda layer: keras_moe.prune(layer, [0, 2, 4]),
        lambda layer: SparseMoE.from_config(layer.get_config()),
    ],
    ids=["grown", "pruned", "from_config"],
)
def test_layers_made_of_others_have_factored_slots(surgery):
    layer = EVERY_LAYER["noisy_top_k"](use_bias=True)
    layer(examples())
    new = surgery(layer)
    shapes = built(new.experts)
    N, D, F = new.num_experts, WIDTH, 4
    assert sorted(shapes) == sorted([(N, D), (N, F), (N, F), (N, F), (N, D), (N, D)])


def test_an_upcycled_layer_has_factored_slots():
    dense = [keras.layers.Dense(4, "relu"), keras.layers.Dense(WIDTH)]
    keras.Sequential([keras.Input((WIDTH,)), *dense])
    layer = keras_moe.upcycle(dense, 3, k=2)
    optimizer = FactoredAdam()
    optimizer.build(layer.experts.trainable_variables)
    D, F = (3, WIDTH), (3, 4)
    assert sorted(slots(optimizer)) == sorted([D, F, F, F, D, D])
