"""The reference pipeline: its latents, its video and the noise that it draws, for tests that
compare ours with them."""

from typing import Any

import numpy as np
import torch
import twins
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogi2v_jax import Noise

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
PADDING = {"1.0": 0, "1.5": 1}  # latent frames that are dropped before decoding
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
PROMPT = "the red circle"


def settings(family: str, steps: int, dynamic: bool, guidance: float = 6.0) -> dict[str, Any]:
    """Settings of a request, with the reference's names."""
    size = dict(zip(("height", "width", "num_frames"), SIZES[family], strict=True))
    guidance_of = {"guidance_scale": guidance, "use_dynamic_cfg": dynamic}
    return {**size, "num_inference_steps": steps, **guidance_of}


def reference(
    pipe: Any, scheduler: str, seed: int, *prompt: Any, **settings: Any
) -> tuple[Any, np.ndarray]:
    """(the reference's latents, ours of the same without the padding frame)."""
    pipe.scheduler = SCHEDULERS[scheduler](**twins.SCHEDULER)
    length = pipe.transformer.config.max_text_seq_length
    generator = torch.Generator().manual_seed(seed)
    fixed = {"generator": generator, "max_sequence_length": length, "output_type": "latent"}
    latents = pipe(*prompt, **fixed, **settings).frames
    padding = PADDING["1.5" if pipe.transformer.config.patch_size_t else "1.0"]
    return latents, twins.frames_last(latents)[:, padding:]


def decoded(pipe: Any, latents: np.ndarray) -> np.ndarray:
    """The reference's video of latents [b t h w c] without padding, in 0 to 255."""
    latents = torch.from_numpy(np.moveaxis(latents, -1, 2).copy())
    with torch.no_grad():
        video = pipe.decode_latents(latents)
        return np.round(pipe.video_processor.postprocess_video(video, output_type="np") * 255.0)


def reference_noise(
    scheduler: str, steps: int, latents: tuple[int, int, int, int], seed: int
) -> Noise:
    """What the reference draws from one generator for latents [t c h w]: the posterior, the initial
    noise, then that of each step. DPM draws twice in the middle and uses the second."""
    t, c, h, w = latents
    generator = torch.Generator().manual_seed(seed)
    posterior = torch.randn(1, c, 1, h, w, generator=generator)
    initial = torch.randn(1, t, c, h, w, generator=generator)
    drawn = torch.zeros(steps, 1, t, c, h, w)
    if scheduler == "dpm":
        for step in range(steps):
            for _ in range(2 if 0 < step < steps - 1 else 1):
                drawn[step] = torch.randn(1, t, c, h, w, generator=generator)
    by_step = np.stack([twins.frames_last(step) for step in drawn])
    return Noise(twins.channels_last(posterior), twins.frames_last(initial), by_step)
