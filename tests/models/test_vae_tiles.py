"""Parity with the reference's tiled encode and decode, and properties of tiles."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from tolerances import TOLERANCE, assert_close

from cogi2v_jax.config import VAEConfig, named
from cogi2v_jax.models.vae import posterior
from cogi2v_jax.models.vae_tiles import Side, decode_tiled, encode_tiled, in_tiles, sides

# Tiles of 48x40 pixels or 6x5 latents, 40 and 32 or 5 and 4 apart.
SMALL = {
    "block_out_channels": (8, 8, 16, 24),
    "layers_per_block": 1,
    "sample_height": 96,
    "sample_width": 80,
}

moments = jax.jit(lambda network, video: network.encode(video))
decode = jax.jit(lambda network, latents: network.decode(latents))


# Three levels: tiles of the same pixels, which have 12x10 latents.
FINER = SMALL | {"block_out_channels": (8, 16, 24)}


@pytest.fixture(scope="module")
def module(request: pytest.FixtureRequest) -> Any:
    module: Any = twins.vae(**request.param)
    module.enable_tiling()
    return module


@pytest.fixture(scope="module")
def twin(module: torch.nn.Module) -> tuple[Any, VAEConfig]:
    return twins.twin("vae", module)


@pytest.mark.parametrize(
    ("module", "frames", "height", "width"),
    [
        pytest.param(SMALL, 5, 6, 5, id="one tile"),
        pytest.param(SMALL, 5, 14, 11, id="ragged 3x3", marks=pytest.mark.slow),
        pytest.param(SMALL, 1, 7, 5, id="a border of one row", marks=pytest.mark.slow),
        pytest.param(SMALL, 2, 3, 9, id="a row of tiles", marks=pytest.mark.slow),
        pytest.param(FINER, 1, 14, 10, id="three levels"),
    ],
    indirect=["module"],
)
def test_decoding_in_tiles_is_the_references(
    module: Any, twin: Any, frames: int, height: int, width: int
) -> None:
    network, config = twin
    generator = torch.Generator().manual_seed(height)
    latents = torch.randn(1, 4, frames, height, width, generator=generator)
    with torch.no_grad():
        truth = twins.channels_last(module.decode(latents).sample)
    found = decode_tiled(partial(decode, network), twins.channels_last(latents), config)
    assert_close(found, truth, TOLERANCE["module"])


@pytest.mark.parametrize(
    ("module", "frames", "height", "width"),
    [
        pytest.param(SMALL, 1, 48, 40, id="one tile"),
        pytest.param(SMALL, 1, 112, 88, id="ragged 3x3"),
        pytest.param(SMALL, 9, 56, 72, id="nine frames", marks=pytest.mark.slow),
        pytest.param(FINER, 9, 56, 72, id="three levels"),
    ],
    indirect=["module"],
)
def test_encoding_in_tiles_is_the_references(
    module: Any, twin: Any, frames: int, height: int, width: int
) -> None:
    network, config = twin
    generator = torch.Generator().manual_seed(height)
    video = torch.randn(1, 3, frames, height, width, generator=generator)
    with torch.no_grad():
        truth = module.encode(video).latent_dist
    ours = partial(moments, network)
    mean, log_variance = posterior(encode_tiled(ours, twins.channels_last(video), config))
    assert_close(mean, twins.channels_last(truth.mean), TOLERANCE["module"])
    assert_close(log_variance, twins.channels_last(truth.logvar), TOLERANCE["module"])


def test_released_checkpoints_have_the_references_tiles() -> None:
    for name in ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"):
        assert sides(named(name).vae, encodes=False) == (
            Side(30, 25, 40, 200),
            Side(45, 36, 72, 288),
        )
        assert sides(named(name).vae, encodes=True) == (
            Side(240, 200, 5, 25),
            Side(360, 288, 9, 36),
        )


def test_tiles_of_equal_shape_share_one_program() -> None:
    traced = []

    @jax.jit
    def twice(tile: jax.Array) -> jax.Array:
        traced.append(tile.shape[2:4])
        return jnp.repeat(jnp.repeat(tile, 2, axis=2), 2, axis=3)

    x = np.arange(13 * 14, dtype=np.float32).reshape(1, 1, 13, 14, 1)
    # The network is pointwise, so overlapping tiles agree and blending changes nothing.
    whole = in_tiles(twice, x, Side(6, 5, 2, 10), Side(5, 4, 2, 8))
    np.testing.assert_allclose(whole, x.repeat(2, axis=2).repeat(2, axis=3), rtol=1e-6)
    assert sorted(traced) == [(3, 2), (3, 5), (6, 2), (6, 5)]


@pytest.mark.parametrize(
    ("size", "multiple"), [({"sample_height": 64}, 96), ({"sample_width": 64}, 80)]
)
def test_sizes_for_which_the_references_tiling_is_wrong_are_refused(
    size: dict[str, int], multiple: int
) -> None:
    rule = f"{next(iter(size))} of a VAE that is tiled must be a multiple of {multiple}: got 64"
    for encodes in (True, False):
        with pytest.raises(ValueError, match=rule):
            sides(VAEConfig(**{"sample_height": 96, "sample_width": 80, **size}), encodes)
