"""Networks of other inputs are recognised by the names in their files."""

import pytest
import twins
from safetensors import safe_open

from cogi2v_jax.lookalikes import RELATIVES, by_keys, by_tensors

BLOCK = "transformer_blocks.0.attn1.to_q.weight"
FOUND = {
    "transformer_blocks_copy.0.attn1.to_q.weight": "Diffusion as Shader",
    "combine_linears.0.weight": "Diffusion as Shader",
    "local_facial_extractor.proj_out": "ConsisID",
    "perceiver_cross_attention.0.to_q.weight": "ConsisID",
    "controlnet_transformer.patch_embed.proj.weight": "a ControlNet",
    "traj_extractor.conv_in.weight": "Tora",
    "mixins.mgf.0.flow_gamma_spatial.weight": "Tora",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "a LoRA",
    "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0": "a LoRA",
    "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight": "a LoRA",
}


@pytest.mark.parametrize("name", FOUND)
def test_weights_of_another_network_are_recognised_by_the_name_of_one_tensor(name: str) -> None:
    assert (by_tensors([BLOCK, name]) or "").startswith(FOUND[name])


def test_every_mark_of_a_relative_is_found_in_a_file_or_a_configuration() -> None:
    for relative in RELATIVES:
        assert relative.keys or relative.tensors
        assert all(mark == mark.lower() for mark in relative.tensors)
        assert {by_keys(["num_layers", key]) for key in relative.keys} <= {str(relative)}
    marks = {mark for relative in RELATIVES for mark in relative.tensors}
    assert all(any(mark in name for name in FOUND) for mark in marks)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_our_own_networks_are_none_of_them(part: str) -> None:
    (file,) = (twins.TINY / part).glob("*.safetensors")
    with safe_open(file, framework="numpy") as tensors:
        names = list(tensors.keys())
    assert names
    assert by_tensors(names) is None
    assert by_keys(["num_layers", "CogVideoXTransformer3DModel"]) is None
