"""Meshes: how many ways the work of a request is split, over which devices."""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from .. import config
from .sharding import AXES, RULES

SHOWN = 2  # faults of a mesh that are told one by one
GUIDED = 2  # predictions of a guidance pair


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
    """What of a request and its checkpoint a mesh must divide: an axis, its size, whose it is, and
    the mesh axes it is split over."""

    axis: str
    size: int
    owner: str
    over: tuple[str, ...]


def sizes_of(text: str) -> Sizes:
    """A mesh by its name in `configs/meshes.toml`, or spelled out: "data=1,pair=2,context=4", where
    what is left out is 1."""
    known = config.meshes()["meshes"]
    if text in known:
        return Sizes(**{axis: known[text].get(axis, 1) for axis in AXES})
    sizes = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh must be auto, {', '.join(known)}, or sizes like {Sizes(1, 2, 4)}: got {text!r}"
            )
        sizes[axis] = int(size)
    return Sizes(**sizes)


def misfits(sizes: Sizes, work: Sequence[Work]) -> list[str]:
    """Whatever a mesh of these sizes does not divide, a line each."""
    by_axis = sizes._asdict()
    lines = []
    for axis, size, owner, over in work:
        ways = math.prod(by_axis[name] for name in over)
        if size % ways:
            lines.append(
                f"{owner}: axis {axis} of size {size} must divide by {ways} ({' x '.join(over)}) for mesh {sizes}"
            )
    return lines


def choose_sizes(text: str, work: Sequence[Work], devices: Sequence[Any]) -> Sizes:
    """The mesh asked for, or ("auto") the one that keeps most of the devices busy: videos first,
    then guidance pairs, then sequences. Raises ValueError where the devices are too few or an axis
    does not divide, naming the nearest mesh that works."""
    fitting = [sizes for sizes in _all_sizes(len(devices)) if not misfits(sizes, work)]
    if text == "auto":
        # The cores of a host are one CPU to XLA: more of its devices split the same threads.
        room = (
            len({device.process_index for device in devices})
            if devices[0].platform == "cpu"
            else len(devices)
        )
        return max(
            (sizes for sizes in fitting if sizes.devices <= room),
            key=lambda sizes: (sizes.devices, sizes),
        )
    sizes = sizes_of(text)
    faults = misfits(sizes, work)
    if sizes.devices > len(devices):
        faults.insert(
            0,
            f"mesh {text} must have at most the {len(devices)} devices that there are: got {sizes.devices}",
        )
    if faults:
        nearest = min(
            fitting,
            key=lambda other: sum(abs(math.log(a / b)) for a, b in zip(sizes, other, strict=True)),
        )
        more = f"; and {len(faults) - SHOWN} more like it" if len(faults) > SHOWN else ""
        raise ValueError(f"{'; '.join(faults[:SHOWN])}{more}; nearest mesh that works is {nearest}")
    return sizes


def _all_sizes(devices: int) -> Iterator[Sizes]:
    for data, pair in itertools.product(range(1, devices + 1), (1, GUIDED)):
        for context in range(1, devices // (data * pair) + 1):
            yield Sizes(data, pair, context)


def make_mesh(sizes: Sizes, devices: Sequence[Any]) -> Mesh:
    """A mesh over the first devices, each sequence group on a compact part of the machine's grid.
    Where several processes run, all of their devices must take part: what the sizes leave over
    repeats the work."""
    copies = 1
    if len({device.process_index for device in devices}) > 1:
        copies = len(devices) // sizes.devices
    elif len(devices) > sizes.devices and devices[0].platform != "cpu":
        warnings.warn(
            f"{len(devices) - sizes.devices} of {len(devices)} devices stay idle: mesh {sizes} has no work for them",
            stacklevel=2,
        )
    chosen = by_squares(devices, sizes.context)[: copies * sizes.devices]
    return Mesh(np.array(chosen, object).reshape(copies, *sizes), ("copies", *AXES))


def by_squares(devices: Sequence[Any], group: int) -> list[Any]:
    """Devices ordered so that every `group` in a row is the most compact block of the grid that
    tiles it: the fewest hops for an all-to-all. In the given order where the devices have no grid,
    or it has holes."""
    coordinates = [tuple(getattr(device, "coords", ())) for device in devices]
    grid = [max(axis) + 1 for axis in zip(*coordinates, strict=True)]
    if not grid or len(set(coordinates)) != len(devices) or math.prod(grid) != len(devices):
        return list(devices)
    blocks = itertools.product(*(range(1, size + 1) for size in grid))
    fitting = [
        block
        for block in blocks
        if math.prod(block) == group
        and not any(size % b for size, b in zip(grid, block, strict=True))
    ]
    if not fitting:
        return list(devices)
    block = min(fitting, key=lambda block: (sum(block), block))

    def place(device: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(c // b for c, b in zip(device.coords, block, strict=True)), tuple(
            device.coords
        )

    return sorted(devices, key=place)


def spatial(mesh: Mesh, rows: int, columns: int) -> Mesh:
    """The same devices in the same order, seen as a grid over an image: videos as they are, and the
    rest over rows and columns as far as these divide. What is left repeats the work."""
    copies, data, *rest = mesh.devices.shape
    ways = math.prod(rest)
    splits = itertools.product(range(1, ways + 1), repeat=2)
    fitting = [
        (r, c) for r, c in splits if ways % (r * c) == 0 and rows % r == 0 and columns % c == 0
    ]
    r, c = max(fitting, key=lambda split: (math.prod(split), split))
    return Mesh(
        mesh.devices.reshape(copies, data, r, c, ways // (r * c)),
        ("copies", "data", "rows", "columns", "spare"),
    )


def work_of(
    checkpoint: config.CheckpointConfig,
    networks: Mapping[str, nnx.Module],
    videos: int,
    guided: bool,
) -> list[Work]:
    """All that a request and its networks split, however large the mesh."""
    work = [
        Work("video", videos, "request", ("data",)),
        Work("pair", GUIDED if guided else 1, "request", ("pair",)),
        Work(
            "heads",
            checkpoint.transformer.num_attention_heads,
            "transformer blocks.attn",
            ("context",),
        ),
    ]
    for part, network in networks.items():
        for path, parameter in nnx.to_flat_state(nnx.state(network, nnx.Param)):
            shape, axes = parameter.get_value().shape, parameter.get_metadata()["axes"]
            for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
                if RULES.get(axis) == AXES:
                    work.append(Work(axis, size, f"{part} {'.'.join(map(str, path))}", AXES))
    return work
