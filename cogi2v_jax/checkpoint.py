"""A converted folder: a diffusers folder's JSON and tokenizer files as they were, and the weights as orbax checkpoints in our names and
layouts, one a layer, so that neither writing nor loading ever holds more than a layer of them on the host.

    checkpoint.json                   format version, the torch tensors' files and dtypes, the weight files' sizes
    model_index.json, scheduler/, tokenizer/, {transformer,vae,text_encoder}/config.json
    {transformer,vae,text_encoder}/weights/{rest,000,001,...}
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from .config import PARTS, CheckpointConfig, read_json
from .models.t5 import T5
from .models.transformer import Transformer
from .models.vae import VAE

FORMAT = 1  # of the folder; a reader refuses any other
MANIFEST = "checkpoint.json"
NETWORKS = {"transformer": Transformer, "vae": VAE, "text_encoder": T5}
_WRITING = threading.Lock()  # orbax's writes stumble over each other when two threads of a process make them
CONFIG_FILES = {"transformer": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json"}


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration a diffusers or converted folder states."""
    return CheckpointConfig.from_parts({part: read_json(folder / part / CONFIG_FILES[part]) for part in PARTS}, str(folder))


@cache  # tracing a VAE takes most of a second
def abstract(config: CheckpointConfig, part: str, dtype: jnp.dtype) -> nnx.Module:
    """A network with shapes for parameters: no memory, at any size. Everyone gets the same one, to read."""
    return nnx.eval_shape(lambda: NETWORKS[part](getattr(config, part), dtype=dtype, rngs=nnx.Rngs(0)))


def leaf_names(network: nnx.Module) -> dict[str, Any]:
    """Parameters (or their shapes) under dotted names."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))}


def is_stacked(name: str) -> bool:
    """Whether a leaf has a layer axis in front."""
    return "blocks" in name.split(".")


def layer_count(config: CheckpointConfig, part: str) -> int:
    """Layers that are stacked; the VAE has none."""
    return getattr(getattr(config, part), "num_layers", 0)


def unit_path(folder: Path, part: str, layer: int | None) -> Path:
    return folder / part / "weights" / ("rest" if layer is None else f"{layer:03d}")


def write_unit(folder: Path, part: str, layer: int | None, leaves: Mapping[str, np.ndarray]) -> None:
    """One layer's leaves without their layer axis, or (None) all that is not stacked."""
    with _WRITING, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unit_path(folder, part, layer).absolute(), dict(leaves))


def read_unit(folder: Path, part: str, layer: int | None) -> dict[str, np.ndarray]:
    path = unit_path(folder, part, layer)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute())
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path} must be a whole orbax checkpoint: {first_line(error)}") from None


def read_leaves(folder: Path, part: str, layer: int | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A unit's leaves, which are these and no others."""
    leaves = read_unit(folder, part, layer)
    found = {name: np.shape(leaf) for name, leaf in leaves.items()}
    wrong = [f"{name} {list(found[name]) if name in found else 'missing'}" for name, shape in shapes.items() if found.get(name) != shape]
    wrong += [f"{name} not of this network" for name in leaves if name not in shapes]
    if wrong:
        raise ValueError(f"{unit_path(folder, part, layer)} must hold the network's leaves: got {', '.join(wrong[:8])}")
    return leaves


def weight_files(folder: Path) -> dict[str, int]:
    """The size of every weight file: what tells a folder that was copied by halves before orbax stumbles over it, deep in its threads."""
    files = (path for part in NETWORKS for path in (folder / part / "weights").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass
class Models:
    """A checkpoint's configuration and where its weights lie. A phase asks for its own part; parts stay loaded where all of them fit."""

    folder: Path
    config: CheckpointConfig
    dtype: jnp.dtype
    attention: str = "auto"
    _resident: dict[str, nnx.Module] = field(default_factory=dict, repr=False)

    def part(self, name: str) -> Any:
        if name in self._resident:
            return self._resident[name]
        network = restore(self.folder, self.config, name, self.dtype)
        if self.all_fit:
            self._resident[name] = network
        return network

    @cached_property
    def all_fit(self) -> bool:
        networks = [abstract(self.config, name, self.dtype) for name in NETWORKS]
        size = sum(leaf.size * leaf.dtype.itemsize for network in networks for leaf in jax.tree.leaves(nnx.state(network)))
        return 2 * size < memory_limit()  # the other half is for activations


def memory_limit() -> int:
    """Bytes that the default device, or the host it is part of, has in all."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_folder(folder: Path, dtype: jnp.dtype, attention: str = "auto") -> Models:
    """A converted folder. Raises ValueError for one of another format or with files missing, FileNotFoundError for what is none."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        raise ValueError(f"{folder} must have format {FORMAT}: got {got!r}; convert its source again with cogi2v-convert to-flax")
    found = weight_files(folder)
    broken = [name for name, size in manifest.get("files", {}).items() if found.get(name) != size]
    if broken:
        raise ValueError(f"{folder} must be whole: got {len(broken)} files missing or cut short, first {broken[0]}; copy it anew")
    return Models(folder, read_config(folder), jnp.dtype(dtype), attention)


def restore(folder: Path, config: CheckpointConfig, part: str, dtype: jnp.dtype) -> nnx.Module:
    """One network onto the default device in `dtype`: layer by layer into its stacked arrays, in place."""
    network = abstract(config, part, dtype)
    graph, state = nnx.split(network)
    leaves = leaf_names(network)
    stacks = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items() if is_stacked(name)}
    flat = {name: leaf.shape for name, leaf in leaves.items() if not is_stacked(name)}
    filled = jax.device_put({name: leaf.astype(dtype) for name, leaf in read_leaves(folder, part, None, flat).items()})
    rows = {name: stack.shape[1:] for name, stack in stacks.items()}
    for layer in range(layer_count(config, part)):
        stacks = _set_layer(stacks, read_leaves(folder, part, layer, rows), np.int32(layer))
    filled |= stacks
    pure = nnx.to_flat_state(state)
    return nnx.merge(graph, nnx.from_flat_state([(path, leaf.replace(filled[".".join(map(str, path))])) for path, leaf in pure]))


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacks: dict[str, Array], layer: dict[str, Array], index: Int[Array, ""]) -> dict[str, Array]:
    return {name: lax.dynamic_update_index_in_dim(stack, layer[name].astype(stack.dtype), index, 0) for name, stack in stacks.items()}
