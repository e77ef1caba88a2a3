"""Parity with CogVideoXTransformer3DModel, and invariants of our transformer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from diffusers import CogVideoXImageToVideoPipeline
from tolerances import TOLERANCE, assert_close, relative_error

from cogi2v_jax.models.positions import sinusoid
from cogi2v_jax.models.transformer import Transformer
from cogi2v_jax.sampling.programs import OFS

TIMESTEP = 999


def reference(module: torch.nn.Module, video: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    """The reference's prediction, with the positions that its pipeline makes."""
    t, _, h, w = video.shape[1:]
    pipe = type("Pipe", (), {"vae_scale_factor_spatial": 8, "transformer": module})()
    rotary = None
    if module.config.use_rotary_positional_embeddings:
        rotary = CogVideoXImageToVideoPipeline._prepare_rotary_positional_embeddings(
            pipe, h * 8, w * 8, t, torch.device("cpu")
        )
    ofs = torch.full((1,), OFS, dtype=video.dtype) if module.config.ofs_embed_dim else None
    timestep = torch.full((len(video),), TIMESTEP)
    with torch.no_grad():
        v = module(video, text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    return twins.frames_last(v)


def ours(
    module: torch.nn.Module, video: torch.Tensor, text: torch.Tensor, dtype: Any = jnp.float32
) -> np.ndarray:
    network, config = twins.twin("transformer", module, dtype)
    latents = jnp.asarray(twins.frames_last(video), dtype)
    ofs = sinusoid(np.array([OFS]), config.ofs_embed_dim) if config.ofs_embed_dim else None

    @jax.jit
    def run(
        network: Transformer, latents: Any, text: Any, positions: Any, time: Any, ofs: Any
    ) -> Any:
        modulation = jax.tree.map(lambda steps: steps[0], network.modulation(time, ofs))
        layout = twins.one_device(len(positions.is_text))
        return network(latents, network.text_in(text), modulation, positions, layout)

    positions = twins.positions_of(config, latents.shape[1:4])
    time = sinusoid(np.array([TIMESTEP]), config.width)
    return np.asarray(run(network, latents, jnp.asarray(text.numpy(), dtype), positions, time, ofs))


def inputs(
    module: torch.nn.Module, latents: tuple[int, int, int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t, h, w = latents
    video = torch.randn(2, t, module.config.in_channels, h, w, generator=generator)
    text = module.config.max_text_seq_length, module.config.text_embed_dim
    return video, torch.randn(2, *text, generator=generator)


LEARNED = twins.FAMILIES["1.0"]
ROTARY = {"sample_height": 6, "sample_width": 10, "sample_frames": 17}
FIXED = {**ROTARY, "use_rotary_positional_embeddings": False}
WIDE_HEADS = {**ROTARY, "attention_head_dim": 64, "num_attention_heads": 2}
TIMED = twins.FAMILIES["1.5"]


@pytest.mark.parametrize(
    ("settings", "latents"),
    [
        pytest.param(LEARNED, (5, 6, 10), id="1.0 with its learned table"),
        pytest.param(ROTARY, (5, 6, 10), id="1.0 without a table"),
        pytest.param(ROTARY, (3, 10, 6), id="1.0 in portrait"),
        pytest.param(ROTARY, (2, 8, 18), id="1.0 wider than its base grid"),
        pytest.param({**ROTARY, "patch_bias": False}, (1, 6, 10), id="1.0 without a patch bias"),
        pytest.param(FIXED, (4, 10, 6), id="neither rotary nor learned"),
        pytest.param(TIMED, (4, 6, 10), id="1.5"),
        pytest.param(TIMED, (2, 14, 4), id="1.5 in portrait"),
        pytest.param({**TIMED, "ofs_embed_dim": None}, (4, 4, 6), id="1.5 without ofs"),
        pytest.param(WIDE_HEADS, (2, 6, 10), id="heads of 64"),
    ],
)
def test_the_prediction_is_the_references(
    settings: dict[str, Any], latents: tuple[int, int, int]
) -> None:
    module = twins.transformer(**settings)
    video, text = inputs(module, latents)
    assert_close(ours(module, video, text), reference(module, video, text), TOLERANCE["module"])


def test_fewer_frames_than_the_learned_table_use_its_first_rows() -> None:
    module = twins.transformer(**LEARNED)
    video, text = inputs(module, (3, 6, 10))
    # The reference silently drops the learned table here. Its network with a shorter table gives
    # what the slice must give.
    shorter = twins.transformer(**{**LEARNED, "sample_frames": 9})
    rows = module.config.max_text_seq_length + 3 * 3 * 5
    state, table = module.state_dict(), "patch_embed.pos_embedding"
    shorter.load_state_dict({**state, table: state[table][:, :rows]})
    assert_close(ours(module, video, text), reference(shorter, video, text), TOLERANCE["module"])


@pytest.mark.parametrize("family", ["1.0", "1.5"])
def test_bfloat16_is_no_further_from_the_truth_than_the_references_bfloat16(family: str) -> None:
    error_ours, error_theirs = [], []
    for seed in range(8):
        half = twins.transformer(seed, **twins.FAMILIES[family]).to(torch.bfloat16)
        module = twins.transformer(seed, **twins.FAMILIES[family])
        module.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
        latents = (5, 6, 10) if family == "1.0" else (4, 6, 10)
        video, text = (x.bfloat16().float() for x in inputs(module, latents, seed))
        truth = reference(module, video, text)
        theirs = reference(half, video.bfloat16(), text.bfloat16())
        error_theirs.append(relative_error(theirs, truth))
        mine = np.float32(ours(module, video, text, jnp.bfloat16))
        error_ours.append(relative_error(mine, truth))
    rms_ours, rms_theirs = (np.sqrt(np.mean(np.square(e))) for e in (error_ours, error_theirs))
    assert rms_ours <= TOLERANCE["bfloat16"] * rms_theirs
    assert min(error_theirs) > 1e-4  # the reference's run was rounded


def test_modulation_of_many_steps_is_that_of_each_step_alone() -> None:
    network, config = twins.twin("transformer", twins.transformer(**TIMED))
    time = jnp.asarray(sinusoid(np.array([999, 500, 19]), config.width))
    ofs = jnp.asarray(sinusoid(np.array([OFS]), config.ofs_embed_dim))
    together = network.modulation(time, ofs)
    for step in range(3):
        alone = network.modulation(time[step : step + 1], ofs)
        assert_close(together.blocks[step], alone.blocks[0], 1e-6)
        assert_close(together.out[step], alone.out[0], 1e-6)
