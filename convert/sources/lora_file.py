"""LoRA files as they lie on disk: their tensors, and all that is said of them in a header, or
beside them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogi2v_jax.disk import read_json, sha256

from .tensor_files import DTYPES, NARROW, open_file

SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")
DEFAULT = "pytorch_lora_weights.safetensors"  # what a folder is asked for first
HEADER = "lora_adapter_metadata"  # diffusers' place for PEFT's settings
BESIDE = "adapter_config.json"  # PEFT's own
BASES = (
    "base_model_name_or_path",
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
    "modelspec.architecture",
)


class LoraFile(NamedTuple):
    """A file before anyone asks what its tensors mean."""

    path: Path
    name: str  # for people
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    # PEFT's: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; empty where nothing is said.
    settings: Mapping[str, Any]
    base: str  # the model it says it was trained on; empty where it doesn't


def open_lora(path: Path) -> LoraFile:
    """From a file, or from a folder that has one. Raises FileNotFoundError or ValueError, in one
    line, for what is no file of tensors."""
    path = _locate(path)
    name = f"{path.absolute().parent.name}/{path.name}" if path.name == DEFAULT else path.name
    if path.suffix not in SUFFIXES:
        raise ValueError(f"lora must end in {', '.join(SUFFIXES)}: got {path}")
    file = open_file(path)
    odd = [
        f"{tensor} of {entry.dtype}"
        for tensor, entry in file.entries.items()
        if entry.dtype not in DTYPES or entry.dtype in NARROW
    ]
    if odd:
        raise ValueError(
            f"{path} must hold tensors of {', '.join(code for code in DTYPES if code not in NARROW)}: got {odd[0]}"
        )
    shapes, head = {tensor: entry.shape for tensor, entry in file.entries.items()}, file.note
    beside = read_json(path.with_name(BESIDE)) if path.with_name(BESIDE).is_file() else {}
    settings = _settings(path, head) or beside
    said = [
        str(source[key]) for source in (settings, beside, head) for key in BASES if source.get(key)
    ]
    digest = sha256(path)
    return LoraFile(path, name, digest, shapes, file.read, settings, (said or [_card(path)])[0])


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"lora must be an existing file or folder: found no {path}")
    files = sorted(path.glob("*.safetensors"))
    chosen = [file for file in files if file.name == DEFAULT] or files
    if len(chosen) != 1:
        raise FileNotFoundError(
            f"lora folder must hold {DEFAULT} or one safetensors file: found {len(files)} in {path}"
        )
    return chosen[0]


def _settings(path: Path, head: Mapping[str, str]) -> dict[str, Any]:
    """The transformer's share of what diffusers packs of PEFT's configuration into the header."""
    try:
        packed = json.loads(head.get(HEADER, "{}"))
        return {
            key.removeprefix("transformer."): value
            for key, value in packed.items()
            if not key.startswith("text_encoder")
        }
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"{path} must have a JSON object as {HEADER} in its header: {error}"
        ) from None


def _card(path: Path) -> str:
    """The one `base_model` of the model card beside a file, which trainers write."""
    try:
        text = path.with_name("README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = (
        re.search(r"^base_model:[ \t]*([\w./-]+)[ \t]*$", front.group(1), re.MULTILINE)
        if front
        else None
    )
    return found.group(1) if found else ""
