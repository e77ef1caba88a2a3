"""The cost of an optimised TPU program, read from its HLO text: the operations of its products, the
cycles that the compiler estimates for each fusion, and the bytes that one chip sends, multiplied by
the trip counts of the loops around them."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# The bytes that one of n chips sends for each byte of its operand, with the algorithm that sends
# least.
COLLECTIVES = {
    "all-to-all": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,  # the operand is the chip's own part
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# The integer operations of loop counters. A value from any other operation is unknown.
SCALAR: dict[str, Any] = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}
SCALAR |= dict.fromkeys(("copy", "copy-start", "copy-done", "bitcast", "convert"), lambda a: a)
COMPARE = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__}
COMPARE |= {"GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__}
MOST_TRIPS = 100_000

Known = Any  # an int, a tuple of these, or None


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; a constant's value or a parameter's number comes first

    def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str:
        found = re.search(rf"\b{name}={pattern}", self.rest)
        return found[1] if found else ""

    @property
    def backend(self) -> dict[str, Any]:
        _, mark, rest = self.rest.partition("backend_config=")
        return json.JSONDecoder().raw_decode(rest)[0] if mark else {}


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass
class Cost:
    """The cost of one run of the program on one chip."""

    flops: float = 0.0  # of convolutions and dots outside kernels
    cycles: float = 0.0  # the compiler's estimate, without kernels and communication
    sent: float = 0.0  # bytes
    # The number of calls of each Mosaic kernel.
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    # Each kernel's program, in base64 as in the HLO.
    bodies: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, other: "Cost", times: int) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.sent += times * other.sent
        self.kernels.update({name: times * count for name, count in other.kernels.items()})
        self.bodies |= other.bodies


def read(text: str) -> Cost:
    """Reads the cost of a program. Raises ValueError for a loop without a countable number of
    trips."""
    computations, entry = parse(text)
    return Reader(computations).sum_cost(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations by name, and the entry's name."""
    computations, entry = {}, ""
    for start in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", text, re.MULTILINE):
        # Attributes span lines too, but none of their lines is only a brace.
        body = text[start.end() :].partition("\n}\n")[0]
        instructions, root = {}, ""
        for line in re.split(r"\n  (?=(?:ROOT )?%?[\w.\-]+ = )", body)[1:]:
            instruction = _parse_instruction(line.removeprefix("ROOT "))
            instructions[instruction.name] = instruction
            root = instruction.name if line.startswith("ROOT ") else root
        computations[start[2]] = Computation(instructions, root)
        entry = start[2] if start[1] else entry
    return computations, entry


def _parse_instruction(line: str) -> Instruction:
    name, _, line = line.partition(" = ")
    shape_end = _find_closing(line, 0) if line.startswith("(") else line.index(" ")
    shape, line = line[:shape_end], line[shape_end:].lstrip()
    start = line.index("(")
    end = _find_closing(line, start)
    inside, after = line[start + 1 : end - 1], line[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        name.removeprefix("%"), shape, line[:start], operands, after if operands else inside + after
    )


def _find_closing(text: str, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"HLO must close its brackets: got {text[start : start + 80]!r}")


class Reader:
    """Walks a program from a computation to the computations that it calls. `given` are the values
    of a computation's parameters, with None for those that are not known before the program runs.
    The known ones are integers, such as the counters of loops."""

    def __init__(self, computations: dict[str, Computation]):
        self._computations = computations
        self._costs: dict[tuple[str, Known], Cost] = {}
        self._values: dict[tuple[int, str, Known], Known] = {}

    def sum_cost(self, name: str, given: Known = None) -> Cost:
        if (name, given) not in self._costs:
            total, computation = Cost(), self._computations[name]
            for instruction in computation.instructions.values():
                self._charge(total, instruction, computation, given)
            self._costs[name, given] = total
        return self._costs[name, given]

    def _charge(
        self, total: Cost, instruction: Instruction, around: Computation, given: Known
    ) -> None:
        opcode, kind = instruction.opcode, instruction.opcode.removesuffix("-start")
        window = instruction.backend.get("window_config", {})
        total.cycles += float(window.get("estimated_cycles", 0))
        if opcode == "while":
            state = self.evaluate(around, instruction.operands[0], given)
            body = self.sum_cost(instruction.attribute("body"), (state,))
            total.add(body, self.count_trips(instruction, state))
        elif opcode == "conditional":
            listed = instruction.attribute("branch_computations", r"\{([^}]*)\}")
            sides = [instruction.attribute(f"{side}_computation") for side in ("true", "false")]
            branches = re.findall(r"%([\w.\-]+)", listed) or sides
            total.add(
                max(map(self.sum_cost, branches), key=lambda cost: (cost.cycles, cost.flops)), 1
            )
        elif kind in COLLECTIVES:
            moved = sum(
                count_bytes(around.instructions[name].shape) for name in instruction.operands
            )
            total.sent += moved * COLLECTIVES[kind](read_group_size(instruction.rest))
        elif opcode in ("convolution", "dot"):
            total.flops += count_flops(instruction, around)
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
            total.kernels[instruction.name] += 1
            total.bodies[instruction.name] = instruction.backend["custom_call_config"]["body"]
        elif opcode in ("fusion", "call", "async-start"):
            inner = self.sum_cost(
                instruction.attribute("to_apply" if opcode == "call" else "calls")
            )
            if opcode == "fusion":  # its own estimate already includes these cycles
                inner = dataclasses.replace(inner, cycles=0.0)
            total.add(inner, 1)

    def count_trips(self, loop: Instruction, state: Known) -> int:
        """Returns the number of trips of a loop: the compiler's if the program states it, else
        counted by evaluating the loop's counter."""
        noted = loop.backend.get("known_trip_count", {}).get("n")
        if noted is not None:
            return int(noted)
        condition = self._computations[loop.attribute("condition")]
        body = self._computations[loop.attribute("body")]
        for trips in range(MOST_TRIPS + 1):
            going = self.evaluate(condition, condition.root, (state,))
            if going is False:
                return trips
            if going is not True:
                break
            state = self.evaluate(body, body.root, (state,))
        rule = f"a loop must count to a constant of at most {MOST_TRIPS}"
        raise ValueError(f"{rule}: got {loop.name}, {loop.shape[:80]}")

    def evaluate(self, inside: Computation, name: str, given: Known) -> Known:
        """Returns an instruction's value: an integer, a tuple, or None for what is not known before
        the run. Each is computed once: of a chain of tuples, every one names its elements anew."""
        key = id(inside), name, given
        if key not in self._values:
            self._values[key] = self._evaluate(inside, name, given)
        return self._values[key]

    def _evaluate(self, inside: Computation, name: str, given: Known) -> Known:
        instruction = inside.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            value = re.match(r"-?\d+(?![.\d])", instruction.rest)
            return int(value[0]) if value else None
        if opcode == "parameter":
            return given[int(instruction.rest.split(",")[0])] if given else None
        if opcode == "get-tuple-element":
            whole = self.evaluate(inside, operands[0], given)
            return whole[int(instruction.attribute("index"))] if isinstance(whole, tuple) else None
        if opcode not in (*SCALAR, "tuple", "fusion", "compare"):
            return None
        values = tuple(self.evaluate(inside, operand, given) for operand in operands)
        if opcode == "tuple":
            return values
        if opcode == "fusion":
            called = self._computations[instruction.attribute("calls")]
            return self.evaluate(called, called.root, values)
        if not all(isinstance(value, int) for value in values):
            return None
        if opcode == "compare":
            return COMPARE[instruction.attribute("direction")](*values)
        return SCALAR[opcode](*values)


def parse_arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    """Yields type and sizes of every array of a shape, which may be a tuple of arrays."""
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        yield kind, [int(size) for size in sizes.split(",") if size]


def count_bytes(shape: str) -> int:
    """Counts the bytes of a shape's values, without padding."""
    return sum(BYTES[kind] * math.prod(sizes) for kind, sizes in parse_arrays(shape))


def read_group_size(attributes: str) -> int:
    """Reads the number of chips in a group of a collective, from any notation of replica groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\w*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if "source_target_pairs=" in attributes:
        return 2
    raise ValueError(f"a collective must name its groups: got {attributes[:120]!r}")


def count_flops(product: Instruction, around: Computation) -> float:
    """Counts multiplications and additions of a dot or a convolution. Taps on padding, or between
    the entries of a dilated input, do not count."""
    left, right = (_read_sizes(around.instructions[name]) for name in product.operands)
    out = _read_sizes(product)
    if product.opcode == "dot":
        contracted = product.attribute("lhs_contracting_dims", r"\{([\d,]*)\}")
        terms = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2.0 * math.prod(out) * terms
    lhs, rhs, result = re.split(r"_|->", product.attribute("dim_labels", r"([\w\->]+)"))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", product.attribute("window", r"\{([^}]*)\}")))

    def stated(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    taps = 1
    for axis, label in enumerate(label for label in rhs if label.isdigit()):
        stride, spread, reach = (
            int(stated(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(stated("pad", axis, "0_0").split("_")[0])
        last = (left[lhs.index(label)] - 1) * spread
        places = (
            o * stride + r * reach - before
            for o in range(out[result.index(label)])
            for r in range(right[rhs.index(label)])
        )
        taps *= sum(0 <= place <= last and place % spread == 0 for place in places)
    return 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")] * taps


def _read_sizes(instruction: Instruction) -> list[int]:
    return next(parse_arrays(instruction.shape))[1]
