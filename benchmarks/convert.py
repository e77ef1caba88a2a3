"""Conversion of weights compared with copying them: bytes a second, and the peak memory.

    python benchmarks/convert.py [--layers N] [--folder DIR] [--repeats N] [--json FILE]

A random transformer of CogVideoX-5B-I2V (42 layers, 11 GB in bfloat16; fewer `--layers` fit a
smaller disk) is copied file by file and converted, in turn. Both are flushed to the disk. The
conversion also computes hashes of what it reads and checksums of what it writes. Both include a
small T5 and VAE. Every round ends with a check of the converted folder.
"""

# pyright: reportPrivateImportUsage=false, reportMissingImports=false
import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import full_path
import ml_dtypes
import numpy as np
from cogi2v_convert.sources.diffusers import write_index, write_safetensors
from cogi2v_convert.sources.parts import Tensor
from cogi2v_convert.tables.rules import expand
from cogi2v_convert.tables.transformer import table
from full_networks import configure
from vs_reference import align, describe_machine

from cogi2v_jax import config
from cogi2v_jax.disk import sync
from cogi2v_jax.weights.pieces import abstract, leaf_names

SHARD = 5e9  # bytes of a source file, as in the released checkpoints


def write(folder: Path, layers: int) -> None:
    """Writes a diffusers folder with a transformer of full width, tensor by tensor."""
    full_path.write("cogvideox-5b-i2v", "small", folder)
    network = dataclasses.replace(config.named("cogvideox-5b-i2v").transformer, num_layers=layers)
    small, _ = configure("cogvideox-5b-i2v", "small")
    network = dataclasses.replace(network, text_embed_dim=small.text_encoder.d_model)
    whole = dataclasses.replace(small, transformer=network)
    leaves = leaf_names(abstract(whole, "transformer", np.dtype(np.float32)))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    place, dtype = folder / "transformer", np.dtype(ml_dtypes.bfloat16)
    shutil.rmtree(place)
    place.mkdir()
    tensors, offset = {}, 0
    for name, (rule, layer) in expand(table(network), layers).items():
        shape = rule.torch_shape(shapes[rule.flax][0 if layer is None else 1 :])
        tensors[name] = Tensor(
            place / f"diffusion_pytorch_model-{1 + int(offset // SHARD):05d}.safetensors",
            shape,
            dtype,
        )
        offset += tensors[name].size
    most = max(tensor.size for tensor in tensors.values()) // 2
    noise = np.random.default_rng(0).integers(0, 2**14, most, np.uint16).view(dtype)
    for file in sorted({tensor.file for tensor in tensors.values()}):
        inside = {name: tensor for name, tensor in tensors.items() if tensor.file == file}
        write_safetensors(
            file,
            inside,
            (
                (name, noise[: tensor.size // 2].reshape(tensor.shape))
                for name, tensor in inside.items()
            ),
        )
    write_index(folder, "transformer", tensors)
    (place / "config.json").write_text(json.dumps(dataclasses.asdict(network)))


def copy(source: Path, target: Path) -> None:
    """Copies a folder as `cp -r` does, then flushes every file to the disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        sync(path)


def clear(*made: Path) -> None:
    """Removes folders, so that every run starts with the same free disk and memory. In a virtual
    machine, the first write to a page of memory is slow."""
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def main() -> None:
    about = "Conversion of a transformer of full width compared with copying it."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--repeats", type=int, default=3)
    about = "on the disk to measure (default: a temporary one)"
    parser.add_argument("--folder", type=Path, help=about)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cogi2v-convert-", dir=args.folder) as scratch:
        source, copied, converted = (Path(scratch, name) for name in ("from", "copied", "to"))
        write(source, args.layers)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        command = [sys.executable, "-m", "cogi2v_convert"]
        seconds: dict[str, list[float]] = {"copy": [], "to-flax": [], "check": []}
        peak = 0
        for _ in range(args.repeats):
            clear(copied, converted)
            begin = time.perf_counter()
            copy(source, copied)
            seconds["copy"].append(time.perf_counter() - begin)
            clear(copied, converted)
            for step, folders in (("to-flax", [source, converted]), ("check", [converted])):
                found = full_path.run_measured([*command, step, *folders])
                if found["code"]:
                    sys.exit("\n".join(found["said"]))
                seconds[step].append(found["seconds"])
                peak = max(peak, found["peak"]) if step == "to-flax" else peak
    pairs = zip(seconds["copy"], seconds["to-flax"], strict=True)
    ratio = statistics.median(copied / converted for copied, converted in pairs)
    cells = [["step", "s", "GB/s"]]
    for step, times in seconds.items():
        median = statistics.median(times)
        cells.append([step, f"{median:.1f}", f"{size / median / 1e9:.2f}"])
    about = f"{args.layers} of 42 layers, {size / 1e9:.1f} GB, medians of {args.repeats}"
    print("\n".join([*describe_machine(), about, align(cells, markdown=False)]))
    print(
        f"to-flax runs at {ratio:.0%} of a copy's speed, start of the program included, in "
        f"{peak / 2**30:.2f} GiB of memory"
    )
    if args.json:
        record = {"bytes": size, "seconds": seconds, "peak": peak}
        record |= {"ratio": ratio, "machine": describe_machine()}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
