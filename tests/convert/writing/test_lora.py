"""A trained LoRA on disk: what we read back, and what diffusers makes of it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.lora_match import match
from cogi2v_convert.sources.lora_file import open_lora
from cogi2v_convert.sources.matching import shapes, targets
from cogi2v_convert.writing.lora import write_lora
from flax import nnx
from safetensors.numpy import load_file
from tolerances import TOLERANCE, assert_close, relative_error

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.models.positions import sinusoid
from cogi2v_jax.models.transformer import Transformer
from cogi2v_jax.sampling.programs import OFS
from cogi2v_jax.weights.checkpoint import read_config
from cogi2v_jax.weights.needed_files import LORA_FILE

RANK, ALPHA = 4, 6.0


@pytest.fixture
def config(saved: dict[str, Path], family: str) -> CheckpointConfig:
    return read_config(saved[family])


def random_leaves(config: CheckpointConfig, wanted: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Factors of all linear weights with names that begin with one of `wanted`; their products are
    about half as large as the weights."""
    random, leaves = np.random.default_rng(0), {}
    rules = {rule.flax for rule, _ in targets(config, "transformer").values() if rule.is_linear}
    for name in sorted(name for name in rules if name.startswith(wanted)):
        *stack, inputs, outputs = shapes(config, "transformer")[name]
        stem = name.removesuffix("kernel") + "lora"
        down = random.standard_normal((*stack, inputs, RANK)) * (0.5 / inputs) ** 0.5
        up = random.standard_normal((*stack, RANK, outputs)) * (0.5 / RANK) ** 0.5
        leaves |= {f"{stem}.down": down.astype(np.float32), f"{stem}.up": up.astype(np.float32)}
    return leaves


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_written_lora_is_read_back_as_it_was(config: Any, kind: Any, tmp_path: Path) -> None:
    leaves = random_leaves(config)
    written = jax.tree.map(kind, leaves)
    write_lora(tmp_path / LORA_FILE, written, config, ALPHA, header={"base_model": "some/model"})
    found = match(open_lora(tmp_path), config)
    assert found.faults == found.unmatched() == []
    assert (found.ranks, found.alphas, found.unstated) == ({RANK}, {ALPHA}, "")
    assert found.file.bases == ("some/model",)
    linear = [target for target in targets(config, "transformer").values() if target.rule.is_linear]
    factors = found.checked().factors
    assert factors.keys() == {(rule.flax, layer) for rule, layer in linear}
    for (name, layer), (down, up, scale) in factors.items():
        for side, factor in (("down", down), ("up", up)):
            leaf = leaves[f"{name.removesuffix('kernel')}lora.{side}"]
            np.testing.assert_array_equal(factor, leaf if layer is None else leaf[layer])
        assert scale == ALPHA / RANK


def test_a_lora_of_some_weights_names_no_others(config: Any, tmp_path: Path) -> None:
    path = tmp_path / LORA_FILE
    write_lora(path, random_leaves(config, ("blocks.attn.v", "text_in")), config, 2.0, "bfloat16")
    assert {tensor.dtype.name for tensor in load_file(path).values()} == {"bfloat16"}
    assert open_lora(path).settings["target_modules"] == ["attn1.to_v", "patch_embed.text_proj"]
    factors = match(open_lora(path), config).checked().factors
    layers = config.transformer.num_layers
    assert len(factors) == layers + 1


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_factor_that_is_not_finite_leaves_the_earlier_file(config: Any, tmp_path: Path) -> None:
    path, leaves = tmp_path / LORA_FILE, random_leaves(config, ("blocks.attn.q",))
    write_lora(path, leaves, config, ALPHA)
    earlier = path.read_bytes()
    leaves["blocks.attn.q.lora.up"][1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"1\.attn1\.to_q\.lora_B\.weight must be finite: got nan"):
        write_lora(path, leaves, config, ALPHA)
    assert path.read_bytes() == earlier


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_the_same_lora_written_again_is_the_same_file(config: Any, tmp_path: Path) -> None:
    path, leaves, files = tmp_path / LORA_FILE, random_leaves(config, ("blocks.attn.q",)), set()
    header = {name: name for name in ("base_model_name_or_path", "a", "\u00fc", "z")}
    for _ in range(8):
        write_lora(path, leaves, config, ALPHA, header=header)
        files.add(path.read_bytes())
    assert len(files) == 1


# diffusers

SIZES = {"1.0": (5, 6, 10), "1.5": (4, 6, 10)}  # latent frames, rows, columns
TIMESTEP = 500
LEAST_CHANGE = 0.1  # of the prediction, by the LoRAs here
# Of that change. It is a difference of two predictions, each of which may be TOLERANCE["module"] of
# the whole prediction away from the reference's. (The largest is 3e-6; without alpha it is 0.3.)
OF_CHANGE = TOLERANCE["module"] / LEAST_CHANGE


def reference(pipe: Any, video: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    network, (_, t, _, h, w) = pipe.transformer, video.shape
    rotary = pipe._prepare_rotary_positional_embeddings(8 * h, 8 * w, t, torch.device("cpu"))
    ofs = torch.tensor([OFS]) if network.config.ofs_embed_dim else None
    step = torch.tensor([TIMESTEP])
    with torch.no_grad():
        v = network(video, text, step, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    return twins.frames_last(v)


@jax.jit
def predict(
    network: Transformer, latents: Any, text: Any, positions: Any, time: Any, ofs: Any
) -> Any:
    modulation = jax.tree.map(lambda steps: steps[0], network.modulation(time, ofs))
    layout = twins.one_device(len(positions.is_text))
    return network(latents, network.text_in(text), modulation, positions, layout)


def add(network: nnx.Module, leaves: dict[str, Any]) -> None:
    """Adds alpha / rank * down @ up to each kernel."""
    for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        stem = ".".join(map(str, path)).removesuffix("kernel") + "lora"
        if f"{stem}.down" in leaves:
            leaf[...] += ALPHA / RANK * jnp.matmul(leaves[f"{stem}.down"], leaves[f"{stem}.up"])


@pytest.mark.parametrize("wanted", [("",), ("blocks.attn",)], ids=["all weights", "attention"])
def test_diffusers_changes_its_prediction_as_training_changed_ours(
    pipe: Any, family: str, config: CheckpointConfig, wanted: tuple[str, ...], tmp_path: Path
) -> None:
    leaves = random_leaves(config, wanted)
    write_lora(tmp_path / LORA_FILE, leaves, config, ALPHA)
    generator = torch.Generator().manual_seed(0)
    t, h, w = SIZES[family]
    video = torch.randn(1, t, config.transformer.in_channels, h, w, generator=generator)
    lengths = config.transformer.max_text_seq_length, config.transformer.text_embed_dim
    text = torch.randn(1, *lengths, generator=generator)

    network, _ = twins.twin("transformer", pipe.transformer)
    embed = config.transformer.ofs_embed_dim
    given = (
        jnp.asarray(twins.frames_last(video)),
        jnp.asarray(text.numpy()),
        twins.positions_of(config.transformer, SIZES[family]),
        sinusoid(np.array([TIMESTEP]), config.transformer.width),
        sinusoid(np.array([OFS]), embed) if embed else None,
    )
    ours = predict(network, *given)
    add(network, leaves)
    change = np.asarray(predict(network, *given) - ours)

    before = reference(pipe, video, text)
    pipe.load_lora_weights(tmp_path)
    after = reference(pipe, video, text)
    pipe.unload_lora_weights()
    assert relative_error(after, before) > LEAST_CHANGE
    assert_close(change, after - before, OF_CHANGE)
