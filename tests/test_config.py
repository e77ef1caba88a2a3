"""Which checkpoints are recognised, with which facts, and which are refused for what they are."""

from typing import Any

import pytest
from released import RELEASED, changed

from cogi2v_jax import config
from cogi2v_jax.config import CheckpointConfig, named, names, toml
from cogi2v_jax.disk import read_toml
from cogi2v_jax.published import Published
from cogi2v_jax.settings import NEUTRAL, SETTINGS
from cogi2v_jax.training import shapes

pytestmark = pytest.mark.usefixtures("without_type_hooks")


PHRASES = [phrase for phrases in shapes.MOTIONS.values() for phrase in phrases]


def defaults(*values: Any) -> dict[str, Any]:
    return dict(zip((name for name in SETTINGS if name not in NEUTRAL), values, strict=True))


# Of the prompts that the generator of clips writes, and of the motions that are left for LoRAs.
WORDS = tuple(sorted({"a", "the", *shapes.COLOURS, *shapes.FORMS, *" ".join(PHRASES).split()}))
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
        defaults(64, 64, 9, 8, 50, 2.0, False, "ddim", "crop", "reference", "jax"),
        Published((64, 64), (64, 64), (9,), words=WORDS, background=0.45),
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


# The 2B checkpoint has other sizes too: it is refused for its channels alone.
SMALL = {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False}


@pytest.mark.parametrize(
    ("channels", "values", "what"),
    [
        (16, {}, "a text-to-video checkpoint"),
        (16, SMALL | {"use_learned_positional_embeddings": False}, "a text-to-video checkpoint"),
        (33, {}, "an inpainting checkpoint"),
        (48, {}, "a checkpoint that takes a further video beside the image"),
        (24, {}, "no checkpoint of this family"),
    ],
)
def test_a_checkpoint_with_other_channels_is_named_by_their_number(
    channels: int, values: dict[str, Any], what: str
) -> None:
    rule = r"transformer in_channels must be .* 16"
    with pytest.raises(ValueError, match=rf"^folder: {rule}: got {channels}, which is {what}"):
        CheckpointConfig.from_parts(
            changed("cogvideox-5b-i2v", "transformer", in_channels=channels, **values), "folder"
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
