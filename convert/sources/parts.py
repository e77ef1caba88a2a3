"""What a weight file is, told by the names in it, and its tensors under diffusers' names: plain
files, those of ComfyUI (prefixes, float8 with scales) and SAT's."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..tables import sat
from ..tables.rules import FileTensor
from . import lookalikes
from .tensor_files import BYTES, DTYPES, NARROW, WeightFile, open_file

DIFFUSERS, SAT = "diffusers", "SAT"
# A name that only one part has, in one naming; what stands before it in a file is that part's
# prefix there.
MARKS = (
    ("transformer", DIFFUSERS, "transformer_blocks.0.attn1.to_q.weight"),
    ("transformer", SAT, "transformer.layers.0.attention.query_key_value.weight"),
    ("vae", DIFFUSERS, "encoder.down_blocks.0.resnets.0.conv1.conv.weight"),
    ("vae", SAT, "encoder.down.0.block.0.conv1.conv.weight"),
    ("text_encoder", DIFFUSERS, "encoder.block.0.layer.0.SelfAttention.q.weight"),
)
# Beside the weights: a T5 file's tokenizer, scales of activations, marks of quantisation; and the
# decoder of a whole T5.
NO_WEIGHTS = re.compile(
    r"(^|\.)(scaled_fp8|spiece_model|logit_scale|scale_input|input_scale|comfy_quant)$"
)
DECODER = re.compile(r"decoder\.|lm_head\.")
# What ComfyUI notes of a quantised layer, and what of it leaves the weight the product of float8
# and scale.
PLAIN = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}
WIDE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)  # what float8 becomes unless told


class Tensor(NamedTuple):
    """Where a tensor lies and what it is read as."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """Some of a file's tensors, under diffusers' names. `wide` is what float8 is read as."""

    file: WeightFile
    naming: str
    places: Mapping[str, FileTensor]
    wide: np.dtype[Any] = WIDE

    def tensors(self) -> dict[str, Tensor]:
        """From the header alone. Raises ValueError, in one line, for what is no weight."""
        return {name: self._tensor(place) for name, place in self.places.items()}

    def kinds(self) -> set[str]:
        """The dtypes in the file, in words."""
        codes = {
            (self.file.entries[place.name].dtype, place.scale is not None)
            for place in self.places.values()
        }
        return {
            f"{DTYPES[code].name}{' with scales' if scaled else ''}"
            for code, scaled in codes
            if code in DTYPES
        }

    def _tensor(self, place: FileTensor) -> Tensor:
        shape, code = self.file.entries[place.name]
        where = f"{self.file.path}: {place.name}"
        if code not in DTYPES:
            raise ValueError(f"{where} must be one of {', '.join(DTYPES)}: got {code}")
        if place.scale:
            entry = self.file.entries[place.scale]
            if entry.dtype not in DTYPES or entry.shape not in (
                (),
                (1,),
                shape[:1],
                (*shape[:1], *(1 for _ in shape[1:])),
            ):
                raise ValueError(
                    f"{where} must have one scale, or one an output row: got {place.scale} {list(entry.shape)} {entry.dtype}"
                )
        if place.chunks > 1:
            if not shape or shape[0] % place.chunks:
                raise ValueError(
                    f"{where} must divide into {place.chunks} along its first axis: got {list(shape)}"
                )
            shape = (shape[0] // place.chunks * len(place.indices), *shape[1:])
        return Tensor(self.file.path, shape, self.wide if code in NARROW else DTYPES[code])

    def read(self, name: str) -> np.ndarray:
        """One tensor, with its scale applied in float32."""
        place = self.places[name]
        code = self.file.entries[place.name].dtype
        if place.chunks == 1:
            values = self.file.read(place.name)
        else:
            rows = self.file.entries[place.name].shape[0] // place.chunks
            values = np.concatenate(
                [self.file.read(place.name, cut * rows, (cut + 1) * rows) for cut in place.indices]
            )
        if place.scale:
            scale = self.file.read(place.scale).astype(np.float32)
            values = values.astype(np.float32) * scale.reshape(
                (-1, *(1,) * (values.ndim - 1)) if scale.size > 1 else ()
            )
        return values.astype(self.wide if code in NARROW else DTYPES[code], copy=False)


def of_part(
    file: WeightFile,
    part: str,
    naming: str = DIFFUSERS,
    prefix: str = "",
    names: Iterable[str] | None = None,
) -> Weights:
    """A part's tensors in a file, all of them or the given ones, whose names begin with a prefix.
    Raises ValueError, in one line, for a quantisation that can't be read."""
    _check_quantisation(file)
    own = {name.removeprefix(prefix): name for name in (file.entries if names is None else names)}
    if naming == SAT:
        return Weights(
            file,
            naming,
            {
                name: place._replace(name=own[place.name])
                for name, place in sat.NAMES[part](own).items()
            },
        )
    scales = _scales(own)
    unused = set(scales.values()) | {
        there for name, there in own.items() if NO_WEIGHTS.search(name)
    }
    if part == "text_encoder":
        unused |= {there for name, there in own.items() if DECODER.match(name)}
    return Weights(
        file,
        naming,
        {
            name: FileTensor(there, scale=scales.get(there))
            for name, there in own.items()
            if there not in unused
        },
    )


def _scales(own: Mapping[str, str]) -> dict[str, str]:
    """The file's name of every tensor's scale, by the file's name of the tensor."""
    pairs = (
        (name, (f"{name}_scale", f"{name.removesuffix('.weight')}.scale_weight")) for name in own
    )
    return {own[name]: own[scale] for name, scales in pairs for scale in scales if scale in own}


def parts_of(path: Path) -> dict[str, Weights]:
    """Every part that a file alone holds, told by the names in it. Raises ValueError or
    FileNotFoundError, in one line, for a file of something else and for a quantisation that can't
    be read."""
    file = open_file(path)
    prefixes: dict[str, tuple[str, str]] = {}
    for part, naming, mark in MARKS:
        for name in file.entries:
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark)
                if part in (found for found, _ in prefixes.values()):
                    raise ValueError(
                        f"{path} must hold one {part}: got more, under {' and '.join(sorted(map(repr, (*prefixes, prefix))))}"
                    )
                prefixes[prefix] = part, naming
    if not prefixes:
        raise ValueError(
            f"{path} must hold a transformer, a VAE or a T5 encoder of this family: got {lookalikes.described(file.entries)}"
        )
    owned: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in file.entries:
        prefix = max(
            (prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None
        )
        if prefix is not None:
            owned[prefix].append(name)
        elif not NO_WEIGHTS.search(name):
            raise ValueError(
                f"{path} must hold nothing but {', '.join(part for part, _ in prefixes.values())}: got {name}"
            )
    return {
        part: of_part(file, part, naming, prefix, owned[prefix])
        for prefix, (part, naming) in prefixes.items()
    }


def _check_quantisation(file: WeightFile) -> None:
    """Raises ValueError unless every quantised weight is float8 times its scale."""
    for layer, note in _notes(file):
        odd = [
            f"{key} {value!r}"
            for key, value in note.items()
            if value not in PLAIN.get(key, (None, False))
        ]
        if odd:
            raise ValueError(
                f"{file.path}: {layer} must be float8 times a scale: got {', '.join(odd)}; take the bf16 or fp8 file instead"
            )


def _notes(file: WeightFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ComfyUI notes of quantised layers, in the header or beside each."""
    try:
        yield from (
            json.loads(file.note.get("_quantization_metadata", "{}")).get("layers", {}).items()
        )
        for name, entry in file.entries.items():
            if name.endswith(".comfy_quant") and entry.dtype == BYTES:
                yield name.removesuffix(".comfy_quant"), dict(json.loads(bytes(file.read(name))))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{file.path} must note its quantisation in JSON: got something else"
        ) from None
