"""Clips to start from, loops, and videos of several segments, on the embedded model."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

import cogi2v_jax
from cogi2v_jax import Models, Request, pipeline
from cogi2v_jax.config import named
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.names import ASSETS
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.noise import draw_as_torch
from cogi2v_jax.sampling.programs import Session
from cogi2v_jax.sampling.samplers import SAMPLERS
from cogi2v_jax.sampling.schedule import loop_shifts, tableau

STEPS = 8
FRAMES = 9


@pytest.fixture(scope="module")
def models() -> Models:
    return cogi2v_jax.load("cogi2v-tiny", dtype="float32")


def ask(prompt: str = "the cyan triangle grows", **settings: Any) -> Request:
    return Request(ASSETS / "example.png", prompt, **({"num_inference_steps": STEPS} | settings))


@pytest.fixture(scope="module")
def plain(models: Models) -> pipeline.Result:
    return cogi2v_jax.generate(models, ask())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The stages that run, with their arguments."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    call = Session.__call__

    def record(self: Session, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        seen.append((function.__name__, args))
        return call(self, function, *args, **static)

    monkeypatch.setattr(pipeline.Session, "__call__", record)
    return seen


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


# a clip to start from


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_schedule_from_a_later_step_is_the_rest_of_the_whole_one(scheduler: str) -> None:
    config = named("cogvideox-5b-i2v").scheduler
    whole = tableau(config, scheduler, 50, 6.0, False)
    rest = tableau(config, scheduler, 50, 6.0, False, first=20)
    assert not rest.past[0].any()  # nothing was kept before
    alone = 2 if scheduler == "dpm3m" else 1  # rows that would read what was not kept
    for name, column in zip(whole._fields, whole, strict=True):
        np.testing.assert_array_equal(getattr(rest, name)[alone:], column[20 + alone :])
    assert rest.alpha[0] == whole.alpha[20]


def test_a_clip_starts_at_the_noise_level_of_its_first_step(models: Models, plain: Any) -> None:
    job = pipeline.prepare(models, ask(video=plain.video[0], strength=0.5))
    run = Session(models, job)
    start = pipeline.begin(run, job)
    moments = np.asarray(pipeline.encode_pixels(run, job.clip))
    mean = models.config.vae.scaling_factor * np.split(moments, 2, axis=-1)[0]
    noise = pipeline.begin(run, pipeline.prepare(models, ask())).state.x
    assert (job.steps, job.request.first_step) == (4, 4)
    levels = job.tableau.alpha[0], job.tableau.sigma[0]
    # The posterior of this VAE is narrow.
    assert_close(start.state.x, levels[0] * mean + levels[1] * np.asarray(noise), 1e-2)
    np.testing.assert_allclose(job.clip[0], plain.video[0] / 127.5 - 1, atol=1e-6)


def test_all_steps_from_a_clip_are_those_from_pure_noise(models: Models, plain: Any) -> None:
    again = cogi2v_jax.generate(models, ask(video=255 - plain.video[0], strength=1))
    np.testing.assert_array_equal(again.latents, plain.latents)


def test_fewer_steps_keep_more_of_the_clip(models: Models, plain: Any) -> None:
    still = np.repeat(plain.video[0, :1], FRAMES, axis=0)
    far = [
        difference(cogi2v_jax.generate(models, ask(video=still, strength=s)).video[0], still)
        for s in (0.125, 0.5, 1)
    ]
    assert far[0] < far[1] < far[2]


@pytest.mark.filterwarnings("ignore:.*expect worse results")
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"strength": 0.1}, "strength must leave at least one of 8 steps: got 0.1; at least 0.125"),
        ({"strength": 0}, "strength must be a number above 0 and at most 1: got 0"),
        ({"num_frames": 17}, "video must have at least the 17 frames of the request: got 9"),
        ({"video": np.zeros((9, 4, 4))}, r"video must be a file or uint8 frames \[f h w 3\]: got"),
        ({"video": "no such.mp4"}, "video must be an existing file or frame folder"),
    ],
)
def test_a_clip_that_cannot_be_started_from_is_refused(
    settings: dict[str, Any], line: str, models: Models
) -> None:
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    with pytest.raises((ValueError, FileNotFoundError), match=line):
        cogi2v_jax.generate(models, ask(**({"video": clip} | settings)))


# loops


@pytest.mark.parametrize(("frames", "stride"), [(13, 6), (3, 1), (12, 5), (21, 10), (4, 1)])
def test_the_shifts_of_a_loop_bring_every_frame_to_every_place(frames: int, stride: int) -> None:
    shifts = loop_shifts(frames, 50)
    assert shifts[:2].tolist() == [0, stride]
    assert {*shifts[:frames].tolist()} == {*range(frames)}


def test_a_step_of_a_loop_sees_latents_and_image_shifted(models: Models, calls: Any) -> None:
    """Shifting what goes in, and what comes out back, is the plain loop on shifted latents."""
    request = ask(num_inference_steps=1)
    job = pipeline.prepare(models, request)
    cogi2v_jax.generate(models, request)
    args = [args for name, args in calls if name == "denoise"][-1]
    state, *rows, keys, image, text, positions, low, shifts = args
    assert shifts is None
    rng = np.random.default_rng(0)
    x = rng.standard_normal(state.x.shape).astype(np.float32)
    run, static = Session(models, job), {"steps": 1, "guidance": job.guidance}

    def step(x: np.ndarray, image: np.ndarray, shift: int | None) -> np.ndarray:
        shifts = None if shift is None else np.array([shift], np.int32)
        given = state._replace(x=x), *rows, keys, image, text, positions, low, shifts
        return np.asarray(run(stages.denoise, *given, **static).x)

    image = np.asarray(image)
    one = step(x, image, 1)
    rolled = step(np.roll(x, 1, 1), np.roll(image, 1, 1), None)
    assert_close(one, np.roll(rolled, -1, 1), 1e-5)
    assert difference(one, step(x, image, 0)) > 1e-3


def test_a_loop_ends_where_it_begins(models: Models, plain: Any) -> None:
    result = cogi2v_jax.generate(models, ask(loop=True))
    (video,) = result.video
    assert len(video) == 12
    assert result.latents.shape == plain.latents.shape
    neighbours = [difference(*pair) for pair in itertools.pairwise(video)]
    assert difference(video[-1], video[0]) <= max(neighbours)
    assert difference(plain.video[0, -1], plain.video[0, 0]) > 3 * max(neighbours)
    again = pipeline.decode(models, result.latents, loop=True)
    np.testing.assert_array_equal(again[0], video)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"end_image": ASSETS / "example.png"}, "loop must be without end_image: got both"),
        ({"extend": 1}, "loop must be without extend: got both"),
        ({"num_frames": 1}, "loop must have at least 9 frames: got 1"),
    ],
)
def test_what_a_loop_cannot_have_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        ask(loop=True, **settings).resolve(named("cogi2v-tiny"))


def test_a_loop_of_patches_of_two_frames_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop must be false for cogvideox1\.5-5b-i2v"):
        ask(loop=True).resolve(named("cogvideox1.5-5b-i2v"))


# segments


@pytest.mark.parametrize("overlap", [1, 5])
def test_a_segment_goes_on_from_the_last_frames(models: Models, calls: Any, overlap: int) -> None:
    seen: list[np.ndarray] = []
    request = ask(extend=2, overlap=overlap, num_inference_steps=2, match_colour=False)
    result = cogi2v_jax.generate(models, request, on_latents=lambda x, _: seen.append(x))
    assert result.video.shape[1] == 9 + 2 * (9 - overlap)
    assert result.request.frames_made(models.config) == result.video.shape[1]
    assert [latents.shape[1] for latents in seen] == [3, 6, 9]
    np.testing.assert_array_equal(seen[-1], result.latents)
    pixels = [args[0] for name, args in calls if name == "encode_image"]
    assert [each.shape[1] for each in pixels] == [1, overlap, overlap]
    ends = [9, 18 - overlap]
    for start, end in zip(pixels[1:], ends, strict=True):
        frames = result.video[:, end - overlap : end]
        np.testing.assert_allclose(start, frames / 127.5 - 1, atol=1e-6)
    keys = [np.asarray(args[1])[0].tolist() for name, args in calls if name == "draw_start"]
    assert keys == [[*divmod(42 + pipeline.APART * n, 2**32)] for n in range(3)]
    assert [name for name, _ in calls].count("encode_text") == 1


def test_segments_that_are_done_are_not_made_again(models: Models, calls: Any) -> None:
    request = ask(extend=1, num_inference_steps=2)
    whole = cogi2v_jax.generate(models, request)
    calls.clear()
    rest = cogi2v_jax.generate(models, request, done=whole.latents[:, :3])
    assert [name for name, _ in calls].count("denoise") == 1
    np.testing.assert_array_equal(rest.video, whole.video)
    np.testing.assert_array_equal(rest.latents, whole.latents)
    for wrong in (whole.latents[:, :4], np.tile(whole.latents, (1, 2, 1, 1, 1))):
        with pytest.raises(ValueError, match=r"done must be latents \[b 3k h w c\]"):
            cogi2v_jax.generate(models, request, done=wrong)


def test_the_end_is_of_the_last_segment_and_keyframes_of_the_first(
    models: Models, calls: Any
) -> None:
    other = np.zeros((64, 64, 3), np.uint8)
    pictures = {"end_image": other, "keyframes": {1: other}}
    cogi2v_jax.generate(models, ask(extend=2, num_inference_steps=1, **pictures))
    of_segments = "".join({"place_image": "p", "denoise": "|"}.get(name, "") for name, _ in calls)
    frames = [int(args[4]) for name, args in calls if name == "place_image"]
    assert (of_segments, frames) == ("p||p|", [1, 2])


def test_only_the_first_segment_starts_from_a_clip(models: Models, plain: Any) -> None:
    request = ask(extend=1, num_inference_steps=2, match_colour=False)
    whole = cogi2v_jax.generate(models, request)
    started = ask(extend=1, num_inference_steps=2, match_colour=False, video=plain.video[0])
    started = dataclasses.replace(started, strength=0.5)
    rest = cogi2v_jax.generate(models, started, done=whole.latents[:, :3])
    np.testing.assert_array_equal(rest.latents, whole.latents)


def test_several_latent_frames_go_behind_the_padding_of_the_second_generation() -> None:
    """As a clip to start from, and as the latents of training; one picture is the first frame."""
    rng, keys = np.random.default_rng(0), np.zeros((1, 2), np.uint32)
    moments = rng.standard_normal((1, 2, 4, 4, 32)).astype(np.float32)
    noise = np.zeros((1, 2, 4, 4, 16), np.float32)
    mesh = make_mesh(Sizes(), jax.local_devices()[:1])
    given = map(jnp.asarray, (moments, noise, keys, np.float32(1)))
    image = np.asarray(stages.draw_image(*given, frames=6, padding=1, mesh=mesh))
    np.testing.assert_array_equal(image[:, [0, 1, 2]], moments[:, [0, 0, 1], ..., :16])
    assert not image[:, 3:].any()


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_a_strength_of_whole_steps_runs_them(steps: int) -> None:
    for run in range(1, steps + 1):
        request = ask(video="clip.mp4", strength=run / steps, num_inference_steps=steps)
        assert request.resolve(named("cogi2v-tiny")).first_step == steps - run


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"overlap": 4}, "overlap must be 4k+1 frames: got 4"),
        ({"overlap": 9}, "overlap must be fewer than the 9 frames of a segment: got 9"),
        ({"extend": -1}, "extend must be an integer from 0 to 999: got -1"),
    ],
)
def test_wrong_segments_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        ask(**({"extend": 1} | settings)).resolve(named("cogi2v-tiny"))


def test_torchs_noise_is_of_the_segments_own_seed(models: Models, calls: Any) -> None:
    request = ask(extend=1, num_inference_steps=1, noise="torch", overlap=5)
    cogi2v_jax.generate(models, request)
    first, second = (args[0] for name, args in calls if name == "draw_start")
    assert difference(first, second) > 0.1
    # The posterior of two latent frames was drawn before.
    draws = draw_as_torch([42 + pipeline.APART], np.float32, first.shape[1:], np.zeros(1, int), 2)
    np.testing.assert_array_equal(second, draws[1])
