"""The time of a denoising step on a GPU: by kernels, and with other attention kernels and compiler
options."""

# pyright: reportPrivateImportUsage=false, reportMissingImports=false
import argparse
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import torch
from full_stages import Case, Stage, make_transformer_stages

from cogi2v_jax.devices.compiler_options import compiler_options

STEP = "denoise, one step"
# Attention backends, with the options of compiler_options.py for the device and these in addition.
TRIALS: tuple[tuple[str, dict[str, str] | None], ...] = (
    ("auto", None),
    ("tokamax", None),
    ("xla", None),
    ("auto", {"xla_gpu_enable_cublaslt": "true"}),  # bias and GELU as epilogues of the product
    ("auto", {"xla_gpu_enable_triton_gemm": "false"}),  # only cuBLAS's products
    ("auto", {"xla_gpu_exhaustive_tiling_search": "true"}),
    ("auto", {"xla_gpu_cudnn_gemm_fusion_level": "2"}),
)
SHOWN = 12  # kernels of a profile, those with the largest shares


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Times our step with each of TRIALS. The best options belong in compiler_options.py, with
    their figure."""
    (dtype,) = args.dtypes
    rows: list[dict[str, Any]] = []
    for backend, options in TRIALS:
        listed = " ".join(f"{name}={value}" for name, value in (options or {}).items())
        row: dict[str, Any] = {"attention": backend, "options": listed or "ours"}
        try:
            stage = _make_step(args, dtype, backend)
            begin = time.perf_counter()
            usual = compiler_options(jax.devices()[0].device_kind, loop=True)
            program = stage.ours(options={**usual, **(options or {})})
            jax.block_until_ready(program.call())
            row["compiled"] = time.perf_counter() - begin
            row["seconds"] = [_time_call(program.call) / stage.parts for _ in range(args.repeats)]
            row["peak"] = program.peak
        # There is no such kernel or option on this device, or too little memory.
        except (ValueError, RuntimeError) as error:
            row["refused"] = str(error).splitlines()[0][:100]
        rows.append(row)
    return {"rows": rows}


def tabulate_trials(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["attention", "options", "s a step", "first / this", "peak GiB", "compiled in s"]]
    first = next((statistics.median(row["seconds"]) for row in rows if "seconds" in row), None)
    for row in rows:
        if "refused" in row:
            cells.append([row["attention"], row["options"], "not here", *["-"] * 3])
            continue
        median = statistics.median(row["seconds"])
        assert first is not None
        numbers = [f"{median:.4g}", f"{first / median:.2f}", f"{row['peak'] / 2**30:.2f}"]
        cells.append([row["attention"], row["options"], *numbers, f"{row['compiled']:.0f}"])
    return cells


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Sums the time of a step by kernels, for ours and for the reference's first variant."""
    (dtype,) = args.dtypes
    stage = _make_step(args, dtype, args.attention)
    call = stage.ours().call
    jax.block_until_ready(call())
    with jax.profiler.trace(str(args.folder / "profile")):
        jax.block_until_ready(call())
    sides = {"cogi2v-jax": _sum_jax_kernels(args.folder / "profile")}
    for variant in args.variants[:1]:
        theirs = stage.make_variant(variant)
        theirs()
        kinds = torch.profiler.ProfilerActivity
        activity = kinds.CUDA if torch.cuda.is_available() else kinds.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            theirs()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        sides[f"reference, {variant}"] = _sum_torch_kernels(profiler)
    rows = []
    for side, kernels in sides.items():
        total = sum(kernels.values()) or 1.0
        shown = kernels.most_common(SHOWN)
        shown += [("all others", total - sum(seconds for _, seconds in shown))]
        rows += [
            {"side": side, "kernel": name, "seconds": spent / stage.parts, "share": spent / total}
            for name, spent in shown
        ]
    return {"rows": rows}


def tabulate_kernels(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["side", "kernel", "ms a step", "share"]]
    return cells + [
        [row["side"], row["kernel"], f"{1e3 * row['seconds']:.3f}", f"{row['share']:.1%}"]
        for row in rows
    ]


def _sum_jax_kernels(folder: Path) -> Counter[str]:
    """Sums the seconds of each kernel of a profile, on the GPU's streams or else on the CPU's
    threads. Numbers at the end of kernels' names are removed."""
    (file,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    spent: Counter[str] = Counter()
    for plane in devices or planes:
        for line in plane.lines:
            # The other lines repeat the same time by module and by step.
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if devices or any(key == "hlo_op" for key, _ in event.stats):
                    spent[re.sub(r"([._]\d+)+$", "", event.name)] += event.duration_ns * 1e-9
    return spent


def _sum_torch_kernels(profiler: torch.profiler.profile) -> Counter[str]:
    spent: Counter[str] = Counter()
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    for event in profiler.key_averages():
        spent[event.key[:80]] += getattr(event, own) * 1e-6
    return spent


def _make_step(args: argparse.Namespace, dtype: str, attention: str) -> Stage:
    return make_transformer_stages(Case(args.model, args.size, dtype, args.steps, attention))[STEP]


def _time_call(call: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
