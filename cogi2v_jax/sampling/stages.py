"""Image-to-video as pure functions, in the order in which the data meets them: encode the text,
encode the image, draw the image's latents, draw the initial noise, denoise with the image's latents
on the channels at every step, decode. Keyword-only arguments are static: what a stage is compiled
for."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from ..devices.mesh import GUIDED, spatial
from ..devices.sharding import Layout, pin, split
from ..models.positions import Positions
from ..models.t5 import T5
from ..models.transformer import Modulation, ModulationNetwork, Transformer
from ..models.vae import VAE, posterior, sample_posterior
from .noise import CLIP, INITIAL, KEYFRAMES, PIXELS, POSTERIOR, STEPS, draw
from .schedule import METHODS, Guidance, Tableau, step


class State(NamedTuple):
    """What one denoising step hands to the next, in float32."""

    x: Float[Array, "b t h w c"]  # noisy latents
    past: tuple[Float[Array, "b t h w c"], ...]  # what the last steps kept, newest first


def encode_text(t5: T5, ids: Int[Array, "pairs p"], *, mesh: Mesh) -> Float[Array, "pairs p d"]:
    """T5's encoding of the prompts; negative prompts first, where the request is guided."""
    return pin(t5(ids), mesh, "batch")


def add_noise(
    pixels: Float[Array, "b 1 h w 3"],
    keys: UInt32[Array, "b 2"],
    level: Float[Array, ""],
    *,
    mesh: Mesh,
) -> Float[Array, "b 1 h w 3"]:
    """The image with noise of a level, as in training."""
    return pin(pixels + level * draw(keys, PIXELS, pixels.shape[1:]), mesh, "video")


def encode_image(
    vae: VAE, pixels: Float[Array, "b f h w 3"], *, strips: int = 1, mesh: Mesh
) -> Float[Array, "b t h2 w2 c2"]:
    """The moments (mean and log-variance) of the latents of pixels in [-1, 1]: of an image, or in
    training of the frames of a clip."""
    grid = spatial(mesh, *(side // vae.spatial_ratio for side in pixels.shape[2:4]))
    pixels = pin(pixels, mesh, "video").astype(vae.dtype)
    moments = vae.encode(pin(pixels, grid, "video", None, "rows", "columns"), strips)
    return pin(moments, grid, "video")


def draw_image(
    moments: Float[Array, "b n h w c2"],
    noise: Float[Array, "b n h w c"] | None,
    keys: UInt32[Array, "b 2"],
    scale: Float[Array, ""],
    *,
    frames: int,
    padding: int = 0,
    mesh: Mesh,
) -> Float[Array, "b t h w c"]:
    """A sample of the image's latents, scaled, as the first of `frames` latent frames (of the last
    frames of a video that is extended: as the first ones, after the first one repeated for
    `padding`). The others are zeros: of latent space, not encoded black frames."""
    mean, log_variance = posterior(moments)
    if noise is None:
        noise = draw(keys, POSTERIOR, mean.shape[1:])
    latents = scale * sample_posterior(mean, log_variance, noise).astype(jnp.float32)
    latents = jnp.concatenate([latents[:, :1]] * padding + [latents], axis=1)
    later_frames = ((0, 0), (0, frames - latents.shape[1]), (0, 0), (0, 0), (0, 0))
    return pin(jnp.pad(latents, later_frames), mesh, "video")


def place_image(
    image: Float[Array, "b t h w c"],
    moments: Float[Array, "b 1 h w c2"],
    keys: UInt32[Array, "b 2"],
    scale: Float[Array, ""],
    frame: Int[Array, ""],
    *,
    mesh: Mesh,
) -> Float[Array, "b t h w c"]:
    """The image's latents with a sample of another image's, scaled, as latent frame `frame`."""
    mean, log_variance = posterior(moments)
    noise = draw(keys, KEYFRAMES, mean.shape[1:], frame)
    latents = scale * sample_posterior(mean, log_variance, noise).astype(jnp.float32)
    return pin(lax.dynamic_update_slice_in_dim(image, latents, frame, 1), mesh, "video")


def low_pass(
    image: Float[Array, "b t h w c"],
    rows: Float[Array, "h h"],
    columns: Float[Array, "w w"],
    *,
    mesh: Mesh,
) -> Float[Array, "b t h w c"]:
    """The image's latents without their fine detail, by the matrices of `low_pass_matrix`."""
    return pin(jnp.einsum("ij, kl, btjlc -> btikc", rows, columns, image), mesh, "video")


def modulate(
    network: ModulationNetwork,
    time: Float[Array, "i d"],
    ofs: Float[Array, "1 e"] | None,
    *,
    mesh: Mesh,
) -> Modulation:
    """The modulation of all steps, from the sinusoids of their timesteps."""
    return jax.tree.map(lambda leaf: pin(leaf, mesh), network(time, ofs))


def draw_start(
    noise: Float[Array, "b t h w c"] | None,
    keys: UInt32[Array, "b 2"],
    *,
    shape: tuple[int, ...],
    past: int = 1,
    mesh: Mesh,
) -> State:
    """Pure noise in latents of `shape` [t h w c], for a sampler that uses what the last `past`
    steps kept."""
    x = pin(draw(keys, INITIAL, shape) if noise is None else noise, mesh, "video")
    return State(x, tuple(pin(jnp.zeros_like(x), mesh, "video") for _ in range(past)))


def start_from_clip(
    moments: Float[Array, "b n h w c2"],
    noise: Float[Array, "b t h w c"] | None,
    keys: UInt32[Array, "b 2"],
    scaling_factor: Float[Array, ""],
    alpha: Float[Array, ""],
    sigma: Float[Array, ""],
    *,
    padding: int,
    past: int = 1,
    mesh: Mesh,
) -> State:
    """A sample of a clip's latents at the noise level of the first step that is run. The first one
    is repeated in front where the network takes `padding` latent frames more (1.5)."""
    mean, log_variance = posterior(moments)
    sample = sample_posterior(mean, log_variance, draw(keys, CLIP, mean.shape[1:]))
    latents = scaling_factor * sample.astype(jnp.float32)
    latents = jnp.concatenate([latents[:, :1]] * padding + [latents], axis=1)
    start = draw_start(noise, keys, shape=latents.shape[1:], past=past, mesh=mesh)
    return start._replace(x=pin(alpha * latents + sigma * start.x, mesh, "video"))


def denoise(
    network: Transformer,
    state: State,
    first: Int[Array, ""],
    tableau: Tableau,
    modulation: Modulation,
    noise: Float[Array, "{steps} b t h w c"] | None,
    keys: UInt32[Array, "b 2"],
    image: Float[Array, "b t h w c"],
    text: Float[Array, "pairs p d"],
    positions: Positions,
    low: Float[Array, "b t h w c"] | None = None,
    shifts: Int[Array, " i"] | None = None,
    *,
    steps: int,
    guidance: Guidance = Guidance(),  # noqa: B008
    layout: Layout,
) -> State:
    """The denoising loop: `steps` steps from row `first` of the tableau on. Schedule, guidance and
    seeds are data and compile nothing; so is given `noise`, which is of these steps alone, since
    that of a whole schedule may be as large as a network. `low` are the image's latents low-passed,
    where some steps want them. For a loop (arXiv 2502.20307) the network sees latents and image
    shifted along time, in every step by another one of `shifts`."""
    rows = jax.tree.map(
        lambda column: lax.dynamic_slice_in_dim(column, first, steps), (tableau, modulation, shifts)
    )
    text = network.text_in(text)  # embedded once, not in every step
    copies = text.shape[0] // image.shape[0]  # 2 where guided
    unprompted, prompted = text[: len(image)], text[-len(image) :]

    def one_step(state: State, inputs: tuple[Any, ...]) -> tuple[State, None]:
        index, (row, modulation, shift), noise = inputs
        predict = layout.one_by_one(
            partial(network, modulation=modulation, positions=positions, layout=layout)
        )
        if shift is not None:
            predict = partial(_predict_shifted, predict, shift)
        seen = image if low is None else image + row.low_pass * (low - image)
        latents = jnp.concatenate([state.x, seen], axis=-1).astype(text.dtype)
        both = partial(predict, jnp.concatenate([latents] * copies), text)
        if guidance.skips:
            is_guided = (row.guidance != 1) | (row.image_guidance != 1)
            v = lax.cond(
                is_guided, both, lambda: jnp.concatenate([predict(latents, prompted)] * GUIDED)
            )
        else:
            v = both()
        v = v.astype(jnp.float32)
        if copies == GUIDED:
            third = partial(_predict_third, predict, layout.mesh, row, state.x, image, unprompted)
            unconditional, conditional = jnp.split(v, GUIDED)
            v = _combine(guidance, row, state.x, unconditional, conditional, third)
        if noise is None:
            noise = draw(keys, STEPS, state.x.shape[1:], index)
        state = State(*step(row, state.x, v, state.past, noise))
        return jax.tree.map(lambda leaf: pin(leaf, layout.mesh, "video"), state), None

    indices = first + jnp.arange(steps)
    state, _ = lax.scan(one_step, state, (indices, rows, noise))
    return state


def _predict_shifted(
    predict: Callable[[Array, Array], Array],
    shift: Int[Array, ""],
    latents: Float[Array, "b t h w c"],
    text: Float[Array, "b p d"],
) -> Float[Array, "b t h w c2"]:
    """Of latents that are shifted along time, shifted back."""
    return jnp.roll(predict(jnp.roll(latents, shift, axis=1), text), -shift, axis=1)


def _predict_third(
    predict: Callable[[Array, Array], Array],
    mesh: Mesh,
    row: Tableau,
    x: Float[Array, "b t h w c"],
    image: Float[Array, "b t h w c"],
    text: Float[Array, "b p d"],
) -> Float[Array, "b t h w c"]:
    """Without the prompt; with the image as it is in steps whose pair has it low-passed, else
    without it."""
    latents = jnp.concatenate([x, row.low_pass * image], axis=-1).astype(text.dtype)
    # Where a pair is on several devices those of the other half would idle: both compute the same.
    ways = mesh.shape["pair"]
    v = predict(jnp.concatenate([latents] * ways), jnp.concatenate([text] * ways))
    return v[: len(x)].astype(jnp.float32)


def _combine(
    guidance: Guidance,
    row: Tableau,
    x: Float[Array, "b t h w c"],
    unconditional: Float[Array, "b t h w c"],
    conditional: Float[Array, "b t h w c"],
    third: Callable[[], Array],
) -> Float[Array, "b t h w c"]:
    """The guided prediction of v. Image guidance (arXiv 2211.09800) leads away from a third
    prediction without image. In steps that low-pass the image (adaptive low-pass guidance, arXiv
    2506.08456) its weight is 0: the guidance of the low-passed pair starts from a third one that
    has the image as it is."""
    v = METHODS[guidance.method](row, unconditional, conditional, x)
    if not guidance.thirds:
        return v
    more = 1 - row.image_guidance
    return v + lax.cond(
        more == 0, lambda: jnp.zeros_like(v), lambda: more * (third() - unconditional)
    )


def decode(
    vae: VAE,
    latents: Float[Array, "b t h w c"],
    scaling_factor: Float[Array, ""],
    *,
    strips: int,
    mesh: Mesh,
) -> Float[Array, "b f h2 w2 3"]:
    """Scaled latents without padding to frames in [-1, 1], or a little beyond."""
    grid = spatial(mesh, *latents.shape[2:4])
    latents = (pin(latents, mesh, "video") / scaling_factor).astype(vae.dtype)
    return vae.decode(pin(latents, grid, "video", None, "rows", "columns"), strips)


def decoded_sharding(
    vae: VAE, latents: Float[Any, "b t h w c"], scaling_factor: Any, *, strips: int, mesh: Mesh
) -> NamedSharding:
    """`out_shardings` of `decode`. A sharding constraint is not enough: for 60x90 latents the TPU
    compiler picks another output layout."""
    return split(spatial(mesh, *latents.shape[2:4]), "video", None, "rows", "columns")


def to_bytes(
    video: Float[Array, "b f h w 3"], *, mesh: Mesh
) -> tuple[UInt8[Array, "b f h w 3"], Bool[Array, ""]]:
    """Frames as 8-bit RGB, whole on every device: any process may write them; and whether all
    values were finite."""
    finite = jnp.isfinite(video).all()
    video = jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
    return pin(jnp.round(video * 255.0).astype(jnp.uint8), mesh), finite
