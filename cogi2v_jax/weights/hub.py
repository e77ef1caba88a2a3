"""Finds the weights that a name stands for, and brings those of the hub or of a bucket to this
machine: only what is needed, where there is room for it, and with their licence named."""

import glob
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import config
from ..disk import check_space, first_line
from . import bucket
from .checkpoint import MANIFEST
from .needed_files import wanted

EMBEDDED = Path(__file__).parent.parent / "assets"
STATED = ("transformer/config.json", "config.json")  # one of them is in whatever was fetched


def report(line: str) -> None:
    print(line, file=sys.stderr)


def locate(
    name: str | os.PathLike[str],
    say: Callable[[str], None] = report,
    must: str = "model must be a folder",
) -> Path:
    """The folder or file that a name, a hub id (a revision may follow, behind an @) or a path
    stands for. `must` begins errors. Raises FileNotFoundError, ValueError or OSError, in one
    line."""
    text = os.fspath(name)
    if text in config.names():
        source = config.toml(text)["source"]
        return EMBEDDED / source["embedded"] if "embedded" in source else fetch(source["hub"], say)
    if bucket.is_bucket(text):
        return bucket.download(text, MANIFEST, say)
    path = Path(os.path.expanduser(text))  # pathlib's own raises for a user there isn't
    if path.exists():
        return path
    repository = text.partition("@")[0]
    if (
        isinstance(name, str)
        and repository.count("/") == 1
        and not text.startswith((".", "~", "/"))
        and not repository.endswith("/")
    ):
        return fetch(text, say)
    raise FileNotFoundError(
        f"{must}, a hub id or one of {', '.join(config.names())}: found no {text}"
    )


class Listing(NamedTuple):
    """A repository on the hub: of its files those that a conversion needs; all of a converted
    folder's."""

    about: Any  # the hub's ModelInfo
    files: list[Any]  # the hub's RepoFile
    missing: int  # bytes of them that are not in the cache

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def ask(repository: str, revision: str = "") -> Listing:
    """What the hub says of a repository. Raises what its client raises, FileNotFoundError for one
    of something else."""
    from huggingface_hub import HfApi, RepoFile, constants

    api = HfApi()
    about = api.model_info(repository, revision=revision or None)
    listed = api.list_repo_tree(repository, recursive=True, revision=about.sha)
    files = {file.path: file for file in listed if isinstance(file, RepoFile)}
    names = sorted(files) if MANIFEST in files else wanted(files)
    if not names:
        seen = ", ".join(sorted(files)[:3]) or "nothing"
        raise FileNotFoundError(
            f"model {repository} must be a diffusers folder: got {seen}; download a single file and give its path to cogi2v-convert"
        )
    chosen = [files[name] for name in names]
    return Listing(
        about,
        chosen,
        _missing(
            chosen,
            Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "blobs"),
        ),
    )


def fetch(hub_id: str, say: Callable[[str], None]) -> Path:
    """The files of a repository that a conversion needs, in the hub's own cache, where its client
    finds those that came before. Where the hub can't be asked, what is there. Raises
    FileNotFoundError, or OSError where there is no room, in one line."""
    from huggingface_hub import constants, errors, snapshot_download

    repository, _, revision = hub_id.partition("@")
    if constants.HF_HUB_OFFLINE:
        return _cached(repository, revision, say, "HF_HUB_OFFLINE is set, and nothing is there")
    try:
        found = ask(repository, revision)
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"model {repository} must have the revision {revision or 'main'}: the hub has none"
        ) from None
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # the client raises a dozen kinds, from missing networks to private repositories
        return _cached(repository, revision, say, _way_out(error, repository))
    check_space(
        Path(constants.HF_HUB_CACHE), found.missing, f"{repository} (HF_HOME names another place)"
    )
    size = f"{found.missing / 1e9:.1f} GB" if found.missing else "nothing new"
    say(
        f"fetching {hub_id} from the hub, {size} (its licence: {_licence(repository, found.about)})"
    )
    try:
        names = [glob.escape(file.path) for file in found.files]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=names))
    except Exception as error:
        raise FileNotFoundError(
            f"model {repository} must be fetched from the hub whole: {_way_out(error, repository)}"
        ) from None


def _missing(files: list[Any], blobs: Path) -> int:
    """Bytes of a repository's files that the cache does not hold under their hashes. Of a file that
    was begun the client keeps nothing."""
    return sum(
        file.size
        for file in files
        if not (blobs / (file.lfs.sha256 if file.lfs else file.blob_id)).exists()
    )


def _licence(repository: str, info: Any) -> str:
    """What our TOML says of a released checkpoint, else the repository's own card."""
    sources = [config.toml(name)["source"] for name in config.names()]
    for source in sources:
        if source.get("hub", "").lower() == repository.lower().replace("thudm/", "zai-org/"):
            return source["licence"]
    card = info.card_data or {}
    named = [card.get(key) for key in ("license_name", "license", "license_link")]
    return " ".join(str(word) for word in named if word and word != "other") or "it names none"


def _way_out(error: Exception, repository: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):  # before its base class
        return f"it is gated; accept its terms at {constants.ENDPOINT}/{repository}, then set HF_TOKEN or run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it has none of this name that is open to you; check the name, and set HF_TOKEN if it is private"
    return first_line(error)


def _cached(repository: str, revision: str, say: Callable[[str], None], reason: str) -> Path:
    """What an earlier run fetched."""
    from huggingface_hub import try_to_load_from_cache

    for stated in STATED:
        found = try_to_load_from_cache(repository, stated, revision=revision or None)
        if isinstance(found, str):
            say(f"taking {repository} from the cache of the hub's client")
            return Path(found.removesuffix(stated))
    raise FileNotFoundError(
        f"model {repository} must be reachable on the hub or in its cache: {reason}; no folder here has this name"
    )
