"""Hub ids, addresses, suffixes of LoRA files, and the names of the published checkpoints."""

import re

from . import config

HUB_ID = re.compile(r"[^./~@][^/@]*/[^/@]+(@.*)?")  # owner/name@revision
ADDRESS = re.compile(r"\s*(?:([a-z][a-z0-9+.-]*)://|(data|file):)", re.IGNORECASE)
LORA_SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")  # preferred ones first


def scheme_of(text: str) -> str:
    """The scheme of an address in lower case, as "https"; empty for a path or a hub id."""
    found = ADDRESS.match(text)
    return (found[1] or found[2]).lower() if found else ""


def find_name(model: str) -> str | None:
    """The one of `config.names()` that a name or a hub id means, or None. As on the hub, case
    doesn't matter, and THUDM is the former name of zai-org."""
    asked = model.lower().replace("thudm/", "zai-org/")
    hubs = {name: config.toml(name)["source"].get("hub", name).lower() for name in config.names()}
    return next((name for name, hub in hubs.items() if asked in (name, hub)), None)
