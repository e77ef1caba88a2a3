"""The cost of a Mosaic kernel: the operations of its products, from its program, and its cycles,
from the compiler's schedule. A bundle of the schedule takes one cycle, without waiting for memory.
"""

import base64
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental.mosaic.dialects import tpu
from jax.extend.mlir import ir

# Comparisons in the order of their numbers in the kernel's program, by their names in the schedule.
PREDICATES = ("eq", "ne", "lt", "le", "gt", "ge")
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
COMPARE: dict[str, Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less}
COMPARE |= {"le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
# Division and remainder are of grid indices, which are never negative.
ARITHMETIC: dict[str, Any] = {"addi": np.add, "subi": np.subtract, "muli": np.multiply}
ARITHMETIC |= {"divsi": np.floor_divide, "remsi": np.remainder}
ARITHMETIC |= {"andi": np.bitwise_and, "ori": np.bitwise_or}
ARITHMETIC |= dict.fromkeys(("extui", "extsi", "index_cast"), np.asarray)
SLOTS = 5  # a branch takes effect this many bundles after its own


class Branch(NamedTuple):
    """A part of the kernel that runs only under a condition."""

    skipped: tuple[str, int] | None  # the comparison with a constant under which it is skipped
    share: float  # of the grid's points that run it; 1 if that is unknown before the run
    number: int  # in the order of the program
    last: int  # the number of the last branch inside it, or its own


class Kernel(NamedTuple):
    grid: tuple[int, ...]
    flops: float  # of products, over the whole grid
    branches: tuple[Branch, ...]


def read(body: str) -> Kernel:
    """Reads a kernel's program from its base64 in the HLO."""
    context = ir.Context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        module = ir.Module.parse(base64.b64decode(body))
        # The other functions map blocks.
        function = next(op for op in module.body.operations if _short_name(op) == "func")
        grid = tuple(int(bound) for bound in function.attributes.get("iteration_bounds", ()))
        block = function.regions[0].blocks[0]
        # At first, only the grid's indices are known, at each of its points.
        indices = np.ogrid[tuple(slice(bound) for bound in grid)] if grid else ()
        walk = _Walk(dict(zip(block.arguments, indices, strict=False)))
        flops = walk.run(block, np.ones((), bool), 1.0) * math.prod(grid)
        return Kernel(grid, flops, tuple(walk.branches))


class _Walk:
    """Walks a kernel's program once, for all points of the grid together."""

    def __init__(self, known: dict[Any, Any]):
        self._known = known
        self._tests: dict[Any, tuple[str, int]] = {}  # comparisons with constants
        self.branches: list[Branch] = []

    def run(self, block: Any, reached: np.ndarray, share: float) -> float:
        """Counts the operations of a block's products at the average point of the grid. `reached`
        is true at the points that run the block, as far as that is known."""
        flops = 0.0
        for op in block.operations:
            name, operands = _short_name(op), list(op.operands)
            if name == "if":
                flops += self._if(op, reached, share)
            elif name == "for":
                first, last, stride = (self._known.get(operand) for operand in operands[:3])
                unknown = first is None or last is None or stride is None
                trips = 1 if unknown else -(-int(last - first) // int(stride))
                flops += self.run(op.regions[0].blocks[0], reached, share) * trips
            elif name == "matmul":
                flops += share * _count_product(op)
            elif len(op.results) == 1:
                self._learn(op, name, operands)
        return flops

    def _if(self, op: Any, reached: np.ndarray, share: float) -> float:
        test, condition = self._tests.get(op.operands[0]), self._known.get(op.operands[0])
        flops = 0.0
        for side, region in enumerate(op.regions):
            if not len(region.blocks):
                continue
            taken, part = reached, share
            if condition is not None:
                taken = reached & (condition == (side == 0))
                part = share * float(taken.mean()) / max(float(reached.mean()), 1e-30)
            number = len(self.branches)
            if side == 0:
                skipped = test and (OPPOSITE[test[0]], test[1])
                ran = part / share if share else 1.0
                self.branches.append(Branch(skipped, ran, number, number))
            flops += self.run(region.blocks[0], taken, part)
            if side == 0:
                last = len(self.branches) - 1
                self.branches[number] = self.branches[number]._replace(last=last)
        return flops

    def _learn(self, op: Any, name: str, operands: list[Any]) -> None:
        values = [self._known.get(operand) for operand in operands]
        result, complete = op.results[0], all(value is not None for value in values)
        if name == "constant" and isinstance(op.attributes["value"], ir.IntegerAttr):
            self._known[result] = np.asarray(op.attributes["value"].value)
        elif name == "cmpi":
            predicate = op.attributes["predicate"].value
            if predicate < len(PREDICATES) and values[1] is not None and values[1].size == 1:
                # `if` tests whether a widened comparison is not 0: record the comparison itself.
                inner = self._tests.get(operands[0])
                own = PREDICATES[predicate], int(values[1])
                self._tests[result] = inner if inner and predicate == 1 else own
            if predicate < len(PREDICATES) and complete:
                self._known[result] = COMPARE[PREDICATES[predicate]](*values)
        elif name in ARITHMETIC:
            if name == "extui" and operands[0] in self._tests:
                self._tests[result] = self._tests[operands[0]]
            if complete:
                self._known[result] = ARITHMETIC[name](*values)


def _short_name(op: Any) -> str:
    """Returns an operation's name without its dialects."""
    return op.operation.name.rpartition(".")[2]


def _count_product(op: Any) -> float:
    left, result = (
        [int(n) for n in re.findall(r"\d+(?=x)", str(value.type))]
        for value in (op.operands[0], op.results[0])
    )
    contracted = re.search(
        r"dot_dimension_numbers<\[([\d, ]*)\]", str(op.attributes["dimension_numbers"])
    )
    axes = [int(axis) for axis in contracted[1].split(",")] if contracted else [1]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)


class Skip(NamedTuple):
    """A forward jump of a schedule, over the bundles from `after` to `target`."""

    after: int
    target: int
    test: tuple[str | None, int]


def match_branches(
    skips: Sequence[Skip], branches: Sequence[Branch]
) -> Sequence[tuple[Skip, Branch]]:
    """Finds the jumps over a kernel's branches: the most that have the same tests in the same order
    and lie inside each other as the branches do. Of several such choices it takes the one that
    skips the fewest bundles. All other jumps are around copies in and out, or around the whole
    body in steps of the grid's loop that only copy; these can have a branch's test too."""
    tests = {branch.skipped for branch in branches}
    skips = [skip for skip in skips if skip.test in tests]

    def alike(pairs: Sequence[tuple[Skip, Branch]]) -> bool:
        return all(skip.test == branch.skipped for skip, branch in pairs) and all(
            (inner.after < outer.target) == (part.number <= whole.last)
            for (outer, whole), (inner, part) in itertools.combinations(pairs, 2)
        )

    def count_skipped(pairs: Sequence[tuple[Skip, Branch]]) -> int:
        return sum(skip.target - skip.after for skip, _ in pairs)

    for count in range(min(len(skips), len(branches)), 0, -1):
        choices = itertools.product(
            itertools.combinations(skips, count), itertools.combinations(branches, count)
        )
        found = filter(alike, (list(zip(*choice, strict=True)) for choice in choices))
        if best := min(found, key=count_skipped, default=[]):
            return best
    return []


def count_cycles(schedule: str, kernel: Kernel) -> float:
    """Counts the bundles that one core runs in one call of the kernel. A bundle inside branches and
    loops counts as often as these run it. Of the schedules that the compiler dumps,
    `packed-bundles-post-ra` is the last in which a cycle of delay is still a bundle."""
    address, count, comparisons, jumps = 0, 0, {}, []
    for line in schedule.splitlines():
        if found := re.match(r" *(0x[0-9a-f]+|0) ", line):
            address = int(found[1], 16)
            count = address + 1
        compared = r"(%p\w+) = scmp\.(\w+)\.s32\.totalorder %s\w+, (-?\d+)"
        for name, predicate, constant in re.findall(compared, line):
            comparisons[name] = predicate, int(constant)
        if found := re.search(r"sbr\.rel \((!?)(%p\w+)\) target bundleno = (\d+)", line):
            predicate, constant = comparisons.get(found[2], (None, 0))
            if found[1] and predicate:
                predicate = OPPOSITE[predicate]
            jumps.append((address + SLOTS, int(found[3]), predicate, constant))
    weight = np.ones(count)
    skips = [Skip(after, target, (test, n)) for after, target, test, n in jumps if target >= after]
    for skip, branch in match_branches(skips, kernel.branches):
        weight[skip.after : skip.target] *= branch.share
    for after, target, predicate, constant in jumps:
        if target < after:
            # The loop jumps back while its counter is less. The grid's loop runs two more times, to
            # begin and to finish its copies.
            if predicate != "lt":
                rule = "a kernel's loop must count to a constant"
                raise ValueError(f"{rule}: got {predicate} {constant}")
            steps = math.prod(kernel.grid)
            of_grid = constant - 2 in (steps, -(-steps // 2))
            weight[target:after] *= constant - 2 if of_grid else constant
    return float(weight.sum())
