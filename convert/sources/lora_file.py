"""LoRA files: their tensors, and what the header and files beside them say."""

import math
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from cogi2v_jax.disk import first_line, one_line, parse_json, read_json, refuse_pointer, sha256
from cogi2v_jax.names import LORA_SUFFIXES
from cogi2v_jax.weights.hub import locate_lora, report
from cogi2v_jax.weights.needed_files import BESIDE_LORA, LORA_FILE, list_loras

from .gather import sat_files
from .tensor_files import DTYPES, INTEGERS, NARROW, open_file

HEADER = "lora_adapter_metadata"  # where diffusers writes PEFT's settings
HEADERS = (HEADER, "lora_config")  # the other one is of finetrainers
ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")  # of other programs
BESIDE, CARD = BESIDE_LORA
BASES = (
    "base_model_name_or_path",
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
    "modelspec.architecture",
)
STEP = re.compile(r"checkpoint-\d+")  # a trainer's folder in that of the run
# A card's front matter, closed or not, and the lines of a base in it.
FRONT = re.compile(r"\s*---[ \t]*\n(.*?)(?:^(?:---|\.\.\.)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
BASE = re.compile(rf"^({'|'.join(BASES)})[ \t]*:(?=\s).*(?:\n[ \t\]-].*)*", re.MULTILINE)


class LoraFile(NamedTuple):
    """A LoRA file whose tensors are not matched with a network yet."""

    path: Path
    name: str  # for messages
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    # PEFT's: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; empty if there are none
    settings: Mapping[str, Any]
    bases: tuple[str, ...]  # the models that it says it was trained on


def open_lora(lora: Path | str, say: Callable[[str], None] = report) -> LoraFile:
    """Opens a file, or the one in a folder or of a hub id. `say` is told what is fetched, and of a
    card that can't be read. Raises FileNotFoundError, OSError or ValueError, in one line, for what
    is no file of tensors."""
    path = _locate(locate_lora(lora, say))
    name = f"{path.absolute().parent.name}/{path.name}" if path.name == LORA_FILE else path.name
    name = name if isinstance(lora, Path) else lora
    if path.suffix.lower() not in LORA_SUFFIXES:
        raise ValueError(f"lora must end in {', '.join(LORA_SUFFIXES)}: got {path}")
    file = open_file(path)
    codes = [code for code in DTYPES if code not in NARROW]
    for tensor, entry in file.entries.items():
        is_number = entry.dtype in INTEGERS and math.prod(entry.shape) == 1
        if entry.dtype not in codes and not is_number:
            must = f"must hold tensors of {', '.join(codes)}"
            got = one_line(f"{tensor} of {entry.dtype}")
            raise ValueError(f"{path} {must}: got {got}")
    shapes = {tensor: entry.shape for tensor, entry in file.entries.items()}
    beside = read_json(path.with_name(BESIDE)) if path.with_name(BESIDE).is_file() else {}
    settings = _settings(path, file.note) or beside
    kind = "DORA" if settings.get("use_dora") else str(settings.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        say(f"lora {name}: it says that it is a {one_line(kind)}: its pairs are merged as a LoRA's")
    sources = settings, beside, file.note, _read_card(path, say)
    stated = [base for source in sources for key in BASES for base in _texts(source.get(key))]
    bases = tuple(dict.fromkeys(stated))
    return LoraFile(path, name, sha256(path), shapes, file.read, settings, bases)


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"lora must be an existing file or folder: found no {path}")
    files = [path / name for name in list_loras(os.listdir(path))] or sat_files(path)
    if len(files) != 1:
        steps = [each for each in sorted(path.iterdir()) if STEP.fullmatch(each.name)]
        way = f"; give one of its steps, as {steps[0]}" if steps else ""
        must = f"lora folder must hold {LORA_FILE} or one file of a LoRA"
        raise FileNotFoundError(f"{must}: found {len(files)} in {path}{way}")
    return files[0]


def _settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings for the transformer, from what diffusers or a trainer writes into the header,
    or the alpha there."""
    for name in HEADERS:
        try:
            stated = parse_json(header.get(name, "{}"))
            flat = {key.removeprefix("transformer."): value for key, value in stated.items()}
            if own := dict(flat.pop("transformer", {})) or {
                key: value for key, value in flat.items() if not key.startswith("text_encoder")
            }:
                return own
        except (ValueError, TypeError, AttributeError) as error:
            must = f"must have a JSON object as {name} in its header"
            raise ValueError(f"{path} {must}: {error}") from None
    alphas = [header[name] for name in ALPHAS if header.get(name, "None") != "None"]
    return {"lora_alpha": alphas[0]} if alphas else {}


def _texts(value: Any) -> list[str]:
    """One text, or a list of them, without what is empty."""
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]


def _read_card(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The bases in the front matter of the model card that trainers write beside a file, or beside
    the folder of its step; {} where there is none. Whatever else is in the card may be wrong."""
    folder = path.absolute().parent
    folders = (folder, folder.parent) if STEP.fullmatch(folder.name) else (folder,)
    try:
        inside = (file for each in folders for file in each.iterdir())
        card = next((file for file in inside if file.name.lower() == CARD.lower()), None)
        if card is None:
            return {}
        refuse_pointer(card)
        head = card.read_bytes()[:2]
        encoding = "utf-16" if head in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"
        front = FRONT.match(card.read_text(encoding, errors="replace"))
        entries = BASE.finditer(front[1] if front else "")
        return {entry[1]: yaml.safe_load(entry[0])[entry[1]] for entry in entries}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = first_line(error)
        say(f"lora {path.name}: its card, which may name its base, is not read: {reason}")
        return {}
