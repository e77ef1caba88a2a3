"""What a weight file holds, recognised by the names in it, and its tensors under diffusers' names:
plain files, files from ComfyUI (prefixes, float8 with scales) and from SAT."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cogi2v_jax.disk import one_line, parse_json

from ..tables import sat
from ..tables.rules import FileTensor
from . import lookalikes
from .tensor_files import BYTES, DTYPES, NARROW, WeightFile, open_file

DIFFUSERS, SAT = "diffusers", "SAT"
# A name that only one part has, in one naming. What precedes it in a file is the prefix of all
# names of that part there.
MARKS = (
    ("transformer", DIFFUSERS, "transformer_blocks.0.attn1.to_q.weight"),
    ("transformer", SAT, "transformer.layers.0.attention.query_key_value.weight"),
    ("vae", DIFFUSERS, "encoder.down_blocks.0.resnets.0.conv1.conv.weight"),
    ("vae", SAT, "encoder.down.0.block.0.conv1.conv.weight"),
    ("text_encoder", DIFFUSERS, "encoder.block.0.layer.0.SelfAttention.q.weight"),
)
MUST = "must hold a transformer, a VAE or a T5 encoder of this family"
# Tensors beside the weights: the tokenizer in a T5 file, scales of activations, notes of
# quantisation; and the decoder of a complete T5.
NO_WEIGHTS = re.compile(
    r"(^|\.)(scaled_fp8|spiece_model|logit_scale|scale_input|input_scale|comfy_quant)$"
)
DECODER = re.compile(r"decoder\.|lm_head\.")
# The values in ComfyUI's note of a quantised layer for which the weight is float8 times a scale.
PLAIN = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}
WIDE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)  # the default dtype to read float8 as


class Tensor(NamedTuple):
    """The file of a tensor, and its shape and dtype when read."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """Tensors of a file, under diffusers' names. float8 is read as `wide`."""

    file: WeightFile
    naming: str
    stored: Mapping[str, FileTensor]
    wide: np.dtype[Any] = WIDE

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, from the header alone. Raises ValueError, in one line, for one that can't be
        a weight."""
        return {name: self._tensor(stored) for name, stored in self.stored.items()}

    def kinds(self) -> set[str]:
        """Names of the dtypes in the file."""
        codes = {
            (self.file.entries[stored.name].dtype, stored.scale is not None)
            for stored in self.stored.values()
        }
        return {
            f"{DTYPES[code].name}{' with scales' if scaled else ''}"
            for code, scaled in codes
            if code in DTYPES
        }

    def _tensor(self, stored: FileTensor) -> Tensor:
        shape, code = self.file.entries[stored.name]
        where = one_line(f"{self.file.path}: {stored.name}")
        if code not in DTYPES:
            raise ValueError(f"{where} must be one of {', '.join(DTYPES)}: got {one_line(code)}")
        if stored.scale:
            scale = self.file.entries[stored.scale]
            rows = (shape[:1], (*shape[:1], *(1 for _ in shape[1:])))  # one scale an output
            if scale.dtype not in DTYPES or scale.shape not in ((), (1,), *rows):
                got = one_line(f"{stored.scale} {list(scale.shape)} {scale.dtype}")
                raise ValueError(f"{where} must have one scale, or one an output row: got {got}")
        if stored.chunks > 1:
            if not shape or shape[0] % stored.chunks:
                must = f"must divide into {stored.chunks} along its first axis"
                raise ValueError(f"{where} {must}: got {list(shape)}")
            shape = (shape[0] // stored.chunks * len(stored.indices), *shape[1:])
        return Tensor(self.file.path, shape, self.wide if code in NARROW else DTYPES[code])

    def read(self, name: str) -> np.ndarray:
        """One tensor, multiplied with its scale in float32."""
        stored = self.stored[name]
        shape, code = self.file.entries[stored.name]
        if stored.chunks == 1:
            values = self.file.read(stored.name)
        else:
            rows = shape[0] // stored.chunks
            starts = (index * rows for index in stored.indices)
            chunks = [self.file.read(stored.name, start, start + rows) for start in starts]
            values = np.concatenate(chunks)
        if stored.scale:
            scale = self.file.read(stored.scale).astype(np.float32)
            axes = (-1, *(1,) * (values.ndim - 1)) if scale.size > 1 else ()
            values = values.astype(np.float32) * scale.reshape(axes)
        return values.astype(self.wide if code in NARROW else DTYPES[code], copy=False)


def of_part(
    file: WeightFile,
    part: str,
    naming: str = DIFFUSERS,
    prefix: str = "",
    names: Iterable[str] | None = None,
) -> Weights:
    """The tensors of a part in a file: all of them, or the given names, which begin with `prefix`.
    Raises ValueError, in one line, for a quantisation that can't be read."""
    _check_quantisation(file)
    own = {name.removeprefix(prefix): name for name in (file.entries if names is None else names)}
    if naming == SAT:
        stored = {
            name: tensor._replace(name=own[tensor.name])
            for name, tensor in sat.NAMES[part](own).items()
        }
        return Weights(file, naming, stored)
    scales = _scales(own)
    unused = set(scales.values()) | {own[name] for name in own if NO_WEIGHTS.search(name)}
    if part == "text_encoder":
        unused |= {own[name] for name in own if DECODER.match(name)}
    stored = {
        name: FileTensor(inside, scale=scales.get(inside))
        for name, inside in own.items()
        if inside not in unused
    }
    return Weights(file, naming, stored)


def _scales(own: Mapping[str, str]) -> dict[str, str]:
    """The scale of each scaled tensor, both by their names in the file."""
    found = {}
    for name, inside in own.items():
        for scale in (f"{name}_scale", f"{name.removesuffix('.weight')}.scale_weight"):
            if scale in own:
                found[inside] = own[scale]
    return found


def parts_of(path: Path) -> dict[str, Weights]:
    """Every part in a single file, recognised by the names in it. Raises ValueError or
    FileNotFoundError, in one line, for a file of something else, and for a quantisation that can't
    be read."""
    file = open_file(path)
    found: dict[str, tuple[str, str]] = {}  # part and naming, by prefix
    for part, naming, mark in MARKS:
        for name in file.entries:
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark)
                if part in (other for other, _ in found.values()):
                    prefixes = " and ".join(sorted(map(repr, (*found, prefix))))
                    raise ValueError(f"{path} must hold one {part}: got more, under {prefixes}")
                found[prefix] = part, naming
    if not found:
        raise ValueError(f"{path} {MUST}: got {lookalikes.describe_names(file.entries)}")
    owned: dict[str, list[str]] = {prefix: [] for prefix in found}
    for name in file.entries:
        prefixes = [prefix for prefix in found if name.startswith(prefix)]
        if prefixes:
            owned[max(prefixes, key=len)].append(name)
        elif not NO_WEIGHTS.search(name):
            parts = ", ".join(part for part, _ in found.values())
            raise ValueError(f"{path} must hold nothing but {parts}: got {one_line(name)}")
    return {
        part: of_part(file, part, naming, prefix, owned[prefix])
        for prefix, (part, naming) in found.items()
    }


def _check_quantisation(file: WeightFile) -> None:
    """Raises ValueError unless every quantised weight is float8 times its scale."""
    for layer, note in _read_notes(file).items():
        other = {
            key: value for key, value in note.items() if value not in PLAIN.get(key, (None, False))
        }
        if other:
            got = ", ".join(f"{key} {value!r}" for key, value in other.items())
            what = one_line(f"{layer} must be float8 times a scale: got {got}")
            raise ValueError(f"{file.path}: {what}; take the bf16 or fp8 file instead")


def _read_notes(file: WeightFile) -> dict[str, dict[str, Any]]:
    """ComfyUI's notes of quantised layers, from the header or from a tensor beside each weight."""
    try:
        notes = dict(parse_json(file.note.get("_quantization_metadata", "{}")).get("layers", {}))
        for name, entry in file.entries.items():
            if name.endswith(".comfy_quant") and entry.dtype == BYTES:
                notes[name.removesuffix(".comfy_quant")] = parse_json(bytes(file.read(name)))
        return {layer: dict(note) for layer, note in notes.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{file.path} must note its quantisation in JSON: got something else"
        ) from None
