"""What decides an executable, in words that every process finds the same, and their hash. Where
something has no such words there is no fingerprint, and nothing may be kept under one."""

import dataclasses
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

PACKAGE = Path(__file__).parent.parent
# Code that a name stands for: our own, whose sources are hashed, and libraries whose versions are.
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "einops", "tokamax")
NAMED = {PACKAGE.name, "builtins", "functools", *LIBRARIES}
COMPILERS = (
    "libtpu",
    *(
        f"{name}-cu{cuda}"
        for name in ("nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-nvcc")
        for cuda in (12, 13)
    ),
)
# Settings of jax that say where to keep things and what to tell, and nothing of what is computed.
INERT = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_dump")


class UnnamedError(Exception):
    """Something that another process could not be told in words."""


def _hash_sources(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(
            f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return total.hexdigest()


# On import, and not when it is asked for: a file that was edited meanwhile is not what runs.
SOURCES = _hash_sources(PACKAGE)


def fingerprint(
    function: Callable[..., Any],
    args: Sequence[Any],
    static: Mapping[str, Any],
    options: Mapping[str, str],
) -> str | None:
    """A hash over the function, the arguments' structure, shapes and places (values are not looked
    at, so that shapes do as well as arrays), static values, compiler options, devices, and all
    software there is between them; None where one of them has no name. What the function reads
    besides its arguments is known by its source alone: a module's constant may not be set anew."""
    try:
        words = [
            name(function),
            describe(dict(static)),
            describe(dict(options)),
            *_arguments(args),
            *_machine(devices(args)),
            *_software(),
        ]
    except UnnamedError:
        return None
    text = "\n".join(words)
    # An address, in somebody's repr.
    return None if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()


def name(code: Any) -> str:
    """A function's or class's module and name, if they lead to it again. Raises UnnamedError for
    lambdas, closures, and code that is neither ours nor a known library's: nobody has hashed its
    sources."""
    if code is type(None):
        return "None"
    home, path = getattr(code, "__module__", None) or "", getattr(code, "__qualname__", "")
    found: Any = sys.modules.get(home)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is not code or home.partition(".")[0] not in NAMED:
        raise UnnamedError(f"{home}.{path}")
    return f"{home}.{path}"


def describe(value: Any) -> str:
    """A static value in words that are equal only where it computes the same. Raises UnnamedError
    where there are none."""
    if isinstance(value, functools.partial):
        return f"partial{describe((value.func, value.args, value.keywords))}"
    if hasattr(value, "__qualname__"):
        return name(value)
    if isinstance(value, Mesh):
        return f"Mesh({_axes(value)}, {[*map(_device, value.devices.flat)]})"
    if isinstance(value, NamedSharding):
        return f"NamedSharding{describe((value.mesh, value.spec, value.memory_kind))}"
    if isinstance(value, (PartitionSpec, np.dtype)):
        return repr(value)
    kind = name(type(value))
    if isinstance(value, Enum):
        return f"{kind}.{value.name}"
    if isinstance(value, (tuple, list)):  # named tuples too
        return f"{kind}({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"{kind}({', '.join(sorted(f'{describe(one)}: {describe(other)}' for one, other in value.items()))})"
    if dataclasses.is_dataclass(value):
        return f"{kind}({', '.join(f'{field.name}={describe(getattr(value, field.name))}' for field in dataclasses.fields(value))})"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return f"{kind}({value!r})"
    raise UnnamedError(repr(value))


def placement(leaf: Any) -> Any:
    """Where a committed array, or a shape with a sharding, lies: equal for shardings that differ in
    words alone, such as trailing Nones and mesh axes of one device. None for what goes wherever the
    program runs."""
    sharding: Sharding | None = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return None
    if len(sharding.device_set) == 1:
        return (*sharding.device_set, sharding.memory_kind)
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = sharding.mesh.shape
    spec = [(part,) if isinstance(part, str) else tuple(part or ()) for part in sharding.spec]
    spec = [tuple(axis for axis in part if sizes[axis] > 1) for part in spec]
    while spec and not spec[-1]:
        spec.pop()
    return sharding.mesh, *spec, sharding.memory_kind


def devices(args: Sequence[Any]) -> list[jax.Device]:
    """The devices that a program with these arguments runs on, in the order of their mesh."""
    for leaf in jax.tree.leaves(args):
        if placement(leaf) is not None:
            mesh = getattr(leaf.sharding, "mesh", None)
            return list(leaf.sharding.device_set) if mesh is None else list(mesh.devices.flat)
    default = jax.config.values["jax_default_device"]
    return [default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]]


def _arguments(args: Sequence[Any]) -> Iterator[str]:
    leaves, tree = jax.tree.flatten(args)
    yield str(tree)  # with the static fields of modules, but only the bare names of their classes
    pending = [tree]
    while pending:
        node = pending.pop()
        if (data := node.node_data()) is not None:
            yield name(data[0])
        pending += node.children()
    for leaf in leaves:
        where = placement(leaf)
        if isinstance(where, Sharding):
            raise UnnamedError(repr(where))
        parts = [
            _axes(part)
            if isinstance(part, Mesh)
            else _device(part)
            if isinstance(part, jax.Device)
            else part
            for part in where or ()
        ]
        yield f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'weak_type', False)} {parts}"


def _axes(mesh: Mesh) -> str:
    return f"{dict(mesh.shape)} {mesh.axis_types}"


def _device(device: jax.Device) -> str:
    return (
        f"{device.device_kind} {device.id} {getattr(device, 'coords', None)} {device.process_index}"
    )


def _machine(used: Sequence[jax.Device]) -> Iterator[str]:
    first = used[0]
    try:
        attached = jax.devices(first.platform)
    except RuntimeError:
        attached = []
    if not set(attached).issuperset(used):
        raise UnnamedError(f"{first} of a compile-only topology, on which nothing runs")
    if first.platform == "gpu" and jax.process_count() > 1:
        raise UnnamedError(
            "GPUs of several processes, which tune kernels together: one that only loaded would leave the others waiting"
        )
    # Each has its own file.
    yield f"{first.platform} {first.client.platform_version} {jax.process_index()} of {jax.process_count()}"
    yield from map(_device, used)
    if first.platform == "cpu":
        yield _processor()


@functools.cache
def _processor() -> str:
    """XLA compiles for the very processor it runs on, and several may share a home folder."""
    kind = f"{platform.machine()} {platform.processor()} {os.cpu_count()}"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = "\n".join(
            [
                kind,
                *sorted(
                    {line for line in lines if line.startswith(("model name", "flags", "Features"))}
                ),
            ]
        )
    return kind


def _software() -> Iterator[str]:
    yield f"{SOURCES} {sys.version}"
    for package in (*LIBRARIES, *COMPILERS):
        with suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        yield f"{variable}={os.environ.get(variable)}"
    for setting, value in sorted(jax.config.values.items()):
        if not setting.startswith(INERT):
            yield f"{setting}={value!r}"
