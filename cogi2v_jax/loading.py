"""Loads a checkpoint by a path, a name or a hub id. One that is not converted yet is converted into
the cache first."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .arguments import parse_loras
from .config import CheckpointConfig
from .devices import hosts
from .devices.compiling import keep_compilations
from .devices.mesh import sizes_of
from .disk import SHA256, cache_folder, process_folder, replace_when_done, sha256
from .models.attention import choose
from .terminal import Say
from .weights.checkpoint import (
    FORMAT,
    MANIFEST,
    Models,
    check_models,
    open_folder,
    read_config,
)
from .weights.hub import locate
from .weights.lora import Lora

DTYPES = ("bfloat16", "float32")
LARGE = 2**26  # bytes from which a file's hash is remembered
COARSEST_CLOCK = 2 * 10**9  # nanoseconds, of the file systems in common use


def _say(line: str) -> None:
    if hosts.leads():
        print(line, file=sys.stderr)


def load(
    path_or_name: str | os.PathLike[str] = "cogi2v-tiny",
    dtype: Any = None,
    attention: str = "auto",
    mesh: str = "auto",
    vae_tiling: bool = False,
    loras: Iterable[Any] = (),
    say: Say = _say,
) -> Models:
    """A checkpoint, ready to sample: a converted or a diffusers folder, local or at gs://, a hub
    id, or one of `config.names()`. Weights are read when a stage first needs them. `dtype` is the
    compute dtype (default: bfloat16, on CPUs float32), `mesh` how devices share the work, and with
    `vae_tiling` the VAE computes the reference's blended tiles. `loras` are added to the weights,
    as in `adapt`. Raises ValueError, FileNotFoundError or OSError in one line."""
    if not isinstance(path_or_name, str | os.PathLike) or not os.fspath(path_or_name):
        raise ValueError(f"model must be a path, a name or a hub id: got {path_or_name!r}")
    if not isinstance(mesh, str):
        raise ValueError(f"mesh must be the name of a machine, or sizes in a text: got {mesh!r}")
    if not isinstance(vae_tiling, bool):
        raise ValueError(f"vae_tiling must be true or false: got {vae_tiling!r}")
    hosts.start_devices()
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with contextlib.suppress(TypeError):  # a name that numpy doesn't know is refused below
        dtype = jnp.dtype(dtype).name
    if dtype not in DTYPES:
        fault = "; float16 overflows in this network" if dtype == "float16" else ""
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}: got {dtype!r}{fault}")
    choose(attention, jnp.dtype(dtype))
    if mesh != "auto":
        sizes_of(mesh)  # before a model is fetched, which may take an hour
    keep_compilations()
    files = _open_loras(loras, say)  # before a model is fetched, which may take an hour
    folder = locate(path_or_name, say)
    found = _match_loras(files, read_config(folder), say) if files else []
    settings = {"attention": attention, "mesh": mesh, "vae_tiling": vae_tiling, "loras": found}
    return open_folder(_convert(folder, say), jnp.dtype(dtype), **settings)


def adapt(models: Models, loras: Iterable[Any] = (), say: Say = _say) -> None:
    """Replaces the LoRAs of `models`: files, folders or hub ids, as "FILE", "FILE:WEIGHT" or
    (FILE, WEIGHT), which are summed. Weights with other LoRAs in them are read again when they are
    needed; only beside int8 weights other ranks may be another program. Calls `say` with a line for
    each file and for each tensor that fits no weight. Raises ValueError or OSError in one line, and
    then changes nothing."""
    check_models(models)
    models.loras = _match_loras(_open_loras(loras, say), models.config, say)


def _open_loras(loras: Iterable[Any], say: Say) -> list[tuple[Any, float]]:
    # The type checker can't follow the package's name to its folder, convert/.
    from cogi2v_convert.sources.lora_file import open_lora  # pyright: ignore[reportMissingImports]

    return [(open_lora(lora, say), weight) for lora, weight in parse_loras(loras)]


def _match_loras(files: list[tuple[Any, float]], of: CheckpointConfig, say: Say) -> list[Lora]:
    from cogi2v_convert.lora_match import match  # pyright: ignore[reportMissingImports]

    found = [match(file, of, weight) for file, weight in files]
    loras = [matched.checked() for matched in found]
    for matched in found:
        say("\n".join([matched.line(), *matched.unmatched()]))
    return loras


def _convert(folder: Path, say: Say) -> Path:
    """A converted folder itself, else its conversion in the cache, which is made if it isn't there
    or is damaged."""
    if folder.is_file():
        way = f"cogi2v-convert to-flax FOLDER {folder.name} DST replaces a part of a folder by it"
        raise ValueError(
            f"model must be a folder, a hub id or a name: got the file {folder}; {way}"
        )
    if (folder / MANIFEST).is_file():
        return folder
    from cogi2v_convert.conversion import to_flax  # pyright: ignore[reportMissingImports]
    from cogi2v_convert.sources.gather import Source  # pyright: ignore[reportMissingImports]

    source = Source(folder)
    cache = _cache(say)
    digests = {file: _hash(file, cache) for file in sorted(source.files)}
    lines = "".join(
        f"{file.parent.name}/{file.name} {digest}\n" for file, digest in digests.items()
    )
    destination = cache / f"{hashlib.sha256(lines.encode()).hexdigest()[:32]}-{FORMAT}"
    if destination.is_dir():
        try:
            open_folder(destination, jnp.dtype(jnp.float32))
        except (ValueError, OSError):  # damaged: a conversion appears only when it is complete
            shutil.rmtree(destination)
    if not destination.is_dir():
        say(f"converting {folder} into {destination}, once")
        try:
            to_flax(folder, destination, wait=True, known=digests)
        except FileExistsError:
            if not destination.is_dir():
                raise  # else another process was faster, and its folder is complete
    return destination


def _cache(say: Say) -> Path:
    """The user's cache of conversions or, where that can't be written, one for this process."""
    cache = cache_folder("converted")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        say(f"cannot write {cache}: not keeping the conversion; XDG_CACHE_HOME sets another place")
        cache = process_folder()
    return cache


def _hash(file: Path, cache: Path) -> str:
    """A file's SHA-256. That of a large file is cached by the file's size and times. Its change
    time can't be set by a program; but while that is younger than the clock's resolution, another
    change could have the same time, and the hash is not cached."""
    stat = file.stat()
    identity = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cached = cache / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    text = cached.read_text(errors="replace") if stat.st_size >= LARGE and cached.is_file() else ""
    if SHA256.fullmatch(text):  # a power cut may have left something else
        return text
    digest = sha256(file)
    if stat.st_size >= LARGE and time.time_ns() - stat.st_ctime_ns > COARSEST_CLOCK:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_done(cached) as part:
            part.write_text(digest)
    return digest
