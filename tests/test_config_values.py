"""What a checkpoint's files may contain, and what the values they leave out become."""

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from transformers import T5Config

from cogi2v_jax.config import (
    PARTS,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)

pytestmark = pytest.mark.usefixtures("without_type_hooks")


KINDS = dict(
    zip(PARTS, (TransformerConfig, VAEConfig, TextEncoderConfig, SchedulerConfig), strict=True)
)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        (TransformerConfig, CogVideoXTransformer3DModel),
        (VAEConfig, AutoencoderKLCogVideoX),
        (TextEncoderConfig, T5Config),
        (SchedulerConfig, CogVideoXDDIMScheduler),
    ],
)
def test_what_a_file_leaves_out_has_the_default_of_the_reference_class_or_must_be_stated(
    kind: type, reference: type
) -> None:
    ours = {**dataclasses.asdict(kind()), **kind.REQUIRED}
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(reference).parameters.items()
    }
    if reference is T5Config:  # these are derived from another key, or name its class
        theirs |= {
            name: getattr(T5Config(feed_forward_proj="gated-gelu"), name)
            for name in ("dense_act_fn", "is_gated_act", "model_type")
        }
    assert {name for name, value in ours.items() if theirs[name] != value} == kind.STATED
    for name in kind.STATED:
        with pytest.raises(ValueError, match=f"^f: {name} must be stated"):
            kind.from_json({key: value for key, value in kind.REQUIRED.items() if key != name}, "f")


@pytest.mark.parametrize("kind", [TransformerConfig, VAEConfig, SchedulerConfig])
def test_an_unknown_key_is_refused_by_name_unless_switched_off(kind: type) -> None:
    off = {"_new": 1, "use_new": False, "new_ratio": None, **dict.fromkeys(kind.INERT, "any")}
    assert kind.from_json({**kind.REQUIRED, **off}, "f") == kind()
    faults = "use_new is not known here: got True; new_ratio is not known here: got 2"
    with pytest.raises(ValueError, match=rf"^folder/file: {faults}$"):
        kind.from_json({**kind.REQUIRED, "use_new": True, "new_ratio": 2}, "folder/file")


# The file on the hub, and keys that transformers 4 wrote in full files.
T5_XXL = json.loads("""{
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64,
    "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
    "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": true, "is_gated_act": true, "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": true, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2", "use_cache": true, "vocab_size": 32128,
    "_name_or_path": "google/t5-v1_1-xxl"
}""")
FOUR = json.loads("""{
    "return_dict": true, "output_hidden_states": false, "torchscript": false,
    "use_bfloat16": false, "pruned_heads": {}, "max_length": 20, "is_decoder": false,
    "temperature": 1.0, "top_k": 50, "num_beams": 1, "add_cross_attention": false,
    "id2label": {"0": "LABEL_0"}, "task_specific_params": {"summarization": {"max_length": 200}},
    "n_positions": 512, "chunk_size_feed_forward": 0, "prefix": "a: "
}""")


@pytest.mark.parametrize(
    "values", [T5Config(feed_forward_proj="gated-gelu").to_dict(), T5_XXL, {**T5_XXL, **FOUR}]
)
def test_keys_of_transformers_that_do_not_change_an_encoder_are_ignored(
    values: dict[str, Any],
) -> None:
    own = {field.name: values[field.name] for field in dataclasses.fields(TextEncoderConfig)}
    assert TextEncoderConfig.from_json(values, "f") == TextEncoderConfig(**own)


@pytest.mark.parametrize("kind", [TransformerConfig, VAEConfig])
def test_what_diffusers_writes_about_an_average_is_ignored(kind: type) -> None:
    average = EMAModel([torch.nn.Parameter(torch.zeros(1))], use_ema_warmup=True).state_dict()
    del average["shadow_params"]  # the weights
    assert "decay" in average
    assert kind.from_json({**kind.REQUIRED, **average}, "f") == kind()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scalable_attention", True),
        ("is_decoder", True),
        ("encoder_layer_norm", "pre"),
        ("add_cross_attention", True),
    ],
)
def test_keys_of_transformers_that_may_change_an_encoder_are_refused_by_name(
    key: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^f: {key} is not known here: got "):
        TextEncoderConfig.from_json({**T5_XXL, key: value}, "f")


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, kind in KINDS.items() for key in kind.REQUIRED]
)
def test_other_mathematics_is_refused_by_name(part: str, key: str) -> None:
    kind = KINDS[part]
    assert kind.from_json(dict(kind.REQUIRED), "f") == kind()
    with pytest.raises(ValueError, match=f"^f: {key} must be {kind.REQUIRED[key]!r}: got 'other'$"):
        kind.from_json({**kind.REQUIRED, key: "other"}, "f")


@pytest.mark.parametrize("value", [True, "8", 0, -2, 8.0, None, [8], 2**31])
def test_a_size_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^f: num_layers must be a positive integer below 2\*\*31: got "
    ) as caught:
        TransformerConfig.from_json({"num_layers": value}, "f")
    assert str(caught.value).endswith(repr(tuple(value) if isinstance(value, list) else value))


@pytest.mark.parametrize(
    ("part", "values", "rule"),
    [
        (
            "transformer",
            {"patch_size_t": 0},
            "patch_size_t must be a positive integer below 2**31, or null: got 0",
        ),
        (
            "transformer",
            {"ofs_embed_dim": True},
            "ofs_embed_dim must be a positive integer below 2**31, or null: got True",
        ),
        ("transformer", {"patch_bias": "false"}, "patch_bias must be true or false: got 'false'"),
        ("transformer", {"norm_eps": True}, "norm_eps must be a positive number: got True"),
        ("transformer", {"norm_eps": "1e-5"}, "norm_eps must be a positive number: got '1e-5'"),
        (
            "transformer",
            {"use_rotary_positional_embeddings": True, "attention_head_dim": 40},
            "attention_head_dim must be a multiple of 16: got 40",
        ),
        (
            "transformer",
            {"use_learned_positional_embeddings": True, "patch_size_t": 2},
            "use_learned_positional_embeddings must be false",
        ),
        (
            "vae",
            {"scaling_factor": float("inf")},
            "scaling_factor must be a positive number: got inf",
        ),
        (
            "vae",
            {"scaling_factor": float("nan")},
            "scaling_factor must be a positive number: got nan",
        ),
        (
            "vae",
            {"scaling_factor": 10**400},
            "scaling_factor must be a positive number: got 10000",
        ),
        (
            "vae",
            {"block_out_channels": [32, 0, 32, 32]},
            "must be a list of positive integers below 2**31: got (32, 0, 32, 32)",
        ),
        (
            "vae",
            {"block_out_channels": 32},
            "block_out_channels must be a list of positive integers below 2**31: got 32",
        ),
        ("vae", {"block_out_channels": [32, 32]}, "three or four entries"),
        ("vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio must be 4"),
        (
            "vae",
            {"block_out_channels": [32, 32, 48, 64]},
            "block_out_channels must be divisible by norm_num_groups 32",
        ),
        (
            "text_encoder",
            {"relative_attention_num_buckets": 16},
            "relative_attention_num_buckets must be 32: got 16",
        ),
    ],
)
def test_what_no_network_here_computes_is_refused(
    part: str, values: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=r"^f: ") as caught:
        KINDS[part].from_json({**KINDS[part].REQUIRED, **values}, "f")
    assert rule in str(caught.value)


def test_a_head_of_any_width_is_accepted_without_rotary_embedding() -> None:
    assert TransformerConfig.from_json({"attention_head_dim": 40}, "f").width == 1200


def test_several_faults_of_a_file_come_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"^f: ") as caught:
        TransformerConfig.from_json(
            {"activation_fn": "relu", "use_new": True, "num_layers": 0, "patch_size": -1}, "f"
        )
    faults = str(caught.value).removeprefix("f: ").split("; ")
    assert [fault.split()[0] for fault in faults] == [
        "activation_fn",
        "use_new",
        "num_layers",
        "patch_size",
    ]
