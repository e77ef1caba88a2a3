"""Chooses by name the files of a repository or a bucket that are needed: of a checkpoint those that
a conversion reads, one precision of every part and safetensors rather than bin."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..names import LORA_SUFFIXES
from .checkpoint import CONFIG_FILES, MANIFEST
from .pieces import NETWORKS

SUFFIXES = (".safetensors", ".bin")  # the preferred one first
# A stem, a variant ("fp16") and the number of a shard; an index has the variant at the end.
FILE = re.compile(r"[^.]+?(?:\.(?P<variant>\w+))?(?P<shard>-\d{5}-of-\d{5})?(\.safetensors|\.bin)")
INDEX = re.compile(r"[^.]+(\.safetensors|\.bin)\.index(?:\.(?P<variant>\w+))?\.json")
# "" is the file without a variant, which programs load by default.
PREFERRED = ("", "bf16", "fp32", "fp16")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the preferred one of several, with any suffix
# What is known of a LoRA beside its file: PEFT's settings, and its card.
BESIDE_LORA = ("adapter_config.json", "README.md")
# Stems of what a trainer writes beside the weights.
BESIDE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict|training_args|random_states|rng_state)"
    r"(_\d+)*|.*optim_states"
)


def list_loras(names: Iterable[str]) -> list[str]:
    """The files of a folder that may be its LoRA: of the first suffix that any has, that of the
    default name, else all."""
    files = [path for name in sorted(names) if not BESIDE.fullmatch((path := Path(name)).stem)]
    for suffix in LORA_SUFFIXES:
        if found := [path for path in files if path.suffix.lower() == suffix]:
            default = [path for path in found if path.stem == Path(LORA_FILE).stem]
            return [path.name for path in default or found]
    return []


def choose_lora(names: Iterable[str]) -> list[str]:
    """The file of a LoRA and what is beside it; empty for a folder with none or several."""
    top = [name for name in names if "/" not in name]
    files = list_loras(top)
    return [*files, *(name for name in BESIDE_LORA if name in top)] if len(files) == 1 else []


def choose_beside(file: str, names: Iterable[str]) -> list[str]:
    """A LoRA's file and what is beside it; empty where there is no such file."""
    folder = file.rpartition("/")[0]
    beside = [f"{folder}/{name}".lstrip("/") for name in BESIDE_LORA]
    names = set(names)
    return [file, *(name for name in beside if name in names)] if file in names else []


def choose_files(names: Iterable[str]) -> list[str]:
    """All files of a converted folder; the files of a diffusers folder, or of a folder with one
    part, that a conversion reads. Empty for any other folder."""
    names = sorted(names)
    if MANIFEST in names:
        return names
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        folders[folder].append(file)
    top = folders[""]
    if not any("config.json" in folders[part] for part in NETWORKS):
        chosen = choose_weights(top) if "config.json" in top else []
        return ["config.json", *chosen] if chosen else []
    found = ["model_index.json"] if "model_index.json" in top else []
    found += [f"{part}/{name}" for part, name in CONFIG_FILES.items() if name in folders[part]]
    found += [f"tokenizer/{name}" for name in sorted(folders["tokenizer"])]
    return found + [f"{part}/{name}" for part in NETWORKS for name in choose_weights(folders[part])]


def choose_weights(names: Iterable[str]) -> list[str]:
    """One set of weights among a folder's files: a single one, or an index and its shards."""
    names = sorted(names)
    for suffix in SUFFIXES:
        variants: dict[str, list[str]] = {}
        for name in names:
            match = FILE.fullmatch(name) or INDEX.fullmatch(name)
            if match and suffix in match.groups():
                variants.setdefault(match["variant"] or "", []).append(name)
        whole = {variant: _whole(files) for variant, files in variants.items()}
        others = sorted(whole.keys() - {*PREFERRED})
        for variant in (*PREFERRED, *others):
            if whole.get(variant):
                return whole[variant]
    return []


def _whole(names: list[str]) -> list[str]:
    """An index with its shards, else the single files."""
    shards = [name for name in names if (match := FILE.fullmatch(name)) and match["shard"]]
    index = [name for name in names if INDEX.fullmatch(name)]
    single = [name for name in names if name not in {*index, *shards}]
    return [*index, *shards] if index and shards else single
