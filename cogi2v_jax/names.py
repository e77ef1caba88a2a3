"""Hub ids, addresses, suffixes of LoRA files, the names of the published checkpoints, and where the
files inside the package are."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from . import config

HUB_ID = re.compile(r"[^./~@][^/@]*/[^/@]+(@.*)?")  # owner/name@revision
ADDRESS = re.compile(r"\s*(?:([a-z][a-z0-9+.-]*)://|(data|file):)", re.IGNORECASE)
ON_HUB = re.compile(
    r"https?://(?:www\.)?(?:huggingface|hf)\.co/(?P<repository>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?"
)
ASSETS = Path(__file__).parent / "assets"
EXAMPLE_LORA = "cogi2v-circles"  # of the embedded model
LORA_SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")  # preferred ones first


class HubPlace(NamedTuple):
    """A repository on the hub, as owner/name or owner/name@revision, and a file of it or ""."""

    id: str
    file: str = ""


def scheme_of(text: str) -> str:
    """The scheme of an address in lower case, as "https"; empty for a path or a hub id."""
    found = ADDRESS.match(text)
    return (found[1] or found[2]).lower() if found else ""


def parse_hub(text: str) -> HubPlace | None:
    """What a hub id or an address of huggingface.co means; None for any other text."""
    if not (address := ON_HUB.fullmatch(text)):
        return HubPlace(text) if HUB_ID.fullmatch(text) else None
    revision = unquote(address["revision"] or "main")
    at = "" if revision == "main" else f"@{revision}"
    return HubPlace(f"{address['repository']}{at}", unquote(address["file"] or ""))


def find_name(model: str) -> str | None:
    """The one of `config.names()` that a name, a hub id or its address means, or None. As on the
    hub, case doesn't matter, and THUDM is the former name of zai-org."""
    place = parse_hub(model)
    asked = place.id if place and not place.file else model
    asked = asked.lower().replace("thudm/", "zai-org/")
    hubs = {name: config.toml(name)["source"].get("hub", name).lower() for name in config.names()}
    return next((name for name, hub in hubs.items() if asked in (name, hub)), None)


def machine_name(text: str) -> str:
    """A machine's name as `configs/meshes.toml` has it: the cloud's for v5e is v5litepod, and case
    makes no difference."""
    return text.strip().lower().replace("v5litepod-", "v5e-")
