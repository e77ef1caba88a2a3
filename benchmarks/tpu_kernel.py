"""What a Mosaic kernel costs: operations of its products from its own program, cycles from the
compiler's schedule of it. A bundle of the schedule is a cycle; it knows nothing of waiting for
memory."""

import base64
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib import tpu
from jaxlib.mlir import ir

# Comparisons as the kernel's program numbers them, under the schedule's names.
PREDICATES = ("eq", "ne", "lt", "le", "gt", "ge")
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
COMPARE = dict(
    zip(
        PREDICATES,
        (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
        strict=True,
    )
)
ARITHMETIC = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": np.floor_divide,
    "remsi": np.remainder,  # of grid indices, which are never negative
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "extui": np.asarray,
    "extsi": np.asarray,
    "index_cast": np.asarray,
}
SLOTS = 5  # a branch is taken this many bundles after it stands


class Branch(NamedTuple):
    """A part of the kernel under a condition."""

    skipped: tuple[str, int] | None  # the comparison, with a constant, that passes it over
    share: float  # of the grid's points that run it; 1 where that can't be told before it runs


class Kernel(NamedTuple):
    grid: tuple[int, ...]
    flops: float  # of products, over the whole grid
    branches: tuple[Branch, ...]  # in the order of the program


def read(body: str) -> Kernel:
    """A kernel's program, from the base64 in which HLO holds it."""
    context = make_ir_context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        module = ir.Module.parse(base64.b64decode(body))
        # The others map blocks.
        function = next(op for op in module.body.operations if _short(op) == "func")
        grid = tuple(int(bound) for bound in function.attributes.get("iteration_bounds", ()))
        block = function.regions[0].blocks[0]
        # Values that are known at each of the grid's points, and nothing else.
        indices = np.ogrid[tuple(slice(bound) for bound in grid)] if grid else ()
        walk = _Walk(dict(zip(block.arguments, indices, strict=False)))
        flops = walk.run(block, np.ones((), bool), 1.0) * math.prod(grid)
        return Kernel(grid, flops, tuple(walk.branches))


class _Walk:
    """Goes through a kernel's program once, for all points of the grid together."""

    def __init__(self, known: dict[Any, Any]):
        self._known = known
        self._tests: dict[Any, tuple[str, int]] = {}  # comparisons with constants
        self.branches: list[Branch] = []

    def run(self, block: Any, reached: np.ndarray, share: float) -> float:
        """Operations of a block's products at the average point; `reached` says by which points, as
        far as that is known."""
        flops = 0.0
        for op in block.operations:
            name, operands = _short(op), list(op.operands)
            if name == "if":
                flops += self._if(op, reached, share)
            elif name == "for":
                first, last, stride = (self._known.get(operand) for operand in operands[:3])
                unknown = first is None or last is None or stride is None
                flops += self.run(op.regions[0].blocks[0], reached, share) * (
                    1 if unknown else -(-int(last - first) // int(stride))
                )
            elif name == "matmul":
                flops += share * _product(op)
            elif len(op.results) == 1:
                self._learn(op, name, operands)
        return flops

    def _if(self, op: Any, reached: np.ndarray, share: float) -> float:
        test, condition = self._tests.get(op.operands[0]), self._known.get(op.operands[0])
        flops = 0.0
        for side, region in enumerate(op.regions):
            if not len(region.blocks):
                continue
            taken = reached if condition is None else reached & (condition == (side == 0))
            part = (
                share
                if condition is None
                else share * float(taken.mean()) / max(float(reached.mean()), 1e-30)
            )
            if side == 0:
                self.branches.append(
                    Branch(test and (OPPOSITE[test[0]], test[1]), part / share if share else 1.0)
                )
            flops += self.run(region.blocks[0], taken, part)
        return flops

    def _learn(self, op: Any, name: str, operands: list[Any]) -> None:
        values = [self._known.get(operand) for operand in operands]
        result, complete = op.results[0], all(value is not None for value in values)
        if name == "constant" and isinstance(op.attributes["value"], ir.IntegerAttr):
            self._known[result] = np.asarray(op.attributes["value"].value)
        elif name == "cmpi":
            predicate = op.attributes["predicate"].value
            if predicate < len(PREDICATES) and values[1] is not None and values[1].size == 1:
                # `if` asks whether a widened comparison is not 0: what counts is the comparison.
                inner = self._tests.get(operands[0])
                self._tests[result] = (
                    inner if inner and predicate == 1 else (PREDICATES[predicate], int(values[1]))
                )
            if predicate < len(PREDICATES) and complete:
                self._known[result] = COMPARE[PREDICATES[predicate]](*values)
        elif name in ARITHMETIC:
            if name == "extui" and operands[0] in self._tests:
                self._tests[result] = self._tests[operands[0]]
            if complete:
                self._known[result] = ARITHMETIC[name](*values)


def _short(op: Any) -> str:
    """An operation's name without its dialects."""
    return op.operation.name.rpartition(".")[2]


def _product(op: Any) -> float:
    left, result = (
        [int(n) for n in re.findall(r"\d+(?=x)", str(value.type))]
        for value in (op.operands[0], op.results[0])
    )
    contracted = re.search(
        r"dot_dimension_numbers<\[([\d, ]*)\]", str(op.attributes["dimension_numbers"])
    )
    axes = [int(axis) for axis in contracted[1].split(",")] if contracted else [1]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)


def cycles(schedule: str, kernel: Kernel) -> float:
    """Bundles of a run of the kernel on one core, each as often as the branches and loops around it
    let it run. Of the schedules that the compiler dumps, `packed-bundles-post-ra` is the last in
    which a cycle of delay still is a bundle."""
    address, count, comparisons, jumps = 0, 0, {}, []
    for line in schedule.splitlines():
        if found := re.match(r" *(0x[0-9a-f]+|0) ", line):
            address = int(found[1], 16)
            count = address + 1
        for name, predicate, constant in re.findall(
            r"(%p\w+) = scmp\.(\w+)\.s32\.totalorder %s\w+, (-?\d+)", line
        ):
            comparisons[name] = predicate, int(constant)
        if found := re.search(r"sbr\.rel \((!?)(%p\w+)\) target bundleno = (\d+)", line):
            predicate, constant = comparisons.get(found[2], (None, 0))
            if found[1] and predicate:
                predicate = OPPOSITE[predicate]
            jumps.append((address + SLOTS, int(found[3]), predicate, constant))
    weight = np.ones(count)
    branches = list(kernel.branches)
    for after, target, predicate, constant in jumps:
        if target >= after:
            same = [
                i for i, branch in enumerate(branches) if branch.skipped == (predicate, constant)
            ]
            if same:  # else it is one of the branches around the copies in and out
                weight[after:target] *= branches[same[0]].share
                branches = branches[same[0] + 1 :]
        else:
            # The loop jumps back while its counter is less; the grid's runs twice more, to begin
            # and to finish its copies.
            if predicate != "lt":
                raise ValueError(
                    f"a kernel's loop must count to a constant: got {predicate} {constant}"
                )
            steps = math.prod(kernel.grid)
            weight[target:after] *= (
                constant - 2 if constant - 2 in (steps, -(-steps // 2)) else constant
            )
    return float(weight.sum())
