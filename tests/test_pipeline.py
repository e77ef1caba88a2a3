"""The whole path against the reference pipeline with the same noise, and what a caller may rely
on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import twins
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from PIL import Image
from tolerances import TOLERANCE, assert_close

import cogi2v_jax
from cogi2v_jax import Models, Noise, Request
from cogi2v_jax.sampling.noise import draw_as_torch

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
PROMPT = "the red circle"


@pytest.fixture(scope="module")
def models(pipe: Any, family: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return cogi2v_jax.load(
        twins.save(pipe, tmp_path_factory.mktemp("source") / family), dtype="float32"
    )


@pytest.fixture(scope="module")
def tiny() -> Models:
    return cogi2v_jax.load("cogi2v-tiny", dtype="float32")


@pytest.fixture
def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))


def reference_noise(
    scheduler: str, steps: int, latents: tuple[int, int, int, int], seed: int
) -> Noise:
    """What the reference draws from one generator: the posterior, the start, then each step's; DPM
    draws twice in the middle and uses the second."""
    t, c, h, w = latents
    generator = torch.Generator().manual_seed(seed)
    posterior = torch.randn(1, c, 1, h, w, generator=generator)
    initial = torch.randn(1, t, c, h, w, generator=generator)
    drawn = torch.zeros(steps, 1, t, c, h, w)
    if scheduler == "dpm":
        for step in range(steps):
            for _ in range(2 if 0 < step < steps - 1 else 1):
                drawn[step] = torch.randn(1, t, c, h, w, generator=generator)
    return Noise(
        twins.channels_last(posterior),
        twins.frames_last(initial),
        np.stack([twins.frames_last(step) for step in drawn]),
    )


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "constant"])
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
    height, width, frames = SIZES[family]
    shared = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": dynamic,
    }
    pipe.scheduler = SCHEDULERS[scheduler](**twins.SCHEDULER)
    padding = {"1.0": 0, "1.5": 1}[family]
    theirs = pipe(
        image,
        PROMPT,
        "blue",
        generator=torch.Generator().manual_seed(7),
        max_sequence_length=models.config.transformer.max_text_seq_length,
        output_type="latent",
        **shared,
    ).frames
    with torch.no_grad():
        pixels = pipe.video_processor.postprocess_video(
            pipe.decode_latents(theirs[:, padding:]), output_type="np"
        )

    noise = reference_noise(scheduler, steps, tuple(theirs.shape[1:]), seed=7)
    ours = cogi2v_jax.generate(
        models, Request(image, PROMPT, "blue", scheduler=scheduler, fit="stretch", **shared), noise
    )

    assert_close(ours.latents, twins.frames_last(theirs)[:, padding:], TOLERANCE["latents"])
    assert ours.video.shape == (1, frames, height, width, 3)
    mean_square = np.mean(np.square(ours.video - np.round(pixels * 255.0)))
    assert 10 * np.log10(255**2 / max(mean_square, 1e-12)) >= 60


# 7 doesn't land on no noise.
@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 4), ("dpm", 1), ("dpm", 4), ("dpm", 7)])
def test_with_torchs_numbers_a_seed_alone_gives_the_references_latents(
    models: Models, pipe: Any, family: str, image: Image.Image, scheduler: str, steps: int
) -> None:
    height, width, frames = SIZES[family]
    shared = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "use_dynamic_cfg": True,
    }
    pipe.scheduler, seed = SCHEDULERS[scheduler](**twins.SCHEDULER), 2**32 + 7
    length, generator = (
        models.config.transformer.max_text_seq_length,
        torch.Generator().manual_seed(seed),
    )
    theirs = pipe(
        image,
        PROMPT,
        generator=generator,
        max_sequence_length=length,
        output_type="latent",
        **shared,
    ).frames
    ours = cogi2v_jax.generate(
        models,
        Request(
            image, PROMPT, scheduler=scheduler, fit="stretch", seed=seed, noise="torch", **shared
        ),
    )
    assert_close(
        ours.latents,
        twins.frames_last(theirs)[:, theirs.shape[1] - ours.latents.shape[1] :],
        TOLERANCE["latents"],
    )


@pytest.mark.slow
def test_with_tiles_latents_and_video_are_the_references_with_tiles(
    image: Image.Image, tmp_path: Path
) -> None:
    pipe = twins.pipeline("1.5")
    # A tile is 48x80.
    pipe.vae = twins.vae(5, invert_scale_latents=True, sample_height=96, sample_width=160)
    pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    folder = twins.save(pipe, tmp_path / "tiled")
    shared = {
        "height": 48,
        "width": 112,
        "num_frames": 9,
        "num_inference_steps": 2,
        "use_dynamic_cfg": False,
    }
    length = pipe.transformer.config.max_text_seq_length
    generator = torch.Generator().manual_seed(7)
    theirs = pipe(
        image,
        PROMPT,
        generator=generator,
        max_sequence_length=length,
        output_type="latent",
        **shared,
    ).frames
    with torch.no_grad():
        pixels = pipe.video_processor.postprocess_video(
            pipe.decode_latents(theirs[:, 1:]), output_type="np"
        )

    noise = reference_noise("ddim", 2, tuple(theirs.shape[1:]), seed=7)
    request = Request(image, PROMPT, scheduler="ddim", fit="stretch", **shared)
    ours = cogi2v_jax.generate(cogi2v_jax.load(folder, "float32", vae_tiling=True), request, noise)
    assert_close(ours.latents, twins.frames_last(theirs)[:, 1:], TOLERANCE["latents"])
    assert np.abs(ours.video - np.round(pixels * 255.0)).max() <= 1
    whole = cogi2v_jax.generate(cogi2v_jax.load(folder, "float32"), request, noise)
    assert np.abs(ours.video.astype(int) - whole.video).max() > 5


def test_without_guidance_only_the_prompt_is_predicted(
    models: Models, pipe: Any, family: str, image: Image.Image
) -> None:
    height, width, frames = SIZES[family]
    shared = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "use_dynamic_cfg": True,
    }
    pipe.scheduler = SCHEDULERS["ddim"](**twins.SCHEDULER)
    length = models.config.transformer.max_text_seq_length
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(
        image,
        PROMPT,
        generator=generator,
        max_sequence_length=length,
        output_type="latent",
        **shared,
    ).frames
    noise = reference_noise("ddim", 2, tuple(theirs.shape[1:]), seed=3)
    ours = cogi2v_jax.generate(
        models,
        Request(image, PROMPT, "never read", scheduler="ddim", fit="stretch", **shared),
        noise,
    )
    assert_close(
        ours.latents,
        twins.frames_last(theirs)[:, theirs.shape[1] - ours.latents.shape[1] :],
        TOLERANCE["latents"],
    )


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Counts what XLA compiles, cached on disk or not."""
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
    with compilations() as first:
        cogi2v_jax.generate(
            tiny,
            Request(image, "the red circle grows", num_inference_steps=3),
            on_step=lambda *_: None,
        )
    assert first
    other = Request(
        image,
        "a blue square spins",
        "white",
        num_inference_steps=3,
        guidance_scale=5.5,
        use_dynamic_cfg=True,
        scheduler="dpm",
        seed=2**40,
    )
    with compilations() as second:
        cogi2v_jax.generate(tiny, other, on_step=lambda *_: None)
    assert not second


@pytest.mark.parametrize("noise", ["jax", "torch"])
def test_slabs_of_the_loop_give_what_the_whole_loop_gives(
    tiny: Models, image: Image.Image, noise: str
) -> None:
    request = Request(
        image, "the red circle grows", num_inference_steps=5, scheduler="dpm", noise=noise
    )
    seen = []
    walked = cogi2v_jax.generate(
        tiny,
        request,
        on_step=lambda step, steps, latents: seen.append((step, steps, np.array(latents))),
    )
    whole = cogi2v_jax.generate(tiny, request)
    assert [(step, steps) for step, steps, _ in seen] == [(step, 5) for step in range(1, 6)]
    assert_close(walked.latents, whole.latents, 1e-6)
    np.testing.assert_array_equal(seen[-1][2], walked.latents)


def test_raising_in_on_step_cancels_and_the_next_run_is_clean(
    tiny: Models, image: Image.Image
) -> None:
    request = Request(image, "the red circle grows", num_inference_steps=3)

    def cancel(step: int, steps: int, latents: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cogi2v_jax.generate(tiny, request, on_step=cancel)
    np.testing.assert_array_equal(
        cogi2v_jax.generate(tiny, request, on_step=lambda *_: None).video,
        cogi2v_jax.generate(tiny, request, on_step=lambda *_: None).video,
    )


def test_a_video_of_a_batch_is_the_video_alone(tiny: Models, rng: np.random.Generator) -> None:
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
    prompts, seeds = ["the red circle grows", "a blue square moves left"], [5, 6]
    shared = {"num_inference_steps": 3, "scheduler": "dpm"}
    batch = cogi2v_jax.generate(tiny, Request(images, prompts, seed=seeds, **shared))
    alone = cogi2v_jax.generate(tiny, Request(images[1], prompts[1], seed=seeds[1], **shared))
    assert batch.video.shape[0] == 2
    assert_close(batch.latents[1:], alone.latents, 1e-5)


def test_given_noise_replaces_only_its_own_draw(
    tiny: Models, image: Image.Image, rng: np.random.Generator
) -> None:
    request = Request(image, "the red circle grows", num_inference_steps=3, scheduler="dpm")
    drawn = cogi2v_jax.generate(tiny, request).latents
    steps = rng.normal(size=(3, 1, 3, 8, 8, 16))
    given = cogi2v_jax.generate(tiny, request, Noise(steps=steps)).latents
    assert not np.allclose(drawn, given, atol=1e-2)
    ddim = {"num_inference_steps": 3, "scheduler": "ddim"}
    np.testing.assert_array_equal(
        cogi2v_jax.generate(
            tiny, Request(image, "the red circle grows", **ddim), Noise(steps=steps)
        ).latents,
        cogi2v_jax.generate(
            tiny, Request(image, "the red circle grows", **ddim), Noise(steps=0 * steps)
        ).latents,
    )


def test_given_noise_replaces_its_own_draw_of_torchs_stream_alone(
    tiny: Models, image: Image.Image
) -> None:
    shared = {"num_inference_steps": 3, "scheduler": "dpm", "seed": [5, 6]}
    posterior, initial, steps = draw_as_torch(
        [5, 6], tiny.dtype, (3, 8, 8, 16), np.array([1, 2, 2])
    )
    images, prompts = [image, image], ["the red circle grows"] * 2
    mixed = cogi2v_jax.generate(
        tiny, Request(images, prompts, noise="torch", **shared), Noise(initial=0 * initial)
    ).latents
    given = cogi2v_jax.generate(
        tiny, Request(images, prompts, **shared), Noise(posterior, 0 * initial, steps)
    ).latents
    np.testing.assert_array_equal(mixed, given)
    assert not np.allclose(
        given,
        cogi2v_jax.generate(tiny, Request(images, prompts, noise="torch", **shared)).latents,
        atol=1e-2,
    )


def test_decoding_latents_alone_gives_the_same_video(tiny: Models, image: Image.Image) -> None:
    kept: list[Any] = []
    request = Request(image, "the red circle grows", num_inference_steps=2)
    result = cogi2v_jax.generate(
        tiny, request, on_latents=lambda latents, resolved: kept.append((latents, resolved))
    )
    latents, resolved = kept[0]
    np.testing.assert_array_equal(cogi2v_jax.decode(tiny, latents), result.video)
    assert (resolved.height, resolved.fps) == (64, 8)
    assert result.request == resolved
    assert set(result.seconds) == {"load", "text", "image", "compile", "denoise", "decode"}


@pytest.mark.parametrize("scale", ["sat", "trainer", 0.5])
def test_the_image_scale_changes_what_the_network_sees(
    scale: str | float, tmp_path: Path, image: Image.Image
) -> None:
    models = cogi2v_jax.load(twins.save(twins.pipeline("1.5"), tmp_path / "1.5"), dtype="float32")
    height, width, frames = SIZES["1.5"]
    shared = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 2}
    reference = cogi2v_jax.generate(models, Request(image, PROMPT, **shared)).latents
    other = cogi2v_jax.generate(
        models, Request(image, PROMPT, image_latent_scale=scale, **shared)
    ).latents
    assert not np.allclose(reference, other, atol=1e-3)


def test_a_prompt_longer_than_the_learned_table_is_refused(
    tiny: Models, image: Image.Image
) -> None:
    with pytest.raises(ValueError, match="prompt must be at most 10 tokens for cogi2v-tiny"):
        cogi2v_jax.generate(tiny, Request(image, "the red circle " * 10))


def test_bad_requests_end_before_weights_are_read(image: Image.Image) -> None:
    models = cogi2v_jax.load("cogi2v-tiny", dtype="float32")
    for wrong in (
        {"num_inference_steps": 61},
        {"height": 65},
        {"scheduler": "euler"},
        {"fit": "zoom"},
        {"noise": "numpy"},
    ):
        with pytest.raises(ValueError, match="must be"):
            cogi2v_jax.generate(models, Request(image, "the red circle grows", **wrong))
    assert not models._resident
