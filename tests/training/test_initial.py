"""New weights: the scale of what goes through a network, and what begins as no change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins

from cogi2v_jax.config import named
from cogi2v_jax.models.vae import posterior
from cogi2v_jax.training.initial import new_leaves
from cogi2v_jax.weights.pieces import abstract, leaf_names

CONFIG = named("cogi2v-tiny")
FLOAT32 = jnp.dtype("float32")


def leaves(part: str) -> dict[str, jax.Array]:
    network: Any = abstract(CONFIG, part, FLOAT32)
    return {name: jnp.zeros(leaf.shape) for name, leaf in leaf_names(network).items()}


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_new_weights_depend_on_the_seed_and_have_the_old_ones_shapes(part: str) -> None:
    old = leaves(part)
    new, again, other = new_leaves(old, 1), new_leaves(old, 1), new_leaves(old, 2)
    assert {name: leaf.shape for name, leaf in new.items()} == {n: x.shape for n, x in old.items()}
    kernel = next(name for name in old if name.endswith("q.kernel") or "conv_1.kernel" in name)
    np.testing.assert_array_equal(new[kernel], again[kernel])
    assert not np.allclose(new[kernel], other[kernel])


def test_a_new_transformer_predicts_zero_and_hardly_modulates() -> None:
    new = new_leaves(leaves("transformer"), 1)
    assert not new["out.kernel"].any()
    assert not any(leaf.any() for name, leaf in new.items() if name.endswith(".bias"))
    assert float(new["modulation.blocks.attn.kernel"].std()) == pytest.approx(0.02, rel=0.02)
    for name in ("blocks.attn.q", "blocks.mlp.up", "blocks.mlp.down", "text_in"):
        kernel = new[f"{name}.kernel"]  # of all layers
        assert float(kernel.std() * kernel.shape[-2] ** 0.5) == pytest.approx(1.0, rel=0.03), name


def test_a_new_vae_keeps_the_scale_and_encodes_with_little_noise() -> None:
    new = new_leaves(leaves("vae"), 1)
    vae = twins.filled(abstract(CONFIG, "vae", FLOAT32), lambda name, _: new[name])
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 9, 16, 16, 3)).astype(np.float32)
    mean, log_variance = jax.jit(lambda vae, x: posterior(vae.encode(x)))(vae, pixels)
    assert 0.2 < float(mean.std()) < 5
    assert -7 < float(log_variance.mean()) < -3
    frames = jax.jit(lambda vae, z: vae.decode(z))(vae, mean)
    assert 0.1 < float(frames.std()) < 5
