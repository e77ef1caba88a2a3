"""Rules that map torch tensors to our leaves. A weight map is a table of rules, and each rule is
read in both directions."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from cogi2v_jax.disk import one_line


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: its torch name, the name of our leaf, and its axes as an einops pattern.
    "{}" in the torch name is the layer index, which becomes the first axis of our leaf; `sizes` are
    the axis lengths that einops needs to split grouped axes."""

    torch: str
    flax: str
    axes: str = ""  # empty: the axes stay as they are
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_flax(self, tensor: np.ndarray | jax.Array) -> Any:
        """Our leaf, in row-major order, from a torch tensor (of one layer, if stacked)."""
        return self._rearrange(tensor, *self.axes.split(" -> ")) if self.axes else tensor

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """The torch tensor, in row-major order, from our leaf (of one layer, if stacked)."""
        return self._rearrange(leaf, *self.axes.split(" -> ")[::-1]) if self.axes else leaf

    def _rearrange(self, array: Any, before: str, after: str) -> Any:
        # einops permutes axes without copying, but to group permuted axes numpy would copy, in
        # twice the time that `contiguous` takes: permute, copy, then group.
        ungrouped = re.sub("[()]", "", after)
        permuted = rearrange(array, f"{before} -> {ungrouped}", **self.sizes)
        return rearrange(contiguous(permuted), f"{ungrouped} -> {after}")

    @property
    def is_linear(self) -> bool:
        """Whether this is the weight of a linear map (a convolution of patches included): torch has
        outputs first, we have inputs first."""
        return self.flax.endswith(".kernel")

    def factors(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The low-rank factors of a linear weight: torch's [r, *inputs] and [outputs, r] become
        [inputs, r] and [r, outputs]. Their product equals `to_flax` of torch's product, because the
        pattern rearranges outputs and inputs independently."""
        outputs, inputs, our_inputs, our_outputs = self._sides()
        return (
            self._rearrange_side(down, f"rank {inputs} -> {our_inputs} rank"),
            self._rearrange_side(up, f"{outputs} rank -> rank {our_outputs}"),
        )

    def torch_factors(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `factors`."""
        outputs, inputs, our_inputs, our_outputs = self._sides()
        return (
            self._rearrange_side(down, f"{our_inputs} rank -> rank {inputs}"),
            self._rearrange_side(up, f"rank {our_outputs} -> {outputs} rank"),
        )

    def _sides(self) -> tuple[str, str, str, str]:
        """Patterns of torch's outputs and inputs and of our inputs and outputs."""
        (outputs, *inputs), (our_inputs, our_outputs) = (
            re.findall(r"\(.*?\)|\S+", side) for side in self.axes.split(" -> ")
        )
        return outputs, " ".join(inputs), our_inputs, our_outputs

    def _rearrange_side(self, factor: np.ndarray, pattern: str) -> np.ndarray:
        named = re.findall(r"\w+", pattern)
        sizes = {axis: size for axis, size in self.sizes.items() if axis in named}
        return rearrange(factor, pattern, **sizes)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the torch tensor of one layer, from the shape of our leaf."""
        if not self.axes:
            return shape
        theirs, ours = self.axes.split(" -> ")
        empty = np.broadcast_to(np.int8(0), shape)  # takes no memory
        return rearrange(empty, f"{ours} -> {theirs}", **self.sizes).shape


def contiguous(array: Any) -> Any:
    """The array in row-major order. Where JAX has a CPU device (JAX_PLATFORMS may exclude it), XLA
    transposes, in a third of numpy's CPU time; not 8-byte numbers, which JAX would narrow to 4."""
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous:
        return array
    cpu = _cpu() if array.itemsize <= 4 else None
    return np.ascontiguousarray(array) if cpu is None else np.asarray(jax.device_put(array, cpu))


@cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


Table = tuple[Rule, ...]


class FileTensor(NamedTuple):
    """How a file stores one of diffusers' tensors: the name in the file; of how many equal chunks
    along its first axis it takes which, in this order; and the name of the scale to multiply it
    with."""

    name: str
    chunks: int = 1
    indices: tuple[int, ...] = (0,)
    scale: str | None = None


class Target(NamedTuple):
    """Our leaf for one torch tensor: its rule, and its layer where the leaf is stacked."""

    rule: Rule
    layer: int | None


def expand(table: Table, layers: int) -> dict[str, Target]:
    """The target of every torch name of a network with so many layers."""
    return {
        rule.torch.format(layer): Target(rule, layer)
        for rule in table
        for layer in (range(layers) if "{}" in rule.torch else (None,))
    }


def misfits(
    targets: Mapping[str, Target],
    leaves: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Why the tensors `found` (torch name to shape) do not fill the `leaves` (our name to shape),
    a line each; empty if they do."""
    faults = [f"{name} has no rule" for name in found if name not in targets]
    shapes: dict[int, tuple[int, ...]] = {}  # by the rule's id: its sizes make it unhashable
    for name, (rule, layer) in targets.items():
        if name not in found:
            faults.append(f"{name} is missing")
            continue
        if id(rule) not in shapes:
            shapes[id(rule)] = rule.torch_shape(leaves[rule.flax][0 if layer is None else 1 :])
        if found[name] != shapes[id(rule)]:
            must, got = list(shapes[id(rule)]), list(found[name])
            faults.append(f"{name} must have the shape {must}: got {got}")
    return faults


def refuse(where: str, faults: Iterable[str], shown: int = 20) -> None:
    """Raises ValueError, in one line, with the first `shown` faults, if there are any."""
    faults = list(faults)
    if faults:
        more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
        raise ValueError(
            one_line(f"{where} must fit the network: {'; '.join(faults[:shown])}{more}")
        )


def linear(torch: str, flax: str, bias: bool = True) -> Table:
    weight = Rule(f"{torch}.weight", f"{flax}.kernel", "o i -> i o")
    return (weight, Rule(f"{torch}.bias", f"{flax}.bias")) if bias else (weight,)


def norm(torch: str, flax: str) -> Table:
    return Rule(f"{torch}.weight", f"{flax}.scale"), Rule(f"{torch}.bias", f"{flax}.bias")
