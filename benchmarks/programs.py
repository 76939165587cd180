"""What a program that XLA has compiled does, read from its text: operations and collectives.

XLA's own analysis counts the body of a loop once, and of a kernel what its author says.
"""

import math
import re

import numpy as np

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COLLECTIVES = """
    all-to-all ragged-all-to-all all-reduce all-gather reduce-scatter collective-permute
    collective-broadcast
""".split()
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}


class Program:
    """The text of a compiled module of XLA, as `compiled.as_text()` of JAX has it.

    Args:
        text: The text.
        turns: How often a loop runs whose number of turns depends on the data.
        share: Of the rows that kernels have room for those that are there. They visit no others.
    """

    def __init__(self, text, turns=1, share=1):
        self.turns, self.share = turns, share
        self.computations, self.shapes = {}, {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations[found[2]] = []
                if found[1]:
                    self.entry = found[2]
            elif found := _INSTRUCTION.match(line):
                name, shape, opcode, rest = found.groups()
                current.append((shape, opcode, rest))
                self.shapes[name] = shape

    def operations(self, computation=None):
        """Floating-point operations of all products, 2 for each pair of numbers.

        Of branches those of the largest; of megablox' kernels those of as many tiles as there can
        be.
        """
        return sum(self._of_instruction(*i) for i in self.computations[computation or self.entry])

    def collectives(self):
        """What chips send each other: a list of names, dtypes and shapes, the largest first."""
        found = []
        for instructions in self.computations.values():
            for shape, opcode, _ in instructions:
                name = opcode.removesuffix("-start")
                if name in _COLLECTIVES:
                    # What starts it has operands and results in its shape.
                    parts = list(dict.fromkeys(_SHAPE.findall(shape)))
                    found += [
                        (name, dtype, tuple(_sizes(sizes))) for dtype, sizes in parts if sizes
                    ]
        return sorted(found, key=lambda each: -math.prod(each[2]) * _BYTES.get(each[1], 4))

    def _of_instruction(self, shape, opcode, rest):
        if opcode == "dot":
            return 2 * _number(shape) * self._contracted(rest)
        if opcode == "convolution":
            return 2 * self._of_convolution(shape, rest)
        if 'custom_call_target="tpu_custom_call"' in rest:
            return _of_kernel(shape, rest, self.share)
        if found := _BRANCHES.search(rest):
            names = [name.strip(" %") for name in found[1].split(",")]
            return max(map(self.operations, names))
        turns = self._turns(rest) if opcode == "while" else 1
        return turns * sum(map(self.operations, _CALLED.findall(rest)))

    def _contracted(self, rest):
        """Of a dot: the product of the sizes along which its first operand is contracted."""
        sizes = self._operand(rest, 0)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
        return math.prod(sizes[int(axis)] for axis in axes.split(","))

    def _of_convolution(self, shape, rest):
        """Of a convolution, as TPUs have all products, batches as windows: pairs of numbers.

        What a window meets of padding and between the entries of what is dilated is not there.
        """
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
        shapes = self._operand(rest, 0), self._operand(rest, 1), _sizes(_SHAPE.search(shape)[2])
        given, kernel, result = (
            dict(zip(axes, sizes, strict=True)) for axes, sizes in zip(labels, shapes, strict=True)
        )
        pairs = result["b"] * result["f"] * kernel["i"]
        window = re.search(r"window=\{([^}]*)\}", rest)
        options = dict(part.split("=") for part in window[1].split()) if window else {}
        for axis in range(len(result) - 2):
            name = str(axis)
            low, stride, apart, spread = (
                int(options[key].split("x")[axis].split("_")[0]) if key in options else default
                for key, default in [
                    ("pad", 0),
                    ("stride", 1),
                    ("lhs_dilate", 1),
                    ("rhs_dilate", 1),
                ]
            )
            starts = np.arange(result[name])[:, None] * stride - low
            places = starts + np.arange(kernel[name]) * spread
            there = (places >= 0) & (places <= (given[name] - 1) * apart) & (places % apart == 0)
            pairs *= int(there.sum())
        return pairs

    def _operand(self, rest, index):
        """The shape of an operand, which stands beside its name or where that is defined."""
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        return _sizes(_SHAPE.search(self.shapes[operands[index]])[2])

    def _turns(self, rest):
        """How often a loop runs: it is told, or the counter is compared with a constant."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(found[1])
        condition = self.computations[re.search(r"condition=%?([\w.-]+)", rest)[1]]
        constants = [
            re.match(r"(\d+)\)", rest)
            for shape, opcode, rest in condition
            if opcode == "constant" and shape.startswith("s32[]")
        ]
        return int(constants[0][1]) if len(constants) == 1 else self.turns


def _of_kernel(shape, rest, share):
    """Of a kernel of megablox: so many tiles of rows, each once with the matrix of an expert."""
    layout = rest.split("operand_layout_constraints={")[1].split("}, frontend")[0]
    operands = [(dtype, _sizes(sizes)) for dtype, sizes in _SHAPE.findall(layout)]
    experts = next(sizes[0] for dtype, sizes in operands if dtype == "s32" and sizes) - 1
    visits = max(sizes[0] for dtype, sizes in operands if dtype == "s32" and sizes)
    result = _sizes(_SHAPE.search(shape)[2])
    floats = [sizes for dtype, sizes in operands if dtype != "s32"]
    rows = floats[0][0]
    tiles = visits - experts + 1
    size = rows // tiles
    visits -= tiles - math.ceil(share * tiles)
    if len(result) == 3:  # of kernels: [N, D, F]
        return 2 * visits * size * math.prod(result[1:])
    return 2 * visits * size * floats[0][1] * result[1]


def _sizes(text):
    return [int(size) for size in text.split(",") if size]


def _number(shape):
    return math.prod(_sizes(_SHAPE.search(shape)[2]))
