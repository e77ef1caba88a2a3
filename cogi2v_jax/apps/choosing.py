"""Several takes of a video, with seeds counting up, and which of them is the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from ..media.images import fit_image, read_image
from ..media.ranking import Figures, rank
from ..request import Request, Resolved

if TYPE_CHECKING:
    from ..pipeline import OnStep
    from ..weights.checkpoint import Models

COLUMNS = ("seed", "motion", "first", "drift", "score")
FIRST = 4  # frames of the first latent frame of a loop
PLACES = {"motion": 2, "first": 1, "drift": 2, "score": 3}  # digits after the point


@dataclass(frozen=True, eq=False)
class Take:
    """One of several videos for the same picture and prompt."""

    video: UInt8[np.ndarray, "f h2 w2 3"]
    latents: Float[np.ndarray, "t h w c"]  # scaled; without the padding frame of 1.5
    seed: int
    figures: Figures


def best_of(
    models: "Models", request: Request, count: int, on_step: "OnStep | None" = None
) -> list[list[Take]]:
    """Makes each video of a request `count` times, with seeds counting up from its own, as many at
    once as the mesh makes side by side. Returns the takes of every video, the best one first:
    `media.ranking` says by what. Raises as `generate`."""
    from ..pipeline import generate, videos_at_once

    request = request.takes(count)
    results = [
        generate(models, batch, on_step=on_step)
        for batch in request.batches(videos_at_once(models, request))
    ]
    made = [
        take
        for result in results
        for take in zip(result.request.videos, result.latents, result.video, strict=True)
    ]
    ordered = []
    for first in range(0, len(made), count):
        videos, latents, frames = zip(*made[first : first + count], strict=True)
        resolved = results[0].request
        found = rank(frames, fitted(resolved, videos[0].image), begins(resolved))
        ordered.append([Take(frames[n], latents[n], videos[n].seed, each) for n, each in found])
    return ordered


def fitted(request: Resolved, image: Any) -> Float[np.ndarray, "h w 3"]:
    """A picture of a request as its videos should begin with it, in [-1, 1]."""
    return fit_image(read_image(image), request.height, request.width, request.fit)


def begins(request: Resolved) -> int:
    """The frames among which one is the picture: in a loop those of the first latent frame."""
    return FIRST if request.loop else 1


def entry(figures: Figures, rank: int, count: int) -> dict[str, Any]:
    """What a recipe says about a take."""
    found = figures._asdict() | {"score": figures.score}
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {"best_of": {"takes": count, "rank": rank, **rounded}}


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines of a table: of names, and recipes with an `entry`."""
    cells = [["", *COLUMNS]]
    for name, recipe in rows:
        figures = recipe["best_of"]
        shown = [f"{figures[column]:.{PLACES[column]}f}" for column in COLUMNS[1:]]
        cells.append([name, str(recipe["seed"]), *shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
