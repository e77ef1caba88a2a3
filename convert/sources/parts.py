"""What weight files hold, recognised by the names in them, and their tensors under diffusers'
names: plain files, files from ComfyUI (prefixes, float8 with scales, GGUF) and from SAT."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cogi2v_jax.disk import one_line, parse_json

from ..tables import fused, llama, sat
from ..tables.rules import FileTensor
from . import blocks, lookalikes
from .tensor_files import BYTES, DTYPES, NARROW, WeightFile

DIFFUSERS, SAT, LLAMA = "diffusers", "SAT", "llama.cpp"
# A name that only one part has, in one naming. What precedes it in a file is the prefix of all
# names of that part there.
MARKS = (
    ("transformer", DIFFUSERS, "transformer_blocks.0.attn1.to_out.0.weight"),
    ("transformer", SAT, "transformer.layers.0.attention.query_key_value.weight"),
    ("vae", DIFFUSERS, "encoder.down_blocks.0.resnets.0.conv1.conv.weight"),
    ("vae", SAT, "encoder.down.0.block.0.conv1.conv.weight"),
    ("text_encoder", DIFFUSERS, "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ("text_encoder", LLAMA, "enc.blk.0.attn_q.weight"),
)
# Diffusers' names for those of another naming, by naming and part.
RENAMED = {
    (SAT, "transformer"): sat.transformer,
    (SAT, "vae"): sat.vae,
    (LLAMA, "text_encoder"): llama.text_encoder,
}
MUST = "must hold a transformer, a VAE or a T5 encoder of this family"
# Tensors beside the weights: the tokenizer in a T5 file, scales of activations, notes of
# quantisation, a trainer's counters, loss and noise levels; and the decoder of a complete T5.
NO_WEIGHTS = re.compile(
    r"(^|\.)(scaled_fp8|spiece_model|logit_scale|scale_input|input_scale|comfy_quant)$|"
    r"^(global_step|step|epoch|iteration|loss)$|^(loss|denoiser)\."
)
DECODER = re.compile(r"decoder\.|lm_head\.")
# Names that only a quantisation has which is not read.
QUANTISED = (
    (re.compile(r"\.quant_state\.bitsandbytes__|\.(quant_map|absmax|SCB)$"), "bitsandbytes"),
    (re.compile(r"\.(qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(wscales|smooth_factor|proj_down)$"), "SVDQuant"),
    (re.compile(r"\._data(\._data)?$"), "quanto"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"[.:_]qdata$"), "torchao"),
    (re.compile(r"\.weight_scale_inv$"), "float8 in blocks"),
    (re.compile(r"\.[A-Z0-9_]+_qweight$"), "GGUF of another kind"),
)
# The values in ComfyUI's note of a quantised layer for which the weight is float8 times a scale.
PLAIN = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}
READ = (*DTYPES, *blocks.KINDS)  # dtypes of weights in files
WIDE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)  # default for float8 and GGUF's blocks


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
    """Tensors of a file, under diffusers' names. float8 and GGUF's blocks are read as `wide`."""

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
            f"{DTYPES[code].name if code in DTYPES else code}{' with scales' if scaled else ''}"
            for code, scaled in codes
            if code in READ
        }

    def _tensor(self, stored: FileTensor) -> Tensor:
        shape, code = self.file.entries[stored.name]
        where = one_line(f"{self.file.path}: {stored.name}")
        if code not in READ:
            kinds = f"{', '.join(DTYPES)} or GGUF's Q4_0 to Q8_0 and Q2_K to Q6_K"
            way = "take the bf16 file instead"
            raise ValueError(f"{where} must be one of {kinds}: got {one_line(code)}; {way}")
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
        return Tensor(self.file.path, shape, self._dtype(code))

    def _dtype(self, code: str) -> np.dtype[Any]:
        return self.wide if code in NARROW or code in blocks.KINDS else DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """One tensor, multiplied with its scale in float32."""
        stored = self.stored[name]
        code = self.file.entries[stored.name].dtype
        values = self._chunks(stored.name, stored)
        if stored.scale:
            is_one = math.prod(self.file.entries[stored.scale].shape) == 1
            scale = self.file.read(stored.scale) if is_one else self._chunks(stored.scale, stored)
            axes = () if is_one else (-1, *(1,) * (values.ndim - 1))
            values = values.astype(np.float32) * scale.astype(np.float32).reshape(axes)
        return values.astype(self._dtype(code), copy=False)

    def _chunks(self, name: str, stored: FileTensor) -> np.ndarray:
        """What a stored tensor takes of one in the file, its weight or its scales."""
        if stored.chunks == 1:
            return self.file.read(name)
        rows = self.file.entries[name].shape[0] // stored.chunks
        starts = (index * rows for index in stored.indices)
        return np.concatenate([self.file.read(name, start, start + rows) for start in starts])


def of_files(files: Sequence[WeightFile], part: str) -> list[Weights]:
    """The tensors of the one part that the files of a folder hold, under diffusers' names and
    whatever is before them all. Raises as `parts_of`; but where the part is not recognised, its
    names are taken as they are, to be compared with its network."""
    mark = next(mark for its, naming, mark in MARKS if (its, naming) == (part, DIFFUSERS))
    names = {name for file in files for name in file.entries}
    if not any(map(_ends_with(mark), names)):
        return [_of_part(file, part, DIFFUSERS, "", file.entries, names) for file in files]
    found = parts_of(files, files[0].path.parent)
    if len(found) > 1:
        must = f"must be the folder of one part: got {', '.join(found)}"
        raise ValueError(f"{files[0].path.parent} {must}")
    return found[part]


def _ends_with(mark: str) -> Callable[[str], bool]:
    return lambda name: name == mark or name.endswith(f".{mark}")


def _of_part(
    file: WeightFile, part: str, naming: str, prefix: str, names: Iterable[str], all: Set[str]
) -> Weights:
    """The tensors of a part in a file: those of `names`, without `prefix`. `all` are the names in
    all files of the part. Raises ValueError, in one line, for a quantisation that can't be
    read."""
    _check_quantisation(file)
    own = {name.removeprefix(prefix): name for name in names if not NO_WEIGHTS.search(name)}
    if rename := RENAMED.get((naming, part)):
        stored = {
            name: tensor._replace(name=own[tensor.name]) for name, tensor in rename(own).items()
        }
        return Weights(file, naming, stored)
    scales = _scales(own)
    unused = set(scales.values())
    if part == "text_encoder":
        unused |= {own[name] for name in own if DECODER.match(name)}
    stored = {
        name: tensor._replace(name=own[tensor.name], scale=scales.get(own[tensor.name]))
        for name, tensor in fused.split(own, {name.removeprefix(prefix) for name in all}).items()
        if own[tensor.name] not in unused
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


def parts_of(files: Sequence[WeightFile], path: Path) -> dict[str, list[Weights]]:
    """Every part in a file, or in the files of one index, recognised by the names in them; `path`
    is for messages. Raises ValueError, in one line, for files of something else, and for a
    quantisation that can't be read."""
    names = {name for file in files for name in file.entries}
    found: dict[str, tuple[str, str]] = {}  # part and naming, by prefix
    for part, naming, mark in MARKS:
        for name in sorted(filter(_ends_with(mark), names)):
            prefix = name.removesuffix(mark)
            if part in (other for other, _ in found.values()):
                prefixes = " and ".join(sorted(map(repr, (*found, prefix))))
                raise ValueError(f"{path} must hold one {part}: got more, under {prefixes}")
            found[prefix] = part, naming
    if not found:
        for file in files:
            _check_quantisation(file)
        raise ValueError(f"{path} {MUST}: got {lookalikes.describe_names(names)}")

    def owner(name: str) -> str | None:
        """The longest prefix that a name begins with."""
        return max(filter(name.startswith, found), key=len, default=None)

    others = (name for name in sorted(names) if owner(name) is None)
    if other := next((name for name in others if not NO_WEIGHTS.search(name)), None):
        parts = ", ".join(part for part, _ in found.values())
        way = f"save the {parts} alone in a file"
        raise ValueError(f"{path} must hold nothing but {parts}: got {one_line(other)}; {way}")

    def weights(file: WeightFile, prefix: str) -> Weights:
        own = [name for name in file.entries if owner(name) == prefix]
        return _of_part(file, *found[prefix], prefix, own, names)

    return {part: [weights(file, prefix) for file in files] for prefix, (part, _) in found.items()}


def _check_quantisation(file: WeightFile) -> None:
    """Raises ValueError for quantised weights but float8 times its scale and GGUF's blocks."""
    for name in file.entries:
        for pattern, what in QUANTISED:
            if pattern.search(name):
                must = "must hold weights that are not quantised, float8, or GGUF's blocks"
                got = f"those of {what} ({one_line(name)})"
                raise ValueError(f"{file.path} {must}: got {got}; take the bf16 file instead")
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
