"""Our training step compared with the official trainer's on diffusers' network and peft's LoRA: the
embedded model, the same prepared clips and batches, float32, on this machine's CPU.

    python benchmarks/training.py [--blocks N] [--steps N] [--seeds N] [--cases NAME ...]
        [--plot FILE] [--json FILE]

A step of either side draws latents from the posterior of its clips, encodes their first frames with
noise exp(N(-3, 0.5)), drops 10 % of the texts and 5 % of the images, and updates the trained
weights by the loss of v: gradient, clipping, AdamW. First both sides take the same steps with the
same random numbers, which must give the same losses. Then blocks of steps are timed in turns, so
that other load affects both; the ratio is theirs / ours within a pair of blocks. Under load torch's
threads wait for each other in a loop, which takes CPU time too: give both sides one thread then, by
`taskset -c 0`. At last both sides train a LoRA from several seeds, each with random numbers of its
own: the same loss within the spread of seeds.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Exits if the reference is not installed.
from vs_reference import REST, TINY, align, count_cpu_seconds, describe_machine

# isort: split
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from cogi2v_convert.sources.matching import TABLES  # pyright: ignore[reportMissingImports]
from cogi2v_convert.tables.rules import expand  # pyright: ignore[reportMissingImports]
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig

from cogi2v_jax import prepare
from cogi2v_jax.config import TransformerConfig
from cogi2v_jax.sampling.noise import POSTERIOR, draw
from cogi2v_jax.training import losses, shapes
from cogi2v_jax.training.recipe import Recipe
from cogi2v_jax.training.run import Run
from cogi2v_jax.training.steps import IMAGE_NOISE

CLIPS = ("--motions", "circles", "--clips", "64")
SETTINGS: dict[str, Any] = {"batch": 8, "learning_rate": 2e-3, "warmup": 0, "dtype": "float32"}
SETTINGS |= {"mesh": "data=1", "output": "", "steps": 2**30}
LORA: dict[str, Any] = {"method": "lora", "rank": 32, "alpha": 32.0}
# What differs between the cases. `kept`: everything, or the inputs of layers, which both recompute.
CASES: dict[str, dict[str, Any]] = {
    "LoRA": LORA | {"kept": "all"},
    "LoRA, recomputed": LORA | {"kept": "layers"},
    "full": {"method": "full", "kept": "all", "learning_rate": 1e-4},
}
BLOCK = 10  # steps
COMPARED = 3  # steps with the same random numbers: Adam's averages show in the third
TOLERANCE = 1e-5  # relative, of their losses: float32 sums in another order; found: 1.3e-6
WINDOW = 40  # steps that a point of the curves is the mean of


class Draws(NamedTuple):
    """The random numbers of a step, in the reference's layouts."""

    latents: torch.Tensor  # [b t c h w], for the posterior of the clips
    noise: torch.Tensor  # [b t c h w]
    timestep: torch.Tensor  # [b]
    text: torch.Tensor  # [b], below the share of texts that are dropped
    image: torch.Tensor  # [b], likewise
    level: torch.Tensor  # [b 1 1 1]
    pixels: torch.Tensor  # [b 3 h w], for the noise of this level
    posterior: torch.Tensor  # [b c 1 h w], of the image


def draw_theirs(rows: dict[str, np.ndarray], levels: int) -> Draws:
    """New numbers of torch's generator."""
    (b, t, h, w, c), (_, height, width, _) = rows["moments"].shape, rows["image"].shape
    latents = b, t, c // 2, h, w
    return Draws(
        torch.randn(latents),
        torch.randn(latents),
        torch.randint(levels, (b,)),
        torch.rand(b),
        torch.rand(b),
        torch.randn(b, 1, 1, 1),
        torch.randn(b, 3, height, width),
        torch.randn(b, c // 2, 1, h, w),
    )


def draw_ours(run: Run, step: int, rows: dict[str, np.ndarray], levels: int) -> Draws:
    """The numbers of our step `step`, counted from 0."""
    (b, t, h, w, c), (_, height, width, _) = rows["moments"].shape, rows["image"].shape
    keys = losses.clip_keys(run.seed, jnp.int32(step), jnp.arange(b))

    def normal(use: int, *shape: int) -> torch.Tensor:
        return torch.tensor(np.moveaxis(draw(keys, use, shape), -1, -3))

    def uniform(use: int) -> np.ndarray:
        keyed = [jax.random.wrap_key_data(key, impl="threefry2x32") for key in keys]
        return np.array([jax.random.uniform(jax.random.fold_in(key, use)) for key in keyed])

    return Draws(
        normal(losses.LATENTS, t, h, w, c // 2),
        normal(losses.NOISE, t, h, w, c // 2),
        torch.tensor((uniform(losses.TIMESTEP) * np.float32(levels)).astype(int)),
        torch.tensor(uniform(losses.DROPPED_TEXT)),
        torch.tensor(uniform(losses.DROPPED_IMAGE)),
        torch.tensor(np.asarray(draw(keys, losses.IMAGE_LEVEL, (1, 1, 1, 1))))[..., 0],
        normal(losses.IMAGE_NOISE, 1, height, width, 3)[:, 0],
        normal(POSTERIOR, 1, h, w, c // 2).movedim(1, 2),
    )


class Ours:
    """Our training run, as `python -m cogi2v_jax.train` steps it."""

    def __init__(self, recipe: Recipe):
        self.run = Run(recipe, lambda *_, **__: None)
        self.state, self.batches, self.number = self.run.begin(), self.run.batches(0), 0

    def step(self) -> Any:
        """Returns the loss, which may still be computed."""
        self.number += 1
        self.state, figures = self.run.step(self.state, next(self.batches), self.number)
        return figures.loss


class Theirs:
    """The official trainer's step on diffusers' network, on the batches of our run."""

    def __init__(self, run: Run):
        recipe = self.recipe = run.recipe
        torch.manual_seed(recipe.seed)
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "dtype": torch.float32}
        pipe: Any = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(TINY, **parts)
        self.network, self.vae, self.scheduler = pipe.transformer, pipe.vae, pipe.scheduler
        self.vae.requires_grad_(False)
        if recipe.method == "lora":
            self.network.requires_grad_(False)
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            lora = LoraConfig(r=recipe.rank, lora_alpha=int(recipe.alpha), target_modules=layers)
            self.network.add_adapter(lora)
        if recipe.kept != "all":
            self.network.enable_gradient_checkpointing()
        self.network.train()
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        betas = recipe.beta1, recipe.beta2
        settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        self.optimizer = torch.optim.AdamW(self.trained, betas=betas, **settings)
        self.batches = run.batches(0)
        self.empty_text = torch.tensor(run.prepared.empty_text)
        bucket = run.prepared.buckets[0]
        frames = (bucket.frames - 1) // pipe.vae_scale_factor_temporal + 1
        size = bucket.height, bucket.width, frames
        self.rotary = pipe._prepare_rotary_positional_embeddings(*size, torch.device("cpu"))

    def copy_lora(self, config: TransformerConfig, leaves: dict[str, Any]) -> None:
        """Sets the factors to those of ours."""
        parameters = dict(self.network.named_parameters())
        targets = expand(TABLES["transformer"](config), config.num_layers)
        for name in [name for name in parameters if "lora_A" in name]:
            rule, layer = targets[re.sub(r"lora_A\.default\.", "", name)]
            ours = (f"{rule.flax.removesuffix('kernel')}lora.{side}" for side in ("down", "up"))
            factors = rule.torch_factors(*(np.asarray(leaves[leaf][layer]) for leaf in ours))
            for side, factor in zip("AB", factors, strict=True):
                parameters[name.replace("lora_A", f"lora_{side}")].data = torch.tensor(factor)

    def step(self, draws: Callable[[dict[str, np.ndarray], int], Draws] = draw_theirs) -> Any:
        """Returns the loss."""
        rows = next(self.batches).values
        given = draws(rows, len(self.scheduler.alphas_cumprod))
        with torch.no_grad():
            noised = self.noise(rows, given)
        loss = self.loss(noised, given.timestep)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def noise(self, rows: dict[str, np.ndarray], draws: Draws) -> list[torch.Tensor]:
        """(clean latents, noisy latents, latents of the image, texts)."""
        recipe, scale = self.recipe, self.vae.config.scaling_factor
        given = torch.tensor(rows["moments"]).float().movedim(-1, 1)  # [b c t h w]
        moments = DiagonalGaussianDistribution(given)
        latents = (moments.mean.movedim(1, 2) + moments.std.movedim(1, 2) * draws.latents) * scale
        noisy = self.scheduler.add_noise(latents, draws.noise, draws.timestep)
        mean, deviation = IMAGE_NOISE
        pixels = torch.tensor(rows["image"]).float().movedim(-1, 1) / 127.5 - 1
        pixels = pixels + torch.exp(mean + deviation * draws.level) * draws.pixels
        moments = self.vae.encode(pixels[:, :, None]).latent_dist
        first = (moments.mean + moments.std * draws.posterior).movedim(1, 2) * scale
        first[draws.image < recipe.image_dropout] = 0
        image = torch.cat([first, torch.zeros_like(latents[:, 1:])], dim=1)
        dropped = (draws.text < recipe.text_dropout)[:, None, None]
        text = torch.where(dropped, self.empty_text, torch.tensor(rows["text"]))
        return [latents, noisy, image, text]

    def loss(self, noised: list[torch.Tensor], timestep: torch.Tensor) -> torch.Tensor:
        """The error of x0 with the weight 1 / (1 - alpha_bar)."""
        latents, noisy, image, text = noised
        inputs = torch.cat([noisy, image], dim=2), text, timestep
        v = self.network(*inputs, image_rotary_emb=self.rotary, return_dict=False)[0]
        x0 = self.scheduler.get_velocity(v, noisy, timestep)
        weights = 1 / (1 - self.scheduler.alphas_cumprod[timestep])
        errors = weights[:, None, None, None, None] * (x0 - latents) ** 2
        return errors.flatten(1).mean(dim=1).mean()


class Row(NamedTuple):
    """What was measured of a case: of ours, then of theirs."""

    differences: list[float]  # relative, of the losses of the first steps
    first: list[float]  # seconds of the first step; ours compiles
    seconds: list[list[float]]  # a step, of every block
    cpu: list[list[float]]  # seconds of this process, likewise


def make_data(scratch: Path) -> str:
    """Draws clips and prepares them. Returns the folder."""
    clips, data = str(scratch / "clips"), str(scratch / "data")
    shapes.main([clips, *CLIPS])
    prepare.main([clips, data, "--model", "cogi2v-tiny"])
    return data


def compare(ours: Ours, theirs: Theirs, steps: int) -> Row:
    """Takes the first steps on both sides with the same weights and random numbers."""
    if ours.run.recipe.method == "lora":
        theirs.copy_lora(ours.run.models.config.transformer, ours.state.leaves)
    row = Row([], [], [[], []], [[], []])
    for step in range(steps):
        draws = partial(draw_ours, ours.run, step)
        sides = [take(one, 1) for one in (ours.step, partial(theirs.step, draws))]
        row.differences.append(abs(sides[0].losses[0] / sides[1].losses[0] - 1))
        if step == 0:
            row.first.extend(side.seconds for side in sides)
    return row


class Taken(NamedTuple):
    """Of some steps in turn."""

    losses: list[float]
    seconds: float  # a step
    cpu: float  # seconds of this process a step


def take(step: Callable[[], Any], steps: int) -> Taken:
    time.sleep(REST)
    begin, cpu = time.perf_counter(), time.process_time()
    losses = [float(loss) for loss in jax.block_until_ready([step() for _ in range(steps)])]
    passed = time.perf_counter() - begin, time.process_time() - cpu
    return Taken(losses, *(seconds / steps for seconds in passed))


def measure(recipe: Recipe, blocks: int) -> Row:
    """Compares the first steps, which also warms up both sides, then times blocks of steps in
    turns. Exits if the losses differ."""
    ours = Ours(recipe)
    sides = ours, Theirs(ours.run)
    row = compare(*sides, COMPARED)
    if max(row.differences) > TOLERANCE:
        rule = f"losses of the same steps must agree within {TOLERANCE:g}"
        sys.exit(f"{recipe.method}: {rule}: got relative differences {row.differences}")
    for block in range(blocks):
        for side in (0, 1) if block % 2 else (1, 0):
            taken = take(sides[side].step, BLOCK)
            row.seconds[side].append(taken.seconds)
            row.cpu[side].append(taken.cpu)
    return row


def train(recipe: Recipe, steps: int) -> list[list[float]]:
    """The losses of our steps and of theirs."""
    ours = Ours(recipe)
    return [take(side.step, steps).losses for side in (ours, Theirs(ours.run))]


def format_times(rows: dict[str, Row]) -> str:
    heads = ("seconds a step", "ours", "theirs", "ratio", "quartiles", "CPU: ours", "theirs")
    cells = [[*heads, "compiling step", "difference"]]
    for name, row in rows.items():
        ratios = np.divide(row.seconds[1], row.seconds[0])
        low, median, high = np.percentile(ratios, (25, 50, 75))
        ours, theirs, *cpu = (f"{np.median(x):.3f}" for x in (*row.seconds, *row.cpu))
        quartiles = f"{low:.2f} - {high:.2f}"
        ends = f"{row.first[0]:.1f}", f"{max(row.differences):.0e}"
        cells.append([name, ours, theirs, f"{median:.2f}", quartiles, *cpu, *ends])
    return align(cells, markdown=False)


def summarise(curves: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Of [seeds, sides, steps]: the mean losses of the first and of the last third of the steps, of
    every seed."""
    third = max(curves.shape[2] // 3, 1)
    means = {"first": curves[..., :third].mean(-1), "last": curves[..., -third:].mean(-1)}
    sides = enumerate(("ours", "theirs"))
    return {
        side: {part: seeds[:, index].tolist() for part, seeds in means.items()}
        for index, side in sides
    }


def format_losses(losses: dict[str, dict[str, list[float]]]) -> str:
    """Returns a table of means over seeds and standard deviations of a seed."""
    cells = [["mean loss", "first third", "last third"]]
    for side, parts in losses.items():
        spreads = (np.std(seeds, ddof=int(len(seeds) > 1)) for seeds in parts.values())
        pairs = zip(parts.values(), spreads, strict=True)
        cells.append([side, *(f"{np.mean(seeds):.4f} +- {spread:.4f}" for seeds, spread in pairs)])
    return align(cells, markdown=False)


def plot(curves: np.ndarray, file: Path) -> None:
    """Draws the losses of [seeds, sides, steps]: a line is the mean over seeds of the mean over a
    window, its band is from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = min(WINDOW, curves.shape[2])
    smooth = np.lib.stride_tricks.sliding_window_view(curves, window, axis=2).mean(-1)
    steps = np.arange(window, curves.shape[2] + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for side, name, colour, dashes in (
        (0, "cogi2v-jax", "tab:blue", "-"),
        (1, "diffusers + peft", "tab:orange", "--"),
    ):
        seeds = smooth[:, side]
        axes.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, seeds.mean(0), dashes, color=colour, label=name)
    axes.set(xlabel="step", ylabel=f"loss of v, mean of {window} steps", ylim=(0, None))
    axes.set_title(f"LoRA on cogi2v-tiny: mean and range of {len(curves)} seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    about = "Our training step compared with the official trainer's on diffusers' network."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--blocks", type=int, default=10, help=f"of {BLOCK} steps, timed, of each")
    parser.add_argument("--steps", type=int, default=300, help="of the curves; 0 makes none")
    parser.add_argument("--seeds", type=int, default=3, help="of the curves")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="to time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA's
    record: dict[str, Any] = {"machine": [*describe_machine(), f"peft {version('peft')}"]}
    print("\n".join(record["machine"]))
    with tempfile.TemporaryDirectory(prefix="cogi2v-benchmark-") as scratch:
        os.environ.setdefault("XDG_CACHE_HOME", scratch)  # empty, so that the first steps compile
        data = make_data(Path(scratch))
        if args.cases:
            before, rows = count_cpu_seconds(), {}
            for name in args.cases:
                rows[name] = measure(Recipe(data=data, **SETTINGS | CASES[name]), args.blocks)
            taken, total = count_cpu_seconds() - before
            record |= {"others": taken / total, "cases": {k: v._asdict() for k, v in rows.items()}}
            share = f"other processes took {taken / total:.0%} of the CPU"
            print(f"\n{args.blocks} blocks of {BLOCK} steps in turns; {share}\n")
            print(format_times(rows), flush=True)
        if args.steps:
            recipe = Recipe(data=data, **SETTINGS | CASES["LoRA"])
            seeds = [replace(recipe, seed=recipe.seed + seed) for seed in range(args.seeds)]
            curves = np.array([train(recipe, args.steps) for recipe in seeds])
            record |= {"curves": curves.tolist(), "losses": summarise(curves)}
            what = f"{args.steps} steps of a LoRA from {args.seeds} seeds"
            print(f"\n{what}, mean and deviation of a seed\n\n{format_losses(record['losses'])}")
            if args.plot:
                plot(curves, args.plot)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
