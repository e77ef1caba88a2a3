"""Position tables against those of diffusers, on the training grid and on others."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.models.embeddings import CogVideoXPatchEmbed, get_timestep_embedding

from cogi2v_jax.config import TransformerConfig, named
from cogi2v_jax.models.positions import positions, sinusoid

FITTED, SLICED = named("cogvideox-5b-i2v").transformer, named("cogvideox1.5-5b-i2v").transformer
FIXED = dataclasses.replace(
    FITTED,
    num_attention_heads=3,
    use_rotary_positional_embeddings=False,
    use_learned_positional_embeddings=False,
)


def theirs(config: TransformerConfig, latents: tuple[int, int, int]) -> list[np.ndarray]:
    """The reference's cosines and sines, with a column for each channel."""
    frames, height, width = latents
    network = SimpleNamespace(config=config)
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=network)
    prepare = CogVideoXImageToVideoPipeline._prepare_rotary_positional_embeddings
    tables = prepare(pipeline, height * 8, width * 8, frames, torch.device("cpu"))
    return [table.numpy() for table in tables]


@pytest.mark.parametrize(
    ("config", "latents"),
    [
        pytest.param(FITTED, (13, 60, 90), id="training grid"),
        pytest.param(FITTED, (3, 48, 170), id="wider"),
        pytest.param(FITTED, (3, 86, 90), id="taller"),
        pytest.param(FITTED, (2, 90, 60), id="portrait"),
        pytest.param(FITTED, (1, 2, 2), id="smallest"),
        pytest.param(SLICED, (22, 96, 170), id="1.5"),
        pytest.param(SLICED, (2, 170, 96), id="1.5 portrait"),
    ],
)
def test_a_video_token_is_rotated_as_in_the_reference_and_a_text_token_is_not(
    config: TransformerConfig, latents: tuple[int, int, int]
) -> None:
    ours, text = positions(config, latents), config.max_text_seq_length
    tables = zip((ours.cos, ours.sin), theirs(config, latents), (1, 0), strict=True)
    for table, reference, still in tables:
        # Positions reach 85, where the last bit of an angle is 8e-6.
        np.testing.assert_allclose(np.repeat(table[text:], 2, axis=1), reference, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(table[:text], np.full((text, 32), still))
        assert table.dtype == np.float32
    np.testing.assert_array_equal(ours.is_text, np.arange(len(ours.cos)) < text)
    assert ours.table is None


def test_the_rotation_of_one_token_has_the_known_values() -> None:
    ours = positions(FITTED, (13, 60, 90))
    token = FITTED.max_text_seq_length + (7 * 30 + 11) * 45 + 29
    channels = np.array([0, 2, 15, 16, 40, 63])
    cos = [0.7539023, -0.5994375, 0.9999976, 0.0044257, -0.7480575, 0.9999805]
    np.testing.assert_allclose(ours.cos[token, channels // 2], cos, atol=1e-6)
    sin = [0.6569866, -0.9999902, -0.6636339]
    np.testing.assert_allclose(ours.sin[token, [0, 8, 20]], sin, atol=1e-6)


@pytest.mark.parametrize("latents", [(13, 60, 90), (3, 10, 6), (2, 6, 10)])
def test_the_fixed_table_is_the_references(latents: tuple[int, int, int]) -> None:
    frames, height, width = latents
    ours = positions(FIXED, latents)
    length = FIXED.max_text_seq_length
    embed = CogVideoXPatchEmbed(
        embed_dim=FIXED.width, max_text_seq_length=length, use_positional_embeddings=False
    )
    reference = embed._get_positional_embeddings(height, width, 4 * (frames - 1) + 1)[0]
    np.testing.assert_allclose(ours.table, reference, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(ours.cos, np.ones((len(reference), 32)))
    np.testing.assert_array_equal(ours.sin, np.zeros((len(reference), 32)))


def test_a_network_with_a_learned_table_has_no_fixed_one() -> None:
    learned = dataclasses.replace(FIXED, use_learned_positional_embeddings=True)
    assert positions(learned, (2, 6, 10)).table is None


@pytest.mark.parametrize(
    ("values", "width"), [(np.arange(1000), 3072), (np.arange(1000), 160), (np.array([2.0]), 512)]
)
def test_a_sinusoid_is_the_references(values: np.ndarray, width: int) -> None:
    reference = get_timestep_embedding(
        torch.tensor(values), width, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    differences = np.abs(sinusoid(values, width) - reference.numpy())
    # Frequencies may differ in their last bit, by 6e-8, and angles reach 999 radians.
    assert differences.max() < 1e-4
    # torch's exp is inexact at 1 to 2.5 % of the frequencies. Exponents that are rounded in another
    # order make 13 % of the results differ.
    assert np.mean(differences > 1e-6) < 0.02


KNOWN = {0: 0.99965, 1: 0.959839, 100: -0.254167, 1535: 0.994954, 1536: -0.026461, 3071: 0.100332}
KNOWN_OFS = {0: -0.416147, 1: -0.350895, 256: 0.909297}


@pytest.mark.parametrize(
    ("value", "width", "known"), [(999, 3072, KNOWN), (2, 512, KNOWN_OFS)], ids=["time", "ofs"]
)
def test_a_sinusoid_has_the_known_values(value: int, width: int, known: dict[int, float]) -> None:
    ours = sinusoid(np.array([value]), width)[0, list(known)]
    np.testing.assert_allclose(ours, list(known.values()), atol=1e-4, rtol=0)


def test_more_frames_than_learned_change_one_frequency_of_the_frames() -> None:
    """RIFLEx for 97 frames: of the eight frequencies over the frames the second, whose period of
    19.9 latent frames would repeat; its new period is the length over 0.9."""
    ours, text = positions(FITTED, (25, 60, 90)), FITTED.max_text_seq_length
    theirs_cos, theirs_sin = (table[:, ::2] for table in theirs(FITTED, (25, 60, 90)))
    own = [table[text:].reshape(25, -1, 32) for table in (ours.cos, ours.sin)]
    reference = [table.reshape(25, -1, 32) for table in (theirs_cos, theirs_sin)]
    for table, other in zip(own, reference, strict=True):
        np.testing.assert_allclose(np.delete(table, 1, 2), np.delete(other, 1, 2), atol=1e-5)
    angles = np.arange(25) * 0.9 * 2 * np.pi / 25
    np.testing.assert_allclose(own[0][:, 0, 1], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(own[1][:, 0, 1], np.sin(angles), atol=1e-5)
    assert np.abs(reference[0][:, 0, 1] - np.cos(angles)).max() > 0.5


def test_fewer_frames_than_the_new_period_keep_their_frequency() -> None:
    ours = positions(FITTED, (15, 60, 90))  # 0.9 * 2 pi / 15 is above the second frequency
    table = ours.cos[FITTED.max_text_seq_length :].reshape(15, -1, 32)
    np.testing.assert_allclose(table[:, 0, 1], np.cos(np.arange(15) * 10**-0.5), atol=1e-5)


@pytest.mark.parametrize("latents", [(25, 60, 90), (13, 90, 60), (13, 40, 60), (25, 48, 48)])
def test_a_learned_table_is_interpolated_as_torch_does(latents: tuple[int, int, int]) -> None:
    resize = positions(FITTED, latents).resize
    assert resize is not None
    learned = np.random.default_rng(0).standard_normal((13, 30, 45)).astype(np.float32)
    ours = np.einsum("fi, hj, wk, ijk -> fhw", *resize, learned)
    frames, rows, columns = latents[0], latents[1] // 2, latents[2] // 2
    table = torch.from_numpy(learned)
    if (rows, columns) != (30, 45):
        size = {"size": (rows, columns), "mode": "bilinear", "align_corners": False}
        table = torch.nn.functional.interpolate(table[None], **size)[0]
    table = table.reshape(13, -1).T[None]
    if frames != 13:
        size = {"size": frames, "mode": "linear", "align_corners": True}
        table = torch.nn.functional.interpolate(table, **size)
    expected = table[0].T.reshape(frames, rows, columns).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("latents", [(13, 60, 90), (3, 60, 90)])
def test_a_learned_table_of_the_grid_is_read_as_it_is(latents: tuple[int, int, int]) -> None:
    assert positions(FITTED, latents).resize is None


def test_fewer_frames_of_another_size_read_the_first_frames_of_the_table() -> None:
    resize = positions(FITTED, (3, 90, 60)).resize
    assert resize is not None
    np.testing.assert_array_equal(resize.frames, np.eye(3, 13))
