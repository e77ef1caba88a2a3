"""Compiles one stage for a mesh that the machine lacks and adds up the compiler's figures. This is
the child process of `tpu_compile.py`, which sets the environment that libtpu reads when jax is
imported."""

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tpu_hlo
import tpu_kernel
from jax.experimental import topologies

from cogi2v_jax import config
from cogi2v_jax.config import TransformerConfig
from cogi2v_jax.devices.mesh import make_mesh, sizes_of
from cogi2v_jax.models.attention import resolve
from cogi2v_jax.request import Request, Resolved
from cogi2v_jax.sampling.programs import RequestTarget
from cogi2v_jax.training.recipe import Recipe, read_recipe
from cogi2v_jax.training.target import StepTarget, mesh_for

DTYPE = jnp.dtype(jnp.bfloat16)
TRAIN, INT8 = "train", "int8"
RECIPES = {
    "cogvideox-5b-i2v": "lora-5b",
    "cogvideox1.5-5b-i2v": "lora-1.5-5b",
    "cogi2v-tiny": "lora-tiny",
}
TRAINED = ("method", "rank", "batch")  # keys of a recipe that its row states
WIRE = 100e9  # bytes/s that a chip sends
GIB, MIB = 2**30, 2**20


def describe_devices(mesh: str) -> Sequence[Any]:
    """Returns the devices of a mesh of `configs/meshes.toml`, as libtpu describes them."""
    stated = config.meshes()["meshes"][mesh]
    generation = config.meshes()["generations"][stated["generation"]]
    chip = {"chip_config_name": generation["chip"]} if "chip" in generation else {}
    options: dict[str, Any] = chip
    if math.prod(map(int, stated["topology"].split("x"))) == 1:
        # By default libtpu assumes a larger host.
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{stated['generation']}:{stated['topology']}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


class Work(NamedTuple):
    """The programs of a stage, what a row says of them, and by how many layers the sent bytes are
    divided."""

    row: dict[str, Any]
    programs: Sequence[Callable[[], jax.stages.Compiled]]
    layers: int


def sampling_work(model: str, mesh: str, memory: int, stage: str, attention: str) -> Work:
    """Returns the programs of a stage of sampling, at a checkpoint's defaults."""
    checkpoint = config.named(model)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    made = make_mesh(sizes_of(mesh), describe_devices(mesh))
    target = RequestTarget(checkpoint, DTYPE, made, memory, request, attention)
    steps = request.num_inference_steps
    layers = {"text": checkpoint.text_encoder.num_layers}
    layers |= {"denoise": checkpoint.transformer.num_layers * steps}
    row = describe(request) | {"steps": steps, "guided": request.guided}
    return Work(row, [call.compile for call in target.calls(stage)], layers.get(stage, 1))


def training_work(
    model: str, mesh: str, memory: int, attention: str, changes: Sequence[str]
) -> Work:
    """Returns the step of a recipe for a model, with changes of its keys; `int8` beside them stands
    for int8 weights."""
    keys = [change for change in changes if change != INT8]
    recipe = read_recipe(RECIPES[model], [f"mesh={mesh}", "dtype=bfloat16", *keys])
    checkpoint = config.named(model)
    if INT8 in changes:
        checkpoint = dataclasses.replace(checkpoint, int8=(recipe.part,))
    where = mesh_for(recipe, checkpoint, DTYPE, describe_devices(mesh), memory)
    target = StepTarget(recipe, checkpoint, DTYPE, where, memory)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    sampling = target.sampling(request, attention)
    program, static = target.program(sampling)
    step = partial(program.compile, *target.arguments(sampling), **static)
    row = describe(request) | {name: getattr(recipe, name) for name in TRAINED}
    row |= {"kept": target.kept(sampling), "int8": INT8 in changes}
    row["useful_flops"] = count_useful(recipe, checkpoint.transformer, sampling.layout.tokens)
    return Work(row, [step], checkpoint.transformer.num_layers)


def count_useful(recipe: Recipe, network: TransformerConfig, tokens: int) -> float:
    """The operations of the products that a step needs in all blocks, forward and backward: without
    what is computed again, and without the small ones of a LoRA."""
    parameters = 12 * network.width**2  # of the attention's four layers and the MLP's two
    # Backward there is a product for a layer's input, and one for its kernel if that is trained.
    linear = 2 * tokens * parameters * (2 if recipe.method == "lora" else 3)
    attention = 3 * 4 * tokens**2 * network.width
    return float(recipe.clips * network.num_layers * (linear + attention))


def describe(request: Resolved) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("height", "width", "num_frames")}


def compile_stage(
    model: str, mesh: str, stage: str, attention: str, changes: Sequence[str], schedules: Path
) -> tuple[dict[str, Any], str]:
    """Compiles a stage. Returns its row and the HLO of its programs. The row lacks the figures that
    the compiler did not reach. libtpu writes the schedules of kernels to `schedules`."""
    chip = config.meshes()["generations"][config.meshes()["meshes"][mesh]["generation"]]
    memory = int(chip["hbm_gib"] * GIB)
    if stage == TRAIN:
        work = training_work(model, mesh, memory, attention, changes)
    else:
        work = sampling_work(model, mesh, memory, stage, attention)
    row: dict[str, Any] = {"model": model, "mesh": mesh, "stage": stage}
    row |= {"changes": " ".join(changes)} if changes else {}
    row |= {**work.row, "dtype": DTYPE.name}
    row["attention"] = resolve(attention, DTYPE, describe_devices(mesh)[0])
    total, kernel_cycles, kernel_flops, peak, texts = tpu_hlo.Cost(), 0.0, 0.0, 0.0, []
    begin = time.perf_counter()
    try:
        executables = [program() for program in work.programs]
    except jax.errors.JaxRuntimeError as error:
        return row | {"fits": False, "peak_gib": read_needed_gib(error)}, ""
    except ValueError as error:
        if "must fit" not in str(error):
            raise
        return row | {"fits": False}, ""  # known without compiling
    compiled = time.perf_counter() - begin
    for executable in executables:
        memory_of = executable.memory_analysis()
        # Not the sum of its parts: where a loop overwrites a buffer, temporaries count it twice.
        peak = max(peak, memory_of.peak_memory_in_bytes / GIB)
        if stage == TRAIN:
            row["host_gib"] = round(memory_of.host_temp_size_in_bytes / GIB, 3)
            parts = memory_of.argument_size_in_bytes + memory_of.output_size_in_bytes
            parts += memory_of.temp_size_in_bytes - memory_of.alias_size_in_bytes
            row["summed_gib"] = round(parts / GIB, 3)
        texts.append(executable.as_text())
        cost = tpu_hlo.read(texts[-1])
        total.add(cost, 1)
        for name, times in cost.kernels.items():
            kernel = tpu_kernel.read(cost.bodies[name])
            kernel_flops += times * kernel.flops
            equal = [other for other, body in cost.bodies.items() if body == cost.bodies[name]]
            schedule = find_schedule(equal, schedules)
            kernel_cycles += times * tpu_kernel.count_cycles(schedule, kernel)
    clock = 1e9 * chip["clock_ghz"]
    seconds = (total.cycles + kernel_cycles) / clock + total.sent / WIRE
    # The peak of a program that keeps buffers on the host seems to count these too: the compiler
    # takes programs whose peak is larger than the chip.
    least = min(peak, row["summed_gib"]) if row.get("host_gib") else peak
    row |= {
        "fits": least <= chip["hbm_gib"],
        "peak_gib": round(peak, 3),
        "flops": total.flops + kernel_flops,
        "collective_mib_per_layer": round(total.sent / work.layers / MIB, 3),
        "compile_seconds": round(compiled, 1),
        "static_seconds": round(seconds, 4),
    }
    return row, "\n".join(texts)


def read_needed_gib(error: jax.errors.JaxRuntimeError) -> float:
    """Reads from the error how much memory of a chip a refused program needs: all of it, or only
    its temporaries if these alone are too large. Raises any other error again."""
    used = re.search(
        r"Used ([\d.]+)([MGT]) of \S+ hbm|"
        r"memory required for .* \(([\d.]+)([MGT])\) exceeds available HBM",
        str(error),
    )
    if not used:
        raise error
    figure, unit = (part for part in used.groups() if part)
    return float(figure) * {"M": 2**-10, "G": 1, "T": 2**10}[unit]


def find_schedule(kernels: Sequence[str], schedules: Path) -> str:
    """Reads the dumped schedule of equal kernels, by the names of their instructions: libtpu may
    dump one of them only. If it compiled one more than once, the last schedule is what runs."""
    names = "|".join(map(re.escape, kernels))
    name = re.compile(rf"(\d+)-(?:{names})-\d+-packed-bundles-post-ra\.txt")
    found = {
        int(match[1]): path for path in schedules.iterdir() if (match := name.fullmatch(path.name))
    }
    if not found:
        rule = "libtpu must have dumped a schedule"
        raise ValueError(f"{rule} of {' or '.join(kernels)}: got none in {schedules}")
    return found[max(found)].read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "mesh", "stage", "attention"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--schedules", type=Path, required=True, help="where libtpu dumps them")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--hlo", type=Path)
    parser.add_argument("changes", nargs="*")
    args = parser.parse_args()
    asked = args.model, args.mesh, args.stage, args.attention, args.changes
    row, text = compile_stage(*asked, args.schedules)
    args.json.write_text(json.dumps(row))
    if args.hlo:
        args.hlo.write_text(text)


if __name__ == "__main__":
    main()
