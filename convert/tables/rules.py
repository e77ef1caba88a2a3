"""A weight map is a table of rules, each read in both directions; this file reads them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from cogi2v_jax.config import one_line


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name here and there, and its axes as an einops pattern. "{}" in the
    torch name is the layer index, which becomes a new first axis of ours; `sizes` are the axis
    lengths that a pattern needs to be read backwards."""

    torch: str
    flax: str
    axes: str = ""  # empty: as it is
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_flax(self, tensor: np.ndarray | jax.Array) -> Any:
        if not self.axes:
            return tensor
        theirs, ours = self.axes.split(" -> ")
        # Whole rows are moved first, and turned last: a view, where that can be one.
        if theirs.endswith(" i") and ours.startswith("i "):
            return rearrange(tensor, f"{theirs} -> {ours.removeprefix('i ')} i", **self.sizes).T
        return rearrange(tensor, self.axes, **self.sizes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        if not self.axes:
            return array
        theirs, ours = self.axes.split(" -> ")
        return rearrange(array, f"{ours} -> {theirs}", **self.sizes)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear map's weight, convolutions of patches among them: outputs first
        there, inputs and outputs here."""
        return self.flax.endswith(".kernel")

    def factors(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two factors of a linear weight, [r, *inputs] and [outputs, r] there, as [inputs, r]
        and [r, outputs]: the product of these is `to_flax` of theirs, for the pattern rearranges
        outputs and inputs apart from each other."""
        (outputs, *inputs), (ours_in, ours_out) = (
            re.findall(r"\(.*?\)|\S+", side) for side in self.axes.split(" -> ")
        )
        patterns = (
            f"rank {' '.join(inputs)} -> {ours_in} rank",
            f"{outputs} rank -> rank {ours_out}",
        )
        sizes = [
            {axis: size for axis, size in self.sizes.items() if axis in re.findall(r"\w+", pattern)}
            for pattern in patterns
        ]
        return rearrange(down, patterns[0], **sizes[0]), rearrange(up, patterns[1], **sizes[1])

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The torch shape of one layer's tensor, from ours."""
        return self.to_torch(np.broadcast_to(np.int8(0), shape)).shape


def contiguous(array: np.ndarray) -> np.ndarray:
    """In row-major order; by XLA's transposition, in a third of numpy's CPU time, where there is
    one (JAX_PLATFORMS may leave CPUs out) and it keeps every bit (of 8 bytes it would take 4)."""
    cpu = None if array.flags.c_contiguous or array.itemsize > 4 else _cpu()
    return np.ascontiguousarray(array) if cpu is None else np.asarray(jax.device_put(array, cpu))


@cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


Table = tuple[Rule, ...]


class Place(NamedTuple):
    """Where a tensor of diffusers' lies in a file: in which of the file's, in which of so many
    equal cuts of its first axis, in order, and what it is to be multiplied with."""

    name: str
    cuts: int = 1
    taken: tuple[int, ...] = (0,)
    scale: str | None = None


class Home(NamedTuple):
    """Where a torch tensor lives with us: its rule, and its layer where the leaf is stacked over
    layers."""

    rule: Rule
    layer: int | None


def expand(table: Table, layers: int) -> dict[str, Home]:
    """Every torch name of a network with so many layers."""
    homes: dict[str, Home] = {}
    for rule in table:
        for layer in range(layers) if "{}" in rule.torch else (None,):
            homes[rule.torch.format(layer)] = Home(rule, layer)
    return homes


def misfits(
    homes: Mapping[str, Home],
    leaves: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Whatever keeps the tensors `found` (name to shape) from filling the `leaves` (our name to our
    shape), a line each."""
    faults = [f"{name} has no rule" for name in found if name not in homes]
    shapes: dict[int, tuple[int, ...]] = {}  # by the rule's identity: a rule's sizes don't hash
    for name, (rule, layer) in homes.items():
        if name not in found:
            faults.append(f"{name} is missing")
            continue
        if id(rule) not in shapes:
            shapes[id(rule)] = rule.torch_shape(leaves[rule.flax][0 if layer is None else 1 :])
        if found[name] != shapes[id(rule)]:
            faults.append(
                f"{name} must have the shape {list(shapes[id(rule)])}: got {list(found[name])}"
            )
    return faults


def refuse(where: str, faults: Iterable[str], shown: int = 20) -> None:
    """Raises ValueError with all the faults, or with as many as a screen takes."""
    faults = list(faults)
    if faults:
        more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
        raise ValueError(
            one_line(f"{where} must fit the network: " + "; ".join(faults[:shown]) + more)
        )


def linear(torch: str, flax: str, bias: bool = True) -> Table:
    weight = Rule(f"{torch}.weight", f"{flax}.kernel", "o i -> i o")
    return (weight, Rule(f"{torch}.bias", f"{flax}.bias")) if bias else (weight,)


def norm(torch: str, flax: str) -> Table:
    return Rule(f"{torch}.weight", f"{flax}.scale"), Rule(f"{torch}.bias", f"{flax}.bias")
