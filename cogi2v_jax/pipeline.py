"""Image-to-video, top to bottom. The mathematics of each stage is in `sampling/stages.py`; what
loads weights, compiles and keeps the clock is the `Session` of `sampling/programs.py`."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32

from .config import CheckpointConfig
from .devices.sharding import put, split, to_host
from .disk import quoted
from .media.images import fit_image, read_image
from .media.segments import Segments, clip_frames
from .media.sizes import fit_size
from .models.tokenizer import tokenize
from .models.transformer import Modulation
from .models.vae_tiles import decode_tiled, encode_tiled, sides
from .published import PLAIN
from .request import Noise, Request, Resolved
from .sampling import stages
from .sampling.noise import draw_as_torch, seed_keys
from .sampling.programs import WRAPPED, RequestTarget, Session, Target, this_machine
from .sampling.schedule import draws
from .weights.checkpoint import Models, check_models

APART = 2_654_435_769  # from the seed of a segment to that of the next; both halves change
WAYS = "lower guidance_scale and image_latent_scale, try float32, or check the weights"
# (step, steps, latents on the devices and with padding), after every step.
OnStep = Callable[[int, int, Any], None]
OnLatents = Callable[[Any, Resolved], None]  # (latents, resolved request), before decoding


@dataclass(frozen=True)
class Result:
    """A batch of videos, and all it takes to make them again."""

    video: UInt8[np.ndarray, "b f h2 w2 3"]
    latents: Float[np.ndarray, "b t h w c"]  # scaled; without the padding frame of 1.5
    request: Resolved
    # By name: load, compile, text, image, denoise, decode.
    seconds: dict[str, float] = field(default_factory=dict)


def generate(
    models: Models,
    request: Request,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
    done: Float[Any, "b t h w c"] | None = None,
) -> Result:
    """Makes the videos of a request. Noise that is not given is drawn from the seeds. `on_step` is
    called after every step, and raising in it cancels; `on_latents` before decoding starts, for a
    video of several segments (`Request.extend`) after each with the latents of all so far; given as
    `done` they are not made again. Raises ValueError for what the network cannot compute,
    FloatingPointError where it computes latents or frames that are not finite."""
    job = prepare(models, request, noise)
    run, request = Session(models, job), job.request
    segments, video = split_segments(done, job), Segments(request.overlap, request.match_colour)
    with run.clock("denoise"):
        job = job.with_torch_noise()
    group, text, start = job.group(on_step), None, None
    if len(segments) <= request.extend:
        with run.ahead(job.loop(len(job.keys), group, job.noise_of(0, group))):
            text = run(stages.encode_text, job.ids)  # [pairs p d]
            start = None if segments else begin(run, job)
    for number in range(request.extend + 1):
        if number == len(segments):
            job = job.after(number, video.last) if number else job
            segments.append(denoise(run, job, text, start or begin(run, job), on_step))
            start = None  # decoding needs its memory
            if on_latents is not None:
                on_latents(np.concatenate(segments, axis=1), request)
        video.add(decode_batch(run, segments[number], request.loop))
    return Result(video.frames, np.concatenate(segments, axis=1), request, run.clock.seconds)


class Start(NamedTuple):
    """What the loop begins with, on the devices."""

    state: stages.State
    image: Float[Any, "b t h w c"]
    low: Float[Any, "b t h w c"] | None
    modulation: Modulation


def begin(run: Session, job: "Job") -> Start:
    """The latents of the pictures, the initial noise, and the modulation of all steps."""
    pixels, level = job.pixels, np.float32(job.request.noise_aug)
    pixels = run(stages.add_noise, pixels, job.keys, level) if level else pixels
    moments = encode_pixels(run, pixels)  # [b 1 h w 2c]
    frames, padding = job.shape.frames, job.shape.padding if pixels.shape[1] > 1 else 0
    drawn = moments, *job.image_noise
    image = run(stages.draw_image, *drawn, frames=frames, padding=padding)
    for frame, picture in job.placed.items():
        placed = encode_pixels(run, picture), job.keys, job.image_scale, np.int32(frame)
        image = run(stages.place_image, image, *placed)
    low = run(stages.low_pass, image, *job.low_pass) if job.low_pass else None
    initial, past = (job.noise.initial, job.keys), job.tableau.past.shape[1]
    if job.clip is None:
        state = run(stages.draw_start, *initial, shape=job.shape[:4], past=past)
    else:
        given = encode_pixels(run, job.clip), *initial, *job.clip_scales
        state = run(stages.start_from_clip, *given, padding=job.shape.padding, past=past)
    return Start(state, image, low, run(stages.modulate, *job.time))


def denoise(
    run: Session, job: "Job", text: Any, start: Start, on_step: OnStep | None
) -> Float[np.ndarray, "b t h w c"]:
    """Latents without padding, with the text [pairs p d] of the prompts."""
    steps, group = job.steps, job.group(on_step)
    state, image, low, modulation = start
    inputs = job.keys, image, text, job.positions(), low, job.shifts
    for done in range(0, steps, group):
        first = np.int32(job.request.first_step + done)
        rows = first, job.tableau, modulation, job.noise_of(done, group)
        state = run(stages.denoise, state, *rows, *inputs, steps=group, guidance=job.guidance)
        if on_step is not None:
            on_step(done + group, steps, state.x)
    latents = to_host(state.x)[:, job.shape.padding :]  # [b t h w c]
    if not np.isfinite(latents).all():
        raise FloatingPointError(f"latents are not finite after {steps} steps; {WAYS}")
    return latents


def decode(
    models: Models,
    latents: Float[Any, "b t h w c"],
    seconds: dict[str, float] | None = None,
    loop: bool = False,
) -> UInt8[np.ndarray, "b f h2 w2 3"]:
    """Scaled latents without padding to frames: 4 (t - 1) + 1 of them where t is odd, 4 t where it
    is even or where they are a loop. Adds wall-clock seconds by name to `seconds`. Raises
    ValueError for latents of another shape or that are not finite, FloatingPointError for frames
    that are not."""
    check_models(models)
    latents = _checked(latents, models.config)
    machine = this_machine(models, len(latents), guided=True)
    run = Session(models, Target(models.config, models.dtype, *machine))
    video = decode_batch(run, latents, loop)
    if seconds is not None:
        for name, spent in run.clock.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    return video


def _checked(latents: Any, config: CheckpointConfig) -> Float[np.ndarray, "b t h w c"]:
    """Latents in float32, as the decoder takes them."""
    try:
        array = np.asarray(latents, np.float32)
    except (ValueError, TypeError):
        raise ValueError(f"latents must be an array: got {type(latents).__name__}") from None
    channels = config.vae.latent_channels
    if array.ndim != 5 or array.shape[-1] != channels or not array.size:
        must = f"latents must have the shape [b t h w {channels}] for {config.title}"
        raise ValueError(f"{must}: got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"latents must be finite: got {array[~np.isfinite(array)][0]}")
    return array


def split_segments(done: Any, job: "Job") -> list[Float[np.ndarray, "b t h w c"]]:
    """The latents of every segment that is done. Raises ValueError for those of another
    request."""
    if done is None:
        return []
    latents, shape = _checked(done, job.config), job.shape
    frames = shape.frames - shape.padding
    count, rest = divmod(latents.shape[1], frames)
    size = len(job.keys), *shape[1:4]
    if rest or count > job.request.extend + 1 or (len(latents), *latents.shape[2:]) != size:
        must = f"done must be latents [b {frames}k h w c] of segments of the request"
        raise ValueError(f"{must}: got {list(latents.shape)}")
    return np.split(latents, count, axis=1)


def encode_pixels(run: Session, pixels: Float[Any, "b f h w 3"]) -> Float[Any, "b t h2 w2 c"]:
    """Pixels in [-1, 1], of a picture or a clip, to the moments of their latents."""

    vae, strips = run.target.config.vae, {}
    if pixels.shape[1] > 1 and not run.models.vae_tiling:  # a clip: eight frames at a time
        rows, columns = (side // vae.spatial_ratio for side in pixels.shape[2:4])
        strips = {"strips": run.target.strips(rows, columns)}

    def encode(pixels: Float[Any, "b f h w 3"]) -> Float[Any, "b t h2 w2 c"]:
        return run(stages.encode_image, pixels, **strips)

    return encode_tiled(encode, pixels, vae) if run.models.vae_tiling else encode(pixels)


def decode_frames(run: Session, latents: Float[Any, "b t h w c"]) -> Float[Any, "b f h2 w2 3"]:
    """Scaled latents to frames in [-1, 1] or a little beyond, on the devices: of as many videos as
    the mesh decodes side by side."""
    vae = run.target.config.vae

    def decode(latents: Float[Any, "b t h w c"]) -> Float[Any, "b f h2 w2 3"]:
        strips = run.target.strips(*latents.shape[2:4])
        return run(stages.decode, latents, np.float32(vae.scaling_factor), strips=strips)

    return decode_tiled(decode, latents, vae) if run.models.vae_tiling else decode(latents)


def decode_batch(
    run: Session, latents: Float[np.ndarray, "b t h w c"], loop: bool = False
) -> UInt8[np.ndarray, "b f h2 w2 3"]:
    """Any number of videos, a few at a time: no program needs more memory than the decoder. The
    start of a loop is decoded after its end, as the rest of it is after what is before."""
    kept = 0  # frames from the end on: all
    if loop:
        kept = run.target.config.vae.temporal_compression_ratio * latents.shape[1]
        last = np.arange(-WRAPPED, 0) % latents.shape[1]
        latents = np.concatenate([latents[:, last], latents], axis=1)
    together = run.target.mesh.shape["data"]
    groups = [latents[first : first + together] for first in range(0, len(latents), together)]
    videos = []
    for group in groups:
        video, finite = run(stages.to_bytes, decode_frames(run, group))
        if not to_host(finite):
            raise FloatingPointError(f"frames are not finite; {WAYS}")
        videos.append(to_host(video)[:, -kept:])
    return np.concatenate(videos)


@dataclass(frozen=True)
class Job(RequestTarget):
    """A request with everything done that needs no weights."""

    noise: Noise  # as given; what is None is still to be drawn
    keys: UInt32[Any, "b 2"]  # of the seeds, on the devices
    pixels: Float[np.ndarray, "b n h w 3"]  # the image, or the frames that a segment goes on from
    pictures: dict[int, Float[np.ndarray, "b 1 h w 3"]]  # others, by latent frame with padding
    clip: Float[np.ndarray, "b f h w 3"] | None  # to start from
    ids: Int[np.ndarray, "pairs p"]  # negative prompts first, where guided
    segment: int = 0

    @property
    def image_noise(self) -> tuple[Any, Any, np.float32]:
        """What `draw_image` takes beside moments."""
        return self.noise.posterior, self.keys, self.image_scale

    @property
    def placed(self) -> dict[int, Float[np.ndarray, "b 1 h w 3"]]:
        """The other pictures of this segment: the end is the last one's, keyframes the first's."""
        end = None if self.request.end_image is None else self.shape.frames - 1
        return {
            frame: picture
            for frame, picture in self.pictures.items()
            if self.segment == (self.request.extend if frame == end else 0)
        }

    @property
    def clip_scales(self) -> tuple[np.float32, np.float32, np.float32]:
        """What `start_from_clip` multiplies latents and noise by."""
        factor = np.float32(self.config.vae.scaling_factor)
        return factor, self.tableau.alpha[0], self.tableau.sigma[0]

    @property
    def seeds(self) -> list[int]:
        """Of this segment, far from the seeds of other videos, which count up by one."""
        return [(video.seed + APART * self.segment) % 2**64 for video in self.request.videos]

    def group(self, on_step: OnStep | None) -> int:
        """Steps of one call of the loop."""
        return self.steps if on_step is None else 1

    def after(self, segment: int, frames: UInt8[np.ndarray, "b n h w 3"]) -> "Job":
        """Segment number `segment`, which goes on from the last frames of the video so far."""
        pixels = frames.astype(np.float32) / 127.5 - 1
        request = dataclasses.replace(self.request, video=None)  # the first one starts from it
        given = {"request": request, "pixels": pixels, "clip": None, "noise": Noise()}
        job = dataclasses.replace(self, segment=segment, **given)
        keys = put(seed_keys(job.seeds), split(self.mesh))
        return dataclasses.replace(job, keys=keys).with_torch_noise()

    def with_torch_noise(self) -> "Job":
        """The same with torch's random numbers for noise that is not given, where the request asks
        for them; otherwise the devices draw it."""
        if self.request.noise != "torch":
            return self
        r = self.request
        counts = draws(self.config.scheduler, r.scheduler, r.num_inference_steps, r.first_step)
        pictures = (self.pixels.shape[1] - 1) // self.config.vae.temporal_compression_ratio + 1
        drawn = draw_as_torch(self.seeds, self.dtype, self.shape[:4], counts, pictures)
        pairs = zip(drawn, vars(self.noise).values(), strict=True)
        noise = Noise(*(own if given is None else given for own, given in pairs))
        return dataclasses.replace(self, noise=noise)

    def noise_of(self, first: int, steps: int) -> Float[np.ndarray, "{steps} b t h w c"] | None:
        """Given noise of `steps` steps from `first` on."""
        return None if self.noise.steps is None else self.noise.steps[first : first + steps]


def prepare(models: Models, request: Request, noise: Noise | None = None) -> Job:
    """Every check there is, before any slow work. Raises ValueError as `generate` does."""
    check_models(models)
    if not isinstance(request, Request):
        raise ValueError(f"request must be a cogi2v_jax.Request: got {type(request).__name__}")
    resolved = fit_size(request, models.config).resolve(models.config)
    videos = resolved.videos
    target = target_of(models, resolved)
    shape, config = target.shape, models.config
    given = Noise() if noise is None else noise
    if not isinstance(given, Noise):
        raise ValueError(f"noise must be a cogi2v_jax.Noise: got {type(noise).__name__}")
    if not target.tableau.noise.any():
        given = dataclasses.replace(given, steps=None)  # DDIM reads none
    given = given.check(shape, len(videos), target.steps)
    if models.vae_tiling:
        sides(config.vae, encodes=False)
    else:
        target.strips(shape.height, shape.width)
    size = resolved.height, resolved.width, resolved.fit
    images = {
        id(video.image): video.image for video in videos
    }  # one of several videos is read once
    fitted = {key: fit_image(read_image(image), *size) for key, image in images.items()}
    others = {k: fit_image(read_image(v), *size) for k, v in resolved.pictures(config).items()}
    if any(map(config.published.is_strange, (*fitted.values(), *others.values()))):
        warnings.warn(f"{config.title} knows {PLAIN} alone: expect nothing of sense", stacklevel=3)
    pixels = np.stack([fitted[id(video.image)] for video in videos])[:, None]
    pictures = {k + shape.padding: np.broadcast_to(v, pixels.shape) for k, v in others.items()}
    clip = None
    if resolved.video is not None:
        frames = clip_frames(resolved.video, resolved.num_frames)
        fits = [fit_image(read_image(frame), *size) for frame in frames]
        clip = np.broadcast_to(np.stack(fits), (len(videos), *np.shape(fits)))
    negative = [video.negative_prompt for video in videos] if resolved.guided else []
    prompts = negative + [video.prompt for video in videos]
    ids = tokenize_prompts(config, models.folder, prompts)
    keys = put(seed_keys([video.seed for video in videos]), split(target.mesh))
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    arrays = {"pixels": pixels, "pictures": pictures, "clip": clip, "ids": ids}
    return Job(**fields, noise=given, keys=keys, **arrays)


def target_of(models: Models, request: Resolved) -> RequestTarget:
    """What the programs of a request are compiled for on this machine."""
    machine = this_machine(models, len(request.videos), request.guided)
    settings = (*machine, request, models.attention)
    return RequestTarget(models.config, models.dtype, *settings, ranks=models.ranks)


def videos_at_once(models: Models, request: Request) -> int:
    """How many videos of a request the mesh for all of them makes side by side. Raises ValueError
    as `generate` does."""
    resolved = fit_size(request, models.config).resolve(models.config)
    return target_of(models, resolved).mesh.shape["data"]


def tokenize_prompts(
    config: CheckpointConfig, folder: Path, prompts: Sequence[str]
) -> Int[np.ndarray, "b p"]:
    """Token ids by the tokenizer of a checkpoint's folder. Raises ValueError for a prompt longer
    than a learned position table, with other positions it is cut with a warning; and for an id
    beyond T5's table, which would read another row of it."""
    length = config.transformer.max_text_seq_length
    ids, counts = tokenize(folder / "tokenizer", prompts, length)
    for prompt, row, count in zip(prompts, ids, counts, strict=True):
        if row.max() >= (size := config.text_encoder.vocab_size):
            what = f"token ids must be below {size}, the size of T5's table"
            raise ValueError(f"{what}: got {row.max()} in {quoted(prompt)}")
        limit = f"{length} tokens for {config.title}, its end mark included"
        what = f"prompt must be at most {limit}: got {count} in {quoted(prompt)}"
        if count > length and config.transformer.use_learned_positional_embeddings:
            raise ValueError(what)
        if count > length:
            warnings.warn(f"{what}; the rest is cut off", stacklevel=4)
    return ids
