"""A converted folder: the JSON and tokenizer files of a diffusers folder unchanged, and the weights
in our names and layouts as orbax checkpoints ("units"), one a layer. The host holds two layers
while a folder is written (the one being written and the next), and one while it is loaded.

    checkpoint.json     format, sources, checksums of all tensors, sizes of all weight files
    model_index.json, scheduler/, tokenizer/, {transformer,vae,text_encoder}/config.json
    {transformer,vae,text_encoder}/weights/{rest,000,001,...}
"""

import dataclasses
import functools
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from orbax.checkpoint import type_handlers
from orbax.checkpoint.options import MultiprocessingOptions

from ..config import PARTS, CheckpointConfig
from ..devices.mesh import Sizes, make_mesh
from ..disk import first_line, one_line, process_folder, read_json, sha256
from .lora import Leaves, Lora, Ranks, ranks_beside, read_merged, select_loras
from .pieces import (
    NETWORKS,
    PIECES,
    bytes_per_device,
    is_stacked,
    layer_count,
    leaf_names,
    memory_limit,
    piece,
    shard_piece,
    shardings,
    transformer_leaves,
    unit_shapes,
)

FORMAT = 2  # of the folder; a reader refuses any other
MANIFEST = "checkpoint.json"
CHUNK = 8 * 2**20  # bytes that are read together: a shard of a leaf is some of its chunks
CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
# Orbax and tensorstore take brackets and stars as patterns, backslashes as separators, and a colon
# as the end of a scheme; other bytes than these they pass on.
PLAIN = re.compile(r"[\w ./+=,@~-]*")
_WRITING = threading.Lock()  # two threads of a process must not write with orbax at once

Shapes = Mapping[str, tuple[int, ...]]


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a diffusers or converted folder."""
    parts = {part: read_json(folder / part / CONFIG_FILES[part]) for part in PARTS}
    config = CheckpointConfig.from_parts(parts, str(folder))
    return dataclasses.replace(config, int8=tuple(int8_errors(folder)))


def int8_errors(folder: Path) -> dict[str, dict[str, float]]:
    """The relative error of each torch tensor, for every part of a converted folder whose kernels
    are int8; empty for any other folder."""
    manifest = folder / MANIFEST
    errors = read_json(manifest).get("int8", {}) if manifest.is_file() else {}

    def is_valid(part: Any) -> bool:
        numbers = isinstance(part, dict) and part.values()
        return bool(numbers) and all(isinstance(error, float) for error in numbers)

    if not isinstance(errors, dict) or not all(map(is_valid, errors.values())):
        rule = "give the errors of every int8 part's tensors"
        raise ValueError(f"{manifest} must {rule}: convert its source again")
    return errors


def open_folder(folder: Path, dtype: jnp.dtype, **settings: Any) -> "Models":
    """A converted folder; `settings` are fields of Models. Raises ValueError for another format and
    for missing files, FileNotFoundError for a folder that is not a converted one."""
    manifest = read_json(folder / MANIFEST)
    again = "convert its source again with cogi2v-convert to-flax"
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        raise ValueError(f"{folder} must have format {FORMAT}: got {got!r}; {again}")
    found, files = list_weights(folder), manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{folder / MANIFEST} must list the sizes of its files; {again}")
    broken = [name for name, size in files.items() if found.get(name) != size]
    if broken:
        got = f"{len(broken)} files missing or cut short, first {one_line(broken[0])}"
        raise ValueError(f"{folder} must be whole: got {got}; copy it again")
    return Models(folder, read_config(folder), jnp.dtype(dtype), **settings)


def list_weights(folder: Path) -> dict[str, int]:
    """The size of every weight file: shows an incomplete copy of a folder before orbax fails on it
    in its threads."""
    weights = (folder / part / "weights" for part in NETWORKS)
    files = (path for folder in weights for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def unit_name(layer: int | None) -> str:
    return "rest" if layer is None else f"{layer:03d}"


def plain_path(folder: Path) -> Path:
    """The absolute path of a folder, or of a link to it where orbax can't take its name. Raises
    OSError where the folder for temporary files has no plain name either."""
    folder = folder.absolute()
    return folder if PLAIN.fullmatch(str(folder)) else _link(folder)


@functools.cache
def _link(folder: Path) -> Path:
    link = Path(tempfile.mkdtemp(dir=process_folder()), "folder")
    if not PLAIN.fullmatch(str(link)):
        raise OSError(f"TMPDIR must be a folder of a plain name: got {link.parents[2]}")
    link.symlink_to(folder, target_is_directory=True)
    return link


def unit_path(folder: Path, part: str, layer: int | None) -> Path:
    return folder / part / "weights" / unit_name(layer)


def _checkpointer(**settings: Any) -> ocp.Checkpointer:
    """Of this process alone: processes may be at different layers and do not wait for each other.
    Without compression, which takes as long as writing and hardly makes weights smaller."""
    this = jax.process_index()
    alone = MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process-{this}"
    )
    settings |= {"multiprocessing_options": alone, "use_compression": False}
    handler = ocp.PyTreeCheckpointHandler(**settings)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_unit(
    folder: Path, part: str, layer: int | None, leaves: Mapping[str, np.ndarray]
) -> None:
    """Writes the leaves of one layer without their layer axis, or (None) all that is not
    stacked."""
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in leaves}
    # Nobody changes the leaves while they are written: orbax need not copy them first. (It warns of
    # a registry without a handler of jax's arrays.)
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),
    )
    with _WRITING, _checkpointer(type_handler_registry=registry) as checkpointer:
        target = unit_path(plain_path(folder), part, layer)
        checkpointer.save(target, args=ocp.args.PyTreeSave(dict(leaves), save_args=chunks))


def read_unit(folder: Path, part: str, layer: int | None) -> dict[str, np.ndarray]:
    with _reading(folder, part, layer) as (checkpointer, path):
        return checkpointer.restore(path)


def read_leaves(
    folder: Path, part: str, layer: int | None, shapes: Shapes
) -> dict[str, np.ndarray]:
    """All leaves of a unit. Raises ValueError unless they have exactly these shapes."""
    leaves = read_unit(folder, part, layer)
    _check_shapes(
        unit_path(folder, part, layer),
        {name: np.shape(leaf) for name, leaf in leaves.items()},
        shapes,
    )
    return leaves


def read_shards(
    folder: Path, part: str, layer: int | None, leaves: Leaves, shapes: Shapes
) -> dict[str, Array]:
    """Some leaves of a unit, in their dtypes and shardings; a process reads what its devices hold.
    Raises ValueError unless the unit's leaves have exactly these `shapes`."""
    arguments = {
        name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding)
        for name, leaf in leaves.items()
    }
    restore = ocp.args.PyTreeRestore(dict(leaves), restore_args=arguments, partial_restore=True)
    with _reading(folder, part, layer) as (checkpointer, path):
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("cannot read its metadata")
        found = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
        read = checkpointer.restore(path, args=restore) if found == shapes else {}
    _check_shapes(unit_path(folder, part, layer), found, shapes)
    return read


@contextmanager
def _reading(folder: Path, part: str, layer: int | None) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    try:
        with _checkpointer() as checkpointer:
            yield checkpointer, unit_path(plain_path(folder), part, layer)
    except (ValueError, OSError, KeyError) as error:
        path = unit_path(folder, part, layer)
        raise ValueError(f"{path} must be a whole orbax checkpoint: {first_line(error)}") from None


def _check_shapes(path: Path, found: Shapes, shapes: Shapes) -> None:
    wrong = [
        f"{name} {list(found[name]) if name in found else 'missing'}"
        for name, shape in shapes.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} not of this network" for name in found if name not in shapes]
    if wrong:
        got = one_line(", ".join(wrong[:8]))
        raise ValueError(f"{path} must hold the network's leaves: got {got}")


@dataclass
class Models:
    """A checkpoint's configuration, and where its weights are stored. A stage asks for its piece of
    them; pieces that leave it no room are dropped."""

    folder: Path
    config: CheckpointConfig
    dtype: jnp.dtype
    attention: str = "auto"
    mesh: str = "auto"  # a name of configs/meshes.toml, sizes spelled out, or "auto"
    vae_tiling: bool = False  # whether the VAE works in the reference's blended tiles
    # Added to the transformer's weights when they are loaded (beside those that are int8); may be
    # set at any time.
    loras: Sequence[Lora] = ()
    # Pieces on the devices, the least recently used first, and the LoRAs merged into them.
    _resident: dict[str, nnx.Module] = field(default_factory=dict, repr=False)
    _merged: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    _loading: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def digest(self) -> str | None:
        """The SHA-256 of the folder's manifest, which has checksums of all weights."""
        manifest = self.folder / MANIFEST
        return sha256(manifest) if manifest.is_file() else None

    def piece(
        self, name: str, shapes: nnx.Module | None = None, workspace: int = 0, ahead: bool = False
    ) -> Any:
        """One of PIECES with the shardings of `shapes` (None: on one device). Where it and
        `workspace` bytes on each device need room, other pieces are dropped first; `ahead` of its
        stage none is, and the result is None where one would have to be."""
        if shapes is None:
            mesh = make_mesh(Sizes(), jax.local_devices()[:1])
            shapes = shard_piece(self.config, name, self.dtype, mesh, memory_limit(), self.ranks)
        with self._loading:
            network = self._resident.pop(name, None)
            loras = select_loras(self.loras, transformer_leaves(name, shapes))
            merged = [lora.identity for lora in loras]
            if network is not None:
                moved = shardings(network) != shardings(shapes)
                if moved or self._merged[name] != merged:
                    network = None  # freed before it is loaded again
            room = memory_limit(shardings(shapes)[0].mesh) - workspace - bytes_per_device(shapes)
            while self._used() > room and self._resident and not ahead:
                del self._resident[next(iter(self._resident))]
            if ahead and self._used() > room:
                if network is not None:  # its stage will ask for it again
                    self._resident[name] = network
                return None
            if network is None:
                network = restore(self.folder, self.config, name, shapes, loras)
            self._resident[name], self._merged[name] = network, merged
            return network

    @property
    def ranks(self) -> Ranks:
        """The layers of the transformer in which LoRAs are a branch beside an int8 kernel."""
        shapes = piece(self.config, "transformer", self.dtype)
        return ranks_beside(self.loras, transformer_leaves("transformer", shapes))

    @property
    def loaded(self) -> list[str]:
        """The names of the pieces on the devices, the least recently used first."""
        return list(self._resident)

    def _used(self) -> int:
        return sum(map(bytes_per_device, self._resident.values()))


def check_models(models: Any) -> None:
    """Raises ValueError for what is no loaded checkpoint."""
    if not isinstance(models, Models):
        raise ValueError(f"models must be what cogi2v_jax.load returns: got {models!r}")


def restore(
    folder: Path,
    config: CheckpointConfig,
    name: str,
    shapes: nnx.Module,
    loras: Sequence[Lora] = (),
) -> nnx.Module:
    """One piece in the dtypes and shardings of `shapes`, with `loras` added: read layer by layer
    into the stacked arrays, in place. Every process reads what its devices hold."""
    part, prefix = PIECES[name]
    graph, state = nnx.split(shapes)
    leaves = {prefix + leaf: shape for leaf, shape in leaf_names(shapes).items()}
    rest_shapes, layer_shapes = unit_shapes(config, part)

    def read(layer: int | None, leaves: Leaves) -> dict[str, Array]:
        shapes = rest_shapes if layer is None else layer_shapes
        shards = partial(read_shards, folder, part, layer, shapes=shapes)
        return read_merged(loras, layer, leaves, shards)

    filled = read(None, {leaf: shape for leaf, shape in leaves.items() if not is_stacked(leaf)})
    stacks = {
        leaf: jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
        for leaf, shape in leaves.items()
        if is_stacked(leaf)
    }
    rows = {leaf: _layer_of(stack) for leaf, stack in stacks.items()}
    for layer in range(layer_count(config, part) if stacks else 0):
        stacks = _set_layer(stacks, read(layer, rows), np.int32(layer))
    filled |= stacks
    paths = ((path, leaf, ".".join(map(str, path))) for path, leaf in nnx.to_flat_state(state))
    new = [(path, leaf.replace(filled[prefix + name])) for path, leaf, name in paths]
    return nnx.merge(graph, nnx.from_flat_state(new))


def _layer_of(stack: Array) -> jax.ShapeDtypeStruct:
    """The shape and sharding of one layer of a stack."""
    assert isinstance(stack.sharding, NamedSharding)
    sharding = NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=sharding)


@partial(jax.jit, donate_argnums=0)
def _set_layer(
    stacks: dict[str, Array], layer: dict[str, Array], index: Int[Array, ""]
) -> dict[str, Array]:
    return {
        name: lax.dynamic_update_index_in_dim(stack, layer[name], index, 0)
        for name, stack in stacks.items()
    }
