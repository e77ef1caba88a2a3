"""What training minimises, as pure functions: the error of v for the transformer, L1 + MSE + KL for
the VAE, and the random numbers of a step. Every clip of a batch draws from a key of its own, so
that a result depends on neither the mesh nor the processes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from ..config import CheckpointConfig
from ..devices.sharding import Layout, pin
from ..models.layers import wide
from ..models.positions import Positions, sinusoid
from ..models.transformer import Transformer
from ..models.vae import VAE, posterior, sample_posterior
from ..sampling.noise import draw
from ..sampling.programs import OFS
from ..sampling.samplers import alphas_cumprod
from ..sampling.stages import draw_image, encode_image

# Folded into the key of a clip, one number for each use; 0 is the posterior of its image.
LATENTS, NOISE, TIMESTEP, DROPPED_TEXT, DROPPED_IMAGE, IMAGE_LEVEL, IMAGE_NOISE = range(1, 8)


class Levels(NamedTuple):
    """Every timestep that a network is trained at."""

    alpha: Float[Any, " levels"]
    sigma: Float[Any, " levels"]
    time: Float[Any, "levels d"]  # sinusoids
    ofs: Float[Any, "1 e"] | None  # the sinusoid of the constant that 1.5 takes


class Clips(NamedTuple):
    """A batch as it lies on disk, with the keys of its clips."""

    moments: Float[Any, "b t h w c2"]  # of the VAE's posterior, without padding
    text: Float[Any, "b p d"]
    image: UInt8[Any, "b h w 3"]  # the first frame
    keys: UInt32[Any, "b 2"]


class Noised(NamedTuple):
    """What the loss of the transformer is computed from."""

    latents: Float[Array, "b t h w c"]  # scaled, with the padding frame of 1.5
    noise: Float[Array, "b t h w c"]
    timestep: Int[Array, " b"]
    image: Float[Array, "b t h w c"]  # scaled latents of the first frame, then zeros
    text: Float[Array, "b p d"]


class Dropout(NamedTuple):
    """How the conditions of a network are disturbed in training: the shares of texts and images
    that are dropped, and the mean and deviation of the logarithm of the noise on an image's
    pixels (None for no noise)."""

    text: float
    image: float
    image_noise: tuple[float, float] | None


def levels(config: CheckpointConfig) -> Levels:
    """All noise levels of a checkpoint's schedule, float32; timesteps as in sampling."""
    network, alphas = config.transformer, alphas_cumprod(config.scheduler)
    alpha, sigma = (np.sqrt(x).astype(np.float32) for x in (alphas, 1 - alphas))
    ofs = sinusoid(np.array([OFS]), network.ofs_embed_dim) if network.ofs_embed_dim else None
    return Levels(alpha, sigma, sinusoid(np.arange(len(alphas)), network.width), ofs)


def clip_keys(
    seed: UInt32[Array, " 2"], step: Int[Array, ""], rows: Int[Array, " b"]
) -> UInt32[Array, "b 2"]:
    """The key of each clip, by its row in the batch of a step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows)


def _happens(keys: UInt32[Array, "b 2"], use: int, share: float) -> Bool[Array, " b"]:
    """True for this share of the keys."""
    return _uniform(keys, use) < share


def _uniform(keys: UInt32[Array, "b 2"], use: int) -> Float[Array, " b"]:
    def one(data: UInt32[Array, " 2"]) -> Float[Array, ""]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), use)
        return jax.random.uniform(key, (), jnp.float32)

    return jax.vmap(one)(keys)


def condition(
    vae: VAE,
    image: UInt8[Array, "b h w 3"],
    keys: UInt32[Array, "b 2"],
    scale: Float[Any, ""],
    dropout: Dropout,
    *,
    frames: int,
    mesh: Mesh,
) -> Float[Array, "b t h2 w2 c"]:
    """The image's latents as sampling makes them, of pixels with fresh noise of a random level;
    zeros where the image is dropped."""
    pixels = image.astype(jnp.float32)[:, None] / 127.5 - 1
    if dropout.image_noise is not None:
        mean, deviation = dropout.image_noise
        level = jnp.exp(mean + deviation * draw(keys, IMAGE_LEVEL, (1, 1, 1, 1)))
        pixels = pixels + level * draw(keys, IMAGE_NOISE, pixels.shape[1:])
    moments = encode_image(vae, pixels, mesh=mesh)
    latents = draw_image(moments, None, keys, scale, frames=frames, mesh=mesh)
    dropped = _happens(keys, DROPPED_IMAGE, dropout.image)
    return jnp.where(dropped[:, None, None, None, None], 0.0, latents)


def add_noise(
    clips: Clips,
    image: Float[Array, "b t h w c"],  # from `condition`
    empty_text: Float[Array, "p d"],
    scaling_factor: Float[Any, ""],
    dropout: Dropout,
    *,
    timesteps: int,
) -> Noised:
    """Draws the latents of the clips from their posterior, noise, timesteps, and the texts that are
    dropped. Where the network takes more latent frames than a clip has (1.5), the first one is
    repeated in front."""
    mean, log_variance = posterior(clips.moments.astype(jnp.float32))
    latents = sample_posterior(mean, log_variance, draw(clips.keys, LATENTS, mean.shape[1:]))
    padding = image.shape[1] - latents.shape[1]
    latents = jnp.concatenate([latents[:, :1]] * padding + [latents], axis=1) * scaling_factor
    dropped = _happens(clips.keys, DROPPED_TEXT, dropout.text)
    text = jnp.where(dropped[:, None, None], empty_text, clips.text)
    uniform = _uniform(clips.keys, TIMESTEP)
    timestep = jnp.minimum((uniform * timesteps).astype(jnp.int32), timesteps - 1)
    return Noised(latents, draw(clips.keys, NOISE, latents.shape[1:]), timestep, image, text)


def v_error(
    network: Transformer,
    given: Noised,
    levels: Levels,
    positions: Positions,
    *,
    dtype: jnp.dtype,
    layout: Layout,
) -> Float[Array, ""]:
    """The mean squared error of the predicted v, computed in `dtype`. It is the reference's error
    of x0 with the weight 1 / (1 - alpha_bar): x0 = alpha x - sigma v and sigma^2 = 1 - alpha_bar.
    """
    rows = given.timestep
    alpha, sigma = (column[rows][:, None, None, None, None] for column in levels[:2])
    noisy = alpha * given.latents + sigma * given.noise
    inputs = jnp.concatenate([noisy, given.image], axis=-1).astype(dtype)
    text = network.text_in(given.text.astype(dtype))
    modulation = network.modulation(levels.time[rows], levels.ofs)
    v = network(inputs, text, modulation, positions, layout)
    target = alpha * given.noise - sigma * given.latents
    return jnp.mean(jnp.square(wide(v) - target))


class VaeErrors(NamedTuple):
    """The terms of the VAE's loss, means over all values."""

    l1: Float[Array, ""]
    mse: Float[Array, ""]
    kl: Float[Array, ""]  # of the posterior from a standard normal distribution


def vae_errors(
    vae: VAE,
    pixels: UInt8[Array, "b f h w 3"],
    keys: UInt32[Array, "b 2"],
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
) -> VaeErrors:
    """Encodes clips, draws latents from their posterior, decodes them, and compares; in `dtype`."""
    true = pin(pixels, mesh, "video").astype(jnp.float32) / 127.5 - 1
    mean, log_variance = posterior(wide(vae.encode(true.astype(dtype))))
    latents = sample_posterior(mean, log_variance, draw(keys, LATENTS, mean.shape[1:]))
    error = wide(vae.decode(latents.astype(dtype))) - true
    divergence = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
    return VaeErrors(jnp.abs(error).mean(), jnp.square(error).mean(), 0.5 * divergence.mean())
