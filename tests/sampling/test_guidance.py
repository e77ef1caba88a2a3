"""How predictions are combined: methods, intervals, image guidance and motion. The network is a
function whose predictions are known where the mathematics is tested, else the embedded model."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from tolerances import assert_close

import cogi2v_jax
from cogi2v_jax import Models, Request, pipeline
from cogi2v_jax.config import SchedulerConfig
from cogi2v_jax.devices.sharding import AXES
from cogi2v_jax.names import ASSETS
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.low_pass import low_pass_matrix
from cogi2v_jax.sampling.programs import Session
from cogi2v_jax.sampling.schedule import METHODS, Guidance, Tableau, tableau

SHAPE = (2, 3, 4, 6, 5)
STEPS = 6
PROMPT = "the cyan triangle moves left"
LEVELS = SchedulerConfig(1000, 0.00085, 0.012, snr_shift_scale=1.0)


@pytest.fixture(scope="module")
def tiny() -> Models:
    return cogi2v_jax.load("cogi2v-tiny", dtype="float32")


def rows(steps: int = STEPS, scale: Any = 6.0, **given: Any) -> Tableau:
    return tableau(LEVELS, "ddim", steps, scale, False, **given)


def row(index: int = 2, **given: Any) -> Tableau:
    return Tableau(*(column[index] for column in rows(**given)))


def latents(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), SHAPE)


def flat(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(len(x), -1)


# methods


def test_apg_adds_to_the_conditional_x0_only_what_is_orthogonal_to_it() -> None:
    one, (u, c, x) = row(), map(latents, range(3))
    v = METHODS["apg"](one, u, c, x)
    x0, guided, without = (flat(one.alpha * x - one.sigma * each) for each in (c, v, u))
    added = guided - x0
    np.testing.assert_allclose((added * x0).sum(1), 0, atol=1e-2)
    assert (abs(added).sum(1) > 100).all()
    across = (x0 - without) - ((x0 - without) * x0).sum(1, keepdims=True) / (x0**2).sum(
        1, keepdims=True
    ) * x0
    assert_close(added, 5.0 * across, 1e-5)


def test_cfg_zero_starts_from_the_nearest_multiple_of_the_unconditional_prediction() -> None:
    one, (u, c, x) = row(), map(latents, range(3))
    v = METHODS["cfg_zero"](one, u, c, x)
    for ours, a, b in zip(flat(v), flat(u), flat(c), strict=True):
        (scale,), *_ = np.linalg.lstsq(a[:, None], b, rcond=None)
        assert_close(ours, scale * a + 6.0 * (b - scale * a), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_with_guidance_1_every_method_gives_the_conditional_prediction(method: str) -> None:
    u, c, x = map(latents, range(3))
    assert_close(METHODS[method](row(scale=1.0), u, c, x), c, 1e-6)


# the tableau


def test_guidance_is_1_outside_of_its_interval() -> None:
    found = rows(10, 4.0, guidance_interval=(0.2, 0.5)).guidance
    assert found.tolist() == [1, 1, 4, 4, 4, 1, 1, 1, 1, 1]


def test_a_list_is_a_guidance_for_each_step_and_those_near_to_1_are_skipped() -> None:
    given = (5.0, 1.04, 0.97, 0.5, 1.06, 2.0)
    assert rows(scale=given).guidance.tolist() == [*np.float32(given)]
    found = rows(scale=given, guidance_skip=0.05).guidance
    assert found.tolist() == [*np.float32((5.0, 1.0, 1.0, 0.5, 1.06, 2.0))]


@pytest.mark.parametrize(("steps", "blurred"), [(50, 2), (100, 4), (10, 1), (1, 1)])
def test_motion_low_passes_the_image_in_the_first_steps(steps: int, blurred: int) -> None:
    found = rows(steps, motion=0.5, image_guidance=1.5)
    assert found.low_pass.tolist() == [1.0] * blurred + [0.0] * (steps - blurred)
    assert found.image_guidance.tolist() == [0.0] * blurred + [1.5] * (steps - blurred)
    assert not rows(steps, motion=0.0).low_pass.any()


@pytest.mark.parametrize(("size", "factor"), [(60, 0.25), (90, 0.625), (16, 0.25), (7, 0.9)])
def test_the_low_pass_is_torchs_resizing_to_a_smaller_size_and_back(
    size: int, factor: float
) -> None:
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
    small = torch.nn.functional.interpolate(x, size=(int(size * factor),) * 2, **settings)
    theirs = torch.nn.functional.interpolate(small, size=(size, size), **settings)
    ours = low_pass_matrix(size, factor)
    assert_close(ours @ x[0, 0].numpy() @ ours.T, theirs[0, 0].numpy(), 1e-5)


# combining


NONE, TEXT = 10.0, 20.0  # what the two texts give


def combine(one: Tableau, seen: Any, pairs: int = 1) -> tuple[np.ndarray, list[int]]:
    """(v, of how many texts a third prediction was made), of a network that predicts
    10 text + 3 image, with a pair of predictions for the image `seen`."""
    calls: list[int] = []
    image, texts = latents(1), jnp.ones((2, 1, 1))

    def predict(latents: Any, text: Any) -> Any:
        jax.debug.callback(lambda: calls.append(len(text)))
        return 10 * text[..., None, None] + 3 * latents[..., SHAPE[-1] :]

    def run() -> Any:
        mesh = Mesh(np.array(jax.devices()[:pairs]).reshape(1, pairs, 1), AXES)
        third = partial(stages._predict_third, predict, mesh, one, image, image, texts)
        pair = (text + 3 * seen for text in (NONE, TEXT))
        return stages._combine(Guidance(thirds=True), one, image, *pair, third)

    v = jax.jit(run)()
    jax.effects_barrier()
    return np.asarray(v), calls


@pytest.mark.parametrize("pairs", [1, 2])
def test_image_guidance_leads_away_from_a_prediction_without_image(pairs: int) -> None:
    image = latents(1)
    v, calls = combine(row(image_guidance=1.5), image, pairs)
    assert_close(v, NONE + 1.5 * 3 * image + 6 * (TEXT - NONE), 1e-6)
    assert calls == [2 * pairs]


def test_motion_guides_low_passed_predictions_from_the_image_as_it_is() -> None:
    image, low = latents(1), latents(2)
    v, calls = combine(row(0, motion=1.0), low)
    assert_close(v, NONE + 3 * image + 6 * (TEXT - NONE), 1e-6)
    assert calls == [2]
    v, calls = combine(row(1, motion=1.0), image)  # a step after the first ones
    assert_close(v, NONE + 3 * image + 6 * (TEXT - NONE), 1e-6)
    assert calls == []


# the whole path


def made(tiny: Models, **given: Any) -> np.ndarray:
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0} | given
    return cogi2v_jax.generate(tiny, Request(ASSETS / "example.png", PROMPT, **settings)).latents


def test_a_list_of_one_number_is_that_number(tiny: Models) -> None:
    np.testing.assert_array_equal(made(tiny, guidance_scale=[4.0] * STEPS), made(tiny))


def test_an_interval_skips_the_same_steps_as_a_list_with_ones(tiny: Models) -> None:
    inside = made(tiny, guidance_interval=(0.3, 0.7))
    listed = made(tiny, guidance_scale=[1.0, 1.0, 4.0, 4.0, 4.0, 1.0])
    np.testing.assert_array_equal(inside, listed)
    # A pair with guidance 1 is the prompt's prediction, up to rounding.
    near = made(tiny, guidance_scale=[1 + 1e-6, 1 + 1e-6, 4.0, 4.0, 4.0, 1 + 1e-6])
    assert_close(inside, near, 1e-4)
    assert np.abs(inside - made(tiny)).max() > 0.1


def test_only_a_loop_that_may_skip_has_two_ways_to_predict(tiny: Models) -> None:
    def lowered(**given: Any) -> str:
        request = Request(ASSETS / "example.png", PROMPT, num_inference_steps=STEPS, **given)
        target = pipeline.target_of(tiny, request.resolve(tiny.config))
        return target.loop(1, STEPS).lower().as_text()

    # 10 tokens of text and 192 of video, in an MLP of 768 channels.
    plain, skipping = (
        {int(n) for n in re.findall(r"tensor<(\d)x202x768x", lowered(**given))}
        for given in ({}, {"guidance_interval": (0.0, 0.5)})
    )
    assert (plain, skipping) == ({2}, {1, 2})


@pytest.mark.parametrize(
    "given",
    [
        {"guidance_method": "apg"},
        {"guidance_method": "cfg_zero"},
        {"image_guidance": 1.5},
        {"motion": 1.0},
        {"motion": 0.5, "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_every_setting_changes_the_latents_and_leaves_them_sound(
    tiny: Models, given: dict[str, Any]
) -> None:
    plain = made(tiny, **{k: v for k, v in given.items() if k == "guidance_scale"})
    changed = made(tiny, **given)
    assert np.isfinite(changed).all()
    assert np.abs(changed - plain).max() > 1e-3
    assert 0.5 < changed.std() / plain.std() < 2


@pytest.mark.parametrize("mesh", ["pair=2", "pair=1,context=2"])
def test_a_mesh_gives_what_one_device_gives(tiny: Models, mesh: str) -> None:
    given = {"motion": 1.0, "image_guidance": 1.5, "guidance_interval": (0.2, 0.6)}
    split = cogi2v_jax.load("cogi2v-tiny", dtype="float32", mesh=mesh)
    assert_close(made(split, **given), made(tiny, **given), 1e-4)


def test_other_values_compile_no_other_program(
    tiny: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    call = Session.__call__

    def record(self: Session, function: Any, *args: Any, **static: Any) -> Any:
        if function is stages.denoise:
            shapes = jax.tree.map(lambda x: (x.shape, x.dtype), args)
            seen.append((jax.tree.flatten(shapes), sorted(static.items())))
        return call(self, function, *args, **static)

    monkeypatch.setattr(pipeline.Session, "__call__", record)
    made(tiny, motion=0.4, guidance_interval=(0, 0.5), image_guidance=1.2)
    made(tiny, motion=0.9, guidance_interval=(0.2, 0.6), image_guidance=2.0, guidance_scale=7.0)
    assert seen[0] == seen[1]
    made(tiny)
    assert dict(seen[2][1])["guidance"] == Guidance()  # the default program computes none of it
