"""The released networks at full size, with random weights, against diffusers in one process on one
GPU: are they the same, and how fast.

    python benchmarks/full_size.py parity  --model cogvideox-5b-i2v           # every stage, float32 and bfloat16
    python benchmarks/full_size.py speed   --stages "denoising step"          # against eager, torch.compile, cuDNN attention
    python benchmarks/full_size.py tune                                       # attention backends and compiler options of ours
    python benchmarks/full_size.py profile                                    # where the time of a step goes, ours and theirs
    python benchmarks/full_size.py path    --folder /scratch                  # to-flax, sample, record, verify by their command lines
    python benchmarks/full_size.py readme  results/*.json                     # README's tables, from what the others wrote

Every part runs alone, prints a table and writes it with `--json FILE`, and is meant to end within
nine minutes on an H100 with 16 cores; `--stages`, `--variants` and `--dtypes` cut one down. Where
there is no GPU, `--size wide` (full width, two layers, a small picture) and `--size small` run on
the CPU.
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

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two frameworks share the memory

from vs_reference import aligned, machine  # which checks that the reference is installed

# isort: split
import full_path
import full_tuning
import jax
import numpy as np
import torch
from full_networks import SIZES
from full_stages import NETWORKS, VARIANTS, Case, Stage
from torch.utils.flop_counter import FlopCounterMode

README = Path(__file__).parent.parent / "README.md"
MODELS = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
STAGES = {
    "text": "text_encoder",
    "image encode": "vae",
    "VAE decode": "vae",
    "DiT forward": "transformer",
    "denoising step": "transformer",
}
TIMED = ("text", "VAE decode", "denoising step")
# Products in bfloat16 and in float32 that a device does a second at most.
PEAKS = {"NVIDIA H100 80GB HBM3": (989e12, 67e12), "NVIDIA H200": (989e12, 67e12)}
# Relative errors in float32 of a stage and of the loop, and in bfloat16 our error over the
# reference's own.
MOST, LOOP_MOST, RATIO = 1e-5, 1e-4, 1.1
OURS = "cogi2v-jax"


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """Every stage's result in both dtypes; a dtype's networks are gone before the next one's are
    made."""
    results: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for dtype in args.dtypes:
        for name, stage in _stages(args, dtype, STAGES):
            theirs = stage.theirs().float().cpu().numpy()
            results[name, dtype] = theirs, np.asarray(stage.ours().call()).astype(np.float32)
    rows = []
    for name in dict.fromkeys(stage for stage, _ in results):
        theirs, _ = results.get((name, "float32")) or results[name, "bfloat16"]
        row = {
            "stage": name,
            "shape": list(theirs.shape),
            "rms": float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64)))),
        }
        if single := results.get((name, "float32")):
            row["float32"] = _error(single[1], single[0])
        if half := results.get((name, "bfloat16")):
            truth = single[0] if single else half[0]
            row["bfloat16"] = _error(half[1], truth)
            row["reference_bfloat16"] = _error(half[0], truth) if single else None
        rows.append(row)
    return {"rows": rows, "faults": [fault for row in rows for fault in _faults(row)]}


def _error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(
        np.linalg.norm(ours.astype(np.float64) - truth) / np.linalg.norm(truth.astype(np.float64))
    )


def _faults(row: dict[str, Any]) -> Iterator[str]:
    most = LOOP_MOST if row["stage"] == "denoising step" else MOST
    if not row.get("float32", 0.0) <= most:
        yield f"{row['stage']} must be within {most:g} of the reference in float32: got {row['float32']:.1e}"
    if row.get("reference_bfloat16") and not row["bfloat16"] <= RATIO * row["reference_bfloat16"]:
        yield f"{row['stage']} must be within {RATIO} x the reference's own error in bfloat16: got {row['bfloat16']:.1e}"


def parity_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [
        ["stage", "result", "rms", "float32", "bfloat16: ours", "the reference's", "ours / theirs"]
    ]
    for row in rows:
        half, theirs = row.get("bfloat16"), row.get("reference_bfloat16")
        errors = [
            f"{error:.1e}" if error is not None else "-"
            for error in (row.get("float32"), half, theirs)
        ]
        shape = "x".join(map(str, row["shape"]))
        cells.append(
            [
                row["stage"],
                shape,
                f"{row['rms']:.2f}",
                *errors,
                f"{half / theirs:.2f}" if half and theirs else "-",
            ]
        )
    return cells


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Every variant of every stage in turn, round after round, so that whatever else happens meets
    them all."""
    (dtype,) = args.dtypes
    rows = []
    for name, stage in _stages(args, dtype, TIMED):
        with FlopCounterMode(display=False) as counter:
            truth = stage.theirs().float().cpu().numpy()
        operations = counter.get_total_flops()
        program = stage.ours()
        calls: dict[str, Callable[[], Any]] = {OURS: program.call}
        facts = {
            OURS: {
                "peak": program.peak,
                "error": _error(np.asarray(program.call()).astype(np.float32), truth),
            }
        }
        for variant in args.variants:
            try:
                facts[variant] = _warmed(call := stage.variant(variant), truth)
                calls[variant] = call
            except (
                RuntimeError,
                torch._dynamo.exc.TorchDynamoException,
            ) as error:  # no such kernel here, or no room
                rows.append(
                    {"stage": name, "variant": variant, "refused": str(error).splitlines()[0][:100]}
                )
        times: dict[str, list[float]] = {variant: [] for variant in calls}
        for repeat in range(args.repeats):
            for variant in list(calls) if repeat % 2 else reversed(list(calls)):
                times[variant].append(_seconds(calls[variant]) / stage.parts)
        for variant, seconds in times.items():
            ratio = statistics.median(
                theirs / ours for theirs, ours in zip(seconds, times[OURS], strict=True)
            )
            rate = operations / stage.parts / statistics.median(seconds)
            share = rate / peak if (peak := _peak(dtype)) else None
            rows.append(
                {
                    "stage": name,
                    "variant": variant,
                    "seconds": seconds,
                    "ratio": ratio,
                    "rate": rate,
                    "mfu": share,
                    **facts[variant],
                }
            )
    return {"rows": rows}


def _warmed(call: Callable[[], torch.Tensor], truth: np.ndarray) -> dict[str, Any]:
    """Compiles, compares, and measures the memory of a second call, torch's networks and inputs
    included."""
    error = _error(call().float().cpu().numpy(), truth)
    if not torch.cuda.is_available():
        return {"peak": None, "error": error}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak": torch.cuda.max_memory_allocated(), "error": error}


def _seconds(call: Callable[[], Any]) -> float:
    _synchronize()
    begin = time.perf_counter()
    jax.block_until_ready(call())
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(dtype: str) -> float | None:
    half, single = PEAKS.get(jax.devices()[0].device_kind, (None, None))
    return half if dtype == "bfloat16" else single


def speed_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [
        [
            "stage",
            "variant",
            "s",
            "variant / ours",
            "peak GiB",
            "TFLOP/s",
            "MFU",
            "distance from eager",
        ]
    ]
    for row in rows:
        if "refused" in row:
            cells.append([row["stage"], row["variant"], "not here", *["-"] * 5])
            continue
        memory = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        numbers = [
            f"{statistics.median(row['seconds']):.4g}",
            f"{row['ratio']:.2f}",
            memory,
            f"{row['rate'] / 1e12:.3g}",
        ]
        cells.append(
            [
                row["stage"],
                row["variant"],
                *numbers,
                f"{row['mfu']:.0%}" if row["mfu"] else "-",
                f"{row['error']:.0e}",
            ]
        )
    return cells


def _stages(args: argparse.Namespace, dtype: str, among: Any) -> Iterator[tuple[str, Stage]]:
    """The stages asked for, network by network."""
    wanted = [name for name in (args.stages or among) if name in among]
    for network in dict.fromkeys(STAGES[name] for name in wanted):
        stages = NETWORKS[network](Case(args.model, args.size, dtype, args.steps, args.attention))
        yield from ((name, stages[name]) for name in wanted if STAGES[name] == network)
        del stages
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def readme(args: argparse.Namespace) -> None:
    """Puts the tables of result files between README's marks."""
    blocks = []
    for path in args.results:
        found = json.loads(path.read_text())
        blocks.append(
            f"{found['title']}\n\n{aligned(found['table'], markdown=True)}\n\n{' '.join(found['machine'])}"
        )
    begin, end = "<!-- benchmarks/full_size.py -->", "<!-- end -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    README.write_text(
        before + "\n\n".join([begin, *blocks, end]) + rest.partition(end)[2], encoding="utf-8"
    )


# What each part measures, and the table of its rows.
PARTS: dict[
    str,
    tuple[
        Callable[[argparse.Namespace], dict[str, Any]],
        Callable[[list[dict[str, Any]]], list[list[str]]],
    ],
] = {
    "parity": (parity, parity_table),
    "speed": (speed, speed_table),
    "tune": (full_tuning.tune, full_tuning.tune_table),
    "profile": (full_tuning.profile, full_tuning.profile_table),
    "path": (full_path.path, full_path.path_table),
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        description="The released networks at full size against diffusers."
    )
    parts = main.add_subparsers(dest="part", required=True, metavar="PART")
    for name, (function, _) in PARTS.items():
        part = parts.add_parser(name, help=(function.__doc__ or "").partition(".")[0])
        part.add_argument("--model", choices=MODELS, default=MODELS[0])
        part.add_argument("--size", choices=SIZES, default="full")
        part.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
        part.add_argument(
            "--steps",
            type=int,
            default=2,
            help="of the loop, as a pair with guidance; times are for one",
        )
        part.add_argument("--attention", default="auto", help="backend of ours")
        part.add_argument("--stages", nargs="+", choices=STAGES)
        part.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS)[:5])
        part.add_argument("--repeats", type=int, default=5)
        part.add_argument(
            "--folder",
            type=Path,
            help="path: where its folders and files are kept, and found again",
        )
        part.add_argument("--json", type=Path, help="write every figure there")
    tables = parts.add_parser("readme", help="README's tables from result files")
    tables.add_argument("results", nargs="+", type=Path)
    return main


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.part == "readme":
        readme(args)
        return 0
    args.dtypes = args.dtypes or (
        ["float32", "bfloat16"] if args.part == "parity" else ["bfloat16"]
    )
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
    title = f"{args.part}, {args.model}, {args.size} size, {' and '.join(args.dtypes)}, {args.steps} steps"
    record = {
        "title": title,
        "machine": [*_gpu(), *machine()],
        "table": tabulate(rows),
        **found,
        "seconds": time.perf_counter() - begin,
    }
    print(
        "\n".join(
            [
                title,
                *record["machine"],
                "",
                aligned(record["table"], markdown=False),
                *found.get("faults", []),
            ]
        ),
        flush=True,
    )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if found.get("faults") else 0


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU:"]
    cudnn = torch.backends.cudnn.version()
    return [
        f"{torch.cuda.get_device_name()}, torch's CUDA {torch.version.cuda} and cuDNN {cudnn}, {jax.devices()[0].client.platform_version};"
    ]


if __name__ == "__main__":
    sys.exit(main())
