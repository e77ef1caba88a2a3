"""What a user asks for, checked against a checkpoint before anything slow begins."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .config import CheckpointConfig
from .disk import is_text
from .settings import COUNT, KINDS, NEUTRAL, Settings, is_sequence, is_whole, misfits

Whole = int | np.integer
Real = int | float | np.number


def _plain(seed: Any) -> Any:
    """Seeds in an array or a range as a list; a single one as it is."""
    if isinstance(seed, range):
        return list(seed)
    return seed.tolist() if isinstance(seed, np.ndarray) else seed


class Video(NamedTuple):
    """One entry of a batch."""

    image: Any
    prompt: str
    negative_prompt: str
    seed: int


class LatentShape(NamedTuple):
    """The shape of a request's latents: `frames` includes `padding` leading latent frames that are
    dropped before decoding."""

    frames: int
    height: int
    width: int
    channels: int
    padding: int


@dataclass(frozen=True)
class Noise:
    """Given noise, channels last, float32. What is None is drawn from the seeds."""

    posterior: Any = None  # [b 1 h w c], of the image's VAE posterior
    initial: Any = None  # [b t h w c], t padded as the network needs it
    steps: Any = None  # [i b t h w c], the draw that each step uses; ddim ignores it

    def check(self, shape: LatentShape, videos: int, steps: int) -> "Noise":
        """The same as float32 arrays. Raises ValueError for shapes other than the request's and
        for values that are not finite."""
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
        wrong += [
            f"{name} must be finite: got {array[~np.isfinite(array)][0]}"
            for name, array in arrays.items()
            if array is not None and not np.isfinite(array).all()
        ]
        if wrong:
            raise ValueError("noise: " + "; ".join(wrong))
        return dataclasses.replace(self, **arrays)


@dataclass(frozen=True)
class Request:
    """A video to make, or a batch: `image` (what `media.images.read_image` reads), `prompt`,
    `negative_prompt` and `seed` may be sequences of one length. A setting that is None has the
    checkpoint's default (see `Settings` and `CheckpointConfig.defaults`)."""

    image: Any
    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str | None] | None = ""
    height: Whole | None = None  # pixels
    width: Whole | None = None
    num_frames: Whole | None = None
    fps: Real | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Real | Sequence[Real] | np.ndarray | None = None  # or one for each step
    use_dynamic_cfg: bool | None = None
    scheduler: str | None = None  # "ddim", "dpm", "dpm2m", "dpm3m" or "deis"
    seed: Whole | Sequence[Whole] | np.ndarray = 42
    fit: str | None = None  # "crop", "pad", "stretch" or "auto"
    # "reference", "sat" (1), "trainer" (the VAE's scaling factor), or a number.
    image_latent_scale: str | Real | None = None
    noise: str | None = None  # "jax" or "torch": whose random numbers a seed means
    motion: Real | None = None  # 0 to 1
    guidance_method: str | None = None  # "cfg", "apg" or "cfg_zero"
    guidance_interval: Sequence[Real] | np.ndarray | None = None  # (A, B), shares of the steps
    guidance_skip: Real | None = None
    image_guidance: Real | None = None
    noise_aug: Real | None = None  # level of noise on the image's pixels in [-1, 1]
    end_image: Any = None  # a picture for the last latent frame, of every video
    keyframes: Mapping[int, Any] | None = None  # pictures by latent frame, from 1 on, likewise
    video: Any = None  # a clip that every video starts from: a file, or uint8 frames [f h w 3]
    strength: Real | None = None  # above 0, at most 1: the share of the steps run from the clip
    loop: bool | None = None
    extend: Whole | None = None  # segments after the first
    overlap: Whole | None = None  # frames, 4k+1, from which a segment goes on
    match_colour: bool | None = None  # of a segment to the one before

    @property
    def videos(self) -> list[Video]:
        """The batch. Single values are the same for every video of it. Raises ValueError where
        lengths differ."""
        negative = (
            [text or "" for text in self.negative_prompt]
            if isinstance(self.negative_prompt, (list, tuple))
            else self.negative_prompt or ""
        )
        columns = [self.image, self.prompt, negative, _plain(self.seed)]
        counts = {
            name: len(column)
            for name, column in zip(Video._fields, columns, strict=True)
            if isinstance(column, (list, tuple))  # an array as the image is one picture
        }
        if len(set(counts.values())) > 1 or 0 in counts.values():
            got = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"sequences of a batch must have one length of at least 1: got {got}")
        size = max(counts.values(), default=1)
        rows = [c if isinstance(c, (list, tuple)) else [c] * size for c in columns]
        return [Video(*row) for row in zip(*rows, strict=True)]

    def batches(self, size: int) -> list["Request"]:
        """Requests for at most `size` of its videos each."""
        videos = self.videos
        return [self._of(videos[first : first + size]) for first in range(0, len(videos), size)]

    def takes(self, count: int) -> "Request":
        """The request for each of its videos `count` times, with seeds counting up from its own.
        Raises ValueError for another count, and as `check`."""
        if not COUNT.fits(count):
            raise ValueError(f"best_of must be {COUNT.rule}: got {count!r}")
        self.check()
        takes = [
            video._replace(seed=int(video.seed) + take)
            for video in self.videos
            for take in range(count)
        ]
        return self._of(takes)

    def _of(self, videos: Sequence[Video]) -> "Request":
        """The same for these videos."""
        columns = videos[0] if len(videos) == 1 else map(list, zip(*videos, strict=True))
        return dataclasses.replace(self, **dict(zip(Video._fields, columns, strict=True)))

    def with_prompts(self, prompts: Sequence[str]) -> "Request":
        """The same with other prompts, one for each of its videos."""
        pairs = zip(self.videos, prompts, strict=True)
        return self._of([video._replace(prompt=prompt) for video, prompt in pairs])

    def resolve(self, config: CheckpointConfig) -> "Resolved":
        """The request with the checkpoint's defaults filled in. Raises ValueError naming all values
        that the network can't compute, with the nearest that it can. Warns once about those that
        are only outside the published range."""
        self.check()
        given = {name: value for name, value in vars(self).items() if value is not None}
        values: dict[str, Any] = {**vars(self), **NEUTRAL, **config.defaults, **given}
        if is_sequence(values["guidance_scale"]):
            values["use_dynamic_cfg"] = given.get("use_dynamic_cfg", False)
        if faults := misfits(values):  # `given` has none, so a TOML lacks one or has a wrong one
            raise ValueError(f"the defaults of {config.title}: {'; '.join(faults)}")
        values |= {name: kind.convert(values[name]) for name, kind in KINDS.items()}
        seed = _plain(self.seed)
        values["seed"] = int(seed) if is_whole(seed) else [int(one) for one in seed]
        resolved = Resolved(**values)
        faults = [*resolved._size_faults(config), *resolved._frame_faults(config)]
        faults += [*resolved._guidance_faults(), *resolved._keyframe_faults(config)]
        faults += [*resolved._length_faults(config)]
        if faults:
            raise ValueError("; ".join(faults))
        sizes = resolved.height, resolved.width, resolved.num_frames
        prompts = [video.prompt for video in resolved.videos]
        learned = learned_sizes(config)
        if outside := [*config.published.outside(*sizes, prompts)]:
            published = f"{config.title} was published for {'; '.join(outside)}"
            warnings.warn(f"{published}: expect worse results", stacklevel=2)
        elif learned and (sizes[:2] != learned[:2] or sizes[2] > learned[2]):
            known = "{2} frames of {0}x{1}".format(*learned)
            what = f"{config.title} learned positions for {known}, which are interpolated"
            warnings.warn(f"{what}: expect worse results", stacklevel=2)
        return resolved

    def check(self) -> None:
        """Raises ValueError naming all values that no checkpoint takes."""
        faults = misfits({name: value for name, value in vars(self).items() if value is not None})
        if not isinstance(self.keyframes or {}, Mapping):
            got = type(self.keyframes).__name__
            faults.append(f"keyframes must be pictures by latent frame: got {got}")
        try:
            for video in self.videos:
                if not is_text(video.prompt) or not is_text(video.negative_prompt):
                    got = f"{video.prompt!r} and {video.negative_prompt!r}"
                    faults.append(f"prompt and negative_prompt must be Unicode text: got {got}")
                if not is_whole(video.seed) or not 0 <= video.seed < 2**64:
                    rule = "an integer from 0 to 2**64 - 1"
                    faults.append(f"seed must be {rule}: got {video.seed!r}")
                if video.image is None:
                    faults.append("image must be a path, a PIL image or an array: got None")
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class Resolved(Settings, Request):
    """A request with nothing left open, valid for its checkpoint. Only `Request.resolve` makes
    one."""

    @property
    def guided(self) -> bool:
        """Whether the unconditional prediction is computed at all. The scale alone decides that,
        also where guidance is dynamic, if nothing else needs it."""
        scale = self.guidance_scale
        most = max(scale) if isinstance(scale, tuple) else scale
        return most > 1 or self.image_guidance != 1 or self.motion > 0

    @property
    def first_step(self) -> int:
        """The step that is run first: of a clip to start from, the noise is added that `strength`
        asks for, and the steps before are left out."""
        steps = self.num_inference_steps
        run = int(steps * self.strength + 1e-9)  # 50 * 0.58 is a little less than 29
        return 0 if self.video is None else steps - run

    def frames_made(self, config: CheckpointConfig) -> int:
        """The frames of the finished video."""
        if self.loop:
            return config.vae.temporal_compression_ratio * self.latent_shape(config).frames
        return self.num_frames + self.extend * (self.num_frames - self.overlap)

    def latent_shape(self, config: CheckpointConfig) -> LatentShape:
        """The shape of the latents of a segment, padded at the front of time to whole patches."""
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
        """What the image's latents are multiplied by."""
        # The 1.5 files set invert_scale_latents, and the network was trained that way.
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

    def pictures(self, config: CheckpointConfig) -> dict[int, Any]:
        """The pictures beside the first one, by latent frame without padding."""
        shape = self.latent_shape(config)
        end = {} if self.end_image is None else {shape.frames - shape.padding - 1: self.end_image}
        return dict(sorted({**(self.keyframes or {}), **end}.items()))

    def _keyframe_faults(self, config: CheckpointConfig) -> list[str]:
        shape, given = self.latent_shape(config), self.keyframes or {}
        last = shape.frames - shape.padding - 1
        faults = []
        if self.end_image is not None and (last == 0 or last in given):
            other = "a keyframe there" if last else "a video of one latent frame"
            faults.append(
                f"end_image must be the only picture of the last latent frame: got {other}"
            )
        rule = f"from 1 to {last} for {self.num_frames} frames"
        faults += [
            f"keyframes must be of latent frames {rule}: got {frame!r}"
            for frame in given
            if not is_whole(frame) or not 1 <= frame <= last
        ]
        return faults

    def _guidance_faults(self) -> list[str]:
        scale, steps = self.guidance_scale, self.num_inference_steps
        if not isinstance(scale, tuple):
            return []
        faults = []
        if len(scale) != steps:
            must = f"guidance_scale must be one number or {steps}, one for each step"
            faults.append(f"{must}: got {len(scale)}")
        if self.use_dynamic_cfg:
            faults.append("guidance_scale must be one number with use_dynamic_cfg: got a list")
        return faults

    def _length_faults(self, config: CheckpointConfig) -> list[str]:
        """Of a clip to start from, a loop, and segments."""
        steps, faults = self.num_inference_steps, []
        if self.first_step == steps:
            rule = f"leave at least one of {steps} steps"
            least = math.ceil(1000 / steps) / 1000
            faults.append(f"strength must {rule}: got {self.strength}; at least {least:g}")
        if self.loop:
            shape = self.latent_shape(config)
            beside = "end_image" if self.end_image is not None else "extend" if self.extend else ""
            if config.transformer.patch_size_t:
                why = "has patches of two latent frames"
                faults.append(f"loop must be false for {config.title}, which {why}: got true")
            elif shape.frames < 3:
                faults.append(f"loop must have at least 9 frames: got {self.num_frames}")
            if beside:
                faults.append(f"loop must be without {beside}: got both")
        if self.overlap % config.vae.temporal_compression_ratio != 1:
            ratio = config.vae.temporal_compression_ratio
            faults.append(f"overlap must be {ratio}k+1 frames: got {self.overlap}")
        if self.extend and self.overlap >= self.num_frames:
            must = f"overlap must be fewer than the {self.num_frames} frames of a segment"
            faults.append(f"{must}: got {self.overlap}")
        return faults

    def _size_faults(self, config: CheckpointConfig) -> list[str]:
        step = config.vae.spatial_ratio * config.transformer.patch_size
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
        """An odd number of latent frames decodes to 8k+1 frames and an even one to 8k, so no other
        number of frames can be made."""
        period = 2 * config.vae.temporal_compression_ratio

        def valid(frames: int) -> bool:
            return frames >= 1 and frames % period in (0, 1)

        if valid(self.num_frames):
            return []
        below = next(filter(valid, range(self.num_frames, 0, -1)), None)
        above = next(filter(valid, range(self.num_frames + 1, self.num_frames + period)), None)
        nearest = " or ".join(str(frames) for frames in (below, above) if frames)
        rule = f"{period}k+1 for {config.title} ({period}k computes too)"
        return [f"num_frames must be {rule}: got {self.num_frames}; nearest is {nearest}"]


def learned_sizes(config: CheckpointConfig) -> tuple[int, int, int] | None:
    """(height, width, frames) that a learned position table was made for; None without one."""
    network, vae = config.transformer, config.vae
    if not network.use_learned_positional_embeddings:
        return None
    sides = network.sample_height, network.sample_width
    height, width = (side * vae.spatial_ratio for side in sides)
    return height, width, vae.decoded_frames(network.table_grid[0])
