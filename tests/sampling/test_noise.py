"""Random streams: what they depend on, and that torch's are torch's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins

from cogi2v_jax.sampling.noise import (
    INITIAL,
    POSTERIOR,
    STEPS,
    TorchStream,
    draw,
    draw_as_torch,
    seed_keys,
)

SHAPE = (2, 3, 4, 5)
SEEDS = [0, 42, 2**32 - 1, 2**32, 2**40 + 3, 2**64 - 1]
THEIRS = {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16}
jitted = jax.jit(draw, static_argnums=(1, 2))


def noise(*seeds: int, stream: int = INITIAL, step: int | None = None) -> np.ndarray:
    return np.asarray(jitted(seed_keys(seeds), stream, SHAPE, step))


def test_a_videos_noise_depends_on_its_own_seed_alone() -> None:
    batch = noise(7, 2**64 - 1, 7, 0)
    assert batch.shape == (4, *SHAPE)
    alone = [noise(7), noise(2**64 - 1), noise(7), noise(0)]
    np.testing.assert_array_equal(batch, np.concatenate(alone))


def test_seeds_streams_and_steps_all_differ() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    draws = []
    for seed in seeds:
        draws += [noise(seed), noise(seed, stream=POSTERIOR)]
        draws += [noise(seed, stream=STEPS, step=step) for step in range(3)]
    for one, other in itertools.combinations(np.reshape(draws, (30, -1)), 2):
        # By chance the correlation of 120 values reaches 0.3.
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_small_seed_is_jaxs_own_key(seed: int) -> None:
    key = jax.random.key(seed, impl="threefry2x32")
    initial = jax.random.fold_in(key, INITIAL)
    np.testing.assert_array_equal(noise(seed)[0], jax.random.normal(initial, SHAPE))
    fifth = jax.random.fold_in(jax.random.fold_in(key, STEPS), 5)
    ours = noise(seed, stream=STEPS, step=5)
    np.testing.assert_array_equal(ours[0], jax.random.normal(fifth, SHAPE))


def test_noise_is_standard_normal_in_float32() -> None:
    values = np.asarray(jitted(seed_keys([11]), INITIAL, (100_000,)))
    assert values.dtype == np.float32
    moments = [np.mean(values**power) for power in (1, 2, 3, 4)]
    # The tolerance is three standard errors of the fourth moment.
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.1)


def randn(generator: torch.Generator, dtype: type, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=THEIRS[dtype]).float()


@pytest.mark.parametrize("seed", SEEDS)
def test_torchs_uniform_numbers_are_exact(seed: int) -> None:
    generator, stream = torch.Generator().manual_seed(seed), TorchStream(seed, jnp.float32)
    for size in (1000, 3, 1, 50):
        theirs = torch.rand(size, generator=generator).numpy()
        np.testing.assert_array_equal(stream._uniform(size), theirs)


@pytest.mark.parametrize("dtype", THEIRS)
@pytest.mark.parametrize("seed", SEEDS)
def test_torchs_normal_numbers_are_drawn_for_sizes_of_every_kind_one_after_another(
    seed: int, dtype: type
) -> None:
    generator, stream = torch.Generator().manual_seed(seed), TorchStream(seed, dtype)
    for size in (1, 16, 17, 1, 3, 31, 15, 160, 2, 1003, 5, 100_000, 7, 70_001, 20):
        # Without AVX2 torch rounds angles in float64, a difference of up to 2.4e-6, and a bfloat16
        # may then be rounded the other way.
        close = {"atol": 3e-6, "rtol": 0 if dtype == jnp.float32 else 2**-7}
        np.testing.assert_allclose(stream.normal((size,)), randn(generator, dtype, size), **close)


@pytest.mark.parametrize("seed", SEEDS)
def test_torchs_normal_numbers_of_fewer_than_16_are_exact(seed: int) -> None:
    generator, stream = torch.Generator().manual_seed(seed), TorchStream(seed, jnp.float32)
    for size in (1, 15, 2, 7):
        np.testing.assert_array_equal(stream.normal((size,)), randn(generator, jnp.float32, size))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch rounds differently on other CPUs",
)
def test_at_most_one_in_a_hundred_thousand_of_torchs_bfloat16_numbers_differs() -> None:
    size, differing = 2**20, 0
    for seed in SEEDS[:4]:
        single, half = (TorchStream(seed, dtype).normal((size,)) for dtype in THEIRS)
        theirs = torch.Generator().manual_seed(seed)
        np.testing.assert_allclose(single, randn(theirs, jnp.float32, size), atol=1e-6, rtol=0)
        differing += np.sum(half != randn(theirs.manual_seed(seed), jnp.bfloat16, size).numpy())
    assert differing <= 4 * size * 1e-5


@pytest.mark.parametrize("dtype", THEIRS)
@pytest.mark.parametrize("size", [3, 16, 160, 1003])
def test_skipping_numbers_of_torchs_stream_skips_what_drawing_would_use(
    size: int, dtype: type
) -> None:
    skipping, drawing = TorchStream(7, dtype), TorchStream(7, dtype)
    skipping.skip((size,))
    drawing.normal((size,))
    np.testing.assert_array_equal(skipping.normal((35,)), drawing.normal((35,)))
    np.testing.assert_array_equal(skipping.normal((2,)), drawing.normal((2,)))


@pytest.mark.parametrize("dtype", THEIRS)
@pytest.mark.parametrize("shape", [(3, 4, 6, 16), (2, 3, 3, 5), (1, 1, 3, 4)], ids=str)
def test_torchs_arrays_are_drawn_in_the_references_order_and_have_our_layout(
    shape: tuple[int, int, int, int], dtype: type
) -> None:
    seeds, (t, h, w, c) = [5, 2**32 + 6], shape
    posterior, initial, steps = draw_as_torch(seeds, dtype, shape, np.array([1, 2, 0, 2]))
    close = {"atol": 3e-6, "rtol": 0 if dtype == jnp.float32 else 2**-7}
    for number, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        first = twins.channels_last(randn(generator, dtype, 1, c, 1, h, w))[0]
        np.testing.assert_allclose(posterior[number], first, **close)
        drawn = [twins.frames_last(randn(generator, dtype, 1, t, c, h, w))[0] for _ in range(6)]
        np.testing.assert_allclose(initial[number], drawn[0], **close)
        used = [drawn[1], drawn[3], 0 * drawn[0], drawn[5]]
        np.testing.assert_allclose(steps[:, number], used, **close)
    assert draw_as_torch(seeds, dtype, shape, np.array([0, 0]))[2] is None
