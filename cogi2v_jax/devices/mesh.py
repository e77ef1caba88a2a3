"""Meshes: how many ways the work of a request is split, and over which devices."""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from .. import config
from ..names import machine_name
from .sharding import AXES, RULES

GUIDED = 2  # predictions of a guidance pair
SHOWN = 2  # axes named in an error


class Sizes(NamedTuple):
    """How many ways videos, guidance pairs and sequences are split."""

    data: int = 1
    pair: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in zip(AXES, self, strict=True))


class Work(NamedTuple):
    """An axis that a mesh must divide: its name and size, the owner named in errors, and the mesh
    axes that it is split over."""

    axis: str
    size: int
    owner: str
    over: tuple[str, ...]


def sizes_of(text: str) -> Sizes:
    """The sizes of a mesh named in `configs/meshes.toml`, or spelled out as
    "data=1,pair=2,context=4", where missing axes are 1. Raises ValueError for anything else."""
    known = config.meshes()["meshes"]
    if (name := machine_name(text)) in known:
        text = name
        return Sizes(**{axis: known[text].get(axis, 1) for axis in AXES})
    sizes = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            valid = f"auto, {', '.join(known)}, or sizes like {Sizes(1, 2, 4)}"
            raise ValueError(f"mesh must be {valid}: got {text!r}")
        sizes[axis] = int(size)
    return Sizes(**sizes)


def work_of(
    checkpoint: config.CheckpointConfig,
    networks: Mapping[str, nnx.Module],
    videos: int,
    guided: bool,
) -> list[Work]:
    """All axes that a mesh must divide for a request, where `networks` have split weights."""
    heads = checkpoint.transformer.num_attention_heads
    work = [
        Work("video", videos, "request", ("data",)),
        Work("pair", GUIDED if guided else 1, "request", ("pair",)),
        Work("heads", heads, "transformer blocks.attn", ("context",)),
    ]
    for part, network in networks.items():
        for path, parameter in nnx.to_flat_state(nnx.state(network, nnx.Param)):
            shape, axes = parameter.get_value().shape, parameter.get_metadata()["axes"]
            for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
                if axis and RULES[axis] == AXES:
                    work.append(Work(axis, size, f"{part} {'.'.join(map(str, path))}", AXES))
    return work


def undivided(sizes: Sizes, work: Sequence[Work]) -> list[str]:
    """The axes that a mesh of these sizes does not divide, a line each."""
    lines = []
    for axis, size, owner, over in work:
        ways = math.prod(getattr(sizes, name) for name in over)
        if size % ways:
            divisor = f"{ways} ({' x '.join(over)})"
            lines.append(
                f"{owner}: {axis} ({size}) must be divisible by {divisor} for mesh {sizes}"
            )
    return lines


def choose_sizes(text: str, work: Sequence[Work], devices: Sequence[Any]) -> Sizes:
    """The mesh asked for, or ("auto") the one that uses the most devices: videos first, then
    guidance pairs, then sequences. Raises ValueError where the devices are too few or an axis does
    not divide, naming the nearest mesh that works."""
    valid = [sizes for sizes in _all_sizes(len(devices)) if not undivided(sizes, work)]
    if text == "auto":
        hosts = len({device.process_index for device in devices})
        # The CPU devices of a host share its threads: more of them compute no faster.
        most = hosts if devices[0].platform == "cpu" else len(devices)
        usable = [sizes for sizes in valid if sizes.devices <= most]
        return max(usable, key=lambda sizes: (sizes.devices, sizes))
    sizes = sizes_of(text)
    faults = undivided(sizes, work)
    if sizes.devices > len(devices):
        there = f"the {len(devices)} devices that there are"
        faults.insert(0, f"mesh {text} must have at most {there}: got {sizes.devices}")
    if faults:

        def distance(other: Sizes) -> float:
            return sum(abs(math.log(a / b)) for a, b in zip(sizes, other, strict=True))

        more = f"; and {len(faults) - SHOWN} more like it" if len(faults) > SHOWN else ""
        nearest = min(valid, key=distance)
        raise ValueError(f"{'; '.join(faults[:SHOWN])}{more}; nearest mesh that works is {nearest}")
    return sizes


def _all_sizes(devices: int) -> Iterator[Sizes]:
    for data, pair in itertools.product(range(1, devices + 1), (1, GUIDED)):
        for context in range(1, devices // (data * pair) + 1):
            yield Sizes(data, pair, context)


def make_mesh(sizes: Sizes, devices: Sequence[Any]) -> Mesh:
    """A mesh over the first devices in the order of `by_blocks`, which gives each sequence group a
    compact block of the machine's grid. Devices of one process that it leaves idle are warned
    about, unless they are a CPU's. Over several processes the mesh is repeated as often as their
    devices allow: its copies (axis "copies") do the same work."""
    copies = 1
    if len({device.process_index for device in devices}) > 1:
        copies = len(devices) // sizes.devices
    elif len(devices) > sizes.devices and devices[0].platform != "cpu":
        idle = f"{len(devices) - sizes.devices} of {len(devices)} devices stay idle"
        warnings.warn(f"{idle}: mesh {sizes} has no work for them", stacklevel=2)
    chosen = by_blocks(devices, sizes.context)[: copies * sizes.devices]
    return Mesh(np.array(chosen, object).reshape(copies, *sizes), ("copies", *AXES))


def by_blocks(devices: Sequence[Any], group: int) -> list[Any]:
    """Devices ordered so that every `group` consecutive ones form the most compact block that tiles
    the machine's grid: the fewest hops for an all-to-all. Unchanged where the devices have no grid,
    or one with holes."""
    coordinates = [tuple(getattr(device, "coords", ())) for device in devices]
    grid = [max(axis) + 1 for axis in zip(*coordinates, strict=True)]
    if not grid or len(set(coordinates)) != len(devices) or math.prod(grid) != len(devices):
        return list(devices)

    def tiles(block: tuple[int, ...]) -> bool:
        divides = not any(size % b for size, b in zip(grid, block, strict=True))
        return math.prod(block) == group and divides

    blocks = list(filter(tiles, itertools.product(*(range(1, size + 1) for size in grid))))
    if not blocks:
        return list(devices)
    block = min(blocks, key=lambda block: (sum(block), block))

    def position(device: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        in_blocks = tuple(c // b for c, b in zip(device.coords, block, strict=True))
        return in_blocks, tuple(device.coords)

    return sorted(devices, key=position)


def spatial(mesh: Mesh, rows: int, columns: int) -> Mesh:
    """The same devices in the same order as a mesh over an image of so many latent rows and
    columns: videos as before, everything else over rows and columns as far as these divide; the
    rest (axis "spare") repeats the work."""
    copies, data, *others = mesh.devices.shape
    ways = math.prod(others)
    grids = itertools.product(range(1, ways + 1), repeat=2)
    valid = [(r, c) for r, c in grids if not (ways % (r * c) or rows % r or columns % c)]
    r, c = max(valid, key=lambda grid: (math.prod(grid), grid))
    devices = mesh.devices.reshape(copies, data, r, c, ways // (r * c))
    return Mesh(devices, ("copies", "data", "rows", "columns", "spare"))
