"""What a finished run leaves in its folder: a LoRA file or a converted folder, a card, a plot."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Array

from ..devices import hosts
from ..devices.sharding import to_host
from ..disk import PART, check_space
from ..terminal import Say
from ..weights.needed_files import LORA_FILE
from .metrics import METRICS
from .results import MODEL, plot_loss, shorten, write_card
from .run import Run

PLOT = "loss.png"
CARD = "README.md"


def check_output(run: Run, folder: Path) -> None:
    """Raises OSError where the disk has no room for checkpoints and results, before training. Those
    that are there already have theirs."""
    count = run.recipe.checkpoints + 1  # the next one is written before the oldest is removed
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size = run.target.bytes_of_state * count
    check_space(folder, max(0, size - there), "checkpoints and results")


def write_output(run: Run, leaves: Mapping[str, Array], folder: Path, say: Say) -> None:
    """Writes the result under its name, each file whole; on process 0."""
    leaves = leaves if run.recipe.method == "lora" else run.whole(leaves)
    # Of one process they are copied as they are written: of a stack a layer at a time.
    values = {n: leaf if leaf.is_fully_addressable else to_host(leaf) for n, leaf in leaves.items()}
    if not hosts.leads():
        return
    from cogi2v_convert.writing.lora import write_lora  # pyright: ignore[reportMissingImports]
    from cogi2v_convert.writing.trained import write_trained  # pyright: ignore[reportMissingImports]

    recipe, models = run.recipe, run.models
    if recipe.method == "lora":
        result = folder / LORA_FILE
        header = {"base_model_name_or_path": shorten(recipe.model)}
        write_lora(result, values, models.config, recipe.alpha, recipe.output_dtype, header)
    else:
        result, old = folder / MODEL, folder / f".{MODEL}{PART}old"
        if result.exists():  # of an earlier end of this run; it stays until the new one is whole
            result.rename(old)
        try:
            write_trained(models.folder, result, recipe.part, values, recipe.output_dtype)
        except BaseException:
            if old.exists() and not result.exists():
                old.rename(result)
            raise
        shutil.rmtree(old, ignore_errors=True)
    metrics, plot = folder / METRICS, folder / PLOT
    picture = plot if plot_loss(metrics, plot, say) else None
    write_card(folder / CARD, recipe, models.config, metrics, picture)
    say(f"{result}: {recipe.steps} steps")
