"""The algorithm's stages as pure functions, in the order in which the data meets them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8, UInt32

from ..devices.mesh import GUIDED
from ..devices.sharding import Layout, pin
from ..models.positions import Positions
from ..models.t5 import T5
from ..models.transformer import Modulation, Shifts, Transformer
from ..models.vae import VAE, posterior, sample_posterior
from . import noise as streams
from .schedule import Tableau, guide, step

OFS = 2.0  # the 1.5 network's fixed conditioning value


Carry = tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]  # x, and the last step's x0


def encode_text(t5: T5, ids: Int[Array, "pairs p"], mesh: Mesh) -> Float[Array, "pairs p d"]:
    return pin(t5(ids), mesh, "batch")


def encode_image(
    vae: VAE, pixels: Float[Array, "b 1 h w 3"], mesh: Mesh
) -> Float[Array, "b 1 h2 w2 c2"]:
    """The moments of the image's latents."""
    pixels = pixels.astype(vae.encoder.conv_in.kernel.dtype)
    return pin(vae.moments(pin(pixels, mesh, "video", None, "rows", "columns")), mesh, "video")


def draw_image(
    moments: Float[Array, "b 1 h w c2"],
    noise: Float[Array, "b 1 h w c"] | None,
    words: UInt32[Array, "b 2"],
    scale: Float[Array, ""],
    frames: int,
    mesh: Mesh,
) -> Float[Array, "b t h w c"]:
    """The image's scaled latents in the first latent frame, zeros in all others: zeros of latent
    space, not an encoded black frame."""
    mean, log_variance = posterior(moments)
    if noise is None:
        noise = streams.draw(words, streams.POSTERIOR, mean.shape[1:])
    latents = scale * sample_posterior(mean, log_variance, noise).astype(jnp.float32)
    return pin(jnp.pad(latents, ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0))), mesh, "video")


def modulate(
    modulation: Modulation, time: Float[Array, "i d"], ofs: Float[Array, "1 e"] | None, mesh: Mesh
) -> Shifts:
    return jax.tree.map(lambda shifts: pin(shifts, mesh), modulation(time, ofs))


def draw_start(
    noise: Float[Array, "b t h w c"] | None,
    words: UInt32[Array, "b 2"],
    shape: tuple[int, ...],
    mesh: Mesh,
) -> Carry:
    start = pin(
        streams.draw(words, streams.INITIAL, shape) if noise is None else noise, mesh, "video"
    )
    return start, pin(jnp.zeros_like(start), mesh, "video")


def denoise(
    network: Transformer,
    carry: Carry,
    first: Int[Array, ""],
    rows: Tableau,
    shifts: Shifts,
    noise: Float[Array, "{slab} b t h w c"] | None,
    words: UInt32[Array, "b 2"],
    image: Float[Array, "b t h w c"],
    text: Float[Array, "pairs p d"],  # negative prompts first, where guided
    positions: Positions,
    slab: int,
    layout: Layout,
) -> Carry:
    """`slab` steps from row `first` on: the one denoising loop there is. Schedule, guidance and
    seeds are data, not part of it; so is given noise, of these steps alone, for a whole schedule's
    may be as large as a network."""
    indices = first + jnp.arange(slab)
    rows, shifts = jax.tree.map(
        lambda column: lax.dynamic_slice_in_dim(column, first, slab), (rows, shifts)
    )
    copies = text.shape[0] // image.shape[0]  # 2 where guided
    text = network.text_in(text)

    def one(carry: Carry, column: tuple[Any, ...]) -> tuple[Carry, None]:
        (x, x0_prev), (index, row, shifts, drawn) = carry, column
        both = jnp.concatenate([x, image], axis=-1).astype(text.dtype)
        v = layout.in_turn(
            lambda both, text: network(both, text, shifts, positions, layout),
            jnp.concatenate([both] * copies),
            text,
        )
        v = v.astype(jnp.float32)
        if copies == GUIDED:
            v = guide(row, *jnp.split(v, GUIDED))
        if drawn is None:
            drawn = streams.draw(words, streams.STEPS, x.shape[1:], index)
        x, x0 = step(row, x, v, x0_prev, drawn)
        return (pin(x, layout.mesh, "video"), pin(x0, layout.mesh, "video")), None

    carry, _ = lax.scan(one, carry, (indices, rows, shifts, noise))
    return carry


def decode_latents(
    vae: VAE,
    latents: Float[Array, "b t h w c"],
    scaling_factor: Float[Array, ""],
    strips: int,
    mesh: Mesh,
) -> Float[Array, "b f h2 w2 3"]:
    latents = (latents / scaling_factor).astype(vae.decoder.conv_in.kernel.dtype)
    return vae.decode(pin(latents, mesh, "video", None, "rows", "columns"), strips)


def to_bytes(video: Float[Array, "b f h w 3"], mesh: Mesh) -> UInt8[Array, "b f h w 3"]:
    """Every device ends with the whole video, so that whichever process writes it has it."""
    return pin(
        jnp.round(jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(
            jnp.uint8
        ),
        mesh,
    )
