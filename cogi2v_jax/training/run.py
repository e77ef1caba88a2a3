"""Everything of a training run that does not change from step to step: the recipe, the data, the
networks on the mesh, and what the programs are compiled for."""

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from ..arguments import parse_loras
from ..devices import hosts
from ..devices.mesh import sizes_of
from ..devices.sharding import put, split
from ..loading import load
from ..models.positions import Positions
from ..request import Request
from ..sampling.noise import seed_keys
from ..sampling.programs import RequestTarget
from ..terminal import Say
from ..weights.checkpoint import Models, restore
from ..weights.pieces import PIECES, leaf_names, memory_limit
from . import data, shards
from .clips import Bucket
from .initial import new_leaves
from .losses import Clips
from .preparation import plan_of
from .recipe import RANDOM, Recipe
from .state import Leaves, State, begin
from .steps import Figures
from .target import NETWORKS, StepTarget, mesh_for


class Run:
    """A recipe with its data and its networks. Raises ValueError, OSError or FileNotFoundError, in
    one line, for what does not fit together."""

    def __init__(self, recipe: Recipe, say: Say):
        self.recipe = recipe
        if recipe.mesh != "auto":
            sizes_of(recipe.mesh)  # refused before a model is fetched and converted
        self.prepared = shards.open(Path(recipe.data), check=hosts.leads())
        _check_kind(recipe, self.prepared)
        dtype = None if recipe.dtype == "auto" else recipe.dtype
        self.models: Models = load(recipe.model, dtype, recipe.attention, say=say)
        _check_model(self.models, self.prepared)
        config, full = self.models.config, recipe.method != "lora"
        if recipe.crop % (ratio := config.vae.spatial_ratio):
            raise ValueError(f"crop must be a multiple of {ratio}: got {recipe.crop}")
        if full and recipe.part in config.int8:
            way = "train a LoRA on it, or convert its source without int8"
            raise ValueError(f"model must not be in int8 to train all weights of it; {way}")
        devices, memory = jax.devices(), memory_limit()
        mesh = mesh_for(recipe, config, self.models.dtype, devices, memory)
        self.target = StepTarget(recipe, config, self.models.dtype, mesh, memory)
        self.seed = put(seed_keys([recipe.seed])[0], split(self.mesh))
        if recipe.method != "vae":
            self._sampling = {bucket: self._sample(bucket) for bucket in self._buckets()}

    @property
    def mesh(self) -> Mesh:
        return self.target.mesh

    def begin(self) -> State:
        """Loads the network and returns the state before the first step. The trained leaves are in
        the state alone."""
        recipe, models, trained = self.recipe, self.models, self.target.trained
        start = models
        if recipe.init not in ("", RANDOM) and recipe.method != "lora":
            start = load(recipe.init, models.dtype, say=lambda _: None)
            if start.config != models.config:
                raise ValueError(f"init must have the networks of model: got {recipe.init}")
        loaded = self._load(start)
        self._frozen = {name: loaded[name] for name in self.target.frozen}
        if recipe.method == "lora" and recipe.init:
            leaves = read_lora(recipe, models, trained)
        elif recipe.method == "lora" or recipe.init == RANDOM:
            leaves = new_leaves(trained, recipe.seed)
        else:
            leaves = {name: loaded[name] for name in trained}
        return begin(recipe, leaves, self.mesh)

    def whole(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """All leaves of the part, with these trained ones."""
        return {**self._frozen, **leaves}

    def _load(self, models: Models) -> Leaves:
        """The leaves of the network of which some are trained."""
        leaves = {}
        for name in NETWORKS[self.recipe.part]:
            piece = restore(models.folder, models.config, name, self.target.piece(name))
            prefix = PIECES[name][1]
            leaves |= {prefix + leaf: value for leaf, value in leaf_names(piece).items()}
        return leaves

    def name_of(self, clip: int) -> str:
        """The video of a clip, as its list named it."""
        return self.prepared.clips[clip].video

    def batches(self, start: int) -> Iterator[data.Rows]:
        """The batches of the steps after `start`: the rows that this process's devices hold."""
        recipe = self.recipe
        sizes = recipe.accumulate, recipe.batch
        return data.batches(self.prepared, recipe.seed, *sizes, start, self._rows)

    @cached_property
    def _rows(self) -> list[int]:
        parts = self._sharding.addressable_devices_indices_map(self._numbers.shape).values()
        return sorted({int(row) for part in parts for row in self._numbers[part].flat})

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The rows of a step, [accumulate batch]."""
        return np.arange(self.recipe.clips).reshape(self.recipe.accumulate, self.recipe.batch)

    @property
    def _sharding(self) -> Any:
        return split(self.mesh, None, "video")

    def _place(self, values: np.ndarray) -> Array:
        """Rows of this process as an array [accumulate batch ...] of all processes."""
        shape = (*self._numbers.shape, *values.shape[1:])

        def part(index: Any) -> np.ndarray:
            return values[np.searchsorted(self._rows, self._numbers[index[:2]])]

        return jax.make_array_from_callback(shape, self._sharding, part)

    def step(self, state: State, rows: data.Rows, number: int) -> tuple[State, Figures]:
        """Step `number`, which overwrites the state before it."""
        if self.recipe.method == "vae":
            pixels = self._place(crop(self.recipe, rows.values["pixels"], self._rows, number))
            program, static = self.target.program(None)
            args = (state, self._frozen, pixels, self.seed)
        else:
            names = "moments", "text", "image"
            moments, text, image = (self._place(rows.values[name]) for name in names)
            clips = Clips(moments, text, image, None)
            sampling = self._sampling[rows.bucket]
            program, static = self.target.program(sampling)
            given = *self._constants, self._positions[rows.bucket], self.target.scales(sampling)
            args = (state, self._frozen, self._vae, clips, self.seed, *given)
        return program.compile(*args, **static)(*args)

    @cached_property
    def _positions(self) -> dict[Bucket, Positions]:
        """Of the tokens of each bucket's clips, on the devices."""
        return {bucket: sampling.positions() for bucket, sampling in self._sampling.items()}

    @cached_property
    def _vae(self) -> Any:
        return self.models.piece("vae", self.target.vae)

    @cached_property
    def _constants(self) -> tuple[Any, ...]:
        everywhere = split(self.mesh)
        constants = self.prepared.empty_text, self.target.levels()
        return jax.tree.map(lambda x: put(x, everywhere), constants)

    def _buckets(self) -> list[Bucket]:
        numbers = sorted({clip.bucket for clip in self.prepared.clips.values()})
        return [self.prepared.buckets[number] for number in numbers]

    def _sample(self, bucket: Bucket) -> RequestTarget:
        """What sampling clips of a bucket would be compiled for. Raises ValueError for clips that
        the network can't compute."""
        sizes: Any = {"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        asked = Request("", "", image_latent_scale=self.recipe.image_latent_scale, **sizes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `prepare` gave them
            request = asked.resolve(self.models.config)
        return self.target.sampling(request, self.models.attention)


def crop(
    recipe: Recipe, pixels: UInt8[np.ndarray, "rows f h w 3"], rows: list[int], step: int
) -> UInt8[np.ndarray, "rows f2 h2 w2 3"]:
    """Random squares of the clips, and of each a random frame in a step for single frames."""
    size, still = recipe.crop, recipe.stills and step % recipe.stills == 0
    if not size and not still:
        return pixels

    def cut(clip: np.ndarray, row: int) -> np.ndarray:
        random = np.random.default_rng([recipe.seed, step, row])
        frames, height, width, _ = clip.shape
        if still:
            first = int(random.integers(frames))
            clip = clip[first : first + 1]
        if size:
            top, left = (int(random.integers(side - size + 1)) for side in (height, width))
            clip = clip[:, top : top + size, left : left + size]
        return clip

    return np.stack([cut(clip, row) for clip, row in zip(pixels, rows, strict=True)])


def read_lora(recipe: Recipe, models: Models, leaves: Leaves) -> Leaves:
    """The factors of a LoRA file as leaves to start from. Raises ValueError for one that has other
    factors than the recipe trains."""
    # The type checker can't follow the package's name to its folder, convert/.
    from cogi2v_convert.lora_match import match  # pyright: ignore[reportMissingImports]
    from cogi2v_convert.sources.lora_file import open_lora  # pyright: ignore[reportMissingImports]

    ((file, weight),) = parse_loras([recipe.init])
    found = match(open_lora(file), models.config, weight).checked()
    filled = {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves.items()}
    given = set()
    for (kernel, layer), factors in found.factors.items():
        names = [f"{kernel.removesuffix('kernel')}lora.{side}" for side in ("down", "up")]
        # Scales may differ: alpha / rank of the file, and of the recipe.
        scale = found.weight * factors.scale * recipe.rank / recipe.alpha
        up = factors.up * np.float32(scale)
        for name, value in zip(names, (factors.down, up), strict=True):
            row = filled.get(name) if layer is None else filled.get(name, {layer: None})[layer]
            if row is None or row.shape != value.shape:
                got = f"{kernel} of rank {len(factors.up)} in {found.name}"
                must = "init must have the targets and the rank of the recipe"
                raise ValueError(f"{must}: got {got}")
            row[...] = value
            given.add(name)
    if missing := sorted(leaves.keys() - given):
        raise ValueError(f"init must have all targets of the recipe: {missing[0]} is missing")
    return {name: jnp.asarray(value) for name, value in filled.items()}


def _check_kind(recipe: Recipe, prepared: shards.Prepared) -> None:
    kind = shards.PIXELS if recipe.method == "vae" else shards.LATENTS
    if prepared.kind != kind:
        way = "prepare it with --pixels" if kind == shards.PIXELS else "prepare it without --pixels"
        raise ValueError(
            f"data must hold {kind} to train method {recipe.method}: got {prepared.kind} in "
            f"{prepared.folder}; {way}"
        )
    small = [bucket for bucket in prepared.buckets if recipe.crop > min(bucket[1:])]
    if small:
        raise ValueError(f"crop must be at most the sides of {small[0]}: got {recipe.crop}")


def _check_model(models: Models, prepared: shards.Prepared) -> None:
    """Raises ValueError where the data were made by other networks than the model's."""
    source = models if prepared.kind == shards.LATENTS else models.config
    ours = json.loads(json.dumps(plan_of(source, (), (), 1.0).model))
    wrong = [part for part in ours if part != "title" and ours[part] != prepared.model.get(part)]
    if wrong:
        title = prepared.model.get("title")
        raise ValueError(
            f"data must be prepared by the model that is trained: {prepared.folder} is of {title}, "
            f"with other {' and '.join(wrong)}; prepare the clips again with --model"
        )
