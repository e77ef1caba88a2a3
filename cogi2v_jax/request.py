"""What a user asks for, checked against a checkpoint before anything slow begins."""

import dataclasses
import math
import numbers
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from .config import CheckpointConfig

# What the image's latents are multiplied by. Three code bases feed the 1.5 network at three scales;
# the reference's is the default.
IMAGE_LATENT_SCALES = ("reference", "sat", "trainer")
FITS = ("crop", "pad", "stretch")  # how the image meets the size asked for
NOISES = ("jax", "torch")  # whose random numbers a seed means

Whole = int | np.integer
Real = int | float | np.number
PLAIN = {
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": float,
    "num_inference_steps": int,
    "guidance_scale": float,
    "use_dynamic_cfg": bool,
    "image_latent_scale": lambda scale: scale if isinstance(scale, str) else float(scale),
    "seed": lambda seed: (
        int(seed) if isinstance(seed, numbers.Integral) else [int(one) for one in seed]
    ),
}


class Video(NamedTuple):
    """One entry of a batch."""

    image: Any
    prompt: str
    negative_prompt: str
    seed: int


class LatentShape(NamedTuple):
    """The network's view of a request: `frames` includes `padding` leading latent frames that are
    dropped before decoding."""

    frames: int
    height: int
    width: int
    channels: int
    padding: int


@dataclass(frozen=True)
class Noise:
    """Noise given instead of drawn, channels last, float32; what is None is drawn from the
    seeds."""

    posterior: Any = None  # [b 1 h w c], of the image's VAE posterior
    initial: Any = None  # [b t h w c], t padded as the network needs it
    steps: Any = None  # [i b t h w c], the draw each step really uses; ddim ignores it

    def check(self, shape: LatentShape, videos: int, steps: int) -> "Noise":
        """The same as float32 arrays. Raises ValueError for a shape the request doesn't have."""
        latents = (videos, *shape[:4])
        expected = {
            "posterior": (videos, 1, *shape[1:4]),
            "initial": latents,
            "steps": (steps, *latents),
        }
        arrays = {
            name: None if (given := getattr(self, name)) is None else np.asarray(given, np.float32)
            for name in expected
        }
        wrong = [
            f"{name} must have the shape {list(expected[name])}: got {list(array.shape)}"
            for name, array in arrays.items()
            if array is not None and array.shape != expected[name]
        ]
        if wrong:
            raise ValueError("noise: " + "; ".join(wrong))
        return dataclasses.replace(self, **arrays)

    def of_slab(self, first: int, slab: int) -> Any:
        """The draws of `slab` steps from `first` on."""
        return None if self.steps is None else self.steps[first : first + slab]


@dataclass(frozen=True)
class Request:
    """A video to make. `image` (a path, a PIL image or an array), `prompt`, `negative_prompt` and
    `seed` may be sequences of equal length: a batch. What is None is answered by the checkpoint
    (see `CheckpointConfig.defaults`)."""

    image: Any
    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str | None] | None = ""
    height: Whole | None = None  # pixels
    width: Whole | None = None
    num_frames: Whole | None = None
    fps: Real | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Real | None = None
    use_dynamic_cfg: bool | None = None
    scheduler: str | None = None  # "dpm" or "ddim"
    seed: Whole | Sequence[Whole] | np.ndarray = 42
    fit: str | None = None  # "crop", "pad" or "stretch"
    # "reference", "sat" (1), "trainer" (the VAE's scaling factor), or a number.
    image_latent_scale: str | Real | None = None
    noise: str | None = None  # "jax" or "torch": whose random numbers a seed means

    @property
    def videos(self) -> list[Video]:
        """The batch; single values serve every video of it. Raises ValueError where lengths
        differ."""
        negative = (
            [text or "" for text in self.negative_prompt]
            if isinstance(self.negative_prompt, (list, tuple))
            else self.negative_prompt or ""
        )
        seeds = list(self.seed) if isinstance(self.seed, (range, np.ndarray)) else self.seed
        columns = [self.image, self.prompt, negative, seeds]  # an array as the image is one picture
        counts = {
            name: len(column)
            for name, column in zip(Video._fields, columns, strict=True)
            if isinstance(column, (list, tuple))
        }
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ValueError(
                f"sequences of a batch must have one length of at least 1: got {', '.join(f'{n} {c}' for n, c in counts.items())}"
            )
        size = max(counts.values(), default=1)
        rows = zip(
            *(
                column if isinstance(column, (list, tuple)) else [column] * size
                for column in columns
            ),
            strict=True,
        )
        return [Video(*row) for row in rows]

    def batches(self, size: int) -> list["Request"]:
        """The same for so many of its videos at a time."""
        videos = self.videos
        parts = [videos[first : first + size] for first in range(0, len(videos), size)]
        columns = [
            part[0] if len(part) == 1 else map(list, zip(*part, strict=True)) for part in parts
        ]
        return [
            dataclasses.replace(self, **dict(zip(Video._fields, column, strict=True)))
            for column in columns
        ]

    def resolve(self, config: CheckpointConfig) -> "Resolved":
        """Every open field answered. Raises ValueError naming all that the network can't compute,
        with the nearest that it can; warns once about what is only outside the published range."""
        self.check()
        answers = dataclasses.asdict(config.defaults)
        answered: dict[str, Any] = {
            name: answers.get(name) if value is None else value
            for name, value in vars(self).items()
        }
        resolved = Resolved(
            **answered | {name: plain(answered[name]) for name, plain in PLAIN.items()}
        )
        faults = [*resolved._size_faults(config), *resolved._frame_faults(config)]
        if faults:
            raise ValueError("; ".join(faults))
        outside = resolved._outside(config)
        if outside:
            warnings.warn(
                f"{config.title} was published for {'; '.join(outside)}: expect worse results",
                stacklevel=2,
            )
        return resolved

    def check(self) -> None:
        """Raises ValueError naming all values that no checkpoint takes. What is None is left to the
        checkpoint."""
        faults = []
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1
            ):
                faults.append(f"{name} must be a positive integer: got {value!r}")
        for name, least in (("fps", "positive"), ("guidance_scale", "not negative")):
            value = getattr(self, name)
            if value is not None and (
                not _is_real(value)
                or not 0 <= value < math.inf
                or (least == "positive" and value == 0)
            ):
                faults.append(f"{name} must be a finite number and {least}: got {value!r}")
        if not isinstance(self.use_dynamic_cfg, (bool, np.bool_, type(None))):
            faults.append(f"use_dynamic_cfg must be true or false: got {self.use_dynamic_cfg!r}")
        scale = self.image_latent_scale
        if scale not in (None, *IMAGE_LATENT_SCALES) and not (
            _is_real(scale) and 0 < scale < math.inf
        ):
            faults.append(
                f"image_latent_scale must be {', '.join(IMAGE_LATENT_SCALES)} or a positive number: got {scale!r}"
            )
        if self.noise not in (None, *NOISES):
            faults.append(f"noise must be {' or '.join(NOISES)}: got {self.noise!r}")
        try:
            for video in self.videos:
                if not isinstance(video.prompt, str) or not isinstance(video.negative_prompt, str):
                    faults.append(
                        f"prompt and negative_prompt must be text: got {video.prompt!r} and {video.negative_prompt!r}"
                    )
                if (
                    isinstance(video.seed, bool)
                    or not isinstance(video.seed, numbers.Integral)
                    or not 0 <= video.seed < 2**64
                ):
                    faults.append(
                        f"seed must be an integer from 0 to 2**64 - 1: got {video.seed!r}"
                    )
                if video.image is None:
                    faults.append("image must be a path, a PIL image or an array: got None")
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))


# The point of the class is that what a request may leave out has no default here.
# pyright: reportGeneralTypeIssues=false
@dataclass(frozen=True, kw_only=True)
class Resolved(Request):
    """A request with nothing left open, valid for its checkpoint. Made by `Request.resolve`
    alone."""

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    scheduler: str
    fit: str
    image_latent_scale: str | float
    noise: str

    @property
    def guided(self) -> bool:
        """Whether the unconditional prediction is made at all: decided by the scale alone, dynamic
        or not."""
        return self.guidance_scale > 1

    def latent_shape(self, config: CheckpointConfig) -> LatentShape:
        """Shape of a resolved request's latents: time padded at the front to whole patches."""
        frames = (self.num_frames - 1) // config.vae.temporal_compression_ratio + 1
        padding = -frames % config.transformer.patch[0]
        ratio = config.vae.spatial_ratio
        return LatentShape(
            frames + padding,
            self.height // ratio,
            self.width // ratio,
            config.vae.latent_channels,
            padding,
        )

    def latent_scale(self, config: CheckpointConfig) -> float:
        """What the image's latents are multiplied by. The 1.5 files say `invert_scale_latents`, and
        mean it."""
        factor = config.vae.scaling_factor
        named = {
            "reference": 1 / factor if config.vae.invert_scale_latents else factor,
            "sat": 1.0,
            "trainer": factor,
        }
        scale = self.image_latent_scale
        if config.family == "cogvideox-i2v" and scale == "sat":
            return factor  # the first generation has one scale everywhere
        return named[scale] if isinstance(scale, str) else scale

    def _size_faults(self, config: CheckpointConfig) -> list[str]:
        t, ratio = config.transformer, config.vae.spatial_ratio
        if t.use_learned_positional_embeddings:
            height, width = t.sample_height * ratio, t.sample_width * ratio
            if (self.height, self.width) != (height, width):
                return [
                    f"height x width must be {height}x{width} for {config.title}, whose position table covers no other size: "
                    f"got {self.height}x{self.width}"
                ]
            return []
        step = ratio * t.patch_size
        faults = []
        for name, value in (("height", self.height), ("width", self.width)):
            if value % step:
                below, above = value // step * step, (value // step + 1) * step
                nearest = f"{below} or {above}" if below else f"{above}"
                faults.append(
                    f"{name} must be a multiple of {step}: got {value}; nearest is {nearest}"
                )
        return faults

    def _frame_faults(self, config: CheckpointConfig) -> list[str]:
        """An odd number of latent frames decodes to 8k+1 frames, an even one to 8k: no other count
        comes out as asked for."""
        period = 2 * config.vae.temporal_compression_ratio
        learned = config.transformer.use_learned_positional_embeddings
        most = (
            config.vae.decoded_frames(config.transformer.table_grid[0]) if learned else sys.maxsize
        )

        def valid(frames: int) -> bool:
            return 1 <= frames <= most and frames % period in (0, 1)

        if valid(self.num_frames):
            return []
        below = next(filter(valid, range(min(self.num_frames, most), 0, -1)), None)
        above = next(filter(valid, range(self.num_frames + 1, self.num_frames + period)), None)
        nearest = " or ".join(str(frames) for frames in (below, above) if frames)
        limit = f" and at most {most}" if learned else ""
        rule = f"{period}k+1{limit} for {config.title} ({period}k computes too)"
        return [f"num_frames must be {rule}: got {self.num_frames}; nearest is {nearest}"]

    def _outside(self, config: CheckpointConfig) -> list[str]:
        published = config.published
        short, long = sorted((self.height, self.width))
        outside = []
        if published.short_side and not published.short_side[0] <= short <= published.short_side[1]:
            outside.append(
                f"a short side of {_span(published.short_side)} pixels (this is {short})"
            )
        if published.long_side and not published.long_side[0] <= long <= published.long_side[1]:
            outside.append(f"a long side of {_span(published.long_side)} pixels (this is {long})")
        if not published.portrait and self.height > self.width:
            outside.append("landscape (this is portrait)")
        if published.frames and self.num_frames not in published.frames:
            outside.append(
                f"{', '.join(map(str, published.frames))} frames (this is {self.num_frames})"
            )
        return outside


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"
