"""What tells how a run went: a plot of its loss, and the card of its result."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import Float

from .. import __version__
from ..config import CheckpointConfig, toml
from ..disk import replace_when_done
from ..names import find_name, parse_hub
from ..weights.hub import report
from .metrics import read_metrics
from .recipe import Recipe

SMOOTH = 0.03  # of all steps: how many the smoothed loss is mostly a mean of
MODEL = "model"  # the converted folder in a run's output
DECADE = 10.0  # largest by smallest smoothed loss from which on the axis is logarithmic
PATHS = ("data", "output", "model", "init", "validation")  # keys of a recipe that may be paths
WHAT = {
    "lora": "A LoRA of rank {rank} (alpha {alpha:g}) for {base}",
    "full": "{base} with a trained transformer",
    "vae": "{base} with a trained VAE",
}


def plot_loss(metrics: Path, picture: Path, say: Callable[[str], None] = report) -> bool:
    """Draws the loss over the steps in a run's JSON lines as a PNG. Returns False, after a line
    that says why, where there are no steps or no matplotlib."""
    lines = read_metrics(metrics)
    if not lines:
        say(f"no plot of the loss: {metrics} has no steps")
    elif not find_spec("matplotlib"):
        say("no plot of the loss without matplotlib: pip install 'cogi2v-jax[compare]'")
    else:
        with replace_when_done(picture) as part:
            draw_loss(lines).savefig(part, format="png", dpi=120)
        return True
    return False


def draw_loss(lines: list[dict[str, Any]]) -> Any:
    """A matplotlib figure of the loss of each step and the smoothed loss."""
    # Not pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses = (np.array([line[key] for line in lines]) for key in ("step", "loss"))
    smooth = _smooth(losses)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, ".", color="tab:blue", markersize=3, alpha=0.4, label="each step")
    axes.plot(steps, smooth, color="tab:orange", linewidth=2, label="smoothed")
    if losses.min() > 0 and smooth.max() > DECADE * smooth.min():
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right")  # the best place takes seconds to find among many steps
    return figure


def write_card(
    path: Path, recipe: Recipe, config: CheckpointConfig, metrics: Path, picture: Path | None
) -> None:
    """Writes the model card of a finished run for the hub: what it is, how to use it, how it was
    trained. `config` is of the base, `metrics` are the JSON lines of the run, `picture` is the plot
    beside the card, if there is one."""
    is_lora, licence = recipe.method == "lora", _licence(config)
    hub, model = _hub_id(recipe.model), shorten(recipe.model)
    name = Path(recipe.output).absolute().name
    front = {
        **({"base_model": hub} if hub else {}),
        "library_name": "diffusers" if is_lora else "cogi2v-jax",
        "pipeline_tag": "image-to-video",
        "tags": ["cogvideox", "image-to-video", "cogi2v-jax", *(["lora"] if is_lora else [])],
        **(licence[0] if licence else {}),
    }
    base = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{model}`"
    what = WHAT[recipe.method].format(rank=recipe.rank, alpha=recipe.alpha, base=base)
    plain = {key: shorten(getattr(recipe, key)) for key in PATHS}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}",
        f"{what}, which makes a video of an image and a prompt. "
        f"Trained with cogi2v-jax {__version__}.",
        f"## Use\n\n`{name}` stands for the folder of these files.",
        _usage(recipe, hub or model),
        f"## Training\n\n{_figures(read_metrics(metrics))}",
        *([f"![The loss over the steps]({picture.name})"] if picture else []),
        f"The recipe:\n\n```toml\n{dataclasses.replace(recipe, **plain).to_toml()}```",
        *([f"## Licence\n\nThat of the base model: {licence[1]}."] if licence else []),
    ]
    with replace_when_done(path) as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _usage(recipe: Recipe, base: str) -> str:
    """Commands for ours and code for diffusers, which loads the model `base`."""
    is_lora, name = recipe.method == "lora", Path(recipe.output).absolute().name
    model = shorten(recipe.model)
    ours = f"--model {model} --lora_path {name}" if is_lora else f"--model {name}/{MODEL}"
    if recipe.image_latent_scale != "reference":
        ours += f" --image_latent_scale {recipe.image_latent_scale}"
    folder = base if is_lora else "diffusers"
    lines = [
        f'```\npython -m cogi2v_jax.sample --image photo.jpg --prompt "..." \\\n    {ours}\n```',
        "With diffusers and PEFT:" if is_lora else "With diffusers:",
        *([] if is_lora else [f"```\ncogi2v-convert to-torch {name}/{MODEL} {folder}\n```"]),
        "```python",
    ]
    code = [
        "import torch",
        "from diffusers import CogVideoXImageToVideoPipeline as Pipeline",
        "from diffusers.utils import load_image",
        f'pipe = Pipeline.from_pretrained("{folder}", torch_dtype=torch.bfloat16)',
        *([f'pipe.load_lora_weights("{name}")'] if is_lora else []),
        'video = pipe.to("cuda")(load_image("photo.jpg"), "...").frames[0]',
        "```",
    ]
    return "\n".join(["\n\n".join(lines), *code])


def _figures(lines: list[dict[str, Any]]) -> str:
    """A table of what the run took and reached."""
    rows = {"machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    if lines:
        losses = np.array([line["loss"] for line in lines])
        # The median: before the first step all is compiled, and some steps write checkpoints.
        seconds = np.median([line["seconds"] for line in lines])
        smooth = f"smoothed: {_smooth(losses)[-1]:.4g}"
        rows = {"steps": lines[-1]["step"], "last loss": f"{losses[-1]:.4g} ({smooth})"} | rows
        rows["seconds a step"] = f"{seconds:.3g}"
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {rows[key]} |" for key in rows)])


def _smooth(losses: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """The exponential moving average, from the mean of the first losses on."""
    span = max(1, round(SMOOTH * len(losses)))
    mean, means = losses[:span].mean(), []
    for loss in losses:
        mean += (loss - mean) / span
        means.append(mean)
    return np.array(means)


def _hub_id(model: str) -> str | None:
    """The repository of a base; None for a folder here and for the model in the package."""
    if name := find_name(model):
        return toml(name)["source"].get("hub")
    place = parse_hub(model)
    return place.id.partition("@")[0] if place and not Path(model).exists() else None


def shorten(path: str) -> str:
    """The last name of an absolute path: a card may be published."""
    return Path(path).name if Path(path).is_absolute() else path


def _licence(config: CheckpointConfig) -> tuple[dict[str, str], str] | None:
    """The licence of a released base, for the hub and in words."""
    source = toml(config.name)["source"] if config.name else {}
    if "licence" not in source:
        return None
    link = f"https://huggingface.co/{source['hub']}/blob/main/LICENSE"
    front = {"license": "other", "license_name": "cogvideox", "license_link": link}
    return front, source["licence"]
