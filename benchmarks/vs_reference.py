"""Our pipeline compared with diffusers on this machine: the same weights, shapes and dtype in one
process, timed in pairs without compile time.

    python benchmarks/vs_reference.py [--size tiny mid] [--repeats N] [--dtype float32]
        [--json FILE] [--markdown]

A pair is one run of ours and one of theirs, back to back and in alternating order, so that other
load on the machine affects both. Times are medians over pairs; the ratio is theirs / ours within a
pair, as median and quartiles: above 1, ours is faster. Before the timing, the outputs of both are
compared. The share of the CPU that other processes took meanwhile is printed. They slow torch more
than us, because its threads wait for each other at every operation: the figures are valid only if
that share is small.
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

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
os.environ.update(DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

import jax
import numpy as np
from PIL import Image

import cogi2v_jax
from cogi2v_jax.devices.compiling import Stopwatch
from cogi2v_jax.devices.sharding import put, split
from cogi2v_jax.media.images import fit_image, read_image
from cogi2v_jax.models.tokenizer import tokenize
from cogi2v_jax.names import ASSETS
from cogi2v_jax.pipeline import decode, encode_pixels, prepare
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import Session

try:
    import diffusers
    import torch
    import transformers
except ImportError as missing:
    sys.exit(
        f"benchmarks/vs_reference.py must have the reference installed: {missing}; "
        "pip install 'cogi2v-jax[reference]'"
    )

TINY = ASSETS / "cogi2v-tiny"
# Relative errors. Videos are bytes, some of which round differently.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.1}
REST = 0.02  # seconds before every run, for the other side's worker threads to stop spinning
PROMPT, GUIDANCE = "the red circle moves left", 3.0


class Size(NamedTuple):
    height: int
    width: int
    frames: int
    steps: int  # of DDIM, each a guidance pair
    repeats: int
    make: Callable[[Path], Path]  # writes a diffusers folder inside a scratch folder


class Stage(NamedTuple):  # two calls that compute the same array
    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    parts: int = 1  # what both times are divided by


# Stage, seconds of ours and of theirs in each pair, relative error.
Row = tuple[str, list[float], list[float], float]


def write_random(folder: Path, vae: dict[str, Any], transformer: dict[str, Any]) -> Path:
    """Writes a diffusers folder of seeded random weights, with 8 heads of 64 in the transformer.
    Returns the folder."""
    torch.manual_seed(0)
    names = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}
    blocks = {key: (name,) * 4 for key, name in names.items()}
    t5: dict[str, Any] = {"vocab_size": 44, "d_model": 256, "d_kv": 32, "d_ff": 1024}
    t5 |= {"num_layers": 4, "num_heads": 8, "feed_forward_proj": "gated-gelu"}
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64}
    sizes |= {"in_channels": 32, "text_embed_dim": 256}
    diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(TINY / "tokenizer"),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**t5)),
        vae=diffusers.AutoencoderKLCogVideoX(block_out_channels=(32, 64, 64, 128), **blocks, **vae),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **sizes, **transformer, use_rotary_positional_embeddings=True
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler.from_pretrained(TINY / "scheduler"),
    ).save_pretrained(folder)
    # Newer transformers do not save it.
    shutil.copyfile(TINY / "tokenizer" / "spiece.model", folder / "tokenizer" / "spiece.model")
    return folder


def write_mid(scratch: Path) -> Path:
    """Writes a pipeline with 1,920 video and 226 text tokens and 4 layers."""
    transformer = {"num_layers": 4, "sample_height": 32, "sample_width": 48, "sample_frames": 17}
    transformer |= {"use_learned_positional_embeddings": True}
    return write_random(scratch / "mid", {"layers_per_block": 1}, transformer)


SIZES = {
    "tiny": Size(64, 64, 9, steps=10, repeats=25, make=lambda scratch: TINY),
    "mid": Size(256, 384, 17, steps=4, repeats=5, make=write_mid),
}


def latents_to_ours(latents: torch.Tensor) -> np.ndarray:
    """The reference's latents, [b t c h w], as our [b t h w c]."""
    return latents.float().permute(0, 1, 3, 4, 2).numpy()


def make_stages(size: Size, folder: Path, dtype: str, watch: Stopwatch) -> list[Stage]:
    """Makes the callables of both sides, with equal noise. Both sides of a stage get the same
    inputs: the reference's results, computed here."""
    pipe: Any = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    models = cogi2v_jax.load(folder, dtype=dtype, say=lambda line: None)
    config, length = models.config, models.config.transformer.max_text_seq_length
    picture = Image.open(ASSETS / "example.png").convert("RGB").resize((size.width, size.height))
    asked: dict[str, Any] = {"height": size.height, "width": size.width, "num_frames": size.frames}
    asked |= {"num_inference_steps": size.steps}
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
    # The reference draws the posterior's noise first, then the initial noise.
    posterior = torch.randn(
        (1, 1, shape.channels, shape.height, shape.width), generator=torch.manual_seed(5)
    )
    noise = cogi2v_jax.Noise(posterior=latents_to_ours(posterior), initial=latents_to_ours(start))
    inputs = [
        put(array, split(job.mesh))
        for array in (latents_to_ours(image), text.float().numpy().astype(models.dtype))
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
        return run(stages.encode_text, ids)

    def our_image() -> Any:
        pixels = fit_image(read_image(picture), size.height, size.width, "stretch")[None, None]
        draw = encode_pixels(run, pixels), noise.posterior, job.keys, job.image_scale
        return run(stages.draw_image, *draw, frames=shape.frames)

    def our_steps() -> Any:
        modulation = run(stages.modulate, *job.time)
        start = noise.initial, job.keys
        state = run(stages.draw_start, *start, shape=tuple(shape[:4]))
        rows = np.int32(0), job.tableau, modulation, None, job.keys
        return run(stages.denoise, state, *rows, *inputs, positions, steps=size.steps).x

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
        Stage("image", our_image, lambda: latents_to_ours(their_image()[1])),
        Stage(
            "denoise, one step", our_steps, lambda: latents_to_ours(their_steps()), parts=size.steps
        ),
        Stage("decode", lambda: decode(models, latents_to_ours(latents)), their_video),
        Stage("whole", lambda: cogi2v_jax.generate(models, request, noise).video, their_whole),
    ]


def measure_error(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|. Our videos are bytes; theirs are then rounded to bytes too."""
    ours, theirs = np.asarray(ours), np.round(theirs * 255) if ours.dtype == np.uint8 else theirs
    return float(
        np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64))
    )


def measure(stage: Stage, repeats: int, tolerance: float) -> Row:
    """Compares the outputs, which also warms up both sides, then times in pairs."""
    error = measure_error(stage.ours(), stage.theirs())
    if error > tolerance:
        rule = f"{stage.name}: the two sides' outputs must agree within {tolerance:g}"
        sys.exit(f"{rule}: got a relative error of {error:.2g}")
    calls, times = (stage.ours, stage.theirs), ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 else (1, 0):
            time.sleep(REST)
            begin = time.perf_counter()
            jax.block_until_ready(calls[side]())
            times[side].append((time.perf_counter() - begin) / stage.parts)
    return stage.name, *times, error


def describe_machine() -> list[str]:
    """Returns the CPU, threads, package versions and date, on which the figures depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("cogi2v-jax", "jax", "flax", "torch", "diffusers", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    cpu = f"{names[0] if names else 'CPU'}, {threads}, {len(os.sched_getaffinity(0))} for XLA"
    return [cpu, f"{versions}; {time.strftime('%Y-%m-%d')}"]


def count_cpu_seconds() -> np.ndarray:
    """Returns the CPU seconds of all other processes and of the whole machine, busy and idle, both
    since the machine started."""
    ticks = np.array(Path("/proc/stat").read_text().split()[1:9], float) / os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return np.array([ticks.sum() - idle - time.process_time(), ticks.sum()])


def format_table(rows: list[Row], markdown: bool) -> str:
    cells = [["stage", "ours ms", "diffusers ms", "ratio", "quartiles", "relative error"]]
    for name, ours, theirs, error in rows:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        several = len(ratios) > 1
        quartiles = statistics.quantiles(ratios, method="inclusive") if several else ratios * 3
        low, median, high = quartiles
        times = [f"{1e3 * statistics.median(side):.4g}" for side in (ours, theirs)]
        cells.append([name, *times, f"{median:.2f}", f"{low:.2f} - {high:.2f}", f"{error:.0e}"])
    return align(cells, markdown)


def align(cells: list[list[str]], markdown: bool) -> str:
    """Returns a table with aligned columns; the first row of cells is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def replace_tables(page: Path, mark: str, text: str) -> None:
    """Puts text between `<!-- mark -->` and `<!-- end -->` of a page. Raises ValueError for a page
    without them."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not (begin and end):
        raise ValueError(f"{page} must have the marks of {mark}: got none")
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    about = "Our pipeline compared with diffusers, in pairs."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, help="pairs a stage; each size has its own default")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--json", type=Path, help="also write every single time there")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print("\n".join(describe_machine()))
    record: dict[str, Any] = {"machine": describe_machine(), "dtype": args.dtype, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="cogi2v-benchmark-") as scratch, torch.inference_mode():
        # An empty cache, so that compile times are those of a first run.
        os.environ["XDG_CACHE_HOME"] = scratch
        for name in args.size:
            size, watch, before = SIZES[name], Stopwatch(), count_cpu_seconds()
            todo = make_stages(size, size.make(Path(scratch)), args.dtype, watch)
            repeats, tolerance = args.repeats or size.repeats, TOLERANCE[args.dtype]
            rows = [measure(stage, repeats, tolerance) for stage in todo]
            (taken, total), compiling = count_cpu_seconds() - before, watch.seconds["compile"]
            what = f"{name}: {size.width}x{size.height}, {size.frames} frames, {size.steps} DDIM"
            what += f" steps with guidance, {args.dtype}"
            share = f"other processes took {taken / total:.0%} of the CPU"
            print(f"\n{what}; {len(rows[0][1])} pairs; {share}")
            print(f"ours compiled once, not counted below: {compiling:.1f} s\n")
            print(format_table(rows, args.markdown), flush=True)
            row = {"what": what, "compile": compiling, "others": taken / total, "rows": rows}
            record["sizes"][name] = row
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
