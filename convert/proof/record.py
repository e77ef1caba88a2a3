"""Runs the PyTorch reference (diffusers' pipeline, untouched) and keeps what it computes at every
stage."""

import inspect
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.disk import beside, check_target, first_line
from cogi2v_jax.media.images import read_image
from cogi2v_jax.pipeline import tokens
from cogi2v_jax.request import SETTINGS, Request, Resolved
from cogi2v_jax.sampling.schedule import tableau
from cogi2v_jax.weights.checkpoint import MANIFEST

from ..sources.gather import Source
from . import trace

MODULES = (  # where the reference draws noise
    "diffusers.models.autoencoders.vae",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
)


def record(
    source: Path,
    target: Path,
    request: Request,
    *,
    device: str | None = None,
    dtype: str | None = None,
    vae_tiling: bool = False,
    keep_steps: Sequence[int] | None = None,
) -> str:
    """Writes the trace of one request, with the predictions of all steps or of `keep_steps`. What
    is left out is CUDA where there is any, and bfloat16 there, float32 on a CPU. Returns what was
    done, in one line. Raises ValueError or FileNotFoundError, in one line, before the slow work."""
    if (source / MANIFEST).is_file():
        raise ValueError(
            f"SRC must be a diffusers folder: got {source}, a converted one; cogi2v-convert to-torch makes one of it"
        )
    config = Source(source).config
    request = request.resolve(config)
    (video,) = request.videos
    check_target(
        "trace", target, (Path(video.image),) if isinstance(video.image, str | PathLike) else ()
    )
    tokens(config, source, [video.negative_prompt, video.prompt])
    _check_table(config, request)
    picture = read_image(video.image)
    count = request.num_inference_steps
    # Some counts it can't compute.
    tableau(
        config.scheduler, request.scheduler, count, request.guidance_scale, request.use_dynamic_cfg
    )
    steps = range(count)
    kept = sorted(steps if keep_steps is None else set(keep_steps))
    if set(kept) - set(steps):
        raise ValueError(
            f"keep_steps must be from 0 to {steps[-1]}: got {', '.join(map(str, keep_steps or ()))}"
        )
    torch, diffusers, transformers = _reference()
    from safetensors.torch import save_file

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu where PyTorch finds no CUDA: got cuda")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    diffusers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # Float32 means float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    try:
        with warnings.catch_warnings():
            # Of the dtype's name, which not all versions call alike.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(
                source, torch_dtype=getattr(torch, dtype)
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source} must be a whole diffusers folder: {first_line(error)}"
        ) from None
    pipe.to(getattr(torch, dtype))  # some versions leave a part as it was stored
    schedulers = {"dpm": diffusers.CogVideoXDPMScheduler, "ddim": diffusers.CogVideoXDDIMScheduler}
    pipe.scheduler = schedulers[request.scheduler].from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    if device == "cuda":
        # A part at a time: a 5B checkpoint needs no more than its largest.
        pipe.enable_model_cpu_offload()
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    if vae_tiling:
        pipe.vae.enable_tiling()
    recorder = Recorder(pipe, kept)
    with recorder.watching(), torch.no_grad():
        frames = pipe(
            image=picture,
            prompt=video.prompt,
            negative_prompt=video.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=count,
            guidance_scale=request.guidance_scale,
            use_dynamic_cfg=request.use_dynamic_cfg,
            generator=torch.Generator().manual_seed(video.seed),
            max_sequence_length=config.transformer.max_text_seq_length,
            output_type="pt",
        ).frames
    tensors = recorder.tensors(torch.from_numpy(np.array(picture)), frames)
    settings = {
        "prompt": video.prompt,
        "negative_prompt": video.negative_prompt,
        "seed": video.seed,
    }
    settings |= {setting: getattr(request, setting) for setting in SETTINGS}
    made = {
        "checkpoint": config.title,
        "dtype": dtype,
        "vae_tiling": vae_tiling,
        "kept_steps": kept,
    }
    made |= {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine()
    }
    made |= {package: version(package) for package in ("torch", "diffusers", "transformers")}
    with beside(target) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, trace.head(settings, made))
        part.chmod(mode)  # save_file's are for their owner alone
    return f"{target}: {len(tensors)} tensors of {count} steps in {dtype} on {made['device']}"


def _reference() -> tuple[Any, Any, Any]:
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"record must have the reference: {error}; pip install 'cogi2v-jax[reference]'"
        ) from None
    return torch, diffusers, transformers


def _check_table(config: CheckpointConfig, request: Resolved) -> None:
    """The reference silently takes another table where frames are not the learned one's: no
    conversion of it could be verified."""
    network = config.transformer
    frames = config.vae.decoded_frames(network.table_grid[0])
    if network.use_learned_positional_embeddings and request.num_frames != frames:
        why = "at any other count the reference leaves its learned position table"
        raise ValueError(
            f"num_frames must be {frames} for a trace of {config.title} ({why}): got {request.num_frames}"
        )


class Recorder:
    """Listens to a pipeline: its networks' inputs and results, its scheduler's steps and every draw
    of noise. What it stands in for keeps its signature: the pipeline asks for that before it hands
    the generator on."""

    def __init__(self, pipe: Any, kept: Sequence[int]):
        self._pipe, self._kept = pipe, kept
        self._draws: list[Any] = []
        # Ids and embeddings: the prompt's, then the negative one's.
        self._prompts: list[tuple[Any, Any]] = []
        self._predictions: Any = None
        self._guidance: list[float] = []
        self._timesteps: list[int] = []
        self._tensors: dict[str, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        pipe, sample = self._pipe, DiagonalGaussianDistribution.sample
        with ExitStack() as stack:
            for module in MODULES:
                stack.enter_context(
                    mock.patch(
                        f"{module}.randn_tensor", self._drawing(import_module(module).randn_tensor)
                    )
                )
            stack.enter_context(
                mock.patch.object(DiagonalGaussianDistribution, "sample", self._sampling(sample))
            )
            stack.enter_context(
                mock.patch.object(pipe.vae, "encode", self._encoding(pipe.vae.encode))
            )
            stack.enter_context(
                mock.patch.object(pipe.scheduler, "step", self._stepping(pipe.scheduler.step))
            )
            for network, hook in (
                (pipe.text_encoder, self._encoded),
                (pipe.transformer, self._predicted),
            ):
                stack.callback(network.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def tensors(self, picture: Any, video: Any) -> dict[str, Any]:
        """Everything kept, by the names of `trace.LAYOUTS`."""
        import torch

        prompts = self._prompts[::-1]  # the network is given the negative one first
        posterior_noise, initial = (
            self._tensors.pop("draw.posterior"),
            self._tensors.pop("draw.initial"),
        )
        return {
            "picture": picture,
            "ids": _kept(torch.cat([ids for ids, _ in prompts])),
            "text": _kept(torch.cat([text for _, text in prompts])),
            "posterior_noise": posterior_noise,
            "initial": initial,
            "timesteps": torch.tensor(self._timesteps),
            "guidance": torch.tensor(self._guidance, dtype=torch.float32),
            **self._tensors,
            "video": _kept(video),
        }

    def _drawing(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> Any:
            self._draws.append(draw(*args, **kwargs))
            return self._draws[-1]

        return drawn

    def _sampling(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(sample)
        def sampled(distribution: Any, *args: Any, **kwargs: Any) -> Any:
            drawn = sample(distribution, *args, **kwargs)
            self._tensors["moments"], self._tensors["posterior"] = (
                _kept(distribution.parameters),
                _kept(drawn),
            )
            return drawn

        return sampled

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def encoded(pixels: Any, *args: Any, **kwargs: Any) -> Any:
            self._tensors["pixels"] = _kept(pixels[:, :, 0])
            return encode(pixels, *args, **kwargs)

        return encoded

    def _encoded(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._prompts.append((args[0] if args else kwargs["input_ids"], output[0]))

    def _predicted(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given, channels = kwargs["hidden_states"], output[0].shape[2]
        self._tensors.setdefault("image", _kept(given[-1:, :, channels:]))
        self._predictions = output[0].split(1)

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if not self._timesteps:
                for name, draw in zip(("draw.posterior", "draw.initial"), self._draws, strict=True):
                    self._tensors[name] = _kept(draw)
            self._draws.clear()
            result, given = step(*args, **kwargs), signature.bind(*args, **kwargs).arguments
            index = len(self._timesteps)
            self._timesteps.append(int(given["timestep"]))
            self._guidance.append(float(self._pipe.guidance_scale))
            kept = {"latents": result[0].to(given["sample"].dtype)}
            if self._draws:
                kept["noise"] = self._draws[-1]
            if index in self._kept:
                kept |= dict(
                    zip(
                        ("unconditional", "conditional")[-len(self._predictions) :],
                        self._predictions,
                        strict=True,
                    )
                )
                kept["guided"] = given["model_output"]
                if given.get("old_pred_original_sample") is not None:
                    kept["x0_prev"] = given["old_pred_original_sample"]
            self._tensors |= {f"{name}.{index}": _kept(tensor) for name, tensor in kept.items()}
            return result

        return stepped


def _kept(tensor: Any) -> Any:
    """A copy that nothing later changes, in a file's layout."""
    return tensor.detach().cpu().clone().contiguous()
