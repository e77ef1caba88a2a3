"""Programs compile for meshes that no other test has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogi2v_jax.config import named
from cogi2v_jax.devices.mesh import Sizes, make_mesh, spatial
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import Target


@pytest.mark.parametrize("latents", [(2, 6), (3, 2)])
def test_more_devices_than_an_image_divides_over_repeat_the_work(latents: tuple[int, int]) -> None:
    """As 60x90 latents on 16 devices. What arrives must have a sharding that jax can name."""
    mesh = make_mesh(Sizes(1, 2, 4), jax.devices())
    target = Target(named("cogi2v-tiny"), jnp.dtype(jnp.float32), mesh, 2**34)
    assert spatial(mesh, *latents).shape["spare"] > 1
    pixels = np.zeros((1, 1, *(8 * side for side in latents), 3), np.float32)
    assert target.call(stages.encode_image, pixels).compile()
    x = np.zeros((1, 2, *latents, target.config.vae.latent_channels), np.float32)
    assert target.call(stages.decode, x, np.float32(1), strips=1).compile()
