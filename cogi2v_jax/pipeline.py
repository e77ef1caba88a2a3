"""Image-to-video, top to bottom: encode the text, encode the image, denoise, decode."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt32

from . import noise as streams
from .attention import Attend, choose
from .checkpoint import Models
from .compiled import Program, Stopwatch
from .media import fit_image, read_image
from .models.t5 import T5
from .models.transformer import Modulation, Shifts, Transformer
from .models.vae import VAE, sample_posterior
from .positions import Positions, positions, sinusoid
from .request import LatentShape, Noise, Request, Resolved
from .schedule import Tableau, step, tableau
from .tokenizer import tokenize

OFS = 2.0  # the 1.5 network's fixed conditioning value

OnStep = Callable[[int, int, Any], None]  # (step, steps, latents), on the host, after every step
OnLatents = Callable[[Any, Resolved], None]  # (latents, resolved request), before they are decoded
Carry = tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]  # x, and the last step's x0


@dataclass(frozen=True)
class Result:
    """A batch of videos, and all it takes to make them again."""

    video: UInt8[np.ndarray, "b f h2 w2 3"]
    latents: Float[np.ndarray, "b t h w c"]  # scaled; the padding frame of 1.5 is dropped
    request: Resolved
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: load, text, image, compile, denoise, decode


def generate(
    models: Models, request: Request, noise: Noise | None = None, on_step: OnStep | None = None, on_latents: OnLatents | None = None
) -> Result:
    """Makes the request's videos. Noise is drawn from the seeds unless given. `on_step` is called between slabs of the loop, and raising in
    it cancels; `on_latents` before decoding starts. Raises ValueError for what the network can't compute."""
    watch = Stopwatch()
    prepared = prepare(models, request, noise)
    latents = _sample(models, prepared, on_step, watch)
    if on_latents is not None:
        on_latents(latents, prepared.request)
    return Result(decode(models, latents, watch), latents, prepared.request, watch.seconds)


class Prepared(NamedTuple):
    """A request with all of it done that needs no weights."""

    request: Resolved
    shape: LatentShape
    rows: Tableau
    noise: Noise
    words: UInt32[np.ndarray, "b 2"]
    pixels: Float[np.ndarray, "b 1 h w 3"]
    ids: Int[np.ndarray, "pairs p"]  # negative prompts first, where guided


def prepare(models: Models, request: Request, noise: Noise | None = None) -> Prepared:
    """Every check there is, before anything slow begins. Raises ValueError as `generate` does."""
    config = models.config
    resolved = request.resolve(config)
    videos = resolved.videos
    shape = resolved.latent_shape(config)
    rows = tableau(config.scheduler, resolved.scheduler, resolved.num_inference_steps, resolved.guidance_scale, resolved.use_dynamic_cfg)
    noise = noise or Noise()
    if not rows.noise.any():
        noise = dataclasses.replace(noise, steps=None)  # ddim reads none
    noise = noise.check(shape, len(videos), len(rows.timestep))
    words = streams.seed_words([video.seed for video in videos])
    images = [fit_image(read_image(video.image), resolved.height, resolved.width, resolved.fit) for video in videos]
    prompts = [video.prompt for video in videos]
    ids = _tokens(models, [video.negative_prompt for video in videos] + prompts if resolved.guided else prompts)
    return Prepared(resolved, shape, rows, noise, words, np.stack(images)[:, None], ids)


def _sample(models: Models, prepared: Prepared, on_step: OnStep | None, watch: Stopwatch) -> Float[np.ndarray, "b t h w c"]:
    """A prepared request's final latents, scaled, without padding."""
    request, shape, rows, noise, words, pixels, ids = prepared
    config = models.config
    attend = choose(models.attention, models.dtype)
    steps = len(rows.timestep)

    with watch("load"):
        t5 = models.part("text_encoder")
    text = watch.run("text", TEXT, t5, ids)
    del t5
    with watch("load"):
        vae = models.part("vae")
    image = watch.run("image", IMAGE, vae, pixels, noise.posterior, words, np.float32(request.latent_scale(config)), frames=shape.frames)
    del vae
    with watch("load"):
        transformer = models.part("transformer")
    ofs = sinusoid(np.array([OFS]), config.transformer.ofs_embed_dim) if config.transformer.ofs_embed_dim else None
    shifts = watch.run("denoise", SHIFTS, transformer.modulation, sinusoid(rows.timestep, config.transformer.width), ofs)
    carry = watch.run("denoise", START, noise.initial, words, shape=image.shape[1:])
    given = (rows, shifts, noise.steps, words, image, text, positions(config.transformer, (shape.frames, shape.height, shape.width)))
    slab = steps if on_step is None else 1
    for first in range(0, steps, slab):
        carry = watch.run("denoise", DENOISE, transformer, carry, np.int32(first), *given, slab=slab, attend=attend)
        if on_step is not None:
            on_step(first + slab, steps, carry[0])
    return np.asarray(carry[0])[:, shape.padding :]


def decode(models: Models, latents: Float[Any, "b t h w c"], watch: Stopwatch | None = None) -> UInt8[np.ndarray, "b f h2 w2 3"]:
    """Scaled latents to frames: 4 (t - 1) + 1 of them where t is odd, 4 t where it is even."""
    watch = watch or Stopwatch()
    with watch("load"):
        vae = models.part("vae")
    return np.asarray(watch.run("decode", DECODE, vae, np.asarray(latents, np.float32), np.float32(models.config.vae.scaling_factor)))


def _tokens(models: Models, prompts: Sequence[str]) -> Int[np.ndarray, "b p"]:
    length = models.config.transformer.max_text_seq_length
    ids, counts = tokenize(models.folder / "tokenizer", prompts, length)
    for prompt, count in zip(prompts, counts, strict=True):
        what = f"prompt must be at most {length} tokens for {models.config.title}, its end mark included: got {count} in {prompt!r}"
        if count > length and models.config.transformer.use_learned_positional_embeddings:
            raise ValueError(what)
        if count > length:
            warnings.warn(f"{what}; the rest is cut off", stacklevel=4)
    return ids


def encode_text(t5: T5, ids: Int[Array, "b p"]) -> Float[Array, "b p d"]:
    return t5(ids)


def encode_image(
    vae: VAE,
    pixels: Float[Array, "b 1 h w 3"],
    noise: Float[Array, "b 1 h2 w2 c"] | None,
    words: UInt32[Array, "b 2"],
    scale: Float[Array, ""],
    frames: int,
) -> Float[Array, "b t h2 w2 c"]:
    """The image's scaled latents in the first latent frame, zeros in all others: zeros of latent space, not an encoded black frame."""
    mean, log_variance = vae.encode(pixels.astype(vae.encoder.conv_in.kernel.dtype))
    if noise is None:
        noise = streams.draw(words, streams.POSTERIOR, mean.shape[1:])
    latents = scale * sample_posterior(mean, log_variance, noise).astype(jnp.float32)
    return jnp.pad(latents, ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0)))


def modulate(modulation: Modulation, time: Float[Array, "i d"], ofs: Float[Array, "1 e"] | None) -> Shifts:
    return modulation(time, ofs)


def draw_start(noise: Float[Array, "b t h w c"] | None, words: UInt32[Array, "b 2"], shape: tuple[int, ...]) -> Carry:
    start = streams.draw(words, streams.INITIAL, shape) if noise is None else noise
    return start, jnp.zeros_like(start)


def denoise(
    network: Transformer,
    carry: Carry,
    first: Int[Array, ""],
    rows: Tableau,
    shifts: Shifts,
    noise: Float[Array, "i b t h w c"] | None,
    words: UInt32[Array, "b 2"],
    image: Float[Array, "b t h w c"],
    text: Float[Array, "pairs p d"],  # negative prompts first, where guided
    positions: Positions,
    slab: int,
    attend: Attend,
) -> Carry:
    """`slab` steps from row `first` on: the one denoising loop there is. Schedule, guidance and seeds are data, not part of it."""
    indices = first + jnp.arange(slab)
    rows, shifts, noise = jax.tree.map(lambda column: lax.dynamic_slice_in_dim(column, first, slab), (rows, shifts, noise))
    videos = image.shape[0]
    copies = text.shape[0] // videos  # 2 where guided

    def one(carry: Carry, column: tuple[Any, ...]) -> tuple[Carry, None]:
        (x, x0_prev), (index, row, shifts, drawn) = carry, column
        both = jnp.concatenate([x, image], axis=-1).astype(text.dtype)
        v = network(jnp.concatenate([both] * copies), text, shifts, positions, attend).astype(jnp.float32)
        if copies == 2:
            unconditional, conditional = jnp.split(v, 2)
            v = unconditional + row.guidance * (conditional - unconditional)
        if drawn is None:
            drawn = streams.draw(words, streams.STEPS, x.shape[1:], index)
        return step(row, x, v, x0_prev, drawn), None

    carry, _ = lax.scan(one, carry, (indices, rows, shifts, noise))
    return carry


def decode_latents(vae: VAE, latents: Float[Array, "b t h w c"], scaling_factor: Float[Array, ""]) -> UInt8[Array, "b f h2 w2 3"]:
    video = vae.decode((latents / scaling_factor).astype(vae.decoder.conv_in.kernel.dtype)).astype(jnp.float32)
    return jnp.round(jnp.clip(video * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


TEXT = Program(encode_text)
IMAGE = Program(encode_image, static=("frames",))
SHIFTS = Program(modulate)
START = Program(draw_start, static=("shape",))
DENOISE = Program(denoise, static=("slab", "attend"))
DECODE = Program(decode_latents)
