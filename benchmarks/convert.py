"""Converting weights against copying them: bytes a second, and the most memory that it takes.

    python benchmarks/convert.py [--layers N] [--folder DIR] [--repeats N] [--json FILE]

A random transformer of CogVideoX-5B-I2V (42 layers, 11 GB in bfloat16; `--layers` takes a stated
part of it where the disk is small) is copied file by file and converted, in turn, and both are
flushed to the disk; ours hashes what it reads and sums what it writes besides. The small T5 and VAE
beside it are in both. It ends with a check of the folder.
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
from full_networks import cut
from vs_reference import aligned, machine

from cogi2v_jax import config
from cogi2v_jax.disk import sync
from cogi2v_jax.weights.pieces import abstract, leaf_names

SHARD = 5e9  # bytes of a source file, as the released ones have


def write(folder: Path, layers: int) -> None:
    """A diffusers folder whose transformer is of full width, written tensor by tensor."""
    full_path.write("cogvideox-5b-i2v", "small", folder)
    network = dataclasses.replace(config.named("cogvideox-5b-i2v").transformer, num_layers=layers)
    small, _ = cut("cogvideox-5b-i2v", "small")
    network = dataclasses.replace(network, text_embed_dim=small.text_encoder.d_model)
    whole = dataclasses.replace(small, transformer=network)
    shapes = {
        name: leaf.shape
        for name, leaf in leaf_names(abstract(whole, "transformer", np.dtype(np.float32))).items()
    }
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
    noise = (
        np.random.default_rng(0)
        .integers(0, 2**14, max(tensor.size for tensor in tensors.values()) // 2, np.uint16)
        .view(dtype)
    )
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
    """What `cp -r` does, and everything on the disk at the end."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        sync(path)


def clear(*made: Path) -> None:
    """Whatever comes next begins with the same room, on the disk and in memory: pages that a
    virtual machine has not had are slow."""
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Converting a transformer of full width against copying it."
    )
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cogi2v-convert-", dir=args.folder) as scratch:
        source, copied, converted = (
            Path(scratch, name) for name in ("source", "copied", "converted")
        )
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
            for step, arguments in (
                ("to-flax", ["to-flax", source, converted]),
                ("check", ["check", converted]),
            ):
                found = full_path.measured([*command, *arguments])
                if found["code"]:
                    sys.exit("\n".join(found["said"]))
                seconds[step].append(found["seconds"])
                peak = max(peak, found["peak"]) if step == "to-flax" else peak
    ratio = statistics.median(
        a / b for a, b in zip(seconds["copy"], seconds["to-flax"], strict=True)
    )
    cells = [["step", "s", "GB/s"]]
    for step, times in seconds.items():
        middle = statistics.median(times)
        cells.append([step, f"{middle:.1f}", f"{size / middle / 1e9:.2f}"])
    about = f"{args.layers} of 42 layers, {size / 1e9:.1f} GB, medians of {args.repeats}"
    print("\n".join([*machine(), about, aligned(cells, markdown=False)]))
    print(
        f"to-flax runs at {ratio:.0%} of a copy's speed, start of the program included, in {peak / 2**30:.2f} GiB of memory"
    )
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "bytes": size,
                    "seconds": seconds,
                    "peak": peak,
                    "ratio": ratio,
                    "machine": machine(),
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
