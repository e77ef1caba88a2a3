"""`sample --plan MESH`: what a request takes on machines that need not be there. All of it is read
off `configs/plans.toml`, in which `benchmarks/tpu_compile.py` keeps what the TPU compiler said:
nothing is loaded, and what was not compiled is named so, never guessed."""

import functools
import math
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import config
from ..request import Request, Resolved

Row = dict[str, Any]  # of plans.toml: one program, compiled

# In the order of running, each with what its program depends on beside checkpoint, mesh and dtype.
# Steps only repeat denoise's.
PHASES = {
    "text": ("guided",),
    "encode": ("height", "width"),
    "denoise": ("guided", "attention", "height", "width", "num_frames"),
    "decode": ("height", "width", "num_frames"),
}
AXES = ("data", "pair", "context")


class Phase(NamedTuple):
    """A phase of a request: the row that was compiled for it, or the nearest one there is, if
    any."""

    name: str
    row: Row | None
    nearest: Row | None


@functools.cache
def table() -> dict[str, Any]:
    """`configs/plans.toml`: `made`, the compiler's versions, and `row`, a table a compiled
    program."""
    path = config.CONFIGS / "plans.toml"
    return {"made": {}, "row": []} | (
        tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )


def lines(
    model: str, mesh: str, dtype: str | None = None, attention: str = "auto", **settings: Any
) -> list[str]:
    """What one video takes, to be printed: the mesh, memory and static seconds a phase, whether it
    fits. `settings` are `Request`'s, from height to noise, with None for the checkpoint's default.
    Raises ValueError in one line for a model or a mesh without a name, and for what the network
    can't compute."""
    chips(mesh)  # the mesh has a name
    model = named(model)
    request = Request(image="", prompt="", **settings).resolve(config.named(model))
    # As `load` has it.
    dtype = dtype or ("float32" if generation(mesh)["kind"] == "cpu" else "bfloat16")
    found = phases(model, mesh, request, dtype, attention)
    video = f"{request.num_frames} frames of {request.height}x{request.width}, {request.num_inference_steps} steps"
    return [
        _machine(mesh),
        f"{model}: one video of {video} {_guidance(request.guided)}, {dtype}",
        "",
        f"{'phase':10}{'GiB a chip':>10}{'floor, s':>12}{'estimate, s':>14}",
        *(_line(phase, request.num_inference_steps) for phase in found),
        *_total(found, request.num_inference_steps),
        "",
        _verdict(found, mesh),
        *_footnotes(found, request.num_inference_steps),
    ]


def named(model: str) -> str:
    """A checkpoint's name from its name or its hub id."""
    by_hub = {config.toml(name)["source"].get("hub", name).lower(): name for name in config.names()}
    name = by_hub.get(model.lower().replace("thudm/", "zai-org/"), model)
    if name not in config.names():
        raise ValueError(
            f"model must be one of {', '.join(config.names())} to be planned: got {model!r}"
        )
    return name


def chips(mesh: str) -> int:
    """Devices of a named mesh. Raises ValueError for an unknown one."""
    known = config.meshes()["meshes"]
    if mesh not in known:
        raise ValueError(f"mesh must be one of {', '.join(known)} to be planned: got {mesh!r}")
    return math.prod(known[mesh].get(axis, 1) for axis in AXES)


def generation(mesh: str) -> dict[str, Any]:
    """Kind, usable memory and speed of a named mesh's devices."""
    tables = config.meshes()
    return tables["generations"][tables["meshes"][mesh]["generation"]]


def phases(
    model: str, mesh: str, request: Resolved, dtype: str = "bfloat16", attention: str = "auto"
) -> list[Phase]:
    """Every phase of a request, in order, with what is known of it."""
    wish = {
        "dtype": dtype,
        "guided": request.guided,
        "attention": attention,
        **_size(vars(request)),
    }
    return [_phase(name, model, mesh, wish) for name in PHASES]


def _phase(name: str, model: str, mesh: str, wish: dict[str, Any]) -> Phase:
    rows = [row for row in table()["row"] if (row["phase"], row["model"]) == (name, model)]
    asked = [key for key in ("dtype", *PHASES[name]) if (key, wish[key]) != ("attention", "auto")]

    exact = next(
        (
            row
            for row in rows
            if row["mesh"] == mesh and all(row[key] == wish[key] for key in asked)
        ),
        None,
    )

    def distance(row: Row) -> tuple[Any, ...]:
        """The same machine at another size says more than another machine."""
        return (
            row["mesh"] != mesh,
            _octaves(row, mesh, wish),
            sum(row[key] != wish[key] for key in asked),
        )

    return Phase(name, exact, None if exact else min(rows, key=distance, default=None))


def _octaves(row: Row, mesh: str, wish: dict[str, Any]) -> float:
    """How far a row's video and machine are from those asked for."""
    volume, wanted = (math.prod(_size(values).values()) for values in (row, wish))
    return abs(math.log2(volume / wanted)) + abs(math.log2(chips(row["mesh"]) / chips(mesh)))


def _size(values: dict[str, Any]) -> dict[str, int]:
    return {key: values[key] for key in ("height", "width", "num_frames")}


def _numbers(row: Row, steps: int) -> list[float]:
    """GiB, and static seconds as a floor and an estimate; NaN for what a program that did not
    compile has not. Denoise's seconds are for `steps`, of which every one is the same program."""
    times = steps / row["steps"] if row["phase"] == "denoise" else 1.0
    seconds = [times * row.get(key, math.nan) for key in ("static_seconds_floor", "static_seconds")]
    return [float(row.get("peak_gib", math.nan)), *seconds]


def _machine(mesh: str) -> str:
    made, count = config.meshes()["meshes"][mesh], chips(mesh)
    split = ", ".join(f"{axis} {made.get(axis, 1)}" for axis in AXES)
    kind, topology = (
        generation(mesh)["kind"],
        f" ({made['topology']})" if "topology" in made else "",
    )
    return f"{mesh}: {count} {'chip' if count == 1 else 'chips'} of {kind}{topology}, split over {split}"


def _line(phase: Phase, steps: int) -> str:
    if phase.row is None:
        near = phase.nearest
        nearest = (
            f"; nearest is {_label(near)}: {_cell(_numbers(near, steps)[0])} GiB a chip"
            if near
            else "; nor is anything near"
        )
        return f"{phase.name:10}not compiled{nearest}"
    note = f"  {phase.row['attention']} attention" if phase.name == "denoise" else ""
    return _columns(phase.name, _numbers(phase.row, steps)) + note


def _columns(name: str, numbers: Sequence[float]) -> str:
    gib, floor, estimate = map(_cell, numbers)
    return f"{name:10}{gib:>10}{floor:>12}{estimate:>14}"


def _cell(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.2f}"


def _label(row: Row) -> str:
    video = (
        f"{row['num_frames']} frames of {row['height']}x{row['width']} {_guidance(row['guided'])}"
    )
    return f"{row['mesh']}, {video}, {row['dtype']}, {row['attention']} attention"


def _guidance(guided: bool) -> str:
    return "with guidance" if guided else "without guidance"


def _total(found: list[Phase], steps: int) -> Iterable[str]:
    """The largest memory and the sum of the seconds, where all phases run."""
    rows = [phase.row for phase in found if phase.row and phase.row["fits"]]
    if len(rows) == len(found):
        gib, floor, estimate = zip(*(_numbers(row, steps) for row in rows), strict=True)
        yield _columns("together", (max(gib), sum(floor), sum(estimate)))


def _verdict(found: list[Phase], mesh: str) -> str:
    usable = generation(mesh).get("hbm_gib")
    of = f"the {usable:g} GiB that a program can use of a chip" if usable else "a chip's memory"
    too_large = [phase.name for phase in found if phase.row and not phase.row["fits"]]
    unknown = [phase.name for phase in found if not phase.row]
    if too_large:
        return f"does not fit: {', '.join(too_large)} would take more than {of}"
    if unknown:
        return f"whether it fits is not known: not compiled for it: {', '.join(unknown)}"
    return f"fits: no phase takes more than {max(phase.row['peak_gib'] for phase in found if phase.row):.2f} of {of}"


def _footnotes(found: list[Phase], steps: int) -> Iterable[str]:
    rows = [phase.row for phase in found if phase.row]
    if not rows:
        return
    yield (
        "seconds are static, of the cycles for which the TPU compiler scheduled the program, with kernels at k = 1.0 (floor) and 1.27 "
        "(estimate): no time was measured on a TPU"
    )
    made = table()["made"]
    yield f"compiled with jax {made['jax']} and libtpu {made['libtpu']} on {made['date']}"
    scaled = [row["steps"] for row in rows if row["phase"] == "denoise" and row["steps"] != steps]
    if scaled:
        yield f"denoise was compiled for {scaled[0]} steps; its seconds are scaled to {steps}"
