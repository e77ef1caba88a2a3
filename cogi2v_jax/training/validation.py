"""Videos of the weights as they are, by `pipeline.generate` itself."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from ..devices import hosts
from ..devices.sharding import to_host
from ..disk import process_folder
from ..media.images import local_copy
from ..media.recipe import recipe_of
from ..media.rows import Row, read_manifest
from ..media.videos import check_output, write_video
from ..pipeline import generate, prepare
from ..request import Request
from ..weights.checkpoint import Models
from ..weights.lora import Factors, Lora
from ..weights.pieces import PIECES, leaf_names
from .run import Run


@dataclass
class TrainedModels(Models):
    """A checkpoint with trained leaves in place of one part's."""

    part: str = ""
    leaves: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def piece(
        self, name: str, shapes: nnx.Module | None = None, workspace: int = 0, ahead: bool = False
    ) -> Any:
        if PIECES[name][0] != self.part or shapes is None:
            return super().piece(name, shapes, workspace, ahead)
        prefix = PIECES[name][1]
        graph, state = nnx.split(shapes)
        filled = {
            leaf: jax.device_put(self.leaves[prefix + leaf].astype(shape.dtype), shape.sharding)
            for leaf, shape in leaf_names(shapes).items()
        }
        named = [  # with their axes, for which programs are compiled
            (path, leaf.replace(filled[".".join(map(str, path))]))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(named))


class Validation:
    """The batch file of a recipe; its videos go into OUTPUT/validation. Raises before training, as
    `read_manifest`, `pipeline.prepare` and `check_output` do: for a picture that can't be read, a
    prompt that is too long, an ffmpeg that does not work."""

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder = run, folder / "validation"
        recipe = run.recipe
        rows = read_manifest(Path(recipe.validation)) if recipe.validation else []
        # Fetched once: a recipe of a video needs the file.
        images = [local_copy(row.image, process_folder()) for row in rows]
        pairs = zip(rows, images, strict=True)
        self.rows = [dataclasses.replace(row, image=image) for row, image in pairs]
        for row in self.rows:
            prepare(run.models, self._request(row))
        if self.rows and hosts.leads():
            check_output(process_folder() / "try.mp4")

    def is_due(self, step: int) -> bool:
        """Whether videos are made after this step."""
        return bool(self.rows) and step % self.run.recipe.validate_every == 0

    def generate(self, step: int, leaves: Mapping[str, Array]) -> None:
        """Makes a video for each row, with these trained leaves."""
        models = with_leaves(self.run, leaves, f"step {step}")
        for number, row in enumerate(self.rows):
            result = generate(models, self._request(row))
            if hosts.leads():
                self.folder.mkdir(exist_ok=True)
                video = result.request.videos[0]
                recipe = recipe_of(models, self.run.recipe.model, result.request, video)
                path = self.folder / f"{step:06d}-{number}.mp4"
                write_video(path, result.video[0], result.request.fps, recipe)

    def _request(self, row: Row) -> Request:
        seed = self.run.recipe.seed if row.seed is None else row.seed
        scale = self.run.recipe.image_latent_scale
        return Request(
            row.image, row.prompt, row.negative_prompt, seed=seed, image_latent_scale=scale
        )


def with_leaves(run: Run, leaves: Mapping[str, Array], name: str) -> Models:
    """The model of a run, to sample from, with trained leaves in it. What sampling loads goes with
    it: training needs the memory again."""
    recipe, models = run.recipe, run.models
    public = (one.name for one in dataclasses.fields(Models) if not one.name.startswith("_"))
    shared: dict[str, Any] = {name: getattr(models, name) for name in public}
    if recipe.method == "lora":
        factors: dict[Any, Factors] = {}
        scale = recipe.alpha / recipe.rank
        for leaf in (leaf.removesuffix("down") for leaf in leaves if leaf.endswith("down")):
            kernel = f"{leaf.removesuffix('lora.')}kernel"
            down, up = (to_host(leaves[f"{leaf}{side}"]) for side in ("down", "up"))
            layers = range(len(down)) if down.ndim == 3 else (None,)
            for layer in layers:
                row = slice(None) if layer is None else layer
                factors[kernel, layer] = Factors(down[row], up[row], scale)
        shared["loras"] = [Lora(name, name, 1.0, factors)]
        return Models(**shared)
    return TrainedModels(**shared, part=recipe.part, leaves=run.whole(leaves))
