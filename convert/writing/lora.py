"""Writes a trained LoRA under diffusers' names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.disk import replace_when_done

from ..sources.lora_file import HEADER
from ..sources.matching import targets
from ..sources.tensor_files import open_file
from ..tables.rules import contiguous
from .checksums import cast_finite, differences, sums

PREFIX = "transformer."  # of the network in diffusers' pipeline


def write_lora(
    path: Path,
    leaves: Mapping[str, Any],
    config: CheckpointConfig,
    alpha: float,
    dtype: str = "float32",
    header: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA of the transformer into a safetensors file that our loader and diffusers read.

    `leaves` are the two factors of each changed weight, by their names in the network:
    `text_in.lora.down` [i r] and `text_in.lora.up` [r o], or of stacked weights
    `blocks.attn.q.lora.down` [l i r] and `blocks.attn.q.lora.up` [l r o]. Each weight changes by
    alpha / r * down @ up; r is the same for all. `header` are other entries of the file's header:
    `base_model_name_or_path` is the model that the LoRA is for. Raises ValueError for a factor that
    is not finite, OSError where the file can't be written."""
    tensors: dict[str, np.ndarray] = {}
    modules, ranks, used = set(), set(), set()
    for name, (rule, layer) in targets(config, "transformer").items():
        ours = [f"{rule.flax.removesuffix('kernel')}lora.{side}" for side in ("down", "up")]
        if not rule.is_linear or not leaves.keys() & {*ours}:
            continue
        rows = (leaves[leaf] if layer is None else leaves[leaf][layer] for leaf in ours)
        down, up = rule.torch_factors(*map(np.asarray, rows))
        up = up.reshape(*up.shape, *[1] * (down.ndim - up.ndim))  # a convolution's is one of 1x1
        module = name.removesuffix(".weight")
        for side, factor in (("A", down), ("B", up)):
            key = f"{PREFIX}{module}.lora_{side}.weight"
            tensors[key] = contiguous(cast_finite(key, factor, np.dtype(jnp.dtype(dtype))))
        modules.add(rule.torch.removesuffix(".weight").removeprefix("transformer_blocks.{}."))
        ranks.add(len(down))
        used |= {*ours}
    assert used == leaves.keys()
    (rank,) = ranks
    # PEFT's settings: it compares target_modules with the ends of the modules' names.
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(modules)}
    note = {PREFIX + key: value for key, value in settings.items()}
    entries = {**(header or {}), "format": "pt", HEADER: json.dumps(note)}
    with replace_when_done(path) as part:
        # Not save_file, whose files only their owner may read.
        part.write_bytes(_sort_header(save(tensors, metadata=entries)))
        back = open_file(part)
        found = sums({key: back.read(key) for key in back.entries})
        if fault := next(differences(sums(tensors), found, path.name), None):
            raise OSError(f"the disk must hold what was written there: {fault}")


def _sort_header(file: bytes) -> bytes:
    """The same safetensors file with its header's entries sorted. The library writes them in
    another order each time, so that a LoRA written again would have another SHA-256."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[start:]
