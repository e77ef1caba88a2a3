"""Parity with AutoencoderKLCogVideoX over chunk patterns and sizes, and causality."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from tolerances import TOLERANCE, assert_close, relative_error

from cogi2v_jax.models.vae import VAE, Encoder, posterior, resize, sample_posterior
from cogi2v_jax.models.vae_chunks import DECODE_CHUNK, ENCODE_CHUNK, ConvCache, in_chunks

# A large norm_eps, so that a norm with the wrong epsilon fails.
SMALL = {"block_out_channels": (8, 8, 16, 24), "layers_per_block": 1, "norm_eps": 1e-3}
VAES = {
    "four levels": SMALL | {"layers_per_block": 2},
    "three levels": SMALL | {"block_out_channels": (8, 16, 24)},  # 4x over space
}


@pytest.fixture(scope="module", params=VAES)
def module(request: pytest.FixtureRequest) -> torch.nn.Module:
    return twins.vae(**VAES[request.param])


@pytest.fixture(scope="module")
def network(module: torch.nn.Module) -> VAE:
    return twins.twin("vae", module)[0]


SHORT = pytest.mark.parametrize("module", ["three levels"], indirect=True)

encode = jax.jit(lambda network, video: posterior(network.encode(video)))
decode = jax.jit(lambda network, latents: network.decode(latents))


@pytest.mark.parametrize(
    ("module", "frames", "height", "width"),
    [
        ("four levels", 1, 40, 24),
        ("four levels", 17, 24, 56),
        pytest.param("four levels", 12, 16, 16, marks=pytest.mark.slow),
        pytest.param("four levels", 4, 16, 24, marks=pytest.mark.slow),
        ("three levels", 9, 40, 24),
    ],
    indirect=["module"],
)
def test_encoding_is_the_references(
    module: torch.nn.Module, network: VAE, frames: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    video = torch.randn(2, 3, frames, height, width, generator=generator)
    with torch.no_grad():
        truth = module.encode(video).latent_dist
    mean, log_variance = encode(network, twins.channels_last(video))
    assert_close(mean, twins.channels_last(truth.mean), TOLERANCE["module"])
    assert_close(log_variance, twins.channels_last(truth.logvar), TOLERANCE["module"])


@pytest.mark.parametrize(
    ("module", "frames", "height", "width"),
    [
        ("four levels", 1, 5, 3),
        pytest.param("four levels", 2, 5, 3, marks=pytest.mark.slow),
        ("four levels", 13, 2, 3),
        pytest.param("four levels", 4, 2, 2, marks=pytest.mark.slow),
        ("three levels", 5, 3, 7),
        pytest.param("three levels", 3, 1, 3, marks=pytest.mark.slow),
    ],
    indirect=["module"],
)
def test_decoding_is_the_references(
    module: torch.nn.Module, network: VAE, frames: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(2, 4, frames, height, width, generator=generator)
    with torch.no_grad():
        truth = module.decode(latents).sample
    video = decode(network, twins.channels_last(latents))
    assert video.shape[1] == (4 * frames if frames % 2 == 0 else 4 * (frames - 1) + 1)
    assert_close(video, twins.channels_last(truth), TOLERANCE["module"])


def test_log_variance_is_clipped_as_the_references_is() -> None:
    loud = twins.vae(**SMALL)
    loud.encoder.conv_out.conv.bias.data[4:] += torch.tensor([60.0, -60, 60, -60])
    _, log_variance = encode(twins.twin("vae", loud)[0], np.zeros((1, 1, 16, 16, 3), np.float32))
    assert (float(log_variance.min()), float(log_variance.max())) == (-30.0, 20.0)


def test_the_posterior_is_sampled_with_its_deviation(rng: np.random.Generator) -> None:
    mean, log_variance, noise = jnp.asarray(rng.normal(size=(3, 1, 1, 2, 2, 4)), jnp.float32)
    assert_close(
        sample_posterior(mean, log_variance, noise), mean + jnp.exp(log_variance / 2) * noise, 1e-6
    )


@SHORT
def test_a_later_chunk_cannot_change_an_earlier_frame(
    network: VAE, rng: np.random.Generator
) -> None:
    latents = rng.normal(size=(2, 5, 3, 7, 4)).astype(np.float32)
    changed = latents.copy()
    changed[:, 3:] += 1
    before, after = decode(network, latents), decode(network, changed)
    first = 4 * (3 - 1) + 1
    np.testing.assert_array_equal(before[:, :first], after[:, :first])
    assert relative_error(before[:, first:], after[:, first:]) > 0.01


@SHORT
def test_an_earlier_chunk_does_change_a_later_frame(network: VAE, rng: np.random.Generator) -> None:
    latents = rng.normal(size=(2, 5, 3, 7, 4)).astype(np.float32)
    changed = latents.copy()
    changed[:, 2] += 1
    assert relative_error(decode(network, latents)[:, 9:], decode(network, changed)[:, 9:]) > 1e-3


@pytest.mark.parametrize("part", [pytest.param("encode", marks=pytest.mark.slow), "decode"])
def test_bfloat16_is_no_further_from_the_truth_than_the_references_is(part: str) -> None:
    error_ours, error_theirs = [], []
    for seed in range(8):
        half = twins.vae(seed, **SMALL).to(torch.bfloat16)
        full = twins.vae(seed, **SMALL)
        full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
        network, _ = twins.twin("vae", full, jnp.bfloat16)
        shape = (1, 3, 9, 24, 16) if part == "encode" else (1, 4, 3, 3, 2)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

        def theirs(module: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
            with torch.no_grad():
                if part == "encode":
                    return twins.channels_last(module.encode(x).latent_dist.mean)
                return twins.channels_last(module.decode(x).sample)

        truth = theirs(full, x.float())
        given = jnp.asarray(twins.channels_last(x), jnp.bfloat16)
        result: Any = encode(network, given)[0] if part == "encode" else decode(network, given)
        error_ours.append(relative_error(np.float32(result), truth))
        error_theirs.append(relative_error(theirs(half, x), truth))
    ours, reference = (np.sqrt(np.mean(np.square(e))) for e in (error_ours, error_theirs))
    assert ours <= TOLERANCE["bfloat16"] * reference
    assert min(error_theirs) > 1e-4


@pytest.mark.parametrize(
    ("frames", "chunk", "size"),
    [(13, DECODE_CHUNK, 3), (4, DECODE_CHUNK, 2), (17, ENCODE_CHUNK, 9)],
)
def test_all_chunks_have_one_shape_and_an_odd_first_frame_is_computed_once(
    frames: int, chunk: int, size: int
) -> None:
    seen: set[int] = set()

    class Spy(Encoder):
        def __init__(self) -> None:
            pass

        def __call__(self, x: Any, cache: ConvCache, strips: Any) -> Any:
            seen.add(x.shape[1])
            cache.pop()
            cache.new.append(x[:, -2:])
            return jnp.where(cache.is_first, x, -x)

    x = jnp.arange(1.0, frames + 1).reshape(1, frames, 1, 1, 1)
    signed = in_chunks(Spy(), x, chunk, lambda rows: 1)[0, :, 0, 0, 0]
    assert seen == {size}
    np.testing.assert_array_equal(jnp.abs(signed), x.ravel())
    assert (signed > 0).tolist() == [True] * size + [False] * (frames - size)


def test_no_mean_counts_a_padding_frame_and_no_convolution_reads_it() -> None:
    x, cached = jnp.arange(3.0).reshape(1, 3, 1, 1, 1), jnp.array([8.0, 9]).reshape(1, 2, 1, 1, 1)
    for is_first, frames, weights in (
        (True, [0, 0, 0, 1, 2], [1 / 3] * 3),
        (False, [0, 8, 9, 1, 2], [0, 0.5, 0.5]),
    ):
        cache = ConvCache([], jnp.bool(is_first))
        assert cache.prepend(x, cached).ravel().tolist() == frames
        np.testing.assert_allclose(cache.frame_weights(3), weights, rtol=1e-6)
    later = ConvCache([], jnp.bool(False))
    assert later.prepend(x[:, 1:], cached).ravel().tolist() == [8, 9, 1, 2]


def test_chunks_that_need_more_than_one_padding_frame_are_refused() -> None:
    network, video = Encoder.__new__(Encoder), jnp.zeros((1, 18, 1, 1, 1))
    rule = r"frames of a video in several chunks must be 8k or 8k\+1: got 18"
    with pytest.raises(ValueError, match=rule):
        in_chunks(network, video, ENCODE_CHUNK, lambda rows: 1)


def test_resizing_repeats_the_first_frame_of_an_odd_number_only_in_space() -> None:
    x = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    assert resize(x, (5, 2, 2))[0, :, 1, 1, 0].tolist() == [0, 1, 1, 2, 2]
    assert resize(x[:, :2], (4, 1, 1))[0, :, 0, 0, 0].tolist() == [0, 0, 1, 1]
    assert resize(x[:, :1], (1, 2, 2)).shape == (1, 1, 2, 2, 1)
