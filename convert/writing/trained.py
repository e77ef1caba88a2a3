"""Writes a converted folder with one part trained, and the others as they were."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.disk import check_space
from cogi2v_jax.weights.checkpoint import open_folder
from cogi2v_jax.weights.pieces import is_stacked, layer_count

from ..sources.diffusers import CODES
from ..sources.matching import shapes
from ..tables.rules import refuse
from . import manifest
from .checksums import cast_finite, sums
from .folder import make_folder
from .layers import Meter, Progress, Unit, UnitWriter


def write_trained(
    base: Path,
    destination: Path | str,
    part: str,
    leaves: Mapping[str, Any],
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Path | str:
    """Writes a converted folder that equals `base` but for the weights of one part. It appears
    under its name only when complete.

    `leaves` are all of the part's, in numpy or jax, by their names in the network and with all
    layers of a stack in one; one layer at a time is copied to the host. They are stored in `dtype`,
    a floating-point one. Raises ValueError for leaves that don't fit the base or are not finite,
    and for a part that is int8 there; FileExistsError where the destination exists, OSError where
    the disk has no room, and as `open_folder`."""
    if dtype not in map(str, CODES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, CODES))}: got {dtype}")
    config, record = open_folder(base, jnp.dtype(jnp.float32)).config, manifest.read(base)
    if part in config.int8:
        raise ValueError(f"the {part} of {base} must be floating-point to be trained: got int8")
    expected = shapes(config, part)
    faults = [
        f"{name} must have the shape {expected.get(name)}: got {np.shape(leaf)}"
        for name, leaf in leaves.items()
        if np.shape(leaf) != expected.get(name)
    ]
    faults += [f"{name} is missing" for name in expected.keys() - leaves.keys()]
    refuse(f"the trained {part}", faults)
    cast = np.dtype(jnp.dtype(dtype))
    size = sum(map(math.prod, expected.values())) * cast.itemsize
    with make_folder(destination) as folder:
        check_space(folder.parent, size, str(destination))
        _link_others(base, record, folder, part)
        writer = UnitWriter(folder, Meter(size, progress))
        writer.write_units(part, _units(config, part, leaves, cast))
        manifest.write_replaced(record, writer, part, dtype)
    return destination


def _units(
    config: CheckpointConfig, part: str, leaves: Mapping[str, Any], cast: np.dtype[Any]
) -> Iterator[Unit]:
    for layer in (None, *range(layer_count(config, part))):
        unit = {
            name: cast_finite(name, np.asarray(leaf if layer is None else leaf[layer]), cast)
            for name, leaf in leaves.items()
            if is_stacked(name) == (layer is not None)
        }
        yield layer, unit, sums(unit)


def _link_others(base: Path, record: Mapping[str, Any], folder: Path, part: str) -> None:
    """Puts all files that the base's manifest lists into a folder, but for the weights of the part.
    Weights take no more space where the disk can link them; people may edit the other files."""
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base).as_posix()
        if name in record["files"] and not name.startswith(f"{part}/weights/"):
            put = _link
        elif name in record["settings"]:
            put = shutil.copyfile
        else:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(path, folder / name)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)
