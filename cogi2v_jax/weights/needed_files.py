"""Which files of a repository or a bucket a checkpoint needs, by their names: one precision of
every part, safetensors rather than bin."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from .checkpoint import CONFIG_FILES
from .pieces import NETWORKS

SUFFIXES = (".safetensors", ".bin")
# stem, variant ("fp16"), number of a shard; or an index, whose variant stands behind.
FILE = re.compile(r"[^.]+?(?:\.(?P<variant>\w+))?(?P<shard>-\d{5}-of-\d{5})?(\.safetensors|\.bin)")
INDEX = re.compile(r"[^.]+(\.safetensors|\.bin)\.index(?:\.(?P<variant>\w+))?\.json")
# "" is the file without a variant, which a program takes if not told otherwise.
PREFERRED = ("", "bf16", "fp32", "fp16")


def wanted(names: Iterable[str]) -> list[str]:
    """Of a diffusers folder's files, or of those of a part's own folder, the ones that a conversion
    reads. Empty where there is neither."""
    folders: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(
            "" if path.parent == PurePosixPath(".") else str(path.parent), []
        ).append(path.name)
    if not any("config.json" in folders.get(part, ()) for part in NETWORKS):
        chosen = weights(folders.get("", ())) if "config.json" in folders.get("", ()) else []
        return ["config.json", *chosen] if chosen else []
    found = ["model_index.json"] if "model_index.json" in folders.get("", ()) else []
    found += [
        f"{part}/{name}" for part, name in CONFIG_FILES.items() if name in folders.get(part, ())
    ]
    found += [f"tokenizer/{name}" for name in sorted(folders.get("tokenizer", ()))]
    return found + [
        f"{part}/{name}" for part in NETWORKS for name in weights(folders.get(part, ()))
    ]


def weights(names: Iterable[str]) -> list[str]:
    """One set of weights among a folder's files: a single one, or an index and its shards."""
    names = sorted(names)
    for suffix in SUFFIXES:
        variants: dict[str, list[str]] = {}
        for name in names:
            match = FILE.fullmatch(name) or INDEX.fullmatch(name)
            if match and suffix in match.groups():
                variants.setdefault(match["variant"] or "", []).append(name)
        whole = {variant: _whole(files) for variant, files in variants.items()}
        ranked = sorted(
            (variant for variant in whole if whole[variant]),
            key=lambda v: (*(v != known for known in PREFERRED), v),
        )
        if ranked:
            return whole[ranked[0]]
    return []


def _whole(names: list[str]) -> list[str]:
    """An index with its shards, else the single files."""
    shards = [name for name in names if (match := FILE.fullmatch(name)) and match["shard"]]
    index = [name for name in names if INDEX.fullmatch(name)]
    return (
        [*index, *shards]
        if index and shards
        else [name for name in names if name not in {*index, *shards}]
    )
