"""A plan on paper for training the paper's language models on many devices.

Closed formulas of nothing but sizes. Experts and secondary gatings are divided among R devices,
everything else is on each of them (section 3.1). The optimizer is `FactoredAdam`, the hidden
activations are computed again (appendix D), every number has 4 bytes, and the experts have as many
rows each. As in Tables 7 and 8 embedding and softmax are left out, and of the activations all but
the rows of experts.
"""

import dataclasses
import math
from typing import NamedTuple

from keras_moe.models import TABLE_8, footprint

BYTES = 4
# About 300,000 words in a batch on 16 devices (section 5.1).
WORDS = 300_000 // 16
DEVICES = 64, 256, 1024, 4096
EXPERTS = 2**16, 2**18, 2**20  # the last ones of 1.05 million parameters each: 10^12


class Counts(NamedTuple):
    """The size of a model.

    Attributes:
        lstms: Parameters of the LSTMs.
        primary: Parameters of the gating that each device has, all of a flat one.
        secondary: Parameters of the gatings within the groups.
        experts: Parameters of all experts.
        ops_per_timestep: Multiply-adds of the forward pass for one word.
    """

    lstms: int
    primary: int
    secondary: int
    experts: int
    ops_per_timestep: int

    @property
    def parameters(self):
        """All of them, each counted once."""
        return self.lstms + self.primary + self.secondary + self.experts


class Plan(NamedTuple):
    """What a training step takes of one of R devices.

    Attributes:
        parameters: Bytes of the parameters that it holds.
        gradients: Bytes of their gradients.
        slots: Bytes of the optimizer's slots for them.
        rows: Bytes of what the backward pass needs of the rows that it sends to experts and of
            those that its experts receive: both, and the results of both.
        exchanged: Bytes that it sends to others by all-to-all.
        reduced: Bytes that it sends to others to sum the gradients of what all have.
        operations: Multiply-adds.
    """

    parameters: int
    gradients: int
    slots: int
    rows: int
    exchanged: int
    reduced: int
    operations: int

    @property
    def memory(self):
        """Bytes that it holds at the same time."""
        return self.parameters + self.gradients + self.slots + self.rows

    @property
    def operations_per_byte(self):
        """Operations, two for a multiply-add, for each byte sent.

        A device with more FLOPS than that for each byte per second of its network waits for it.
        """
        return 2 * self.operations / (self.exchanged + self.reduced)


def counts(preset):
    """Returns the `Counts` of a `Preset` with experts."""
    width, num_experts = preset.width, preset.num_experts
    units = preset.lstm_units or width
    # Four gates see input and output; a projection makes that as wide as the input.
    matrices = 4 * units * 2 * width + (0 if preset.lstm_units is None else units * width)
    lstms = preset.num_lstms * (matrices + 4 * units)
    # Each gating has a matrix, and one more for its noise.
    primary, secondary, secondary_operations = 2 * width * num_experts, 0, 0
    if preset.num_groups is not None:
        primary, secondary = 2 * width * preset.num_groups, primary
        secondary_operations = secondary * preset.k[0] // preset.num_groups
    chosen = preset.k if preset.num_groups is None else math.prod(preset.k)
    expert = expert_size(preset)
    operations = preset.num_lstms * matrices + primary + secondary_operations + chosen * expert
    return Counts(lstms, primary, secondary, num_experts * expert, operations)


def expert_size(preset):
    """Parameters of an expert, and its multiply-adds for a row."""
    return sum(math.prod(shape) for shape in _matrices(preset))


def intensity(preset):
    """Multiply-adds of an expert for each number that it reads or writes (section 3.2).

    With one hidden layer they are as many as its hidden units.
    """
    return expert_size(preset) / (2 * preset.width)


def plan(preset, devices, words=WORDS):
    """Returns the `Plan` of a training step.

    Args:
        preset: A `Preset` with experts.
        devices: R, which divides the experts, or the groups where there are some.
        words: Words of a batch on each device.

    Raises:
        ValueError: If the devices cannot hold as many experts or groups each.
    """
    units = preset.num_experts if preset.num_groups is None else preset.num_groups
    if units % devices:
        raise ValueError(
            "The experts, or the groups of experts, must be a multiple of the devices. Received: "
            f"{units} and {devices} devices"
        )
    sizes, width = counts(preset), preset.width
    mirrored = sizes.lstms + sizes.primary
    parameters = mirrored + (sizes.secondary + sizes.experts) // devices
    # Adam keeps two moments, and of an expert's matrix the means of its rows and of its columns.
    means = preset.num_experts * sum(map(sum, _matrices(preset))) // devices
    slots = 2 * (mirrored + sizes.secondary // devices) + means

    # A row and its result travel, and both their gradients; to a secondary gating as well, whose
    # results are the logits of a group's experts and of their noise.
    chosen = preset.k if preset.num_groups is None else math.prod(preset.k)
    travelling = 4 * chosen * width
    if preset.num_groups is not None:
        logits = 2 * preset.num_experts // preset.num_groups
        travelling += 2 * preset.k[0] * (width + logits)
    to_others = (devices - 1) / devices
    return Plan(
        parameters=BYTES * parameters,
        gradients=BYTES * parameters,
        slots=BYTES * slots,
        rows=BYTES * words * 4 * chosen * width,
        exchanged=round(BYTES * words * travelling * to_others),
        reduced=round(BYTES * 2 * mirrored * to_others),  # In a ring: to sum, and to spread.
        operations=3 * words * sizes.ops_per_timestep,  # The backward pass has twice as many.
    )


def with_experts(num_experts, devices):
    """A model beside those of Table 8, with as many groups as experts in each if devices allow."""
    num_groups = max(devices, 2 ** math.ceil(math.log2(num_experts) / 2))
    largest = TABLE_8["MoE-131072-h"]
    return dataclasses.replace(largest, num_experts=num_experts, num_groups=num_groups)


def print_plan():
    """Prints the plan, and the models of Table 8 by the same formulas."""
    rows = [
        (f"{num_experts} experts", with_experts(num_experts, devices), devices)
        for num_experts in EXPERTS
        for devices in DEVICES
    ]
    print(f"Planned: {WORDS} words on each device, experts of 1.05 million parameters\n")
    _print_rows(rows)
    print("\nTable 8 on as few devices, in powers of two, as hold it in 12 GB each\n")
    rows = [
        (name, preset, _fewest(preset)) for name, preset in TABLE_8.items() if preset.num_experts
    ]
    _print_rows(rows)
    print(
        "\n| model | parameters | `footprint` | ops per word | `footprint` |\n" + "|---" * 5 + "|"
    )
    for name, preset, _ in rows:
        sizes, counted = counts(preset), footprint(preset)
        print(
            f"| {name} | {sizes.parameters} | {counted.parameters} | "
            f"{sizes.ops_per_timestep} | {counted.ops_per_timestep} |"
        )


def _fewest(preset, memory=12e9):
    """The least power of two of devices with so many bytes each."""
    return next(2**i for i in range(20) if plan(preset, 2**i).memory <= memory)


def _print_rows(rows):
    print(
        "| model | devices | parameters | GB per device | parameters | gradients | slots | rows | "
        "MB sent per step | rows | gradients | multiply-adds per number | operations per byte |"
    )
    print("|---" * 13 + "|")
    for name, preset, devices in rows:
        step = plan(preset, devices)
        memory = (step.memory, step.parameters, step.gradients, step.slots, step.rows)
        sent = (step.exchanged + step.reduced, step.exchanged, step.reduced)
        columns = [
            name,
            devices,
            f"{counts(preset).parameters:.3g}",
            *(f"{number / 1e9:.2f}" for number in memory),
            *(f"{number / 1e6:.0f}" for number in sent),
            f"{intensity(preset):.0f}",
            f"{step.operations_per_byte:.0f}" if devices > 1 else "",
        ]
        print("| " + " | ".join(map(str, columns)) + " |")


def _matrices(preset):
    """The shapes of an expert's matrices."""
    several = isinstance(preset.hidden_units, tuple)
    hidden = preset.hidden_units if several else (preset.hidden_units,)
    sizes = (preset.width, *hidden, preset.width)
    return list(zip(sizes, sizes[1:], strict=False))
