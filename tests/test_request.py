"""A request and a checkpoint: the defaults it gets, what is refused with the nearest valid value,
and what only warns."""

import dataclasses
import math
from typing import Any

import jaxtyping
import numpy as np
import pytest

from cogi2v_jax.config import CheckpointConfig, named
from cogi2v_jax.published import Published
from cogi2v_jax.request import LatentShape, Noise, Request, Resolved, Video
from cogi2v_jax.settings import SETTINGS

FIRST, SECOND, TINY = (
    named(name) for name in ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v", "cogi2v-tiny")
)
OWN = dataclasses.replace(
    FIRST,
    name=None,
    transformer=dataclasses.replace(FIRST.transformer, sample_frames=25),
    published=Published(),
)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type hooks of the tests: these checks are for programs that have none."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def request(**given: Any) -> Request:
    return Request(**{"image": "photo.jpg", "prompt": "a circle moves", **given})


def refusal(config: CheckpointConfig = SECOND, **given: Any) -> str:
    """The one line that refuses it."""
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        request(**given).resolve(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "answers"),
    [
        (FIRST, (480, 720, 49, 8.0, 50, 6.0, True, "dpm", "crop", "reference", "jax")),
        (SECOND, (768, 1360, 81, 16.0, 50, 6.0, True, "dpm", "crop", "reference", "jax")),
        (TINY, (64, 64, 9, 8.0, 50, 2.0, False, "ddim", "crop", "reference", "jax")),
        (OWN, (480, 720, 25, 8.0, 50, 6.0, True, "dpm", "crop", "reference", "jax")),
    ],
    ids=lambda value: value.title if isinstance(value, CheckpointConfig) else "",
)
def test_defaults_are_the_checkpoints_then_its_familys_then_its_folders_and_warn_of_nothing(
    config: CheckpointConfig, answers: tuple
) -> None:
    resolved = request().resolve(config)
    assert tuple(getattr(resolved, name) for name in config.defaults) == answers
    assert (resolved.image, resolved.prompt, resolved.negative_prompt, resolved.seed) == (
        "photo.jpg",
        "a circle moves",
        "",
        42,
    )
    assert resolved.resolve(config) == resolved


def test_every_setting_may_be_left_out_of_a_request() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    assert {name: defaults[name] for name in SETTINGS} == dict.fromkeys(SETTINGS)


@pytest.mark.parametrize("value", [None, "fast"])
def test_a_default_that_a_toml_lacks_or_has_wrong_is_refused(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {**SECOND.defaults, "scheduler": value}
    if value is None:
        del defaults["scheduler"]
    monkeypatch.setattr(CheckpointConfig, "defaults", defaults)
    config = dataclasses.replace(SECOND)  # SECOND has read its own already
    rule = "scheduler must be ddim, dpm, dpm2m, dpm3m or deis"
    assert refusal(config) == f"the defaults of {config.title}: {rule}: got {value!r}"
    assert request(scheduler="ddim").resolve(config).scheduler == "ddim"


def test_given_values_are_kept() -> None:
    given = {
        "height": 784,
        "width": 768,
        "num_frames": 17,
        "fps": 12.5,
        "num_inference_steps": 7,
        "guidance_scale": 0.0,
    }
    given |= {
        "use_dynamic_cfg": False,
        "scheduler": "ddim",
        "fit": "pad",
        "image_latent_scale": 0.9,
        "negative_prompt": "blur",
        "seed": 0,
    }
    given |= {"noise": "torch", "motion": 0.3, "guidance_method": "apg", "image_guidance": 1.5}
    given |= {"guidance_interval": (0.1, 0.9), "guidance_skip": 0.2, "noise_aug": 0.05}
    given |= {"strength": 0.5, "loop": False, "extend": 1, "overlap": 5, "match_colour": False}
    published = dataclasses.replace(SECOND, published=Published())
    assert request(**given).resolve(published) == Resolved(
        image="photo.jpg", prompt="a circle moves", **given
    )


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *((name, np.int16(768), int) for name in ("height", "width", "num_inference_steps")),
        ("num_frames", np.uint8(81), int),
        ("fps", np.int64(16), float),
        ("guidance_scale", np.float32(6), float),
        ("use_dynamic_cfg", np.bool_(True), bool),
        ("image_latent_scale", np.float32(0.5), float),
        ("seed", np.uint64(2**64 - 1), int),
    ],
)
def test_numpys_values_are_accepted_and_become_pythons(
    name: str, value: np.generic, kind: type
) -> None:
    resolved = getattr(request(**{name: value}).resolve(SECOND), name)
    assert resolved == value
    assert type(resolved) is kind


@pytest.mark.parametrize("name", ["height", "width", "num_frames", "num_inference_steps"])
@pytest.mark.parametrize("value", [0, -16, True, 16.0, "16", math.nan, 2**31])
def test_a_count_must_be_a_positive_integer(name: str, value: Any) -> None:
    assert (
        refusal(**{name: value}) == f"{name} must be a positive integer below 2**31: got {value!r}"
    )


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400, True, "6", 1j])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("fps", "a number from 0.01 to 240"),
        ("guidance_scale", "a finite number and not negative, or one for each step"),
        ("image_latent_scale", "reference, sat, trainer or a positive number"),
    ],
)
def test_a_rate_and_a_scale_must_be_finite_numbers(name: str, rule: str, value: Any) -> None:
    assert refusal(**{name: value}) == f"{name} must be {rule}: got {value!r}"


@pytest.mark.parametrize("name", ["scheduler", "fit", "noise", "image_latent_scale"])
def test_an_array_is_no_name(name: str) -> None:
    assert refusal(**{name: np.array(["crop", "dpm"])}).startswith(f"{name} must be ")


SCALES = "reference, sat, trainer or a positive number"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        *(
            ({"fps": rate}, f"fps must be a number from 0.01 to 240: got {rate}")
            for rate in (0, 0.009, 240.5)
        ),
        ({"use_dynamic_cfg": 1}, "use_dynamic_cfg must be true or false: got 1"),
        ({"noise": "numpy"}, "noise must be jax or torch: got 'numpy'"),
        ({"prompt": 3}, "prompt and negative_prompt must be Unicode text: got 3 and ''"),
        (
            {"prompt": ["a"], "negative_prompt": [3]},
            "prompt and negative_prompt must be Unicode text: got 'a' and 3",
        ),
        (
            {"prompt": "caf\udce9"},
            r"prompt and negative_prompt must be Unicode text: got 'caf\udce9' and ''",
        ),
        ({"image": None}, "image must be a path, a PIL image or an array: got None"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**64 - 1: got -1"),
        ({"seed": 2**64}, f"seed must be an integer from 0 to 2**64 - 1: got {2**64}"),
        ({"seed": True}, "seed must be an integer from 0 to 2**64 - 1: got True"),
        ({"seed": 1.0}, "seed must be an integer from 0 to 2**64 - 1: got 1.0"),
        ({"seed": [1, None]}, "seed must be an integer from 0 to 2**64 - 1: got None"),
        ({"scheduler": "euler"}, "scheduler must be ddim, dpm, dpm2m, dpm3m or deis: got 'euler'"),
        ({"fit": "zoom"}, "fit must be crop, pad, stretch or auto: got 'zoom'"),
        *(
            ({"image_latent_scale": value}, f"image_latent_scale must be {SCALES}: got {value!r}")
            for value in ("diffusers", 0, -0.7, math.nan, math.inf, True)
        ),
    ],
    ids=str,
)
def test_other_values_that_no_checkpoint_takes_are_refused(
    given: dict[str, Any], line: str
) -> None:
    assert refusal(**given) == line


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.array(3)])
def test_a_seed_may_be_any_64_bits(seed: Any) -> None:
    assert request(seed=seed).resolve(SECOND).seed == seed


@pytest.mark.parametrize("seeds", [(0, 1), [np.int8(0), 1], range(2), np.arange(2)], ids=str)
def test_the_seeds_of_a_batch_may_be_any_sequence(seeds: Any) -> None:
    resolved = request(seed=seeds).resolve(SECOND)
    assert resolved.seed == [0, 1]
    assert {type(seed) for seed in resolved.seed} == {int}
    assert [video.seed for video in request(seed=seeds).videos] == [0, 1]


@pytest.mark.parametrize(
    ("config", "given", "line"),
    [
        (
            SECOND,
            {"height": 770},
            "height must be a multiple of 16: got 770; nearest is 768 or 784",
        ),
        (SECOND, {"width": 8}, "width must be a multiple of 16: got 8; nearest is 16"),
        (FIRST, {"width": 728}, "width must be a multiple of 16: got 728; nearest is 720 or 736"),
    ],
)
def test_a_size_that_a_network_cannot_compute_is_refused_naming_the_nearest_that_it_can(
    config: CheckpointConfig, given: dict[str, Any], line: str
) -> None:
    assert refusal(config, **given) == line


@pytest.mark.parametrize(
    ("config", "frames", "rule", "nearest"),
    [
        (FIRST, 50, "8k+1 for cogvideox-5b-i2v", "49 or 56"),
        (FIRST, 47, "8k+1 for cogvideox-5b-i2v", "41 or 48"),
        (FIRST, 2, "8k+1 for cogvideox-5b-i2v", "1 or 8"),
        (OWN, 31, "8k+1 for this cogvideox-i2v checkpoint", "25 or 32"),
        (SECOND, 85, "8k+1 for cogvideox1.5-5b-i2v", "81 or 88"),
        (SECOND, 1002, "8k+1 for cogvideox1.5-5b-i2v", "1001 or 1008"),
    ],
)
def test_a_number_of_frames_that_can_not_be_made_is_refused_naming_the_nearest_that_can(
    config: CheckpointConfig, frames: int, rule: str, nearest: str
) -> None:
    assert (
        refusal(config, num_frames=frames)
        == f"num_frames must be {rule} (8k computes too): got {frames}; nearest is {nearest}"
    )


def test_all_faults_are_in_one_error() -> None:
    assert refusal(height=0, fps=-1, seed=-1, image=None).count("must") == 4
    assert refusal(height=10, width=20, num_frames=30).count("nearest") == 3


@pytest.mark.filterwarnings("ignore:.*was published for")
@pytest.mark.parametrize(
    ("config", "given", "shape"),
    [
        (FIRST, {}, LatentShape(13, 60, 90, 16, padding=0)),
        (FIRST, {"num_frames": 48}, LatentShape(12, 60, 90, 16, padding=0)),
        (FIRST, {"num_frames": 1}, LatentShape(1, 60, 90, 16, padding=0)),
        (SECOND, {}, LatentShape(22, 96, 170, 16, padding=1)),
        (SECOND, {"num_frames": 80}, LatentShape(20, 96, 170, 16, padding=0)),
        (
            SECOND,
            {"num_frames": 1000, "height": 16, "width": 4000},
            LatentShape(250, 2, 500, 16, padding=0),
        ),
        (
            SECOND,
            {"num_frames": 1, "height": 1360, "width": 768},
            LatentShape(2, 170, 96, 16, padding=1),
        ),
    ],
)
def test_latents_have_whole_patches_and_any_size_that_the_network_computes(
    config: CheckpointConfig, given: dict[str, Any], shape: LatentShape
) -> None:
    assert request(**given).resolve(config).latent_shape(config) == shape


@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        ("reference", 0.7, 1 / 0.7),
        ("sat", 0.7, 1.0),
        ("trainer", 0.7, 0.7),
        (0.5, 0.5, 0.5),
        (2, 2.0, 2.0),
    ],
)
def test_the_images_latents_are_scaled_as_each_code_base_scales_them(
    scale: str | float, first: float, second: float
) -> None:
    assert request(image_latent_scale=scale).resolve(FIRST).latent_scale(FIRST) == first
    assert request(image_latent_scale=scale).resolve(SECOND).latent_scale(SECOND) == second


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.01, True), (6, True)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_only_a_scale_above_one_guides_dynamic_or_not(
    scale: float, guided: bool, dynamic: bool
) -> None:
    assert request(guidance_scale=scale, use_dynamic_cfg=dynamic).resolve(SECOND).guided is guided


LANDSCAPE_ONLY = dataclasses.replace(SECOND, published=Published(portrait=False))


@pytest.mark.parametrize(
    ("config", "given", "ranges"),
    [
        (FIRST, {"num_frames": 48}, ["9, 17, 25, 33, 41, 49 frames (this is 48)"]),
        (SECOND, {"num_frames": 80}, ["81, 97, 113, 129, 145, 161 frames (this is 80)"]),
        (
            SECOND,
            {"height": 1376, "width": 768},
            ["a long side of 768 to 1360 pixels (this is 1376)"],
        ),
        (
            SECOND,
            {"height": 480, "width": 720},
            [
                "a short side of 768 pixels (this is 480)",
                "a long side of 768 to 1360 pixels (this is 720)",
            ],
        ),
        (LANDSCAPE_ONLY, {"height": 1360, "width": 768}, ["landscape (this is portrait)"]),
    ],
)
def test_what_is_only_outside_the_published_range_is_one_warning(
    config: CheckpointConfig, given: dict[str, Any], ranges: list[str]
) -> None:
    with pytest.warns(
        UserWarning, match=f"^{config.title} was published for .*: expect worse results$"
    ) as warned:
        request(**given).resolve(config)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert message.count("this is") == len(ranges)
    assert all(bounds in message for bounds in ranges)


@pytest.mark.parametrize(
    "given", [{"height": 1360, "width": 768}, {"height": 768, "width": 768}, {"num_frames": 161}]
)
def test_what_is_inside_the_published_range_is_not_warned_about(given: dict[str, Any]) -> None:
    request(**given).resolve(SECOND)  # a warning would raise


def test_a_single_value_serves_every_video_of_a_batch() -> None:
    batch = request(prompt=["a", "b", "c"], seed=(1, 2, 3), negative_prompt=None)
    assert batch.videos == [
        Video("photo.jpg", prompt, "", seed) for prompt, seed in zip("abc", (1, 2, 3), strict=True)
    ]
    assert request(image=np.zeros((3, 4, 3))).videos[0].image.shape == (3, 4, 3)
    assert [video.negative_prompt for video in request(negative_prompt=("blur", None)).videos] == [
        "blur",
        "",
    ]


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "prompt 2, seed 3"),
        ({"prompt": []}, "prompt 0"),
        ({"image": [], "seed": [1]}, "image 0, seed 1"),
    ],
)
def test_sequences_of_unequal_or_no_length_are_refused(given: dict[str, Any], counts: str) -> None:
    assert (
        refusal(**given) == f"sequences of a batch must have one length of at least 1: got {counts}"
    )


SHAPE = LatentShape(4, 2, 3, 5, padding=1)


def test_given_noise_becomes_float32_and_the_rest_stays_none() -> None:
    given = Noise(posterior=np.ones((2, 1, 2, 3, 5)), steps=np.ones((7, 2, 4, 2, 3, 5)).tolist())
    noise = given.check(SHAPE, videos=2, steps=7)
    assert noise.posterior.dtype == noise.steps.dtype == np.float32
    assert noise.initial is None
    assert Noise().check(SHAPE, videos=1, steps=1) == Noise()


def test_noise_that_is_not_finite_is_refused() -> None:
    noise = np.ones((2, 1, 2, 3, 5))
    noise[0, 0, 1, 1, 1] = np.nan
    with pytest.raises(ValueError, match="noise: posterior must be finite: got nan"):
        Noise(posterior=noise).check(SHAPE, videos=2, steps=7)


def test_noise_of_other_shapes_is_refused_naming_each() -> None:
    noise = Noise(
        posterior=np.ones((2, 4, 2, 3, 5)),
        initial=np.ones((2, 3, 2, 3, 5)),
        steps=np.ones((6, 2, 4, 2, 3, 5)),
    )
    with pytest.raises(ValueError, match=r"^noise: posterior") as caught:
        noise.check(SHAPE, videos=2, steps=7)
    assert str(caught.value).removeprefix("noise: ").split("; ") == [
        "posterior must have the shape [2, 1, 2, 3, 5]: got [2, 4, 2, 3, 5]",
        "initial must have the shape [2, 4, 2, 3, 5]: got [2, 3, 2, 3, 5]",
        "steps must have the shape [7, 2, 4, 2, 3, 5]: got [6, 2, 4, 2, 3, 5]",
    ]
