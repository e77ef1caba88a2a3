"""Finds the folder or file that a user names, and downloads it from the hub or a bucket: only the
files that are needed, if there is space for them, and with their licence named."""

import glob
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import config
from ..config import CheckpointConfig
from ..disk import check_space, first_line, one_line, show_size
from ..names import ASSETS, HubPlace, find_name, parse_hub
from . import bucket
from .checkpoint import MANIFEST, read_config
from .needed_files import BESIDE_LORA, LORA_FILE, choose_beside, choose_files, choose_lora


class Kind(NamedTuple):
    """What a repository is fetched for."""

    what: str  # for messages
    must: str
    choose: Callable[[Iterable[str]], list[str]]  # the files to fetch, of all
    stated: tuple[str, ...]  # most downloads have one of them


CHECKPOINT = Kind(
    "model", "be a diffusers folder", choose_files, ("transformer/config.json", "config.json")
)
LORA = Kind("lora", "hold one file of a LoRA", choose_lora, (LORA_FILE, *BESIDE_LORA))


def report(line: str) -> None:
    print(line, file=sys.stderr)


def locate(
    name: str | os.PathLike[str],
    say: Callable[[str], None] = report,
    must: str = "model must be a folder",
) -> Path:
    """The folder or file of a checkpoint's name, a hub id (with or without "@revision"), its
    address or a path. `must` begins the error for a name that is none of them. Raises
    FileNotFoundError, ValueError or OSError, in one line."""
    text = os.fspath(name)
    if text in config.names():
        source = config.toml(text)["source"]
        return ASSETS / source["embedded"] if "embedded" in source else fetch(source["hub"], say)
    if bucket.is_bucket(text):
        return bucket.download(text, MANIFEST, say)
    path = Path(os.path.expanduser(text))  # pathlib's raises for a user that doesn't exist
    if text and path.exists():
        return path
    if isinstance(name, str) and (place := parse_hub(text)):
        if place.file:
            way = "download it and give its path, or give the address of the repository"
            raise FileNotFoundError(f"{must}: got a file on the hub, {text}; {way}")
        return fetch(place.id, say)
    known = ", ".join(config.names())
    raise FileNotFoundError(f"{must}, a hub id or one of {known}: found no {text or repr(text)}")


def known_config(name: str | os.PathLike[str]) -> CheckpointConfig | None:
    """The configuration of what `locate` would return; None where only a download tells it, and for
    a folder that is no checkpoint's."""
    text = os.fspath(name)
    folder = Path(os.path.expanduser(text))
    if text not in config.names() and folder.exists():
        return read_config(folder) if (folder / "transformer").is_dir() else None
    known = find_name(text)
    return config.named(known) if known else None


def locate_lora(lora: Path | str, say: Callable[[str], None] = report) -> Path:
    """The path of a LoRA itself, or the folder that its hub id, or the file that its address, is
    downloaded into. Raises as `fetch`."""
    if isinstance(lora, Path):
        return lora
    id, file = parse_hub(lora) or HubPlace(lora)
    choose = partial(choose_beside, file)
    kind = LORA._replace(must=f"hold {file}", choose=choose, stated=(file,)) if file else LORA
    return fetch(id, say, kind) / file


class Listing(NamedTuple):
    """A repository on the hub: the files to fetch."""

    about: Any  # huggingface_hub's ModelInfo
    files: list[Any]  # huggingface_hub's RepoFile
    missing: int  # bytes of them that are not in the cache

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def ask(repository: str, revision: str = "", kind: Kind = CHECKPOINT) -> Listing:
    """The files and the card of a repository, from the hub. Raises what its client raises, and
    FileNotFoundError for a repository with nothing of this kind."""
    from huggingface_hub import HfApi, RepoFile, constants

    api = HfApi()
    about = api.model_info(repository, revision=revision or None)
    listed = api.list_repo_tree(repository, recursive=True, revision=about.sha)
    files = {file.path: file for file in listed if isinstance(file, RepoFile)}
    names = kind.choose(files)
    if not names:
        seen = one_line(", ".join(sorted(files)[:3])) or "nothing"
        to = " to cogi2v-convert" if kind is CHECKPOINT else ""
        way = f"download a single file and give its path{to}"
        must = f"{kind.what} {repository} must {kind.must}"
        raise FileNotFoundError(f"{must}: got {seen}; {way}")
    chosen = [files[name] for name in names]
    # The cache has a file under its hash, and nothing of one whose download was cut off.
    blobs = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "blobs")
    hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in chosen}
    missing = [file.size for file in chosen if not (blobs / hashes[file.path]).exists()]
    return Listing(about, chosen, sum(missing))


def fetch(hub_id: str, say: Callable[[str], None], kind: Kind = CHECKPOINT) -> Path:
    """Downloads the files of a repository that are needed into the hub client's cache, and returns
    their folder. Where the hub can't be reached, it is what an earlier run downloaded. Raises
    FileNotFoundError, or OSError where there is no space, in one line."""
    from huggingface_hub import constants, errors, snapshot_download

    repository, _, revision = hub_id.partition("@")
    if constants.HF_HUB_OFFLINE:
        offline = "HF_HUB_OFFLINE is set, and nothing is there"
        return _cached(repository, revision, say, offline, kind)
    try:
        found = ask(repository, revision, kind)
    except errors.RevisionNotFoundError:
        must = f"{kind.what} {repository} must have the revision {revision or 'main'}"
        raise FileNotFoundError(f"{must}: the hub has none") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # a dozen kinds, from missing networks to private repositories
        return _cached(repository, revision, say, _reason(error, repository), kind)
    check_space(
        Path(constants.HF_HUB_CACHE), found.missing, f"{repository} (HF_HOME sets another place)"
    )
    size = show_size(found.missing) if found.missing else "nothing new"
    licence = one_line(_licence(repository, found.about))
    say(f"fetching {hub_id} from the hub, {size} (its licence: {licence})")
    try:
        names = [glob.escape(file.path) for file in found.files]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=names))
    except Exception as error:
        reason = _reason(error, repository)
        raise FileNotFoundError(f"cannot fetch {kind.what} {repository}: {reason}") from None


def _licence(repository: str, info: Any) -> str:
    """The licence in our TOML of a released checkpoint, else in the repository's card."""
    if name := find_name(repository):
        return config.toml(name)["source"]["licence"]
    card = info.card_data or {}
    named = [card.get(key) for key in ("license_name", "license", "license_link")]
    return " ".join(str(part) for part in named if part and part != "other") or "it names none"


def _reason(error: Exception, repository: str) -> str:
    """Why the hub's client failed, and what helps."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):  # before its base class
        terms = f"accept its terms at {constants.ENDPOINT}/{repository}"
        return f"it is gated; {terms}, then set HF_TOKEN or run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        way = "check the name, and set HF_TOKEN if it is private"
        return f"the hub has none of this name that you may read; {way}"
    return first_line(error)


def _cached(
    repository: str, revision: str, say: Callable[[str], None], reason: str, kind: Kind
) -> Path:
    """The folder of what an earlier run downloaded. Raises FileNotFoundError with the `reason` why
    the hub was not asked."""
    from huggingface_hub import try_to_load_from_cache

    for stated in kind.stated:
        found = try_to_load_from_cache(repository, stated, revision=revision or None)
        if isinstance(found, str):
            say(f"taking {repository} from the cache of the hub's client")
            return Path(found.removesuffix(stated))
    raise FileNotFoundError(
        f"{kind.what} {repository} must be on the hub, in its cache or a folder here: {reason}"
    )
