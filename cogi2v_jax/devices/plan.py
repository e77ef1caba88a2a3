"""`sample --plan MESH [--train]`: what a request, or a step of training, takes on a machine, which
need not be at hand. All figures come from `configs/plans.toml`, which `benchmarks/tpu_compile.py`
writes from the TPU compiler's reports. Nothing is loaded, and what was not compiled is not guessed.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from .. import config
from ..disk import read_toml
from ..names import find_name, machine_name
from ..request import Request, Resolved

Row = dict[str, Any]  # of plans.toml: the programs of one stage, compiled

# In the order of running, each with what its programs depend on beside checkpoint, mesh and dtype.
# (The number of steps repeats one program.)
STAGES = {
    "text": ("guided",),
    "image": ("height", "width"),
    "denoise": ("guided", "attention", "height", "width", "num_frames"),
    "decode": ("height", "width", "num_frames"),
}
TRAIN = "train"  # the stage of a row for a step of training
AXES = ("data", "pair", "context")  # of a mesh; `devices/sharding.py` has them too, but starts jax
SIZE = ("height", "width", "num_frames")
STATIC = (
    "seconds are static: the cycles that the TPU compiler scheduled; no time of ours was measured "
    "on a TPU"
)


class Stage(NamedTuple):
    """A stage of a request: the row that was compiled for it, or else the nearest row."""

    name: str
    row: Row | None
    nearest: Row | None


@functools.cache
def table() -> list[Row]:
    """The rows of `configs/plans.toml`, one for each compiled stage."""
    path = config.CONFIGS / "plans.toml"
    return read_toml(path).get("row", []) if path.is_file() else []


def lines(
    model: str, mesh: str, dtype: str | None = None, attention: str = "auto", **settings: Any
) -> list[str]:
    """What one video takes, as lines to print: the mesh, memory and static seconds of each stage,
    and whether it fits. `settings` are those of `Request`, None for the checkpoint's default.
    Raises ValueError in one line for an unknown model or mesh, and for what the network cannot
    compute."""
    mesh = machine_name(mesh)
    count_devices(mesh)  # raises for an unknown mesh
    model = _find(model)
    request = Request(image="", prompt="", **settings).resolve(config.named(model))
    steps = request.num_inference_steps
    # The defaults of `load`.
    dtype = dtype or ("float32" if generation(mesh)["kind"] == "cpu" else "bfloat16")
    found = stages(model, mesh, request, dtype, attention)
    video = f"{request.num_frames} frames of {request.height}x{request.width}, {steps} steps"
    return [
        _machine(mesh),
        f"{model}: one video of {video} {_guidance(request.guided)}, {dtype}",
        "",
        f"{'stage':10}{'GiB a device':>12}{'static s':>12}",
        *(_line(stage, steps) for stage in found),
        *_total(found, steps),
        "",
        _verdict(found, mesh),
        *_footnotes(found, steps),
    ]


def training_lines(model: str, mesh: str) -> list[str]:
    """What a step of training takes, as lines to print: one for each way that was compiled for the
    machine. Raises ValueError in one line for an unknown model or mesh."""
    mesh = machine_name(mesh)
    devices = count_devices(mesh)  # raises for an unknown mesh
    model = _find(model)
    rows = [row for row in table() if (row["stage"], row["model"]) == (TRAIN, model)]
    found = [row for row in rows if row["mesh"] == mesh]
    head = f"{model}: a step of training on {mesh}, {devices} x {generation(mesh)['kind']}"
    if not found:
        others = ", ".join(dict.fromkeys(row["mesh"] for row in rows)) or "no machine"
        return [head, "", f"not compiled for it; compiled for {others}"]
    columns = _training_columns("", "peak GiB", "summed GiB", "on the host", "static s", "MFU")
    copies = "(without copies to the host and back; the peak may count what is kept there)"
    host = [copies] if any(row["kept"] == "host" for row in found) else []
    ways = (_training_line(row, devices) for row in found)
    return [head, "", columns, *ways, "", STATIC, *host, _compilers(found)]


def _training_line(row: Row, devices: int) -> str:
    """How a step trains, GiB of a device by both accounts of the compiler and of the host, static
    seconds, and the share of the peak that the useful operations are: without those that are
    computed again."""
    way = f"LoRA of rank {row['rank']}" if row["method"] == "lora" else "all weights"
    way += " beside int8" if row["int8"] else ""
    way += f", {row['kept']} kept"
    gib, seconds = _numbers(row, 1)
    peak = 1e12 * generation(row["mesh"])["peak_tflops"] * devices
    share = row.get("useful_flops", math.nan) / (seconds * peak)
    percent = "-" if math.isnan(share) else f"{share:.0%}"
    summed, host = (_cell(row.get(name, math.nan)) for name in ("summed_gib", "host_gib"))
    return _training_columns(way, _cell(gib), summed, host, _cell(seconds), percent) + (
        "" if row["fits"] else "  does not fit"
    )


def _training_columns(way: str, peak: str, summed: str, host: str, seconds: str, share: str) -> str:
    return f"{way:42}{peak:>10}{summed:>12}{host:>13}{seconds:>10}{share:>6}"


def _find(model: str) -> str:
    """The name of a checkpoint, from its name or its hub id."""
    if (name := find_name(model)) is None:
        known = ", ".join(config.names())
        raise ValueError(f"model must be one of {known} to be planned: got {model!r}")
    return name


def count_devices(mesh: str) -> int:
    """The number of devices of a named mesh. Raises ValueError for an unknown name."""
    known = config.meshes()["meshes"]
    if mesh not in known:
        raise ValueError(f"mesh must be one of {', '.join(known)} to be planned: got {mesh!r}")
    return math.prod(known[mesh].get(axis, 1) for axis in AXES)


def generation(mesh: str) -> dict[str, Any]:
    """Kind, usable memory and speed of the devices of a named mesh."""
    tables = config.meshes()
    return tables["generations"][tables["meshes"][mesh]["generation"]]


def stages(
    model: str, mesh: str, request: Resolved, dtype: str = "bfloat16", attention: str = "auto"
) -> list[Stage]:
    """All stages of a request, in order, with what is known of them."""
    wanted = {"dtype": dtype, "guided": request.guided, "attention": attention}
    wanted |= {key: getattr(request, key) for key in SIZE}
    return [_stage(name, model, mesh, wanted) for name in STAGES]


def _stage(name: str, model: str, mesh: str, wanted: dict[str, Any]) -> Stage:
    rows = [row for row in table() if (row["stage"], row["model"]) == (name, model)]
    keys = [key for key in ("dtype", *STAGES[name]) if (key, wanted[key]) != ("attention", "auto")]

    def misses(row: Row) -> int:
        return sum(row[key] != wanted[key] for key in keys)

    def distance(row: Row) -> tuple[Any, ...]:
        """The same machine at another size comes before another machine."""
        return row["mesh"] != mesh, _octaves(row, mesh, wanted), misses(row)

    exact = next((row for row in rows if row["mesh"] == mesh and not misses(row)), None)
    return Stage(name, exact, None if exact else min(rows, key=distance, default=None))


def _octaves(row: Row, mesh: str, wanted: dict[str, Any]) -> float:
    """How far the video and the machine of a row are from those asked for, in powers of two."""
    volume, target = (math.prod(values[key] for key in SIZE) for values in (row, wanted))
    ratio = count_devices(row["mesh"]) / count_devices(mesh)
    return abs(math.log2(volume / target)) + abs(math.log2(ratio))


def _numbers(row: Row, steps: int) -> tuple[float, float]:
    """GiB and static seconds; NaN where a program did not compile. The seconds of denoise are for
    `steps`: all steps are the same program."""
    times = steps / row["steps"] if row["stage"] == "denoise" else 1.0
    return float(row.get("peak_gib", math.nan)), times * row.get("static_seconds", math.nan)


def _machine(mesh: str) -> str:
    made, devices = config.meshes()["meshes"][mesh], count_devices(mesh)
    split = ", ".join(f"{axis} {made.get(axis, 1)}" for axis in AXES)
    topology = made.get("topology", "")
    chips = math.prod(map(int, topology.split("x"))) if topology else devices
    kind = f"{'chip' if chips == 1 else 'chips'} of {generation(mesh)['kind']}"
    kind += f" ({topology})" if topology else ""
    kind += f", {devices // chips} devices each" if devices > chips else ""
    return f"{mesh}: {chips} {kind}, split over {split}"


def _line(stage: Stage, steps: int) -> str:
    if stage.row is None:
        near, nearest = stage.nearest, "no similar program was compiled either"
        if near:
            nearest = f"nearest is {_label(near)}: {_cell(_numbers(near, steps)[0])} GiB a device"
        return f"{stage.name:10}not compiled; {nearest}"
    note = f"  {stage.row['attention']} attention" if stage.name == "denoise" else ""
    return _columns(stage.name, *_numbers(stage.row, steps)) + note


def _columns(name: str, gib: float, seconds: float) -> str:
    return f"{name:10}{_cell(gib):>12}{_cell(seconds):>12}"


def _cell(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.2f}"


def _label(row: Row) -> str:
    video = f"{row['num_frames']} frames of {row['height']}x{row['width']}"
    program = f"{video} {_guidance(row['guided'])}, {row['dtype']}, {row['attention']} attention"
    return f"{row['mesh']}, {program}"


def _guidance(guided: bool) -> str:
    return "with guidance" if guided else "without guidance"


def _total(found: list[Stage], steps: int) -> Iterable[str]:
    """The largest memory and the sum of the seconds, where all stages run."""
    rows = [stage.row for stage in found if stage.row and stage.row["fits"]]
    if len(rows) == len(found):
        gib, seconds = zip(*(_numbers(row, steps) for row in rows), strict=True)
        yield _columns("together", max(gib), sum(seconds))


def _verdict(found: list[Stage], mesh: str) -> str:
    usable = generation(mesh).get("hbm_gib")
    of = f"the {usable:g} GiB that a program can use of a device" if usable else "a device's memory"
    too_large = [stage.name for stage in found if stage.row and not stage.row["fits"]]
    unknown = [stage.name for stage in found if not stage.row]
    if too_large:
        return f"does not fit: {', '.join(too_large)} would take more than {of}"
    if unknown:
        return f"whether it fits is not known: not compiled for it: {', '.join(unknown)}"
    largest = max(stage.row["peak_gib"] for stage in found if stage.row)
    return f"fits: no stage takes more than {largest:.2f} of {of}"


def _footnotes(found: list[Stage], steps: int) -> Iterable[str]:
    rows = [stage.row for stage in found if stage.row]
    if not rows:
        return
    yield STATIC
    yield (
        "(tokamax's attention takes 0.92 - 1.04 times its static time on v5p and v6e, and "
        "1.13 - 1.20 times on v7x, whose clock is assumed)"
    )
    yield _compilers(rows)
    scaled = [row["steps"] for row in rows if row["stage"] == "denoise" and row["steps"] != steps]
    if scaled:
        yield f"denoise was compiled for {scaled[0]} steps; its seconds are scaled to {steps}"


def _compilers(rows: Iterable[Row]) -> str:
    made = (f"jax {row['jax']} and libtpu {row['libtpu']} on {row['date']}" for row in rows)
    return f"compiled with {'; '.join(dict.fromkeys(made))}"
