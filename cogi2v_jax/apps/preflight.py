"""Whether this machine can hold a checkpoint, for notebooks to ask before they fetch tens of
gigabytes. `look` finds the facts, `faults` judges them, `check` does both and prints the result."""

import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

from .. import config
from ..devices import plan
from ..devices.hosts import has_tpu, host_memory
from ..disk import cache_folder, free_space
from ..request import Request

EMBEDDED = "cogi2v-tiny"
RELEASED = "cogvideox-5b-i2v"  # what "auto" chooses where it fits
SMALL = f"so this takes {EMBEDDED}, a small model that knows only flat shapes"
# Host memory. Measured at full width on a CPU: converting takes 1.8 GiB, loading 2.1 GiB beside the
# network itself (T5 in float32), compiling the denoising loop for a TPU 0.7 GiB. The rest is for
# the system and for data in transfer; notebook machines start at 12 GB.
RAM_GIB = 8.0
DISK_GIB = 2.0  # for compiled programs and videos


class Unfit(ValueError):
    """A checkpoint that the machine cannot hold. A notebook shows the message without a traceback,
    and runs no further cell."""

    def _render_traceback_(self) -> list[str]:  # IPython's own hook
        return [str(self)]


class Machine(NamedTuple):
    """What was found here."""

    kind: str  # of the devices, as jax calls it; "cpu" where there is no accelerator
    chips: int
    hbm_gib: float | None  # usable, of one chip, if the device reports it
    libtpu: str | None  # version installed
    ram_gib: float
    disk_gib: float  # free where weights are kept


class Weights(NamedTuple):
    """What a checkpoint still needs on the disk."""

    fetch_gib: float
    convert_gib: float


def check_imports(remedy: str) -> None:
    """Raises Unfit, which ends with the remedy, if this process imported a library before pip
    replaced it. Its compiled parts cannot be loaded again."""
    for name in ("numpy", "ml_dtypes", "jaxlib", "jax"):
        loaded, now = getattr(sys.modules.get(name), "__version__", None), installed(name)
        if loaded not in (None, now):
            got = f"{loaded}, which was imported before pip replaced it; {remedy}"
            raise Unfit(f"{name} must be {now} in this session: got {got}")


def check(wanted: str = "auto", say: Callable[[str], None] = print) -> str:
    """The checkpoint to load on this machine. "auto" is CogVideoX-5B-I2V where it fits, and
    otherwise the embedded model, with the reason printed. Raises Unfit, with a remedy, for a
    checkpoint chosen by name that does not fit, and where a TPU's library is too old."""
    machine = look()
    say(describe(machine))
    if stale := library_fault(machine):
        raise Unfit(stale)
    if wanted == EMBEDDED:
        say(f"{wanted}: fits everywhere")
        return wanted
    if wanted not in (*config.names(), "auto"):
        say(f"{wanted}: not a checkpoint known by name, so its needs are not judged")
        return wanted
    if wanted == "auto" and machine.kind == "cpu":
        say(f"there is no accelerator, {SMALL}")
        return EMBEDDED
    model = RELEASED if wanted == "auto" else wanted
    needs = Weights(0.0, 0.0) if machine.kind == "cpu" else weights(model, say)
    found = faults(model, machine, needs)
    if found and wanted != "auto":
        raise Unfit("\n".join(found))
    if found:
        say("\n".join(found))
        say(SMALL)
        return EMBEDDED
    say(f"{model}: {expectation(model, machine)}")
    return model


def say_training(model: str, say: Callable[[str], None] = print) -> None:
    """Says what a step of training takes on this machine, by ahead-of-time compiles; nothing on a
    machine that they do not know."""
    for mesh in _meshes(look())[:1]:
        if model in config.names() and plan.generation(mesh)["kind"] != "cpu":
            say("\n".join(plan.training_lines(model, mesh)))


def faults(model: str, machine: Machine, weights: Weights) -> list[str]:
    """Every reason why a machine cannot run a named checkpoint at its defaults, each with a
    remedy."""
    if machine.kind == "cpu":
        got = f"a CPU, which would take days; switch the machine to a TPU, or take {EMBEDDED}"
        return [f"{model} must run on an accelerator: got {got}"]
    found = [fault] if (fault := library_fault(machine)) else []
    if machine.ram_gib < RAM_GIB:
        got = f"{machine.ram_gib:.1f}; choose a machine with more of it"
        found.append(f"memory must be {RAM_GIB:g} GiB for {model}: got {got}")
    disk = sum(weights) + DISK_GIB
    if machine.disk_gib < disk:
        need = f"{weights.fetch_gib:.0f} to fetch, {weights.convert_gib:.0f} to convert"
        remedy = "delete something, or set HF_HOME and XDG_CACHE_HOME to folders on a larger disk"
        got = f"{machine.disk_gib:.0f}; {remedy}"
        found.append(f"disk must have {disk:.0f} GiB free for {model} ({need}): got {got}")
    too_large = ""
    if machine.hbm_gib and machine.chips * machine.hbm_gib < (least := transformer_gib(model)):
        memory = f"{machine.chips} x {machine.hbm_gib:.1f} GiB"
        too_large = f"{memory}, less than the {least:.1f} of its transformer alone"
    elif names := [stage.name for stage in _known(model, machine) if not stage.row["fits"]]:  # pyright: ignore[reportOptionalSubscript]
        stages = ", ".join(dict.fromkeys(names))
        too_large = f"{stages}, too large for {machine.chips} x {machine.kind}"
    if too_large:
        remedy = f"choose {_alternatives(model)}, or take {EMBEDDED}"
        found.append(f"{model} must fit the device's memory: got {too_large}; {remedy}")
    return found


def library_fault(machine: Machine) -> str | None:
    """The fault of a TPU library older than the one that the installed jax was released with, which
    Pallas kernels need."""
    needed, pin = required_libtpu()
    if not machine.kind.startswith("TPU") or numbers(machine.libtpu) >= numbers(needed):
        return None
    got = f'{machine.libtpu or "none"}; run: pip install "libtpu=={pin}", then this cell again'
    return f"libtpu must be {needed} or newer for this jax: got {got}"


def look() -> Machine:
    """The facts. Starts jax, unless a TPU's library is too old: then the right one can be installed
    without a restart."""
    libtpu = installed("libtpu")
    free, _ = free_space(cache_folder("converted"))
    host = libtpu, host_memory() / 2**30, free / 2**30
    unstarted = Machine("TPU", 0, None, *host)
    if has_tpu() and library_fault(unstarted):
        return unstarted
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return Machine("cpu", len(devices), None, *host)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return Machine(devices[0].device_kind, len(devices), limit and limit / 2**30, *host)


def describe(machine: Machine) -> str:
    device = "no accelerator"
    if machine.kind != "cpu":
        device = f"{machine.chips} x {machine.kind}" if machine.chips else machine.kind
    device += f" of {machine.hbm_gib:.1f} GiB" if machine.hbm_gib else ""
    device += f", libtpu {machine.libtpu or 'missing'}" if machine.kind.startswith("TPU") else ""
    host = f"{machine.ram_gib:.1f} GiB of memory, {machine.disk_gib:.0f} GiB of disk free"
    return f"this machine: {device}, {host}"


def expectation(model: str, machine: Machine) -> str:
    """What the compiler's table says of a machine without faults."""
    for mesh in _meshes(machine):
        if all(stage.row for stage in _stages(model, mesh)):
            return f"fits, by ahead-of-time compiles for {mesh}; nobody has run it there yet"
    return "was not compiled for this machine, so whether it fits is not known"


def weights(model: str, say: Callable[[str], None] = print) -> Weights:
    """What is still to be fetched, by the hub's account, and as much again for the conversion
    unless that is in the cache."""
    from ..weights.hub import ask

    try:
        found = ask(config.toml(model)["source"]["hub"])
    # The hub's client raises a dozen kinds; `load` reports what is wrong, if it still is then.
    except Exception as error:
        unknown = f"the hub does not say how large {model} is ({type(error).__name__})"
        say(f"{unknown}, so the disk is not judged")
        return Weights(0.0, 0.0)
    return Weights(found.missing / 2**30, 0.0 if is_converted(model) else found.size / 2**30)


def transformer_gib(model: str) -> float:
    """The largest network of a checkpoint in bfloat16: with less memory no machine can hold it,
    however it is split."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ..weights.pieces import abstract

    network = abstract(config.named(model), "transformer", jnp.dtype(jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(network))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**30


def is_converted(model: str) -> bool:
    """Whether the cache holds a conversion of a checkpoint of this architecture."""
    from ..weights.checkpoint import MANIFEST, read_config

    found = (manifest.parent for manifest in cache_folder("converted").glob(f"[!.]*/{MANIFEST}"))
    return any(read_config(folder).name == model for folder in found)


def required_libtpu() -> tuple[str, str]:
    """The libtpu that the installed jax was released with, as a number and as pip takes it."""
    pattern = r"libtpu\s*[=~>]=\s*([\d.]+\*?)"
    found = (re.match(pattern, line) for line in metadata.requires("jax") or [])
    pin = next((match[1] for match in found if match), "0")
    return pin.removesuffix(".*"), pin


def numbers(version: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version or "")[:3]]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _meshes(machine: Machine) -> list[str]:
    """Named meshes of exactly this machine's devices."""

    def devices(mesh: str) -> tuple[str, int]:
        return plan.generation(mesh)["kind"], plan.count_devices(mesh)

    here = machine.kind, machine.chips
    return [mesh for mesh in config.meshes()["meshes"] if devices(mesh) == here]


def _stages(model: str, mesh: str) -> list[plan.Stage]:
    return plan.stages(model, mesh, Request(image="", prompt="").resolve(config.named(model)))


def _known(model: str, machine: Machine) -> list[plan.Stage]:
    """The stages that were compiled for this machine."""
    found = (stage for mesh in _meshes(machine) for stage in _stages(model, mesh))
    return [stage for stage in found if stage.row]


def _alternatives(model: str) -> str:
    """Machines on which every stage is known to fit."""

    def fits(mesh: str) -> bool:
        return all(stage.row and stage.row["fits"] for stage in _stages(model, mesh))

    return " or ".join(filter(fits, config.meshes()["meshes"])) or "a larger machine"
