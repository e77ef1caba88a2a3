"""LoRA files as they lie on disk: their tensors, and all that is said of them in a header, or beside them."""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogi2v_jax.checkpoint import first_line
from cogi2v_jax.config import read_json

from .diffusers import DTYPES, open_safetensors

DEFAULT = "pytorch_lora_weights.safetensors"  # what a folder is asked for first
PICKLED = (".pt", ".bin", ".pth", ".ckpt")
INSIDE = ("model", "module", "state_dict")  # what trainers wrap their tensors in
HEADER = "lora_adapter_metadata"  # diffusers' place for PEFT's settings
BESIDE = "adapter_config.json"  # PEFT's own
BASES = ("base_model_name_or_path", "base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


class LoraFile(NamedTuple):
    """A file before anyone asks what its tensors mean."""

    path: Path
    name: str  # for people
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    settings: Mapping[str, Any]  # PEFT's: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; empty where nothing is said
    base: str  # the model it says it was trained on; empty where it doesn't


def open_lora(path: Path) -> LoraFile:
    """From a file, or from a folder that has one. Raises FileNotFoundError or ValueError, in one line, for what is no file of tensors."""
    path = _locate(path)
    name = f"{path.absolute().parent.name}/{path.name}" if path.name == DEFAULT else path.name
    if path.suffix == ".safetensors":
        shapes, read, head = _safetensors(path)
    elif path.suffix in PICKLED:
        shapes, read, head = _pickled(path)
    else:
        raise ValueError(f"lora must end in .safetensors, {', '.join(PICKLED)}: got {path}")
    beside = read_json(path.with_name(BESIDE)) if path.with_name(BESIDE).is_file() else {}
    settings = _settings(path, head) or beside
    said = [str(source[key]) for source in (settings, beside, head) for key in BASES if source.get(key)]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return LoraFile(path, name, digest, shapes, read, settings, (said or [_card(path)])[0])


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"lora must be an existing file or folder: found no {path}")
    files = sorted(path.glob("*.safetensors"))
    chosen = [file for file in files if file.name == DEFAULT] or files
    if len(chosen) != 1:
        raise FileNotFoundError(f"lora folder must hold {DEFAULT} or one safetensors file: found {len(files)} in {path}")
    return chosen[0]


Opened = tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray], dict[str, str]]


def _safetensors(path: Path) -> Opened:
    file = open_safetensors(path)
    views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    odd = [f"{name} of {view.get_dtype()}" for name, view in views.items() if view.get_dtype() not in DTYPES]
    if odd:
        raise ValueError(f"{path} must hold tensors of {', '.join(DTYPES)}: got {odd[0]}")
    return {name: tuple(view.get_shape()) for name, view in views.items()}, file.get_tensor, file.metadata() or {}


def _pickled(path: Path) -> Opened:
    """What torch saved, if it is tensors and nothing else: unpickling anything more would run it."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} must be a safetensors file, or PyTorch must be installed: pip install torch") from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} must be a file of torch.save that holds tensors and nothing else"
        raise ValueError(f"{what}: {first_line(error)[:120]}; save its tensors as safetensors if you trust it") from None
    for key in INSIDE:
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    tensors = {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)} if isinstance(held, dict) else {}

    def read(name: str) -> np.ndarray:
        return tensors[name].to(torch.float32).numpy()  # numpy has no word for torch's bfloat16

    return {name: tuple(value.shape) for name, value in tensors.items()}, read, {}


def _settings(path: Path, head: Mapping[str, str]) -> dict[str, Any]:
    """The transformer's share of what diffusers packs of PEFT's configuration into the header."""
    try:
        packed = json.loads(head.get(HEADER, "{}"))
        return {key.removeprefix("transformer."): value for key, value in packed.items() if not key.startswith("text_encoder")}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} must have a JSON object as {HEADER} in its header: {error}") from None


def _card(path: Path) -> str:
    """The one `base_model` of the model card beside a file, which trainers write."""
    try:
        text = path.with_name("README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^base_model:[ \t]*([\w./-]+)[ \t]*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else ""
