"""Our pipeline against diffusers on this machine: the same weights, shapes and dtype in one
process, in pairs, compile time apart.

    python benchmarks/vs_reference.py [--size tiny mid] [--repeats N] [--dtype float32] [--json FILE] [--markdown]

A pair is one run of ours and one of theirs, back to back, in alternating order, so that whatever
else the machine does meets both. Times are medians over pairs; the ratio is theirs / ours within a
pair, as median and quartiles: above 1, ours is faster. Before anything is timed, both sides'
outputs are compared, so that the same thing is timed. The share of the CPU that other processes
took meanwhile is printed: they slow torch's threads, which wait for each other at every operation,
more than ours, so figures count only where it is small.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(
    HF_HUB_OFFLINE="1",
    TQDM_DISABLE="1",
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
)

import jax
import numpy as np
from PIL import Image

import cogi2v_jax
from cogi2v_jax.devices.compiling import Stopwatch
from cogi2v_jax.devices.sharding import put, split
from cogi2v_jax.media.images import fit_image, read_image
from cogi2v_jax.models.tokenizer import tokenize
from cogi2v_jax.pipeline import decode, encode_image, prepare
from cogi2v_jax.sampling import stages as programs
from cogi2v_jax.sampling.programs import Session
from cogi2v_jax.weights.hub import EMBEDDED

try:
    import diffusers
    import torch
    import transformers
except ImportError as missing:
    sys.exit(
        f"benchmarks/vs_reference.py must have the reference installed: {missing}; pip install 'cogi2v-jax[reference]'"
    )

TINY = EMBEDDED / "cogi2v-tiny"
# Relative error; videos are bytes, of which some round the other way.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.1}
REST = 0.02  # seconds before every run, in which the other side's worker threads stop spinning
PROMPT, GUIDANCE = "the red circle moves left", 3.0


class Size(NamedTuple):
    height: int
    width: int
    frames: int
    steps: int  # of DDIM with guidance, as a pair
    repeats: int
    make: Callable[[Path], Path]  # diffusers weights, inside a scratch folder


class Stage(NamedTuple):  # two calls that compute the same array
    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    parts: int = 1  # what both times are divided by


# Stage, seconds of ours and of theirs pair by pair, relative error.
Row = tuple[str, list[float], list[float], float]


def mid(scratch: Path) -> Path:
    """Seeded random weights as a diffusers folder: 1,920 video and 226 text tokens through 4 layers
    of 8 heads of 64."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    }
    t5 = {
        "vocab_size": 39,
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 1024,
        "num_layers": 4,
        "num_heads": 8,
        "feed_forward_proj": "gated-gelu",
    }
    sizes = {
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "num_layers": 4,
        "in_channels": 32,
        "text_embed_dim": 256,
    }
    table = {
        "sample_height": 32,
        "sample_width": 48,
        "sample_frames": 17,
        "use_learned_positional_embeddings": True,
    }
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(TINY / "tokenizer"),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**t5)),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(32, 64, 64, 128), layers_per_block=1, **blocks
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **sizes, **table, use_rotary_positional_embeddings=True
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler.from_pretrained(TINY / "scheduler"),
    )
    pipe.save_pretrained(folder := scratch / "mid")
    # Newer transformers leave it out.
    shutil.copyfile(TINY / "tokenizer" / "spiece.model", folder / "tokenizer" / "spiece.model")
    return folder


SIZES = {
    "tiny": Size(64, 64, 9, steps=10, repeats=25, make=lambda scratch: TINY),
    "mid": Size(256, 384, 17, steps=4, repeats=5, make=mid),
}


def frames_last(latents: torch.Tensor) -> np.ndarray:
    """[b t c h w], the reference's latents, as our [b t h w c]."""
    return latents.float().permute(0, 1, 3, 4, 2).numpy()


def stages(size: Size, folder: Path, dtype: str, watch: Stopwatch) -> list[Stage]:
    """Both sides' callables, fed with equal noise. A stage's inputs are the same on both sides: the
    reference's results, computed here."""
    pipe: Any = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    models = cogi2v_jax.load(folder, dtype=dtype, say=lambda line: None)
    config, length = models.config, models.config.transformer.max_text_seq_length
    picture = Image.open(EMBEDDED / "example.png").convert("RGB").resize((size.width, size.height))
    asked: dict[str, Any] = {
        "height": size.height,
        "width": size.width,
        "num_frames": size.frames,
        "num_inference_steps": size.steps,
    }
    asked |= {"guidance_scale": GUIDANCE, "use_dynamic_cfg": False}
    request = cogi2v_jax.Request(picture, PROMPT, scheduler="ddim", fit="stretch", **asked).resolve(
        config
    )
    job = prepare(models, request)
    run, shape = Session(models, job, watch), job.shape

    def their_text() -> torch.Tensor:
        prompt, negative = pipe.encode_prompt(
            PROMPT, "", do_classifier_free_guidance=True, max_sequence_length=length
        )
        return torch.cat([negative, prompt])

    def their_image() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = pipe.video_processor.preprocess(picture, height=size.height, width=size.width).to(
            getattr(torch, dtype)
        )
        sizes = (1, shape.channels, size.frames, size.height, size.width)
        return pipe.prepare_latents(
            pixels, *sizes, pixels.dtype, torch.device("cpu"), torch.manual_seed(5)
        )

    text, (start, image) = their_text(), their_image()
    # The reference draws the posterior's noise first, then the initial latents.
    posterior = torch.randn(
        (1, 1, shape.channels, shape.height, shape.width), generator=torch.manual_seed(5)
    )
    noise = cogi2v_jax.Noise(posterior=frames_last(posterior), initial=frames_last(start))
    inputs = [
        put(array, split(job.mesh))
        for array in (frames_last(image), text.float().numpy().astype(models.dtype))
    ]

    def their_steps() -> torch.Tensor:
        pipe.scheduler.set_timesteps(size.steps)
        rotary = pipe._prepare_rotary_positional_embeddings(
            size.height, size.width, shape.frames, torch.device("cpu")
        )
        x = start
        for t in pipe.scheduler.timesteps:
            both = torch.cat([torch.cat([x] * 2), torch.cat([image] * 2)], dim=2)
            v = pipe.transformer(
                both, text, t.expand(2), image_rotary_emb=rotary, return_dict=False
            )[0].float()
            unconditional, conditional = v.chunk(2)
            x = pipe.scheduler.step(
                unconditional + GUIDANCE * (conditional - unconditional), t, x, return_dict=False
            )[0].to(text.dtype)
        return x

    latents, positions = their_steps(), job.positions()

    def our_text() -> Any:
        ids, _ = tokenize(models.folder / "tokenizer", ["", PROMPT], length)
        return run(programs.encode_text, ids)

    def our_image() -> Any:
        pixels = fit_image(read_image(picture), size.height, size.width, "stretch")[None, None]
        draw = encode_image(run, pixels), noise.posterior, job.keys, job.image_scale
        return run(programs.draw_image, *draw, frames=shape.frames)

    def our_steps() -> Any:
        modulation = run(programs.modulate, *job.time)
        start = noise.initial, job.keys
        state = run(programs.draw_start, *start, shape=tuple(shape[:4]))
        rows = np.int32(0), job.tableau, modulation, None, job.keys
        return run(programs.denoise, state, *rows, *inputs, positions, steps=size.steps).x

    def their_video() -> np.ndarray:
        return pipe.video_processor.postprocess_video(
            pipe.decode_latents(latents), output_type="np"
        )

    def their_whole() -> np.ndarray:
        return pipe(
            picture,
            PROMPT,
            **asked,
            max_sequence_length=length,
            generator=torch.manual_seed(5),
            output_type="np",
        ).frames

    return [
        Stage("text", our_text, lambda: their_text().float().numpy()),
        Stage("image encode", our_image, lambda: frames_last(their_image()[1])),
        Stage(
            "one denoising step", our_steps, lambda: frames_last(their_steps()), parts=size.steps
        ),
        Stage("VAE decode", lambda: decode(models, frames_last(latents)), their_video),
        Stage("whole", lambda: cogi2v_jax.generate(models, request, noise).video, their_whole),
    ]


def relative_error(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|; our videos are bytes, against which theirs are rounded alike."""
    ours, theirs = np.asarray(ours), np.round(theirs * 255) if ours.dtype == np.uint8 else theirs
    return float(
        np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64))
    )


def measure(stage: Stage, repeats: int, tolerance: float) -> Row:
    """Compares, which also warms both sides up, then times in pairs."""
    error = relative_error(stage.ours(), stage.theirs())
    if error > tolerance:
        sys.exit(
            f"{stage.name}: the two sides' outputs must agree within {tolerance:g}: got a relative error of {error:.2g}"
        )
    calls, times = (stage.ours, stage.theirs), ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 else (1, 0):
            time.sleep(REST)
            begin = time.perf_counter()
            jax.block_until_ready(calls[side]())
            times[side].append((time.perf_counter() - begin) / stage.parts)
    return stage.name, *times, error


def machine() -> list[str]:
    """Everything that a figure depends on and a reader can't see."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("cogi2v-jax", "jax", "flax", "torch", "diffusers", "transformers")
    )
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch, {len(os.sched_getaffinity(0))} for XLA"
    return [
        f"{names[0] if names else 'CPU'}, {threads}",
        f"{packages}; {time.strftime('%Y-%m-%d')}",
    ]


def others() -> np.ndarray:
    """(CPU seconds of all processes but this one, CPU seconds that there were), since some time in
    the past."""
    ticks = np.array(Path("/proc/stat").read_text().split()[1:9], float) / os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return np.array([ticks.sum() - idle - time.process_time(), ticks.sum()])


def table(rows: list[Row], markdown: bool) -> str:
    cells = [["stage", "ours ms", "diffusers ms", "ratio", "quartiles", "relative error"]]
    for name, ours, theirs, error in rows:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        times = [f"{1e3 * statistics.median(side):.4g}" for side in (ours, theirs)]
        cells.append([name, *times, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", f"{error:.0e}"])
    return aligned(cells, markdown)


def aligned(cells: list[list[str]], markdown: bool) -> str:
    """A table, its heads first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Our pipeline against diffusers, in pairs.")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, help="pairs a stage; each size has its own default")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--json", type=Path, help="also write every single time there")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print("\n".join(machine()))
    record: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="cogi2v-benchmark-") as scratch, torch.inference_mode():
        # An empty cache, so that compile times are those of a first run.
        os.environ["XDG_CACHE_HOME"] = scratch
        for name in args.size:
            size, watch, before = SIZES[name], Stopwatch(), others()
            todo = stages(size, size.make(Path(scratch)), args.dtype, watch)
            rows = [
                measure(stage, args.repeats or size.repeats, TOLERANCE[args.dtype])
                for stage in todo
            ]
            (taken, total), pairs, compiling = (
                others() - before,
                len(rows[0][1]),
                watch.seconds["compile"],
            )
            what = f"{name}: {size.width}x{size.height}, {size.frames} frames, {size.steps} DDIM steps with guidance, {args.dtype}"
            print(f"\n{what}; {pairs} pairs; other processes took {taken / total:.0%} of the CPU")
            print(
                f"ours compiled once, not counted below: {compiling:.1f} s\n\n{table(rows, args.markdown)}",
                flush=True,
            )
            record["sizes"][name] = {
                "what": what,
                "compile": compiling,
                "others": taken / total,
                "rows": rows,
            }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
