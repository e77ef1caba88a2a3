"""The full-size programs compiled by XLA for an H100, on a machine without one: memory, and the
bytes that their kernels move.

    pip install 'jax[cuda12]'  # the compiler; no driver and no device are needed
    python benchmarks/gpu_compile.py [--model M] [--stage denoise] [--attention cudnn] [--hlo DIR]
        [--markdown]

Nothing is timed. XLA chooses kernels without autotuning, so a tuned program may differ in its
tiles, not in the bytes that it moves. "s at least" is the time to move them at the H100's
bandwidth; the operations of products and attention take time in addition.
"""

# pyright: reportPrivateImportUsage=false, reportMissingImports=false,
# reportAttributeAccessIssue=false
import argparse
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax._src.cudnn.fused_attention_stablehlo as fused
import jax.numpy as jnp
import tpu_hlo
from jax.experimental import topologies

from cogi2v_jax import config
from cogi2v_jax.devices.compiler_options import compile_with, compiler_options
from cogi2v_jax.devices.plan import STAGES
from cogi2v_jax.request import Request
from cogi2v_jax.sampling.programs import Call, RequestTarget, mesh_for

MODELS = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
# An H100 SXM with cuDNN 9.8, as its driver describes it to XLA.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What jax's functions of these names answer on it. They ask a real device before cuDNN attention is
# lowered, and jax has no public way to answer for one.
ABILITIES: dict[str, Any] = {
    "check_cudnn_version": lambda: 90800,
    "check_compute_capability": lambda _: True,
    "is_cuda_compute_capability_equal": lambda version: version == "9.0",
}
# The bytes of the device that jax uses by default; bytes a second.
MEMORY, BANDWIDTH = int(0.75 * 84978434048), 3.35e12
# Instructions that move no bytes themselves.
SILENT = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
SILENT |= {"while", "conditional", "call"}


def describe_h100() -> Any:
    """Returns an H100 as XLA's compiler describes it."""
    for name, answer in ABILITIES.items():
        setattr(fused, name, answer)
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET, topology="1x1x1"
    ).devices[0]


def count_moved_bytes(text: str) -> Counter[str]:
    """Counts the bytes that a program's kernels read and write, by kind of kernel. A kernel inside
    a loop counts once for every trip."""
    computations, entry = tpu_hlo.parse(text)

    def walk(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        instructions = computations[name].instructions
        for instruction in instructions.values():
            if instruction.opcode == "while":
                trips = int(re.search(r"known_trip_count\D+(\d+)", instruction.rest)[1])
                for kind, count in walk(instruction.attribute("body")).items():
                    found[kind] += trips * count
            elif instruction.opcode == "call":
                found += walk(instruction.attribute("to_apply"))
            elif instruction.opcode not in SILENT:
                name = instruction.name
                slices = "dynamic_slice" in name or "dynamic_update_slice" in name
                shapes = [instructions[operand].shape for operand in instruction.operands]
                sizes = [_count_bytes(shape) for shape in (instruction.shape, *shapes)]
                # A slice moves only its own bytes, from or to a larger array: they count twice.
                whole = not slices or len(sizes) == 1
                found[_classify(instruction)] += sum(sizes) if whole else 2 * sorted(sizes)[-2]
        return found

    return walk(entry)


def _classify(instruction: tpu_hlo.Instruction) -> str:
    target = instruction.attribute("custom_call_target", r'"([^"]*)"')
    if "fmha" in target:
        return "attention"
    if "cublas" in target or instruction.name.startswith("gemm_fusion"):
        return "products"
    return "convolutions" if "conv" in target else "the rest"


def _count_bytes(shape: str) -> int:
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        count = tpu_hlo.BYTES.get(kind, 0)
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count
    return total


def main() -> None:
    about = "The full-size programs compiled by XLA for an H100, without one."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--stage", "--phase", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--attention", default="cudnn")
    parser.add_argument("--hlo", type=Path, help="write the optimised programs there")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    head = "model, stage, GiB, GB moved: products, attention, convolutions, the rest, s at least"
    cells = [[*head.split(", "), "compiled in s"]]
    try:
        gpu, half = describe_h100(), jnp.dtype(jnp.bfloat16)
    except NotImplementedError as missing:
        rule = "benchmarks/gpu_compile.py must have XLA's compiler for CUDA"
        sys.exit(f"{rule}: {missing}; pip install 'jax[cuda12]'")
    for name in args.model:
        checkpoint = config.named(name)
        request = Request("none.png", "none", num_inference_steps=1).resolve(checkpoint)
        mesh = mesh_for(checkpoint, half, "data=1", 1, True, [gpu], MEMORY)
        target = RequestTarget(checkpoint, half, mesh, MEMORY, request, args.attention)
        for stage in args.stage:
            what = stage + (", one step" if stage == "denoise" else "")
            cells.append([name, what, *_compile_row(target, stage, target.calls(stage), args.hlo)])
            print("  ".join(cells[-1]), file=sys.stderr, flush=True)
    mark = " | " if args.markdown else "  "
    for line in [cells[0], *([["-"] * len(cells[0])] if args.markdown else []), *cells[1:]]:
        print(f"| {mark.join(line)} |" if args.markdown else mark.join(line))


def _compile_row(
    target: RequestTarget, stage: str, calls: list[Call], hlo: Path | None
) -> list[str]:
    memory, bytes_moved, begin = 0, Counter(), time.perf_counter()
    for number, call in enumerate(calls):
        options = compiler_options(target.mesh.devices.flat[0].device_kind, call.stage.program.loop)
        executable = compile_with(options, call.lower())
        sizes = executable.memory_analysis()
        both = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        memory = max(memory, both + sizes.temp_size_in_bytes)
        bytes_moved += count_moved_bytes(text := executable.as_text())
        if hlo is not None:
            (hlo / f"{target.config.name}-{stage}-{number}.txt").write_text(text)
    seconds = time.perf_counter() - begin
    kinds = ("products", "attention", "convolutions", "the rest")
    figures = [f"{bytes_moved[kind] / 1e9:.1f}" for kind in kinds]
    least = f"{sum(bytes_moved.values()) / BANDWIDTH:.3f}"
    return [f"{memory / 2**30:.2f}", *figures, least, f"{seconds:.0f}"]


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        main()
