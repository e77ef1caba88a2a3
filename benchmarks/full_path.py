"""The whole path at full size, by the command lines that users type: random weights as a diffusers
folder, then to-flax, sample, record and verify, each a process of its own whose time and memory are
measured."""

# pyright: reportPrivateImportUsage=false, reportMissingImports=false, reportArgumentType=false
import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from full_networks import cut, reference

from cogi2v_jax.weights.hub import EMBEDDED

PROMPT = "a boat drifts out of the harbour"
LINES = 8  # of a command's output that are kept


def path(args: argparse.Namespace) -> dict[str, Any]:
    """Makes, converts, samples, records and verifies. What `--folder` holds already is not made
    again, so that calls may share the work."""
    dtype = args.dtypes[0]
    source, converted, video, trace, figures = (
        args.folder / name for name in ("source", "converted", "out.mp4", "trace", "verify.json")
    )
    _, asked = cut(args.model, args.size)
    rows: list[dict[str, Any]] = []
    if not source.is_dir():
        begin = time.perf_counter()
        write(args.model, args.size, source)
        rows.append(
            {
                "step": "weights written",
                "seconds": time.perf_counter() - begin,
                "peak": None,
                "said": [],
            }
        )
    request = [
        f"--{name}={value}" for name, value in {**asked, "num_inference_steps": args.steps}.items()
    ]
    request += [f"--prompt={PROMPT}", "--scheduler=ddim"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    convert = [sys.executable, "-m", "cogi2v_convert"]
    commands = {
        "to-flax": (converted, [*convert, "to-flax", source, converted]),
        "sample": (
            video,
            [
                sys.executable,
                "-m",
                "cogi2v_jax.sample",
                "--model",
                converted,
                "--image",
                picture(),
                "--output",
                video,
                *request,
            ],
        ),
        "record": (
            trace,
            [
                *convert,
                "record",
                source,
                trace,
                "--image",
                picture(),
                "--device",
                device,
                "--dtype",
                dtype,
                *request,
            ],
        ),
        "verify": (figures, [*convert, "verify", converted, trace, "--json", figures]),
    }
    faults = []
    for step, (made, command) in commands.items():
        if not made.exists():
            row = {"step": step, **measured(command)}
            rows.append(row)
            if row["code"]:
                faults.append(f"{step} must succeed: got {' '.join(row['said'])}")
                break
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    for row in rows:
        row["bytes"] = size
    return {"rows": rows, "faults": faults}


def path_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["step", "s", "peak host GiB", "GiB of weights", "last line"]]
    for row in rows:
        memory = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        last = row["said"][-1] if row["said"] else ""
        cells.append(
            [row["step"], f"{row['seconds']:.1f}", memory, f"{row['bytes'] / 2**30:.2f}", last]
        )
    return cells


def write(model: str, size: str, folder: Path) -> None:
    """A diffusers folder of seeded random weights in bfloat16, in shards as the released ones have
    them."""
    config, _ = cut(model, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = {
        part: reference(part, config, torch.bfloat16, device)
        for part in ("text_encoder", "vae", "transformer")
    }
    tokenizer = EMBEDDED / "cogi2v-tiny" / "tokenizer"
    diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(tokenizer),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            **vars(config.scheduler), **config.scheduler.REQUIRED
        ),
        **networks,
    ).save_pretrained(part := folder.with_name(f".{folder.name}.part"), max_shard_size="5GB")
    # Newer transformers leave it out.
    shutil.copyfile(tokenizer / "spiece.model", part / "tokenizer" / "spiece.model")
    part.rename(folder)


def picture() -> Path:
    return EMBEDDED / "example.png"


# A process counts the memory of the one that it was forked from as its own, so that a small one has
# to stand between.
BETWEEN = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def measured(command: list[Any]) -> dict[str, Any]:
    """Runs a command: its wall seconds, the most memory that it held, its exit code and the end of
    what it said."""
    begin = time.perf_counter()
    arguments = [sys.executable, "-c", BETWEEN, *map(str, command)]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    *said, peak = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    return {
        "seconds": time.perf_counter() - begin,
        "peak": int(peak) * 1024,
        "code": done.returncode,
        "said": said[-LINES:],
    }
