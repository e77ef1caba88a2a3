"""What a step draws: noise, timesteps, disturbed and dropped conditions; and the VAE's loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.sources.matching import TABLES
from cogi2v_convert.tables.rules import expand
from flax import nnx
from tolerances import TOLERANCE, relative_error

from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.models.vae import VAE
from cogi2v_jax.sampling.noise import draw
from cogi2v_jax.sampling.stages import draw_image, encode_image
from cogi2v_jax.training.losses import (
    LATENTS,
    Clips,
    Dropout,
    add_noise,
    clip_keys,
    condition,
    vae_errors,
)
from cogi2v_jax.weights.pieces import leaf_names

MESH = make_mesh(Sizes(), jax.devices()[:1])
NONE = Dropout(0.0, 0.0, None)
MANY = 4000


def keys(count: int, step: int = 1) -> jax.Array:
    seed = jnp.array([0, 7], jnp.uint32)
    return clip_keys(seed, jnp.int32(step), jnp.arange(count))


class Glass(VAE):
    """Its latents are the pixels."""

    dtype = jnp.dtype(jnp.float32)

    def __init__(self) -> None:
        self.spatial_ratio = 1

    def encode(self, pixels: jax.Array, strips: int = 1) -> jax.Array:
        return jnp.concatenate([pixels, jnp.full_like(pixels, -30.0)], axis=-1)


def clips(count: int, frames: int = 3) -> Clips:
    random = np.random.default_rng(0)
    moments = random.normal(size=(count, frames, 2, 2, 8))
    text = 1 + random.random((count, 3, 4))
    image = np.full((count, 4, 4, 3), 127, np.uint8)
    arrays = (jnp.asarray(x, jnp.float32) for x in (moments, text))
    return Clips(*arrays, jnp.asarray(image), keys(count))


def noised(given: Clips, frames: int, dropout: Dropout = NONE) -> Any:
    count = len(given.text)
    image, empty = jnp.zeros((count, frames, 2, 2, 4)), jnp.zeros((3, 4))
    return add_noise(given, image, empty, jnp.float32(2.0), dropout, timesteps=1000)


def test_keys_depend_on_seed_step_and_row_and_on_nothing_else() -> None:
    every = np.asarray(keys(6))
    assert len(np.unique(np.concatenate([every, keys(6, step=2)]), axis=0)) == 12
    seed = jnp.array([0, 7], jnp.uint32)
    assert np.array_equal(clip_keys(seed, jnp.int32(1), jnp.array([4, 2])), every[[4, 2]])


def test_timesteps_are_uniform_and_noise_is_normal() -> None:
    drawn = noised(clips(MANY), 3)
    timesteps = np.asarray(drawn.timestep)
    counts, _ = np.histogram(timesteps, 10, (0, 1000))
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert abs(counts - MANY / 10).max() < 5 * (MANY / 10) ** 0.5
    noise = np.asarray(drawn.noise)
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.std() - 1) < 5 / noise.size**0.5
    mean = np.asarray(clips(MANY).moments)[..., :4]
    deviation = np.exp(0.5 * np.asarray(clips(MANY).moments)[..., 4:])
    drawn_anew = (np.asarray(drawn.latents) / 2 - mean) / deviation
    assert abs(drawn_anew.std() - 1) < 5 / noise.size**0.5


def test_the_first_frame_is_repeated_where_the_network_takes_one_more() -> None:
    plain, padded = (np.asarray(noised(clips(2), frames).latents) for frames in (3, 4))
    assert np.array_equal(padded[:, 1:], plain)
    assert np.array_equal(padded[:, 0], plain[:, 0])


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_texts_and_images_are_dropped_by_their_shares(share: float) -> None:
    given = clips(MANY)
    text = np.asarray(noised(given, 3, Dropout(share, 0.0, None)).text)
    dropped = (text == 0).all(axis=(1, 2))
    assert ((text == 0).any(axis=(1, 2)) == dropped).all()
    assert np.array_equal(text[~dropped], np.asarray(given.text)[~dropped])
    image = jnp.full((MANY, 2, 2, 3), 255, jnp.uint8)
    settings: dict[str, Any] = {"frames": 3, "mesh": MESH}
    dropout = Dropout(0.0, share, None)
    latents = condition(Glass(), image, given.keys, jnp.float32(1.0), dropout, **settings)
    gone = np.asarray((latents == 0).all(axis=(1, 2, 3, 4)))
    for found in (dropped, gone):
        assert abs(found.mean() - share) <= 5 * (share * (1 - share) / MANY) ** 0.5
    if share == 0.1:
        assert not np.array_equal(dropped, gone)  # each by a draw of its own
    assert np.allclose(latents[~gone, 0], 1, atol=1e-5)
    assert not latents[:, 1:].any()


def test_noise_on_images_is_log_normal_and_of_a_level_for_each() -> None:
    image = jnp.full((MANY, 8, 8, 3), 127, jnp.uint8)
    settings: dict[str, Any] = {"frames": 1, "mesh": MESH}
    dropout = Dropout(0.0, 0.0, (-3.0, 0.5))
    latents = condition(Glass(), image, keys(MANY), jnp.float32(1.0), dropout, **settings)
    levels = np.log(np.std(np.asarray(latents) - (127 / 127.5 - 1), axis=(1, 2, 3, 4)))
    assert abs(levels.mean() + 3) < 0.03
    assert abs(levels.std() - 0.5) < 0.03


def test_without_noise_an_image_is_conditioned_on_as_in_sampling(rng: np.random.Generator) -> None:
    vae, _ = twins.twin("vae", twins.vae())
    image = jnp.asarray(rng.integers(0, 256, (2, 16, 24, 3)).astype(np.uint8))
    settings: dict[str, Any] = {"frames": 3, "mesh": MESH}
    scale = jnp.float32(1 / 0.7)
    ours = condition(vae, image, keys(2), scale, NONE, **settings)
    moments = encode_image(vae, image[:, None] / 127.5 - 1, strips=1, mesh=MESH)
    sampled = draw_image(moments, None, keys(2), scale, **settings)
    assert relative_error(ours, sampled) < 1e-6


@pytest.mark.slow
def test_the_vaes_loss_and_gradients_are_those_of_the_reference(rng: np.random.Generator) -> None:
    module = twins.vae()
    vae, config = twins.twin("vae", module)
    pixels = rng.integers(0, 256, (2, 9, 16, 24, 3)).astype(np.uint8)
    noise = draw(keys(2), LATENTS, (3, 2, 3, config.latent_channels))
    video = torch.tensor(pixels).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    posterior = module.encode(video).latent_dist
    latents = posterior.mean + posterior.std * torch.tensor(np.array(noise)).permute(0, 4, 1, 2, 3)
    error = module.decode(latents).sample - video
    square = posterior.mean**2 + posterior.var - 1 - posterior.logvar
    loss = error.abs().mean() + error.square().mean() + 0.1 * 0.5 * square.mean()
    loss.backward()
    graph, state = nnx.split(vae)

    def ours(state: Any) -> Any:
        settings: dict[str, Any] = {"dtype": jnp.dtype("float32"), "mesh": MESH}
        errors = vae_errors(nnx.merge(graph, state), jnp.asarray(pixels), keys(2), **settings)
        return errors.l1 + errors.mse + 0.1 * errors.kl

    value, grads = jax.jit(jax.value_and_grad(ours))(state)
    assert value == pytest.approx(loss.item(), rel=TOLERANCE["module"])
    leaves, parameters = leaf_names(nnx.merge(graph, grads)), dict(module.named_parameters())
    scale = max(float(np.linalg.norm(leaf)) for leaf in leaves.values())
    for name, (rule, _) in expand(TABLES["vae"](config), 0).items():
        expected = rule.to_flax(parameters[name].grad.numpy())
        # A bias in front of a norm has no gradient but rounding.
        error = np.linalg.norm(np.asarray(leaves[rule.flax]) - expected)
        assert error <= 1e-4 * np.linalg.norm(expected) + 1e-6 * scale, name
