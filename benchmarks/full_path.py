"""The whole path at full size with the commands that users run: random weights as a diffusers
folder, then to-flax, sample, record and verify, each a process with its time and memory measured.
"""

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
from full_networks import build_reference, configure

from cogi2v_jax.names import ASSETS

PROMPT = "a boat drifts out of the harbour"
LINES = 8  # of a command's output, kept in the results


def run_path(args: argparse.Namespace) -> dict[str, Any]:
    """Writes weights, converts, samples, records and verifies. Skips what `--folder` already has,
    so that several calls may share the work."""
    dtype = args.dtypes[0]
    source, converted, video, trace, figures = (
        args.folder / name for name in ("source", "converted", "out.mp4", "trace", "verify.json")
    )
    _, asked = configure(args.model, args.size)
    rows: list[dict[str, Any]] = []
    if not source.is_dir():
        begin = time.perf_counter()
        write(args.model, args.size, source)
        seconds = time.perf_counter() - begin
        rows.append({"step": "weights written", "seconds": seconds, "peak": None, "said": []})
    asked = asked | {"num_inference_steps": args.steps, "prompt": PROMPT, "scheduler": "ddim"}
    asked["image"] = ASSETS / "example.png"
    request = [f"--{name}={value}" for name, value in asked.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = ["cogi2v_jax.sample", "--model", converted, "--output", video, *request]
    record = ["record", source, trace, "--device", device, "--dtype", dtype, *request]
    commands = {
        "to-flax": (converted, ["cogi2v_convert", "to-flax", source, converted]),
        "sample": (video, sample),
        "record": (trace, ["cogi2v_convert", *record]),
        "verify": (figures, ["cogi2v_convert", "verify", converted, trace, "--json", figures]),
    }
    faults = []
    for step, (target, command) in commands.items():
        if not target.exists():
            row = {"step": step, **run_measured([sys.executable, "-m", *command])}
            rows.append(row)
            if row["code"]:
                faults.append(f"{step} must succeed: got {' '.join(row['said'])}")
                break
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    for row in rows:
        row["bytes"] = size
    return {"rows": rows, "faults": faults}


def tabulate_path(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["step", "s", "peak host GiB", "GiB of weights", "last line"]]
    for row in rows:
        memory = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        seconds, size = f"{row['seconds']:.1f}", f"{row['bytes'] / 2**30:.2f}"
        cells.append([row["step"], seconds, memory, size, row["said"][-1] if row["said"] else ""])
    return cells


def write(model: str, size: str, folder: Path) -> None:
    """Writes a diffusers folder of seeded random weights in bfloat16, in shards of the released
    checkpoints' size."""
    config, _ = configure(model, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = ("text_encoder", "vae", "transformer")
    networks = {part: build_reference(part, config, torch.bfloat16, device) for part in parts}
    settings = vars(config.scheduler) | config.scheduler.REQUIRED
    tokenizer = ASSETS / "cogi2v-tiny" / "tokenizer"
    diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(tokenizer),
        scheduler=diffusers.CogVideoXDDIMScheduler(**settings),
        **networks,
    ).save_pretrained(part := folder.with_name(f".{folder.name}.part"), max_shard_size="5GB")
    # Newer transformers do not save it.
    shutil.copyfile(tokenizer / "spiece.model", part / "tokenizer" / "spiece.model")
    part.rename(folder)


# A process counts the memory of the process that it was forked from as its own. So a small process
# starts the command.
STARTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_measured(command: list[Any]) -> dict[str, Any]:
    """Runs a command. Returns its wall seconds, peak memory in bytes, exit code and last lines."""
    begin = time.perf_counter()
    arguments = [sys.executable, "-c", STARTER, *map(str, command)]
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(arguments, **output, check=False)
    *said, peak = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    row = {"seconds": time.perf_counter() - begin, "peak": int(peak) * 1024}
    return row | {"code": done.returncode, "said": said[-LINES:]}
