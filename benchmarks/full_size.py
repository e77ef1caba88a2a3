"""The released networks at full size, with random weights, compared with diffusers in one process
on one GPU: parity and speed.

    python benchmarks/full_size.py PART [options]

    parity   --model cogvideox-5b-i2v     every stage in float32 and bfloat16
    speed    --stages "denoise, one step" ours, eager, torch.compile, cuDNN attention
    tune                                  our attention backends and compiler options
    profile                               the time of a step by kernels, ours and theirs
    path     --folder /scratch            the commands to-flax, sample, record and verify
    publish  results/*.json               writes the tables of docs/performance.md

Every part runs alone, prints a table and writes it with `--json FILE`. It should take at most nine
minutes on an H100 with 16 cores; `--stages`, `--variants` and `--dtypes` select less. Without a
GPU, `--size wide` (full width, two layers, a small picture) and `--size small` run on the CPU.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportMissingImports=false
import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # because torch shares the GPU's memory

# This exits if the reference is not installed.
from vs_reference import align, describe_machine, measure_error, replace_tables

# isort: split
import full_path
import full_tuning
import jax
import numpy as np
import torch
from full_networks import SIZES
from full_stages import NETWORKS, VARIANTS, Case, Stage
from torch.utils.flop_counter import FlopCounterMode

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MODELS = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
STAGES = {
    "text": "text_encoder",
    "image": "vae",
    "decode": "vae",
    "denoise, one prediction": "transformer",
    "denoise, one step": "transformer",
}
TIMED = ("text", "decode", "denoise, one step")
# Peak operations a second of a device in bfloat16 and in float32.
PEAKS = {"NVIDIA H100 80GB HBM3": (989e12, 67e12), "NVIDIA H200": (989e12, 67e12)}
# Limits: the relative error of a stage and of the loop in float32; in bfloat16, our error over the
# reference's own.
MOST, LOOP_MOST, RATIO = 1e-5, 1e-4, 1.1
OURS = "cogi2v-jax"


def measure_parity(args: argparse.Namespace) -> dict[str, Any]:
    """Compares the result of every stage in both dtypes. The networks of one dtype are freed before
    those of the next are made."""
    results: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for dtype in args.dtypes:
        for name, stage in _make_stages(args, dtype, STAGES):
            theirs = stage.theirs().float().cpu().numpy()
            results[name, dtype] = theirs, np.asarray(stage.ours().call()).astype(np.float32)
    rows = []
    for name in dict.fromkeys(stage for stage, _ in results):
        theirs, _ = results.get((name, "float32")) or results[name, "bfloat16"]
        rms = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
        row = {"stage": name, "shape": list(theirs.shape), "rms": rms}
        if single := results.get((name, "float32")):
            row["float32"] = measure_error(single[1], single[0])
        if half := results.get((name, "bfloat16")):
            truth = single[0] if single else half[0]
            row["bfloat16"] = measure_error(half[1], truth)
            row["reference_bfloat16"] = measure_error(half[0], truth) if single else None
        rows.append(row)
    return {"rows": rows, "faults": [fault for row in rows for fault in _find_faults(row)]}


def _find_faults(row: dict[str, Any]) -> Iterator[str]:
    stage, most = row["stage"], LOOP_MOST if row["stage"] == "denoise, one step" else MOST
    if not row.get("float32", 0.0) <= most:
        rule = f"must be within {most:g} of the reference in float32"
        yield f"{stage} {rule}: got {row['float32']:.1e}"
    if row.get("reference_bfloat16") and not row["bfloat16"] <= RATIO * row["reference_bfloat16"]:
        rule = f"must be within {RATIO} x the reference's own error in bfloat16"
        yield f"{stage} {rule}: got {row['bfloat16']:.1e}"


def tabulate_parity(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [
        ["stage", "result", "rms", "float32", "bfloat16: ours", "the reference's", "ours / theirs"]
    ]
    for row in rows:
        half, theirs = row.get("bfloat16"), row.get("reference_bfloat16")
        errors = (row.get("float32"), half, theirs)
        printed = [f"{error:.1e}" if error is not None else "-" for error in errors]
        shape, ratio = "x".join(map(str, row["shape"])), half / theirs if half and theirs else None
        printed.append(f"{ratio:.2f}" if ratio is not None else "-")
        cells.append([row["stage"], shape, f"{row['rms']:.2f}", *printed])
    return cells


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Times all variants of a stage in turn, round after round, so that other load on the machine
    affects all of them."""
    (dtype,) = args.dtypes
    rows = []
    for name, stage in _make_stages(args, dtype, TIMED):
        with FlopCounterMode(display=False) as counter:
            truth = stage.theirs().float().cpu().numpy()
        operations = counter.get_total_flops()
        program = stage.ours()
        calls: dict[str, Callable[[], Any]] = {OURS: program.call}
        error = measure_error(np.asarray(program.call()).astype(np.float32), truth)
        facts = {OURS: {"peak": program.peak, "error": error}}
        for variant in args.variants:
            try:
                facts[variant] = _warm_up(call := stage.make_variant(variant), truth)
                calls[variant] = call
            # There is no such kernel on this device, or too little memory.
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                why = str(error).splitlines()[0][:100]
                rows.append({"stage": name, "variant": variant, "refused": why})
        times: dict[str, list[float]] = {variant: [] for variant in calls}
        for repeat in range(args.repeats):
            for variant in list(calls) if repeat % 2 else reversed(list(calls)):
                times[variant].append(_time_call(calls[variant]) / stage.parts)
        for variant, seconds in times.items():
            pairs = zip(seconds, times[OURS], strict=True)
            rate = operations / stage.parts / statistics.median(seconds)
            row = {"stage": name, "variant": variant, "seconds": seconds}
            row |= {"ratio": statistics.median(theirs / ours for theirs, ours in pairs)}
            row |= {"rate": rate, "mfu": rate / peak if (peak := _find_peak(dtype)) else None}
            rows.append(row | facts[variant])
    return {"rows": rows}


def _warm_up(call: Callable[[], torch.Tensor], truth: np.ndarray) -> dict[str, Any]:
    """Calls a variant of the reference twice: the first call compiles it and gives its error, the
    second its peak memory, including torch's networks and inputs."""
    error = measure_error(call().float().cpu().numpy(), truth)
    if not torch.cuda.is_available():
        return {"peak": None, "error": error}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak": torch.cuda.max_memory_allocated(), "error": error}


def _time_call(call: Callable[[], Any]) -> float:
    _synchronize()
    begin = time.perf_counter()
    jax.block_until_ready(call())
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _find_peak(dtype: str) -> float | None:
    half, single = PEAKS.get(jax.devices()[0].device_kind, (None, None))
    return half if dtype == "bfloat16" else single


def tabulate_speed(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = "stage, variant, s, variant / ours, peak GiB, TFLOP/s, MFU, distance from eager"
    cells = [head.split(", ")]
    for row in rows:
        if "refused" in row:
            cells.append([row["stage"], row["variant"], "not here", *["-"] * 5])
            continue
        memory = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        numbers = [f"{statistics.median(row['seconds']):.4g}", f"{row['ratio']:.2f}", memory]
        numbers += [f"{row['rate'] / 1e12:.3g}", f"{row['mfu']:.0%}" if row["mfu"] else "-"]
        cells.append([row["stage"], row["variant"], *numbers, f"{row['error']:.0e}"])
    return cells


def _make_stages(args: argparse.Namespace, dtype: str, among: Any) -> Iterator[tuple[str, Stage]]:
    """Makes the requested stages, one network at a time, so that only one is in memory."""
    wanted = [name for name in (args.stages or among) if name in among]
    for network in dict.fromkeys(STAGES[name] for name in wanted):
        stages = NETWORKS[network](Case(args.model, args.size, dtype, args.steps, args.attention))
        yield from ((name, stages[name]) for name in wanted if STAGES[name] == network)
        del stages
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def publish(args: argparse.Namespace) -> None:
    """Puts the tables of result files into docs/performance.md."""
    blocks = []
    for path in args.results:
        found = json.loads(path.read_text())
        parts = (found["title"], align(found["table"], markdown=True), " ".join(found["machine"]))
        blocks.append("\n\n".join(parts))
    replace_tables(PAGE, "benchmarks/full_size.py", "\n" + "\n\n".join(blocks) + "\n")


Measure = Callable[[argparse.Namespace], dict[str, Any]]
Tabulate = Callable[[list[dict[str, Any]]], list[list[str]]]
PARTS: dict[str, tuple[Measure, Tabulate]] = {
    "parity": (measure_parity, tabulate_parity),
    "speed": (measure_speed, tabulate_speed),
    "tune": (full_tuning.tune, full_tuning.tabulate_trials),
    "profile": (full_tuning.profile, full_tuning.tabulate_kernels),
    "path": (full_path.run_path, full_path.tabulate_path),
}


def make_parser() -> argparse.ArgumentParser:
    about = "The released networks at full size compared with diffusers."
    main = argparse.ArgumentParser(description=about)
    parts = main.add_subparsers(dest="part", required=True, metavar="PART")
    for name, (function, _) in PARTS.items():
        part = parts.add_parser(name, help=(function.__doc__ or "").partition(".")[0])
        part.add_argument("--model", choices=MODELS, default=MODELS[0])
        part.add_argument("--size", choices=SIZES, default="full")
        part.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
        about = "of the denoising loop, each a guidance pair; times are for one"
        part.add_argument("--steps", type=int, default=2, help=about)
        part.add_argument("--attention", default="auto", help="our attention backend")
        part.add_argument("--stages", nargs="+", choices=STAGES)
        part.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS)[:5])
        part.add_argument("--repeats", type=int, default=5)
        about = "path: for its folders and files, which later calls find again"
        part.add_argument("--folder", type=Path, help=about)
        part.add_argument("--json", type=Path, help="write every figure there")
    tables = parts.add_parser("publish", help=f"put the tables of result files into {PAGE.name}")
    tables.add_argument("results", nargs="+", type=Path)
    return main


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if args.part == "publish":
        publish(args)
        return 0
    both = ["float32", "bfloat16"]
    args.dtypes = args.dtypes or (both if args.part == "parity" else both[1:])
    if args.size == "full" and jax.default_backend() != "gpu":
        sys.exit("full size must have a GPU: got none; --size wide or small will do")
    torch.set_num_threads(os.cpu_count() or 1)
    # Float32 means float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    measure, tabulate = PARTS[args.part]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cogi2v-full-size-") as scratch, torch.inference_mode():
        os.environ.setdefault("XDG_CACHE_HOME", scratch)
        args.folder = args.folder or Path(scratch)
        found = measure(args)
    rows = found["rows"]
    what = f"{args.size} size, {' and '.join(args.dtypes)}, {args.steps} steps"
    title, about = f"{args.part}, {args.model}, {what}", [*_describe_gpu(), *describe_machine()]
    record = {"title": title, "machine": about, "table": tabulate(rows), **found}
    record["seconds"] = time.perf_counter() - begin
    table = align(record["table"], markdown=False)
    print("\n".join([title, *about, "", table, *found.get("faults", [])]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if found.get("faults") else 0


def _describe_gpu() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU:"]
    theirs = f"CUDA {torch.version.cuda} and cuDNN {torch.backends.cudnn.version()}"
    ours = jax.devices()[0].client.platform_version
    return [f"{torch.cuda.get_device_name()}, torch's {theirs}, {ours};"]


if __name__ == "__main__":
    sys.exit(main())
