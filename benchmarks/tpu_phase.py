"""Compiles one phase for a mesh that is not there and adds up what the compiler says: the child
process of `tpu_compile.py`, which sets the environment that libtpu reads when jax is imported."""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tpu_hlo
import tpu_kernel
from jax.experimental import topologies

from cogi2v_jax import config
from cogi2v_jax.devices.mesh import make_mesh, sizes_of
from cogi2v_jax.models.attention import resolve
from cogi2v_jax.request import Request
from cogi2v_jax.sampling.programs import RequestTarget

DTYPE = jnp.dtype(jnp.bfloat16)
WIRE = 100e9  # bytes/s that a chip sends
KERNEL_FACTOR = 1.27  # what kernels take over their schedule
GIB, MIB = 2**30, 2**20


def devices_of(mesh: str) -> Sequence[Any]:
    """The chips of a mesh of `configs/meshes.toml`, described by libtpu alone."""
    stated = config.meshes()["meshes"][mesh]
    generation = config.meshes()["generations"][stated["generation"]]
    options: dict[str, Any] = (
        {"chip_config_name": generation["chip"]} if "chip" in generation else {}
    )
    if math.prod(map(int, stated["topology"].split("x"))) == 1:
        # Libtpu takes a host for a bigger one unless told.
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{stated['generation']}:{stated['topology']}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def phase_row(
    model: str, mesh: str, phase: str, attention: str, schedules: Path | None
) -> tuple[dict[str, Any], str]:
    """The row of a phase, and its programs' HLO. Keys that the compiler gives no figure for are
    left out; those that need its schedules of kernels, where there is no folder of these."""
    checkpoint = config.named(model)
    chip = config.meshes()["generations"][config.meshes()["meshes"][mesh]["generation"]]
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    memory = int(chip["hbm_gib"] * GIB)
    target = RequestTarget(
        checkpoint, DTYPE, make_mesh(sizes_of(mesh), devices_of(mesh)), memory, request, attention
    )
    steps = request.num_inference_steps
    row: dict[str, Any] = {
        "model": model,
        "mesh": mesh,
        "phase": phase,
        "height": request.height,
        "width": request.width,
    }
    row |= {
        "num_frames": request.num_frames,
        "steps": steps,
        "guided": request.guided,
        "dtype": DTYPE.name,
    }
    row["attention"] = resolve(attention, DTYPE, target.mesh.devices.flat[0])
    total, kernel_cycles, kernel_flops, peak, texts = tpu_hlo.Cost(), 0.0, 0.0, 0.0, []
    begin = time.perf_counter()
    try:
        executables = [call.compile() for call in target.calls(phase)]
    except jax.errors.JaxRuntimeError as error:
        return row | {"fits": False, "peak_gib": needed_gib(error)}, ""
    except ValueError as error:
        if "must fit" not in str(error):
            raise
        return row | {"fits": False}, ""  # known before the compiler is asked
    seconds = time.perf_counter() - begin
    for executable in executables:
        memory_of = executable.memory_analysis()
        held = (
            memory_of.argument_size_in_bytes
            + memory_of.output_size_in_bytes
            + memory_of.temp_size_in_bytes
        )
        peak = max(peak, (held - memory_of.alias_size_in_bytes) / GIB)
        texts.append(executable.as_text())
        cost = tpu_hlo.read(texts[-1])
        total.add(cost, 1)
        for name, times in cost.kernels.items():
            kernel = tpu_kernel.read(cost.bodies[name])
            kernel_flops += times * kernel.flops
            kernel_cycles += (
                times * tpu_kernel.cycles(schedule_of(name, schedules), kernel)
                if schedules
                else 0.0
            )
    layers = {
        "text": checkpoint.text_encoder.num_layers,
        "denoise": checkpoint.transformer.num_layers * steps,
    }.get(phase, 1)
    row |= {
        "fits": peak <= chip["hbm_gib"],
        "peak_gib": round(peak, 3),
        "flops": total.flops + kernel_flops,
        "collective_mib_per_layer": round(total.sent / layers / MIB, 3),
        "compile_seconds": round(seconds, 1),
    }
    if schedules or not total.kernels:
        clock = 1e9 * chip["clock_ghz"]
        fixed = total.cycles / clock + total.sent / WIRE
        row["static_seconds_floor"] = round(fixed + kernel_cycles / clock, 4)
        row["static_seconds"] = round(fixed + KERNEL_FACTOR * kernel_cycles / clock, 4)
    return row, "\n".join(texts)


def needed_gib(error: jax.errors.JaxRuntimeError) -> float:
    """What a program refused for its memory says it needs of a chip: all of it, or its temporaries
    where these are too much already. Raises any other error again."""
    used = re.search(
        r"Used ([\d.]+)([MGT]) of \S+ hbm|memory required for .* \(([\d.]+)([MGT])\) exceeds available HBM",
        str(error),
    )
    if not used:
        raise error
    figure, unit = (part for part in used.groups() if part)
    return float(figure) * {"M": 2**-10, "G": 1, "T": 2**10}[unit]


def schedule_of(kernel: str, schedules: Path) -> str:
    """A kernel's dumped schedule, by the name of its instruction. libtpu may have compiled it more
    than once: the last is what runs."""
    name = re.compile(rf"(\d+)-{re.escape(kernel)}-\d+-packed-bundles-post-ra\.txt")
    found = {
        int(match[1]): path for path in schedules.iterdir() if (match := name.fullmatch(path.name))
    }
    if not found:
        raise ValueError(f"libtpu must have dumped a schedule of {kernel}: got none in {schedules}")
    return found[max(found)].read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "mesh", "phase", "attention"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--schedules", type=Path, help="where libtpu was told to dump schedules")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--hlo", type=Path)
    args = parser.parse_args()
    row, text = phase_row(args.model, args.mesh, args.phase, args.attention, args.schedules)
    args.json.write_text(json.dumps(row))
    if args.hlo:
        args.hlo.write_text(text)


if __name__ == "__main__":
    main()
