"""Whether this machine can hold a checkpoint: what a notebook asks before it fetches tens of
gigabytes. `look` finds the facts, `faults` judges them, `check` does both and says so."""

import os
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .. import config
from ..devices import plan
from ..request import Request

EMBEDDED = "cogi2v-tiny"
RELEASED = "cogvideox-5b-i2v"  # what "auto" takes where it can
# Host memory. Measured at full width on a CPU: converting keeps 1.8 GiB, loading 2.1 GiB beside the
# network itself (T5 in float32), and compiling the denoising loop for a TPU 0.7 GiB. The rest is
# the system's and what is on its way; notebook machines begin at 12 GB.
RAM_GIB = 8.0
DISK_GIB = 2.0  # to spare, for compiled programs and videos
MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")


class Unfit(ValueError):
    """A checkpoint that the machine can't hold. A notebook shows its sentences alone, and runs no
    cell after it."""

    def _render_traceback_(self) -> list[str]:  # IPython's own hook
        return [str(self)]


class Machine(NamedTuple):
    """What was found here."""

    kind: str  # of the devices, as jax calls it; "cpu" where there is no accelerator
    chips: int
    hbm_gib: float | None  # usable, of one chip, where the device tells
    libtpu: str | None  # version installed
    ram_gib: float
    disk_gib: float  # free where weights are kept


class Weights(NamedTuple):
    """What a checkpoint still needs of the disk."""

    fetch_gib: float
    convert_gib: float


def check(wanted: str = "auto", say: Callable[[str], None] = print) -> str:
    """The checkpoint to load on this machine. "auto" is CogVideoX-5B-I2V where it fits and the
    embedded model elsewhere, with the reason said. Raises Unfit, with a remedy, for a checkpoint
    that was chosen by name and doesn't fit, and where a TPU's library is too old."""
    machine = look()
    say(describe(machine))
    if stale := library_fault(machine):
        raise Unfit(stale)
    if wanted == EMBEDDED or wanted not in (*config.names(), "auto"):
        say(
            f"{wanted}: {'fits everywhere' if wanted == EMBEDDED else 'not a checkpoint known by name, so its needs are not judged'}"
        )
        return wanted
    if wanted == "auto" and machine.kind == "cpu":
        say(
            f"there is no accelerator, so this takes {EMBEDDED}, a small model that knows only flat shapes"
        )
        return EMBEDDED
    model = RELEASED if wanted == "auto" else wanted
    found = faults(
        model, machine, Weights(0.0, 0.0) if machine.kind == "cpu" else weights(model, say)
    )
    if found and wanted == "auto":
        say("\n".join(found))
        say(f"so this takes {EMBEDDED}, a small model that knows only flat shapes")
        return EMBEDDED
    if found:
        raise Unfit("\n".join(found))
    say(f"{model}: {expectation(model, machine)}")
    return model


def faults(model: str, machine: Machine, weights: Weights) -> list[str]:
    """Every reason why a machine can't run a named checkpoint at its defaults, each with its
    remedy; none if it can."""
    if machine.kind == "cpu":
        return [
            f"{model} must run on an accelerator: got a CPU, which would take days; switch the machine to a TPU, or take {EMBEDDED}"
        ]
    found = [fault] if (fault := library_fault(machine)) else []
    if machine.ram_gib < RAM_GIB:
        found.append(
            f"memory must be {RAM_GIB:g} GiB for {model}: got {machine.ram_gib:.1f}; choose a machine with more of it"
        )
    disk = sum(weights) + DISK_GIB
    if machine.disk_gib < disk:
        found.append(
            f"disk must have {disk:.0f} GiB free for {model} ({weights.fetch_gib:.0f} to fetch, {weights.convert_gib:.0f} to convert): "
            f"got {machine.disk_gib:.0f}; delete something, or set HF_HOME and XDG_CACHE_HOME to folders on a larger disk"
        )
    if machine.hbm_gib and machine.chips * machine.hbm_gib < (least := transformer_gib(model)):
        found.append(
            f"{model} must fit the device's memory: got {machine.chips} x {machine.hbm_gib:.1f} GiB, less than the {least:.1f} of its "
            f"transformer alone; choose {_alternatives(model)}, or take {EMBEDDED}"
        )
    elif too_large := [
        phase
        for mesh in _meshes(machine)
        for phase in _phases(model, mesh)
        if phase.row and not phase.row["fits"]
    ]:
        names = ", ".join(dict.fromkeys(phase.name for phase in too_large))
        found.append(
            f"{model} must fit the device's memory: got {names}, too large for {machine.chips} x {machine.kind}; "
            f"choose {_alternatives(model)}, or take {EMBEDDED}"
        )
    return found


def library_fault(machine: Machine) -> str | None:
    """A TPU's library that is older than the one the installed jax was released with, which Pallas
    kernels need."""
    needed, pin = required_libtpu()
    if not machine.kind.startswith("TPU") or numbers(machine.libtpu) >= numbers(needed):
        return None
    remedy = f'run: pip install "libtpu=={pin}", then this cell again'
    return (
        f"libtpu must be {needed} or newer for this jax: got {machine.libtpu or 'none'}; {remedy}"
    )


def look() -> Machine:
    """The facts. jax starts here, unless a TPU's library is too old to be loaded: installing the
    right one then needs no restart."""
    libtpu = installed("libtpu")
    host = libtpu, ram_gib(), shutil.disk_usage(_existing(_cache())).free / 2**30
    asleep = Machine("TPU", 0, None, *host)
    if has_tpu() and library_fault(asleep):
        return asleep
    import jax

    devices = jax.local_devices()
    limit = (
        (devices[0].memory_stats() or {}).get("bytes_limit")
        if devices[0].platform != "cpu"
        else None
    )
    kind = devices[0].device_kind if devices[0].platform != "cpu" else "cpu"
    return Machine(kind, len(devices), limit and limit / 2**30, *host)


def describe(machine: Machine) -> str:
    device = (
        "no accelerator"
        if machine.kind == "cpu"
        else f"{machine.chips or ''} x {machine.kind}".removeprefix(" x ")
    )
    device += f" of {machine.hbm_gib:.1f} GiB" if machine.hbm_gib else ""
    device += f", libtpu {machine.libtpu or 'missing'}" if machine.kind.startswith("TPU") else ""
    return f"this machine: {device}, {machine.ram_gib:.1f} GiB of memory, {machine.disk_gib:.0f} GiB of disk free"


def expectation(model: str, machine: Machine) -> str:
    """What the compiler's table says of a machine that has no faults."""
    for mesh in _meshes(machine):
        rows = [phase.row for phase in _phases(model, mesh)]
        if all(rows):
            return f"fits, by ahead-of-time compiles for {mesh}; nobody has run it there yet"
    return "was not compiled for this machine, so whether it fits is not known"


def weights(model: str, say: Callable[[str], None] = print) -> Weights:
    """What the hub says is still to be fetched, and as much again to be converted unless that was
    done here before."""
    from ..weights.hub import ask

    try:
        found = ask(config.toml(model)["source"]["hub"])
    except Exception as error:  # the hub's client raises a dozen kinds; `load` will say what is wrong, if it still is
        say(
            f"the hub doesn't say how large {model} is ({type(error).__name__}), so the disk is not judged"
        )
        return Weights(0.0, 0.0)
    return Weights(found.missing / 2**30, 0.0 if is_converted(model) else found.size / 2**30)


def transformer_gib(model: str) -> float:
    """A checkpoint's largest network in bfloat16: below that no machine can hold it, however it is
    split."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ..weights.pieces import abstract

    network = abstract(config.named(model), "transformer", jnp.dtype(jnp.bfloat16))
    return (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(network))) / 2**30
    )


def is_converted(model: str) -> bool:
    """Whether a conversion of a checkpoint of this architecture stands in the cache."""
    from ..weights.checkpoint import MANIFEST, read_config

    found = (manifest.parent for manifest in _cache().glob(f"[!.]*/{MANIFEST}"))
    return any(read_config(folder).name == model for folder in found)


def required_libtpu() -> tuple[str, str]:
    """The libtpu that the installed jax was released with, as a number and as pip takes it."""
    wanted = [
        re.match(r"libtpu\s*[=~>]=\s*([\d.]+\*?)", line) for line in metadata.requires("jax") or []
    ]
    pin = next((found[1] for found in wanted if found), "0")
    return pin.removesuffix(".*"), pin


def numbers(version: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version or "")[:3]]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_tpu() -> bool:
    """By the device files of a TPU VM, without waking the TPU."""
    return any(
        found for pattern in ("accel[0-9]*", "vfio/[0-9]*") for found in Path("/dev").glob(pattern)
    )


def ram_gib() -> float:
    """Of the container, where it has less than its host."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = MEMORY_MAX.read_text().strip() if MEMORY_MAX.is_file() else "max"
    return (min(host, int(own)) if own.isdecimal() else host) / 2**30


def _cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("cogi2v-jax") / "converted"


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _meshes(machine: Machine) -> list[str]:
    """Named meshes of just this machine's devices."""
    return [
        m
        for m in config.meshes()["meshes"]
        if (plan.generation(m)["kind"], plan.chips(m)) == (machine.kind, machine.chips)
    ]


def _phases(model: str, mesh: str) -> list[plan.Phase]:
    return plan.phases(model, mesh, Request(image="", prompt="").resolve(config.named(model)))


def _alternatives(model: str) -> str:
    """Machines on which every phase is known to fit."""
    fits = [
        mesh
        for mesh in config.meshes()["meshes"]
        if all(phase.row and phase.row["fits"] for phase in _phases(model, mesh))
    ]
    return " or ".join(fits) or "a larger machine"
