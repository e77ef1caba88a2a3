"""Which device does what. A mesh has the axes of `AXES` on every machine, all of size 1 on one chip, and `RULES` says which of them an axis
of an array is split over. Networks name the axes of their parameters and know no mesh."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from .. import config

# Of growing appetite for the wires: videos never talk to each other, a guidance pair once a step, parts of a sequence in every layer.
AXES = ("data", "pair", "context")
RULES: dict[str, str | tuple[str, ...]] = {
    "video": "data",
    "batch": ("pair", "data"),  # the guidance pair's halves, each of all videos
    "sequence": "context",
    "rows": "rows",  # of `spatial`'s view of the same devices
    "columns": "columns",
    # of parameters that are split at all
    "heads": AXES,
    "mlp": AXES,
}
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
    """What of a request and its checkpoint a mesh must divide: an axis, its size, whose it is, and the mesh axes it is split over."""

    axis: str
    size: int
    owner: str
    over: tuple[str, ...]


def sizes_of(text: str) -> Sizes:
    """A mesh by its name in `configs/meshes.toml`, or spelled out: "data=1,pair=2,context=4", where what is left out is 1."""
    known = config.meshes()["meshes"]
    if text in known:
        return Sizes(**{axis: known[text].get(axis, 1) for axis in AXES})
    sizes = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh must be auto, {', '.join(known)}, or sizes like {Sizes(1, 2, 4)}: got {text!r}")
        sizes[axis] = int(size)
    return Sizes(**sizes)


def misfits(sizes: Sizes, work: Sequence[Work]) -> list[str]:
    """Whatever a mesh of these sizes does not divide, a line each."""
    by_axis = sizes._asdict()
    lines = []
    for axis, size, owner, over in work:
        ways = math.prod(by_axis[name] for name in over)
        if size % ways:
            lines.append(f"{owner}: axis {axis} of size {size} must divide by {ways} ({' x '.join(over)}) for mesh {sizes}")
    return lines


def choose_sizes(text: str, work: Sequence[Work], devices: Sequence[Any]) -> Sizes:
    """The mesh asked for, or ("auto") the one that keeps most of the devices busy: videos first, then guidance pairs, then sequences.
    Raises ValueError where the devices are too few or an axis does not divide, naming the nearest mesh that works."""
    fitting = [sizes for sizes in _all_sizes(len(devices)) if not misfits(sizes, work)]
    if text == "auto":
        # The cores of a host are one CPU to XLA: more of its devices split the same threads.
        room = len({device.process_index for device in devices}) if devices[0].platform == "cpu" else len(devices)
        return max((sizes for sizes in fitting if sizes.devices <= room), key=lambda sizes: (sizes.devices, sizes))
    sizes = sizes_of(text)
    faults = misfits(sizes, work)
    if sizes.devices > len(devices):
        faults.insert(0, f"mesh {text} must have at most the {len(devices)} devices that there are: got {sizes.devices}")
    if faults:
        nearest = min(fitting, key=lambda other: sum(abs(math.log(a / b)) for a, b in zip(sizes, other, strict=True)))
        more = f"; and {len(faults) - SHOWN} more like it" if len(faults) > SHOWN else ""
        raise ValueError(f"{'; '.join(faults[:SHOWN])}{more}; nearest mesh that works is {nearest}")
    return sizes


def _all_sizes(devices: int) -> Iterator[Sizes]:
    for data, pair in itertools.product(range(1, devices + 1), (1, GUIDED)):
        for context in range(1, devices // (data * pair) + 1):
            yield Sizes(data, pair, context)


def make_mesh(sizes: Sizes, devices: Sequence[Any]) -> Mesh:
    """A mesh over the first devices, each sequence group on a compact part of the machine's grid. Where several processes run, all of their
    devices must take part: what the sizes leave over repeats the work."""
    copies = 1
    if len({device.process_index for device in devices}) > 1:
        copies = len(devices) // sizes.devices
    elif len(devices) > sizes.devices and devices[0].platform != "cpu":
        warnings.warn(
            f"{len(devices) - sizes.devices} of {len(devices)} devices stay idle: mesh {sizes} has no work for them", stacklevel=2
        )
    chosen = by_squares(devices, sizes.context)[: copies * sizes.devices]
    return Mesh(np.array(chosen, object).reshape(copies, *sizes), ("copies", *AXES))


def by_squares(devices: Sequence[Any], group: int) -> list[Any]:
    """Devices ordered so that every `group` in a row is the most compact block of the grid that tiles it: the fewest hops for an
    all-to-all. In the given order where the devices have no grid, or it has holes."""
    coordinates = [tuple(getattr(device, "coords", ())) for device in devices]
    grid = [max(axis) + 1 for axis in zip(*coordinates, strict=True)]
    if not grid or len(set(coordinates)) != len(devices) or math.prod(grid) != len(devices):
        return list(devices)
    blocks = itertools.product(*(range(1, size + 1) for size in grid))
    fitting = [block for block in blocks if math.prod(block) == group and not any(size % b for size, b in zip(grid, block, strict=True))]
    if not fitting:
        return list(devices)
    block = min(fitting, key=lambda block: (sum(block), block))

    def place(device: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(c // b for c, b in zip(device.coords, block, strict=True)), tuple(device.coords)

    return sorted(devices, key=place)


def spatial(mesh: Mesh, rows: int, columns: int) -> Mesh:
    """The same devices in the same order, seen as a grid over an image: videos as they are, and the rest over rows and columns as far as
    these divide. What is left repeats the work."""
    copies, data, *rest = mesh.devices.shape
    ways = math.prod(rest)
    splits = itertools.product(range(1, ways + 1), repeat=2)
    fitting = [(r, c) for r, c in splits if ways % (r * c) == 0 and rows % r == 0 and columns % c == 0]
    r, c = max(fitting, key=lambda split: (math.prod(split), split))
    return Mesh(mesh.devices.reshape(copies, data, r, c, ways // (r * c)), ("copies", "data", "rows", "columns", "spare"))


def split(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Where an array lies whose axes have these names; None and unnamed axes are not split. In the one spelling that jax itself gives a
    result's place: nothing of mesh axes of size 1, nothing after the last axis that is split."""
    spec: list[Any] = []
    for axis in axes:
        over = RULES.get(axis, ()) if axis else ()
        ways = [name for name in ((over,) if isinstance(over, str) else over) if mesh.shape[name] > 1]
        spec.append(tuple(ways) if len(ways) > 1 else ways[0] if ways else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def pin(x: Array, mesh: Mesh, *axes: str | None) -> Array:
    """Holds an array inside a program to its split."""
    return lax.with_sharding_constraint(x, split(mesh, *axes))


def parameter_shardings(network: nnx.Module, mesh: Mesh, whole: bool) -> Any:
    """Where a network's parameters lie, as its state: `whole` on every device, or split as their axes' names say."""

    def place(parameter: nnx.Param) -> nnx.Variable:
        named = () if whole else parameter.get_metadata()["axes"]
        stacked = [None] * (parameter.get_value().ndim - len(named)) if named else []  # a stack's layers come first
        return parameter.replace(split(mesh, *stacked, *named))

    return jax.tree.map(place, nnx.state(network, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def put(value: Any, sharding: NamedSharding) -> Array:
    """Host data that every process has, onto a mesh that may reach beyond this process."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: Array) -> np.ndarray:
    """An array's values on every process, wherever they lie."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x)


@dataclass(frozen=True)
class Layout:
    """How one request's transformer is spread: what the network is handed instead of a mesh."""

    mesh: Mesh
    attention: Any  # a backend of attention.py, for one device
    tokens: int  # of the joint sequence, without what evens it out
    whole: bool = True  # whether every device holds all weights
    turns: bool = False  # whether a device takes one video of a batch after another

    @property
    def padded(self) -> int:
        """Tokens of the joint sequence as the layers see it: what the backend is quickest at, and as many in every part."""
        return self.attention.rows(self.tokens, self.mesh.shape["context"])

    def exchange(self, parts: tuple[Array, Array, Array], norms: Any, positions: Any) -> Float[Array, "b s d"]:
        """Attention by Ulysses (arXiv 2309.14509): a device trades its part of the sequence with all heads for the whole sequence with its
        part of the heads, attends alone, and trades back. What is moved is [b s d] as it is, on full lanes."""
        heads = PartitionSpec(RULES["batch"], RULES["sequence"])
        graph, norms = nnx.split(norms)

        def local(parts: tuple[Array, Array, Array], norms: Any, positions: Any) -> Array:
            q, k, v = (self._trade(part, "b s (parts d) -> parts b s d", "parts b s d -> b (parts s) d") for part in parts)
            y = self.attention(q, k, v, nnx.merge(graph, norms), positions, self.tokens)
            return self._trade(y, "b (parts s) d -> parts b s d", "parts b s d -> b s (parts d)")

        specs = (heads, PartitionSpec(), PartitionSpec())
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=heads, check_vma=False)(parts, norms, positions)

    def _trade(self, x: Float[Array, "b s d"], give: str, take: str) -> Float[Array, "b s2 d2"]:
        """What is traded lies in front, a part for each device: of an exchange along an inner axis some TPU compilers make passes over the
        whole array that cost more than the products beside them (libtpu 0.0.42: 5.9 ms instead of 1.1 on eight v5e)."""
        parts = self.mesh.shape["context"]
        if parts == 1:
            return x
        return rearrange(lax.all_to_all(rearrange(x, give, parts=parts), "context", 0, 0, tiled=True), take)

    def in_turn(self, predict: Callable[..., Array], *batch: Array) -> Array:
        """Predictions of a batch: all at once, or on each device one after another. A long sequence fills a device alone, so that turns
        cost no time there, and need less memory."""
        ways = math.prod(self.mesh.shape[axis] for axis in RULES["batch"])
        if not self.turns or len(batch[0]) == ways:
            return predict(*batch)
        turns = [jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0) for x in batch]
        y = lax.map(lambda parts: predict(*parts), turns)
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])

    def gather(self, layer: Any) -> Any:
        """A layer's weights, brought to every device for as long as it needs them."""
        return layer if self.whole else jax.tree.map(lambda leaf: pin(leaf, self.mesh), layer)

    def split(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Each part of the sequence where it is computed."""
        return pin(x, self.mesh, "batch", "sequence")

    def join(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The whole sequence on every device of its group."""
        return pin(x, self.mesh, "batch")


def work_of(checkpoint: config.CheckpointConfig, networks: Mapping[str, nnx.Module], videos: int, guided: bool) -> list[Work]:
    """All that a request and its networks split, however large the mesh."""
    work = [
        Work("video", videos, "request", ("data",)),
        Work("pair", GUIDED if guided else 1, "request", ("pair",)),
        Work("heads", checkpoint.transformer.num_attention_heads, "transformer blocks.attn", ("context",)),
    ]
    for part, network in networks.items():
        for path, parameter in nnx.to_flat_state(nnx.state(network, nnx.Param)):
            shape, axes = parameter.get_value().shape, parameter.get_metadata()["axes"]
            for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
                if RULES.get(axis) == AXES:
                    work.append(Work(axis, size, f"{part} {'.'.join(map(str, path))}", AXES))
    return work
