"""Random streams: what they depend on, and what they don't."""

import itertools

import jax
import numpy as np
import pytest

from cogi2v_jax.noise import INITIAL, POSTERIOR, STEPS, draw, seed_words

SHAPE = (2, 3, 4, 5)
jitted = jax.jit(draw, static_argnums=(1, 2))


def noise(*seeds: int, stream: int = INITIAL, step: int | None = None) -> np.ndarray:
    return np.asarray(jitted(seed_words(seeds), stream, SHAPE, step))


def test_a_videos_noise_depends_on_its_own_seed_alone() -> None:
    batch = noise(7, 2**64 - 1, 7, 0)
    assert batch.shape == (4, *SHAPE)
    np.testing.assert_array_equal(batch, np.concatenate([noise(7), noise(2**64 - 1), noise(7), noise(0)]))


def test_seeds_streams_and_steps_all_differ() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    draws = [[noise(seed), noise(seed, stream=POSTERIOR), *(noise(seed, stream=STEPS, step=step) for step in range(3))] for seed in seeds]
    for one, other in itertools.combinations(np.reshape(draws, (30, -1)), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.5  # chance makes 0.3 of 120 values


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_small_seed_is_jaxs_own_key(seed: int) -> None:
    key = jax.random.key(seed, impl="threefry2x32")
    initial, fifth = jax.random.fold_in(key, INITIAL), jax.random.fold_in(jax.random.fold_in(key, STEPS), 5)
    np.testing.assert_array_equal(noise(seed)[0], jax.random.normal(initial, SHAPE))
    np.testing.assert_array_equal(noise(seed, stream=STEPS, step=5)[0], jax.random.normal(fifth, SHAPE))


def test_noise_is_standard_normal_in_float32() -> None:
    values = np.asarray(jitted(seed_words([11]), INITIAL, (100_000,)))
    assert values.dtype == np.float32
    moments = [np.mean(values**power) for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.1)  # three standard errors of the fourth
