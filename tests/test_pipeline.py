"""The whole path against the reference pipeline with the same noise, and what callers rely on."""

import gc
import inspect
import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import twins
from PIL import Image
from reference import PROMPT, SIZES, decoded, reference, reference_noise, settings
from tolerances import TOLERANCE, assert_close

import cogi2v_jax
from cogi2v_jax import Models, Noise, Request, pipeline
from cogi2v_jax.models import attention
from cogi2v_jax.sampling.noise import draw_as_torch
from cogi2v_jax.sampling.programs import Session

GROWS = "the red circle grows"  # for the embedded model


@pytest.fixture(scope="module")
def models(pipe: Any, family: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = twins.save(pipe, tmp_path_factory.mktemp("source") / family)
    return cogi2v_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def tiny() -> Models:
    return cogi2v_jax.load("cogi2v-tiny", dtype="float32")


@pytest.fixture
def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))


# Many steps for one guidance alone: the reference takes 10 s for 50 of them.
@pytest.mark.parametrize(
    ("dynamic", "steps"),
    [(True, 4), (False, 4), (True, 50)],
    ids=["dynamic-4", "constant-4", "dynamic-50"],
)
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_latents_and_video_are_the_references(
    models: Models,
    pipe: Any,
    family: str,
    image: Image.Image,
    scheduler: str,
    dynamic: bool,
    steps: int,
) -> None:
    shared = settings(family, steps, dynamic)
    theirs, latents = reference(pipe, scheduler, 7, image, PROMPT, "blue", **shared)
    noise = reference_noise(scheduler, steps, tuple(theirs.shape[1:]), seed=7)
    request = Request(image, PROMPT, "blue", scheduler=scheduler, fit="stretch", **shared)
    ours = cogi2v_jax.generate(models, request, noise)
    assert_close(ours.latents, latents, TOLERANCE["latents"])
    height, width, frames = SIZES[family]
    assert ours.video.shape == (1, frames, height, width, 3)
    mean_square = np.mean(np.square(ours.video - decoded(pipe, latents)))
    assert 10 * np.log10(255**2 / max(mean_square, 1e-12)) >= 60


# With 7 steps the last one does not end at zero noise.
@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 4), ("dpm", 1), ("dpm", 7)])
def test_with_torchs_numbers_a_seed_alone_gives_the_references_latents(
    models: Models, pipe: Any, family: str, image: Image.Image, scheduler: str, steps: int
) -> None:
    shared, seed = settings(family, steps, dynamic=True), 2**32 + 7
    _, latents = reference(pipe, scheduler, seed, image, PROMPT, **shared)
    ways = {"scheduler": scheduler, "fit": "stretch", "noise": "torch"}
    ours = cogi2v_jax.generate(models, Request(image, PROMPT, seed=seed, **ways, **shared))
    assert_close(ours.latents, latents, TOLERANCE["latents"])


def test_without_guidance_only_the_prompt_is_predicted(
    models: Models, pipe: Any, family: str, image: Image.Image
) -> None:
    shared = settings(family, 2, dynamic=True, guidance=1.0)
    theirs, latents = reference(pipe, "ddim", 3, image, PROMPT, **shared)
    noise = reference_noise("ddim", 2, tuple(theirs.shape[1:]), seed=3)
    request = Request(image, PROMPT, "never read", scheduler="ddim", fit="stretch", **shared)
    ours = cogi2v_jax.generate(models, request, noise)
    assert_close(ours.latents, latents, TOLERANCE["latents"])


@contextmanager
def compilations() -> Iterator[list[str]]:
    """An entry for each program that XLA compiles, found in the cache or not."""
    seen: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_run_with_other_values_compiles_nothing(tiny: Models, image: Image.Image) -> None:
    one = Request(image, GROWS, num_inference_steps=3)
    with compilations() as first:
        cogi2v_jax.generate(tiny, one, on_step=lambda *_: None)
    assert first
    guidance = {"guidance_scale": 5.5, "use_dynamic_cfg": True}
    ways = {"num_inference_steps": 3, "scheduler": "dpm", "seed": 2**40}
    other = Request(image, "a blue square spins", "white", **guidance, **ways)
    with compilations() as second:
        cogi2v_jax.generate(tiny, other, on_step=lambda *_: None)
    assert not second


CLIP = np.zeros((9, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"motion": 0.3}, {"motion": 0.9}),
        ({"image_guidance": 1.5, "noise_aug": 0.05}, {"image_guidance": 2.0, "noise_aug": 0.1}),
        ({"guidance_interval": (0.0, 0.5)}, {"guidance_interval": (0.3, 0.9)}),
        ({"video": CLIP, "strength": 0.4}, {"video": CLIP + 1, "strength": 0.7}),
        ({"extend": 1}, {"extend": 2, "match_colour": False}),
        ({"keyframes": {1: CLIP[0]}}, {"end_image": CLIP[0]}),
        ({"loop": True}, {"loop": True, "seed": 3, "guidance_scale": 5.0}),
    ],
    ids=lambda given: "-".join(given),
)
def test_another_value_of_what_is_data_compiles_nothing(
    tiny: Models, image: Image.Image, one: dict[str, Any], other: dict[str, Any]
) -> None:
    seen = []
    for given in (one, other):
        with compilations() as found:
            request = Request(image, GROWS, num_inference_steps=3, **given)
            cogi2v_jax.generate(tiny, request, on_step=lambda *_: None)
        seen.append(len(found))
    assert seen[1] == 0


class Enough(Exception):
    """Ends a run before its latents are decoded."""


def stop(latents: Any, resolved: Request) -> None:
    raise Enough


def test_from_generate_to_the_softmax_there_are_at_most_12_functions_of_ours(
    tiny: Models, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted while the loop is traced. That is in a thread, with the function of `Session.ahead`
    at the bottom of its stack: `generate` is added where it is not on the stack."""
    package, exp, stacks = str(Path(cogi2v_jax.__file__).parent), attention.jnp.exp, []

    def softmax(x: Any) -> Any:
        frame, ours = inspect.currentframe().f_back, []
        if frame.f_code.co_filename == attention.__file__:
            while frame is not None:
                if frame.f_code.co_filename.startswith(package):
                    ours.append(frame.f_code.co_name)
                frame = frame.f_back
            stacks.append(ours if "generate" in ours else [*ours, "generate"])
        return exp(x)

    monkeypatch.setattr(attention.jnp, "exp", softmax)
    # A batch of three is used nowhere else: nothing is traced twice for the same shapes.
    request = Request([image] * 3, GROWS, num_inference_steps=1)
    with pytest.raises(Enough):
        cogi2v_jax.generate(tiny, request, on_latents=stop)
    assert stacks
    assert {"attend", "denoise", "generate"} <= {*stacks[0]}
    assert max(map(len, stacks)) <= 12, stacks


@pytest.mark.parametrize("noise", ["jax", "torch"])
def test_single_steps_of_the_loop_give_what_the_whole_loop_gives(
    tiny: Models, image: Image.Image, noise: str
) -> None:
    request = Request(image, GROWS, num_inference_steps=5, scheduler="dpm", noise=noise)
    seen = []

    def keep(step: int, steps: int, latents: Any) -> None:
        seen.append((step, steps, np.array(latents)))

    stepped = cogi2v_jax.generate(tiny, request, on_step=keep)
    whole = cogi2v_jax.generate(tiny, request)
    assert [(step, steps) for step, steps, _ in seen] == [(step, 5) for step in range(1, 6)]
    assert_close(stepped.latents, whole.latents, 1e-6)
    np.testing.assert_array_equal(seen[-1][2], stepped.latents)


def test_a_step_keeps_the_network_of_the_step_before(
    tiny: Models, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding out what fits beside it takes as long as a step of a small network."""
    piece, asked = Models.piece, []

    def note(self: Models, name: str, *args: Any, **named: Any) -> Any:
        asked.append(name)
        return piece(self, name, *args, **named)

    monkeypatch.setattr(Models, "piece", note)
    request = Request(image, GROWS, num_inference_steps=5)
    cogi2v_jax.generate(tiny, request, on_step=lambda *_: None)
    # The transformer once ahead of the loop and once for it.
    assert sorted(asked) == sorted(
        ["text_encoder", "vae", "modulation", "transformer", "transformer", "vae"]
    )


def test_no_array_of_the_loop_is_left_when_decoding_starts(
    tiny: Models, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modulation of all steps alone takes 155 MB on every device for the 5B network."""
    run, made, left = Session.__call__, [], []

    def note(self: Session, stage: Any, *args: Any, **static: Any) -> Any:
        results = run(self, stage, *args, **static)
        made.extend((stage.__name__, weakref.ref(leaf)) for leaf in jax.tree.leaves(results))
        return results

    def look(latents: Any, resolved: Request) -> None:
        gc.collect()
        left.extend(name for name, array in made if array() is not None)

    monkeypatch.setattr(Session, "__call__", note)
    cogi2v_jax.generate(tiny, Request(image, GROWS, num_inference_steps=2), on_latents=look)
    assert {"encode_text", "draw_image", "modulate", "denoise"} <= {name for name, _ in made}
    # The text, 3.7 MB, is that of the next segment too. On a CPU the latents on the host are a view
    # of the last x.
    assert left in (["encode_text"], ["encode_text", "denoise"])


def test_raising_in_on_step_cancels_and_the_next_run_is_unchanged(
    tiny: Models, image: Image.Image
) -> None:
    request = Request(image, GROWS, num_inference_steps=3)

    def cancel(step: int, steps: int, latents: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cogi2v_jax.generate(tiny, request, on_step=cancel)
    after, again = (
        cogi2v_jax.generate(tiny, request, on_step=lambda *_: None).video for _ in range(2)
    )
    np.testing.assert_array_equal(after, again)


def test_a_video_of_a_batch_is_the_video_alone(tiny: Models, rng: np.random.Generator) -> None:
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
    prompts, seeds = [GROWS, "a blue square moves left"], [5, 6]
    shared = {"num_inference_steps": 3, "scheduler": "dpm"}
    batch = cogi2v_jax.generate(tiny, Request(images, prompts, seed=seeds, **shared))
    alone = cogi2v_jax.generate(tiny, Request(images[1], prompts[1], seed=seeds[1], **shared))
    assert batch.video.shape[0] == 2
    assert_close(batch.latents[1:], alone.latents, 1e-5)


def test_given_noise_replaces_only_its_own_draw(
    tiny: Models, image: Image.Image, rng: np.random.Generator
) -> None:
    request = Request(image, GROWS, num_inference_steps=3, scheduler="dpm")
    drawn = cogi2v_jax.generate(tiny, request).latents
    steps = rng.normal(size=(3, 1, 3, 16, 16, 16))
    given = cogi2v_jax.generate(tiny, request, Noise(steps=steps)).latents
    assert not np.allclose(drawn, given, atol=1e-2)
    ddim = Request(image, GROWS, num_inference_steps=3, scheduler="ddim")
    one, other = (
        cogi2v_jax.generate(tiny, ddim, Noise(steps=noise)).latents for noise in (steps, 0 * steps)
    )
    np.testing.assert_array_equal(one, other)


def test_given_noise_replaces_only_its_own_draw_of_torchs_stream(
    tiny: Models, image: Image.Image
) -> None:
    counts = np.array([1, 2, 2])
    posterior, initial, steps = draw_as_torch([5, 6], tiny.dtype, (3, 16, 16, 16), counts)
    shared = {"num_inference_steps": 3, "scheduler": "dpm", "seed": [5, 6]}
    torchs, ours = (Request(image, GROWS, noise=noise, **shared) for noise in ("torch", "jax"))
    mixed = cogi2v_jax.generate(tiny, torchs, Noise(initial=0 * initial)).latents
    given = cogi2v_jax.generate(tiny, ours, Noise(posterior, 0 * initial, steps)).latents
    np.testing.assert_array_equal(mixed, given)
    assert not np.allclose(given, cogi2v_jax.generate(tiny, torchs).latents, atol=1e-2)


def test_decoding_latents_alone_gives_the_same_video(tiny: Models, image: Image.Image) -> None:
    kept: list[Any] = []
    request = Request(image, GROWS, num_inference_steps=2)
    result = cogi2v_jax.generate(tiny, request, on_latents=lambda *both: kept.append(both))
    latents, resolved = kept[0]
    np.testing.assert_array_equal(cogi2v_jax.decode(tiny, latents), result.video)
    assert (resolved.height, resolved.fps) == (64, 8)
    assert result.request == resolved
    assert set(result.seconds) == {"load", "text", "image", "compile", "denoise", "decode"}


@pytest.mark.parametrize("scale", ["sat", "trainer", 0.5])
def test_the_image_scale_changes_what_the_network_gets(
    scale: str | float, tmp_path: Path, image: Image.Image
) -> None:
    models = cogi2v_jax.load(twins.save(twins.pipeline("1.5"), tmp_path / "1.5"), dtype="float32")
    size = dict(zip(("height", "width", "num_frames"), SIZES["1.5"], strict=True))
    default, other = (
        Request(image, PROMPT, num_inference_steps=2, image_latent_scale=chosen, **size)
        for chosen in (None, scale)
    )
    latents = [cogi2v_jax.generate(models, request).latents for request in (default, other)]
    assert not np.allclose(*latents, atol=1e-3)


def test_a_prompt_longer_than_the_learned_table_is_refused(
    tiny: Models, image: Image.Image
) -> None:
    with pytest.raises(
        ValueError, match="prompt must be at most 10 tokens for cogi2v-tiny"
    ) as caught:
        cogi2v_jax.generate(tiny, Request(image, "the red circle " * 3000))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": 61},
        {"height": 65},
        {"scheduler": "euler"},
        {"fit": "zoom"},
        {"noise": "numpy"},
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_before_weights_are_read(
    wrong: dict[str, Any], image: Image.Image
) -> None:
    models = cogi2v_jax.load("cogi2v-tiny", dtype="float32")
    with pytest.raises(ValueError, match="must be"):
        cogi2v_jax.generate(models, Request(image, GROWS, **wrong))
    assert not models.loaded


def test_latents_that_are_not_finite_are_no_result(tiny: Models, image: Image.Image) -> None:
    kept: list[Any] = []
    request = Request(image, GROWS, num_inference_steps=1, image_latent_scale=1e38)
    with pytest.raises(FloatingPointError, match="latents are not finite after 1 steps; lower"):
        cogi2v_jax.generate(tiny, request, on_latents=lambda *both: kept.append(both))
    assert not kept


def test_frames_that_are_not_finite_are_no_result(tiny: Models) -> None:
    with pytest.raises(FloatingPointError, match="frames are not finite; lower guidance_scale"):
        cogi2v_jax.decode(tiny, np.full((1, 3, 16, 16, 16), 3e38, np.float32))


@pytest.mark.parametrize(
    ("latents", "line"),
    [
        (None, "latents must have the shape .b t h w 16. for cogi2v-tiny: got .."),
        ("latents", "latents must be an array: got str"),
        (np.zeros((3, 16, 16, 16)), r"for cogi2v-tiny: got \[3, 16, 16, 16\]"),
        (np.zeros((1, 16, 3, 16, 15)), r"for cogi2v-tiny: got \[1, 16, 3, 16, 15\]"),
        (np.zeros((1, 0, 16, 16, 16)), r"for cogi2v-tiny: got \[1, 0, 16, 16, 16\]"),
        (np.full((1, 3, 16, 16, 16), np.nan), "latents must be finite: got nan"),
    ],
    ids=["none", "text", "four axes", "channels", "no frames", "nan"],
)
@pytest.mark.usefixtures("without_type_hooks")
def test_what_are_no_latents_is_refused(tiny: Models, latents: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        cogi2v_jax.decode(tiny, latents)


@pytest.mark.usefixtures("without_type_hooks")
def test_only_noise_is_taken_as_noise(tiny: Models, image: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"noise must be a cogi2v_jax.Noise: got dict"):
        cogi2v_jax.generate(tiny, Request(image, GROWS), {"initial": 1})


def test_an_id_beyond_the_text_encoders_table_is_refused(
    tiny: Models, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read another row: jax clamps indices."""
    ids = np.full((1, 10), tiny.config.text_encoder.vocab_size, np.int32)
    monkeypatch.setattr(pipeline, "tokenize", lambda *given: (ids, [10]))
    with pytest.raises(ValueError, match="token ids must be below 44, the size of T5's table: got"):
        pipeline.prepare(tiny, Request(image, GROWS, guidance_scale=1.0))


def test_an_image_of_several_videos_is_read_once(tiny: Models, image: Image.Image) -> None:
    class Once(io.BytesIO):
        def seekable(self) -> bool:
            return False

    image.save(png := Once(), "PNG")
    job = pipeline.prepare(tiny, Request(Once(png.getvalue()), [GROWS, GROWS], seed=[1, 2]))
    np.testing.assert_array_equal(job.pixels[0], job.pixels[1])
