"""A converted folder: a diffusers folder's JSON and tokenizer files as they were, and the weights
as orbax checkpoints in our names and layouts, one a layer, so that neither writing nor loading ever
holds more than a layer of them on the host.

    checkpoint.json                   format version, what it was made of, every tensor's checksum, the weight files' sizes
    model_index.json, scheduler/, tokenizer/, {transformer,vae,text_encoder}/config.json
    {transformer,vae,text_encoder}/weights/{rest,000,001,...}
"""

import dataclasses
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

from ..config import PARTS, CheckpointConfig, read_json
from ..devices.mesh import Sizes, make_mesh
from ..disk import first_line
from .lora import Leaves, Lora, changing, check_leaves, read_merged
from .pieces import (
    NETWORKS,
    PIECES,
    _full_names,
    bytes_per_device,
    is_stacked,
    layer_count,
    leaf_names,
    memory_limit,
    piece,
    placed,
    places,
    unit_shapes,
)

FORMAT = 2  # of the folder; a reader refuses any other
MANIFEST = "checkpoint.json"
# Orbax's writes stumble over each other when two threads of a process make them.
_WRITING = threading.Lock()
CHUNK = 8 * 2**20  # bytes that are read together: a shard of a leaf is some of its chunks
CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration a diffusers or converted folder states."""
    config = CheckpointConfig.from_parts(
        {part: read_json(folder / part / CONFIG_FILES[part]) for part in PARTS}, str(folder)
    )
    return dataclasses.replace(config, int8=tuple(int8_errors(folder)))


def int8_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Parts of a converted folder whose blocks' kernels are int8, with each torch tensor's relative
    error; none in any other folder."""
    errors = read_json(folder / MANIFEST).get("int8", {}) if (folder / MANIFEST).is_file() else {}
    parts = errors.values() if isinstance(errors, dict) else [None]
    if not all(
        isinstance(part, dict) and part and all(isinstance(error, float) for error in part.values())
        for part in parts
    ):
        raise ValueError(
            f"{folder / MANIFEST} must give every part in int8 its tensors' errors: convert its source again"
        )
    return errors


def unit_path(folder: Path, part: str, layer: int | None) -> Path:
    return folder / part / "weights" / unit_name(layer)


def unit_name(layer: int | None) -> str:
    return "rest" if layer is None else f"{layer:03d}"


def _checkpointer(**settings: Any) -> ocp.Checkpointer:
    """Of this process alone: several may be at different layers, and none waits for another.
    Weights hardly compress, and trying takes as long again as writing."""
    me = jax.process_index()
    alone = MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone, use_compression=False, **settings
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_unit(
    folder: Path, part: str, layer: int | None, leaves: Mapping[str, np.ndarray]
) -> None:
    """One layer's leaves without their layer axis, or (None) all that is not stacked."""
    arguments = ocp.args.PyTreeSave(
        dict(leaves), save_args={name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in leaves}
    )
    # Nobody changes the leaves while they are written, so orbax need not copy them first.
    as_they_are = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    # (A registry without a handler of jax's own arrays would be warned of.)
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, as_they_are), (jax.Array, type_handlers.ArrayHandler())
    )
    with _WRITING, _checkpointer(type_handler_registry=registry) as checkpointer:
        checkpointer.save(unit_path(folder, part, layer).absolute(), args=arguments)


def read_unit(folder: Path, part: str, layer: int | None) -> dict[str, np.ndarray]:
    with _reading(folder, part, layer) as (checkpointer, path):
        return checkpointer.restore(path)


def read_leaves(
    folder: Path, part: str, layer: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """A unit's leaves, which are these and no others."""
    leaves = read_unit(folder, part, layer)
    found = {name: np.shape(leaf) for name, leaf in leaves.items()}
    if found != shapes:
        raise ValueError(_misfits(unit_path(folder, part, layer), found, shapes))
    return leaves


def read_shards(
    folder: Path,
    part: str,
    layer: int | None,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """Some of a unit's leaves, which are of these `shapes` and no others, onto their devices; a
    process reads what its own hold."""
    arguments = {
        name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding)
        for name, leaf in leaves.items()
    }
    with _reading(folder, part, layer) as (checkpointer, path):
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("its metadata can't be read")
        found = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
        if found == shapes:
            return checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    dict(leaves), restore_args=arguments, partial_restore=True
                ),
            )
    raise ValueError(_misfits(path, found, shapes))


@contextmanager
def _reading(folder: Path, part: str, layer: int | None) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    path = unit_path(folder, part, layer).absolute()
    try:
        with _checkpointer() as checkpointer:
            yield checkpointer, path
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path} must be a whole orbax checkpoint: {first_line(error)}") from None


def _misfits(
    path: Path, found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    wrong = [
        f"{name} {list(found[name]) if name in found else 'missing'}"
        for name, shape in shapes.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} not of this network" for name in found if name not in shapes]
    return f"{path} must hold the network's leaves: got {', '.join(wrong[:8])}"


def weight_files(folder: Path) -> dict[str, int]:
    """The size of every weight file: what tells a folder that was copied by halves before orbax
    stumbles over it, deep in its threads."""
    files = (
        path
        for part in NETWORKS
        for path in (folder / part / "weights").rglob("*")
        if path.is_file()
    )
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


@dataclass
class Models:
    """A checkpoint's configuration and where its weights lie: never a bag of weights. A phase asks
    for its own piece, and pieces that it leaves no room for go."""

    folder: Path
    config: CheckpointConfig
    dtype: jnp.dtype
    attention: str = "auto"
    mesh: str = "auto"  # a name of configs/meshes.toml, sizes spelled out, or "auto"
    vae_tiling: bool = False  # whether the VAE works in the reference's blended tiles
    # Added to the transformer as it is restored; others may be set at any time.
    loras: Sequence[Lora] = ()
    # The least recently used first.
    _resident: dict[str, nnx.Module] = field(default_factory=dict, repr=False)
    # The identities of what was added to those.
    _merged: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    _loading: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def piece(
        self, name: str, shapes: nnx.Module | None = None, workspace: int = 0, ahead: bool = False
    ) -> Any:
        """One of PIECES, where `shapes` says it lies (None: on one device). If it and `workspace`
        bytes a device for its phase need room, others leave first; `ahead` of its phase none
        leaves, and None is the answer where they'd have to."""
        if shapes is None:
            shapes = placed(
                self.config,
                name,
                self.dtype,
                make_mesh(Sizes(), jax.local_devices()[:1]),
                memory_limit(),
            )
        with self._loading:
            network, loras = (
                self._resident.pop(name, None),
                changing(self.loras, _full_names(name, shapes)),
            )
            merged = [lora.identity for lora in loras]
            if network is not None and (
                places(network) != places(shapes) or self._merged[name] != merged
            ):
                # It lies elsewhere or has other LoRAs in it, and is gone before its successor
                # comes.
                network = None
            room = memory_limit(places(shapes)[0].mesh) - workspace - bytes_per_device(shapes)
            while self._used() > room and self._resident and not ahead:
                del self._resident[next(iter(self._resident))]
            if ahead and self._used() > room:
                return None
            self._resident[name] = (
                restore(self.folder, self.config, name, shapes, loras)
                if network is None
                else network
            )
            self._merged[name] = merged
            return self._resident[name]

    def _used(self) -> int:
        return sum(map(bytes_per_device, self._resident.values()))


def check_loras(config: CheckpointConfig, dtype: jnp.dtype, loras: Sequence[Lora]) -> None:
    """Raises ValueError for LoRAs that can't be added to a checkpoint's weights as they are
    loaded."""
    for name in PIECES:
        check_leaves(loras, _full_names(name, piece(config, name, dtype)))


def open_folder(folder: Path, dtype: jnp.dtype, **settings: Any) -> Models:
    """A converted folder; `settings` are fields of Models. Raises ValueError for one of another
    format or with files missing, FileNotFoundError for what is none."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        raise ValueError(
            f"{folder} must have format {FORMAT}: got {got!r}; convert its source again with cogi2v-convert to-flax"
        )
    found, files = weight_files(folder), manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(
            f"{folder / MANIFEST} must have the sizes of its files: convert its source again"
        )
    broken = [name for name, size in files.items() if found.get(name) != size]
    if broken:
        raise ValueError(
            f"{folder} must be whole: got {len(broken)} files missing or cut short, first {broken[0]}; copy it anew"
        )
    return Models(folder, read_config(folder), jnp.dtype(dtype), **settings)


def restore(
    folder: Path,
    config: CheckpointConfig,
    name: str,
    shapes: nnx.Module,
    loras: Sequence[Lora] = (),
) -> nnx.Module:
    """One piece onto its devices, in the dtype and the places of `shapes`: layer by layer into its
    stacked arrays, in place, with `loras` added. Every process reads what its own devices hold."""
    part, prefix = PIECES[name]
    graph, state = nnx.split(shapes)
    leaves = {prefix + leaf: shape for leaf, shape in leaf_names(shapes).items()}
    all_rest, all_rows = unit_shapes(config, part)

    def read(layer: int | None, asked: Leaves) -> dict[str, Array]:
        shapes = all_rest if layer is None else all_rows
        return read_merged(
            loras, layer, asked, lambda asked: read_shards(folder, part, layer, asked, shapes)
        )

    filled = read(None, {leaf: shape for leaf, shape in leaves.items() if not is_stacked(leaf)})
    stacks = {
        leaf: jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
        for leaf, shape in leaves.items()
        if is_stacked(leaf)
    }
    rows = {leaf: _of_a_layer(stack) for leaf, stack in stacks.items()}
    for layer in range(layer_count(config, part) if stacks else 0):
        stacks = _set_layer(stacks, read(layer, rows), np.int32(layer))
    filled |= stacks
    pure = nnx.to_flat_state(state)
    return nnx.merge(
        graph,
        nnx.from_flat_state(
            [(path, leaf.replace(filled[prefix + ".".join(map(str, path))])) for path, leaf in pure]
        ),
    )


def _of_a_layer(stack: Array) -> jax.ShapeDtypeStruct:
    assert isinstance(stack.sharding, NamedSharding)
    place = NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=place)


@partial(jax.jit, donate_argnums=0)
def _set_layer(
    stacks: dict[str, Array], layer: dict[str, Array], index: Int[Array, ""]
) -> dict[str, Array]:
    return {
        name: lax.dynamic_update_index_in_dim(stack, layer[name], index, 0)
        for name, stack in stacks.items()
    }
