"""What a checkpoint's files may contain, and what the values they leave out become."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import twins
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config

from cogi2v_jax import config
from cogi2v_jax.config import (
    PARTS,
    CheckpointConfig,
    Published,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    named,
    names,
    toml,
)
from cogi2v_jax.disk import read_json, read_toml
from cogi2v_jax.request import SETTINGS

KINDS = dict(
    zip(PARTS, (TransformerConfig, VAEConfig, TextEncoderConfig, SchedulerConfig), strict=True)
)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type hooks of the tests: these checks are for programs that have none."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# The configuration files of the released checkpoints.
TRANSFORMER = json.loads("""{
    "_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.31.0", "dropout": 0.0,
    "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "in_channels": 32,
    "out_channels": 16, "patch_size": 2, "text_embed_dim": 4096, "time_embed_dim": 512,
    "max_text_seq_length": 226, "temporal_compression_ratio": 4,
    "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": true, "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu", "attention_bias": true, "flip_sin_to_cos": true,
    "freq_shift": 0, "norm_elementwise_affine": true, "norm_eps": 1e-05
}""")
FIRST = json.loads("""{
    "sample_height": 60, "sample_width": 90, "sample_frames": 49,
    "use_learned_positional_embeddings": true
}""")
SECOND = json.loads("""{
    "sample_height": 300, "sample_width": 300, "sample_frames": 81,
    "use_learned_positional_embeddings": false, "patch_size_t": 2, "ofs_embed_dim": 512,
    "patch_bias": false
}""")
VAE = json.loads("""{
    "_class_name": "AutoencoderKLCogVideoX", "act_fn": "silu", "force_upcast": true,
    "in_channels": 3, "out_channels": 3,
    "down_block_types": ["CogVideoXDownBlock3D", "CogVideoXDownBlock3D",
        "CogVideoXDownBlock3D", "CogVideoXDownBlock3D"],
    "up_block_types": ["CogVideoXUpBlock3D", "CogVideoXUpBlock3D",
        "CogVideoXUpBlock3D", "CogVideoXUpBlock3D"],
    "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3,
    "norm_eps": 1e-06, "norm_num_groups": 32, "sample_height": 480, "sample_width": 720,
    "temporal_compression_ratio": 4, "scaling_factor": 0.7, "shift_factor": null,
    "latents_mean": null, "latents_std": null, "use_quant_conv": false,
    "use_post_quant_conv": false
}""")
TEXT_ENCODER = json.loads("""{
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_encoder_decoder": true,
    "use_cache": true, "layer_norm_epsilon": 1e-06, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32
}""")
SCHEDULER = json.loads("""{
    "_class_name": "CogVideoXDDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "timestep_spacing": "trailing", "rescale_betas_zero_snr": true, "snr_shift_scale": 1.0,
    "set_alpha_to_one": true, "trained_betas": null, "clip_sample": false,
    "clip_sample_range": 1.0, "sample_max_value": 1.0, "steps_offset": 0
}""")
SHARED = {"vae": VAE, "text_encoder": TEXT_ENCODER, "scheduler": SCHEDULER}
RELEASED = {
    "cogvideox-5b-i2v": {**SHARED, "transformer": {**TRANSFORMER, **FIRST}},
    "cogvideox1.5-5b-i2v": {
        **SHARED,
        "transformer": {**TRANSFORMER, **SECOND},
        "vae": {**VAE, "invert_scale_latents": True},
    },
    "cogi2v-tiny": {
        part: read_json(next((twins.TINY / part).glob("*config.json"))) for part in PARTS
    },
}


def changed(name: str, part: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**RELEASED[name], part: {**RELEASED[name][part], **values}}


def defaults(*values: Any) -> dict[str, Any]:
    return dict(zip(SETTINGS, values, strict=True))


FACTS = {
    "cogvideox-5b-i2v": (
        "cogvideox-i2v",
        defaults(480, 720, 49, 8, 50, 6.0, True, "dpm", "crop", "reference", "jax"),
        Published((480, 480), (720, 720), (9, 17, 25, 33, 41, 49), portrait=False),
    ),
    "cogvideox1.5-5b-i2v": (
        "cogvideox1.5-i2v",
        defaults(768, 1360, 81, 16, 50, 6.0, True, "dpm", "crop", "reference", "jax"),
        Published((768, 768), (768, 1360), tuple(range(17, 162, 16)), portrait=True),
    ),
    "cogi2v-tiny": (
        "cogvideox-i2v",
        defaults(64, 64, 9, 8, 50, 3.0, False, "ddim", "crop", "reference", "jax"),
        Published((64, 64), (64, 64), (9,), portrait=True),
    ),
}


def test_every_toml_is_a_checkpoint_or_a_family_of_one() -> None:
    assert set(names()) == set(FACTS)
    families = {path.stem: read_toml(path) for path in (config.CONFIGS / "families").glob("*")}
    assert set(families) == {named(name).family for name in names()}
    for family in families.values():
        assert set(family) == {"defaults"}
        assert set(family["defaults"]) <= set(SETTINGS)


@pytest.mark.parametrize("name", FACTS)
def test_a_released_checkpoint_is_recognised_by_its_architecture_and_has_the_published_facts(
    name: str,
) -> None:
    for known in (named(name), CheckpointConfig.from_parts(RELEASED[name], "some/folder")):
        assert (known.family, known.defaults, known.published) == FACTS[name]
        assert (known.name, known.title) == (name, name)
        assert known == named(name)


@pytest.mark.parametrize("sizes", [(96, 170, 81), (60, 90, 49)])
def test_the_second_generation_is_recognised_whatever_sample_size_its_file_states(
    sizes: tuple[int, int, int],
) -> None:
    stated = dict(zip(("sample_height", "sample_width", "sample_frames"), sizes, strict=True))
    known = CheckpointConfig.from_parts(
        changed("cogvideox1.5-5b-i2v", "transformer", **stated), "folder"
    )
    assert (known.name, known.defaults) == ("cogvideox1.5-5b-i2v", FACTS["cogvideox1.5-5b-i2v"][1])


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("transformer", {"num_layers": 41}),
        ("transformer", {"sample_frames": 25}),
        ("transformer", {"sample_frames": 13}),
        ("vae", {"scaling_factor": 0.8}),
        ("text_encoder", {"d_ff": 8}),
    ],
)
def test_other_weights_have_no_name_and_the_defaults_of_family_and_folder(
    part: str, values: dict[str, Any]
) -> None:
    known = CheckpointConfig.from_parts(changed("cogvideox-5b-i2v", part, **values), "folder")
    assert (known.name, known.title, known.published) == (
        None,
        "this cogvideox-i2v checkpoint",
        Published(),
    )
    # Four latent frames decode to 16.
    frames = {25: 25, 13: 16}.get(known.transformer.sample_frames, 49)
    assert known.defaults == FACTS["cogvideox-5b-i2v"][1] | {"num_frames": frames}


def test_derived_sizes_are_those_of_the_released_networks() -> None:
    first, second = named("cogvideox-5b-i2v"), named("cogvideox1.5-5b-i2v")
    assert (first.transformer.width, first.transformer.patch, second.transformer.patch) == (
        3072,
        (1, 2, 2),
        (2, 2, 2),
    )
    assert [first.vae.decoded_frames(count) for count in (1, 2, 3, 13, 22)] == [1, 8, 9, 49, 88]
    assert (
        first.transformer.table_grid,
        first.transformer.table_rows,
        first.vae.spatial_ratio,
    ) == ((13, 30, 45), 17776, 8)


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scalable_attention", True),
        ("is_decoder", True),
        ("quantization_config", {"load_in_8bit": True}),
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
    ("part", "values", "relative"),
    [
        (
            "transformer",
            {"in_channels": 33, "add_noise_in_inpaint_model": True},
            "CogVideoX-Fun, which takes a mask or a control video",
        ),
        (
            "transformer",
            {"add_noise_in_inpaint_model": False},
            "CogVideoX-Fun, which takes a mask or a control video",
        ),
        (
            "transformer",
            {"_class_name": "ConsisIDTransformer3DModel"},
            "ConsisID, which takes a face",
        ),
        (
            "transformer",
            {"is_train_face": True, "is_kps": False, "cross_attn_interval": 2},
            "ConsisID, which takes a face",
        ),
        (
            "transformer",
            {"num_tracking_blocks": 18},
            "Diffusion as Shader, which takes a tracking video",
        ),
    ],
)
def test_a_relative_of_the_family_is_refused_for_what_it_is(
    part: str, values: dict[str, Any], relative: str
) -> None:
    what = "image-to-video from a prompt and a first image alone"
    line = rf"^folder: {part} must be of {what}: got {relative}"
    with pytest.raises(ValueError, match=line):
        CheckpointConfig.from_parts(changed("cogvideox-5b-i2v", part, **values), "folder")


@pytest.mark.parametrize(
    ("part", "name"), [("transformer", "MyTransformer"), ("vae", "AutoencoderKL")]
)
def test_another_class_is_another_network(part: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^folder: {part}: _class_name must be \w+: got '{name}'$"
    ):
        CheckpointConfig.from_parts(changed("cogvideox-5b-i2v", part, _class_name=name), "folder")


@pytest.mark.parametrize(
    ("channels", "what"),
    [
        (16, "a text-to-video checkpoint"),
        (33, "an inpainting checkpoint"),
        (48, "a checkpoint that takes a further video"),
        (24, "no ch"),
    ],
)
def test_a_checkpoint_with_other_channels_is_named_by_their_number(
    channels: int, what: str
) -> None:
    with pytest.raises(ValueError, match=rf"16: got {channels}, which is {what}"):
        CheckpointConfig.from_parts(
            changed("cogvideox-5b-i2v", "transformer", in_channels=channels), "folder"
        )


def test_the_2b_checkpoint_is_refused_as_text_to_video() -> None:
    values = {
        "num_attention_heads": 30,
        "num_layers": 30,
        "in_channels": 16,
        "use_rotary_positional_embeddings": False,
    }
    with pytest.raises(ValueError, match=r"got 16, which is a text-to-video checkpoint$"):
        CheckpointConfig.from_parts(
            changed(
                "cogvideox-5b-i2v", "transformer", **values, use_learned_positional_embeddings=False
            ),
            "folder",
        )


def test_anisora_has_no_name_and_the_defaults_of_its_folder() -> None:
    """The first generation without a learned table, for 720x1280 and 97 frames."""
    values = {
        "sample_height": 90,
        "sample_width": 160,
        "sample_frames": 97,
        "use_learned_positional_embeddings": False,
    }
    known = CheckpointConfig.from_parts(
        changed("cogvideox-5b-i2v", "transformer", **values), "folder"
    )
    assert (known.name, known.family) == (None, "cogvideox-i2v")
    sizes = {"height": 720, "width": 1280, "num_frames": 97, "fps": 8}
    assert known.defaults.items() >= sizes.items()


def test_an_interpolation_fine_tune_is_the_checkpoint_that_it_was_trained_from() -> None:
    """The same channels with other images in them are the same network."""
    assert (
        CheckpointConfig.from_parts(
            changed("cogvideox-5b-i2v", "transformer", _name_or_path="x"), "folder"
        ).name
        == "cogvideox-5b-i2v"
    )


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, kind in KINDS.items() for key in kind.REQUIRED]
)
def test_other_mathematics_is_refused_by_name(part: str, key: str) -> None:
    kind = KINDS[part]
    assert kind.from_json(dict(kind.REQUIRED), "f") == kind()
    with pytest.raises(ValueError, match=f"^f: {key} must be {kind.REQUIRED[key]!r}: got 'other'$"):
        kind.from_json({**kind.REQUIRED, key: "other"}, "f")


@pytest.mark.parametrize("value", [True, "8", 0, -2, 8.0, None, [8]])
def test_a_size_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^f: num_layers must be a positive integer: got "
    ) as caught:
        TransformerConfig.from_json({"num_layers": value}, "f")
    assert str(caught.value).endswith(repr(tuple(value) if isinstance(value, list) else value))


@pytest.mark.parametrize(
    ("part", "values", "rule"),
    [
        (
            "transformer",
            {"patch_size_t": 0},
            "patch_size_t must be a positive integer or null: got 0",
        ),
        (
            "transformer",
            {"ofs_embed_dim": True},
            "ofs_embed_dim must be a positive integer or null: got True",
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
            {"block_out_channels": [32, 0, 32, 32]},
            "block_out_channels must be a list of positive integers: got (32, 0, 32, 32)",
        ),
        (
            "vae",
            {"block_out_channels": 32},
            "block_out_channels must be a list of positive integers: got 32",
        ),
        ("vae", {"block_out_channels": [32, 32, 32]}, "four entries"),
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


def test_a_text_to_video_checkpoint_is_refused_for_what_it_is() -> None:
    rule = r"transformer in_channels must be .* 16"
    line = rf"^folder: {rule}: got 16, which is a text-to-video checkpoint$"
    with pytest.raises(ValueError, match=line):
        CheckpointConfig.from_parts(
            changed("cogvideox-5b-i2v", "transformer", in_channels=16), "folder"
        )


def test_parts_that_do_not_fit_each_other_are_refused_all_at_once() -> None:
    values = {
        "in_channels": 24,
        "out_channels": 8,
        "text_embed_dim": 20,
        "use_rotary_positional_embeddings": False,
    }
    with pytest.raises(ValueError, match=r"^folder: ") as caught:
        CheckpointConfig.from_parts(
            changed("cogvideox1.5-5b-i2v", "transformer", **values), "folder"
        )
    for fault in (
        "got 24, which is no checkpoint of this family",
        "latent_channels 16: got 8",
        "d_model 4096: got 20",
        "rotary positions",
    ):
        assert fault in str(caught.value)


def test_an_unknown_name_is_refused_naming_the_known() -> None:
    known = r"cogi2v-tiny, cogvideox-5b-i2v, cogvideox1\.5-5b-i2v"
    with pytest.raises(ValueError, match=rf"must be one of {known}: got 'cogvideox-2b'"):
        toml("cogvideox-2b")


@pytest.mark.parametrize(
    ("content", "kind", "line"),
    [
        (b"{", ValueError, "must be a JSON file: "),
        (b'{"a": "\xff"}', ValueError, "must be a JSON file: "),
        (b"[1]", ValueError, "must hold a JSON object: got list"),
        (None, FileNotFoundError, "must hold config.json: found none"),
    ],
)
def test_an_unreadable_file_is_one_line_naming_it(
    tmp_path: Path, content: bytes | None, kind: type[Exception], line: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=line) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_json_file_is_read_as_its_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"é": [1, None]}
