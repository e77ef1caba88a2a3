"""Executables in the user's cache folder, a file each, named by its fingerprint. A file that can't
be used is one line and as good as none; it is never a wrong program, nor the end of this one."""

import hashlib
import os
import pickle
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax import monitoring
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from platformdirs import user_cache_path

CHECKSUM = hashlib.sha256().digest_size  # bytes in front of the rest

_thread = threading.local()


def folder() -> Path | None:
    """Where executables are kept; None where nothing is to be: the user switched jax's compilation
    cache off, or the system can't say whose a file is."""
    kept = jax.config.values["jax_enable_compilation_cache"] and os.name == "posix"
    return user_cache_path("cogi2v-jax") / "executables" if kept else None


def load(
    fingerprint: str, args: Sequence[Any], devices: Sequence[jax.Device]
) -> Callable[..., Any] | None:
    """The executable of this fingerprint, for arguments of this structure. None if there is none; a
    file that is of no use is removed, with a line on stderr."""
    home = folder()
    if home is None:
        return None
    path = home / fingerprint
    try:
        content = _read(path, fingerprint)
        payload, outputs = pickle.loads(content)
        trees = jax.tree.structure((tuple(args), {})), jax.tree.structure(outputs)
        return deserialize_and_load(payload, *trees, devices[0].client, devices)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (
        Exception
    ) as error:  # of unpickling and of every backend; whatever it is, compiling helps
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(
            f"cached executable {path} must be whole, yours alone and of this machine: got {why}; compiling it again",
            file=sys.stderr,
        )
        with suppress(OSError):
            path.unlink()
        return None


def _read(path: Path, fingerprint: str) -> bytes:
    """A file's content, once it is known that the user wrote it, whole and under this name:
    unpickling runs what it is told to."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(
                f"a file that others can write (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
            )
        content = file.read()
    if _checksum(fingerprint, content[CHECKSUM:]) != content[:CHECKSUM]:
        raise ValueError(f"{len(content)} bytes of another checksum")
    return content[CHECKSUM:]


def _checksum(fingerprint: str, content: bytes) -> bytes:
    return hashlib.sha256(fingerprint.encode() + content).digest()


def store(fingerprint: str, executable: jax.stages.Compiled) -> None:
    """Keeps an executable, where that can be done."""
    home = folder()
    if home is None:
        return
    try:
        payload, _, tree = serialize(executable)
        content = pickle.dumps((payload, jax.tree.unflatten(tree, range(tree.num_leaves))))
        home.mkdir(parents=True, exist_ok=True)
        # The user's alone, whatever the umask.
        descriptor, part = tempfile.mkstemp(dir=home, prefix=".part-")
    except Exception:  # of pickling and of every backend: callbacks, constants, outputs that are no plain containers
        return
    with suppress(OSError):
        try:
            with open(descriptor, "wb") as file:
                file.write(_checksum(fingerprint, content) + content)
            os.replace(part, home / fingerprint)
        finally:
            Path(part).unlink(missing_ok=True)


@contextmanager
def compiling() -> Iterator[SimpleNamespace]:
    """Sees whether what this thread compiles meanwhile is `fresh`: XLA's own work, and not found in
    jax's cache or memory. What XLA:CPU has read from a cache it serialises to something that loads,
    and then doesn't run."""
    seen = _thread.seen = SimpleNamespace(compiled=False, found=False, fresh=False)
    try:
        yield seen
    finally:
        del _thread.seen
        seen.fresh = seen.compiled and not seen.found


def _hear(event: str, *_: Any, **__: Any) -> None:
    if seen := getattr(_thread, "seen", None):
        # Heard for what is found, too.
        seen.compiled |= event == "/jax/core/compile/backend_compile_duration"
        seen.found |= event == "/jax/compilation_cache/cache_hits"


monitoring.register_event_listener(_hear)
monitoring.register_event_duration_secs_listener(_hear)
