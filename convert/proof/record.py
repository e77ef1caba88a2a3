"""Runs the PyTorch reference (diffusers' unmodified pipeline) and records what it computes at every
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
from cogi2v_jax.disk import check_target, first_line, replace_when_done
from cogi2v_jax.media.images import read_image
from cogi2v_jax.pipeline import tokenize_prompts
from cogi2v_jax.request import Request, Resolved
from cogi2v_jax.sampling.schedule import tableau
from cogi2v_jax.settings import SETTINGS
from cogi2v_jax.weights.checkpoint import MANIFEST

from ..sources.gather import Source
from . import trace

NOISE_MODULES = (  # where the reference draws noise
    "diffusers.models.autoencoders.vae",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
)
REFERENCE = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


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
    """Writes the trace of one request, with the predictions of all steps or of `keep_steps`. By
    default it runs on CUDA in bfloat16 if there is CUDA, else on the CPU in float32. Returns one
    line about the trace. Raises ValueError or FileNotFoundError, before the slow work."""
    if (source / MANIFEST).is_file():
        raise ValueError(
            f"SRC must be a diffusers folder: got {source}, a converted one; "
            "cogi2v-convert to-torch makes one of it"
        )
    config = Source(source).config
    request = request.resolve(config)
    (video,) = request.videos
    read = (Path(video.image),) if isinstance(video.image, str | PathLike) else ()
    check_target("trace", target, read)
    tokenize_prompts(config, source, [video.negative_prompt, video.prompt])
    _check_table(config, request)
    picture = read_image(video.image)
    count = request.num_inference_steps
    if request.scheduler not in REFERENCE:
        must = f"scheduler must be {' or '.join(REFERENCE)}, which the reference has"
        raise ValueError(f"{must}: got {request.scheduler!r}")
    if isinstance(request.guidance_scale, tuple):
        raise ValueError("guidance_scale must be one number, which the reference takes: got a list")
    # Raises ValueError for a number of steps that the scheduler cannot compute.
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
        # Newer versions call torch_dtype dtype, and warn.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            pipe = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(
                source, torch_dtype=getattr(torch, dtype)
            )
    except (OSError, ValueError, RuntimeError) as error:
        why = first_line(error)
        raise ValueError(f"{source} must be a whole diffusers folder: {why}") from None
    pipe.to(getattr(torch, dtype))  # some versions leave a part in its stored dtype
    pipe.scheduler = getattr(diffusers, REFERENCE[request.scheduler]).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    if device == "cuda":
        # One part at a time on the GPU: a 5B checkpoint needs the memory of its largest part.
        pipe.enable_model_cpu_offload()
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    if vae_tiling:
        pipe.vae.enable_tiling()
    recorder = Recorder(pipe, kept)
    with recorder.recording(), torch.no_grad():
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
    settings = {name: getattr(video, name) for name in ("prompt", "negative_prompt", "seed")}
    settings |= {setting: getattr(request, setting) for setting in SETTINGS}
    made = {"checkpoint": config.title, "dtype": dtype, "vae_tiling": vae_tiling}
    made |= {"kept_steps": kept, "device": platform.processor() or platform.machine()}
    if device == "cuda":
        made["device"] = torch.cuda.get_device_name()
    made |= {package: version(package) for package in ("torch", "diffusers", "transformers")}
    with replace_when_done(target) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, trace.head(settings, made))
        part.chmod(mode)  # save_file makes it readable by its owner only
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
    """Refuses a number of frames that the learned position table is not for. The reference then
    silently uses another table, so that the trace could not verify a conversion."""
    network = config.transformer
    frames = config.vae.decoded_frames(network.table_grid[0])
    if network.use_learned_positional_embeddings and request.num_frames != frames:
        raise ValueError(
            f"num_frames must be {frames} for a trace of {config.title} (at any other count the "
            f"reference leaves its learned position table): got {request.num_frames}"
        )


class Recorder:
    """Records a pipeline's network inputs and outputs, scheduler steps and noise draws. Its
    wrappers keep the signatures of what they wrap, because the pipeline inspects these before it
    passes the generator."""

    def __init__(self, pipe: Any, keep_steps: Sequence[int]):
        self._pipe, self._keep_steps = pipe, keep_steps
        self._draws: list[Any] = []
        # Ids and embeddings: of the prompt, then of the negative prompt.
        self._prompts: list[tuple[Any, Any]] = []
        self._predictions: Any = None
        self._guidance: list[float] = []
        self._timesteps: list[int] = []
        self._tensors: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        pipe = self._pipe
        wrapped = [
            *((import_module(name), "randn_tensor", self._drawing) for name in NOISE_MODULES),
            (DiagonalGaussianDistribution, "sample", self._sampling),
            (pipe.vae, "encode", self._encoding),
            (pipe.scheduler, "step", self._stepping),
        ]
        with ExitStack() as stack:
            for owner, name, wrapper in wrapped:
                stack.enter_context(mock.patch.object(owner, name, wrapper(getattr(owner, name))))
            hooks = (pipe.text_encoder, self._encoded), (pipe.transformer, self._predicted)
            for network, hook in hooks:
                stack.callback(network.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def tensors(self, picture: Any, video: Any) -> dict[str, Any]:
        """All tensors of the trace, by the names in `trace.LAYOUTS`."""
        import torch

        prompts = self._prompts[::-1]  # the network gets the negative one first
        posterior_noise = self._tensors.pop("draw.posterior")
        initial = self._tensors.pop("draw.initial")
        return {
            "picture": picture,
            "ids": _copy(torch.cat([ids for ids, _ in prompts])),
            "text": _copy(torch.cat([text for _, text in prompts])),
            "posterior_noise": posterior_noise,
            "initial": initial,
            "timesteps": torch.tensor(self._timesteps),
            "guidance": torch.tensor(self._guidance, dtype=torch.float32),
            **self._tensors,
            "video": _copy(video),
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
            self._tensors["moments"] = _copy(distribution.parameters)
            self._tensors["posterior"] = _copy(drawn)
            return drawn

        return sampled

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def encoded(pixels: Any, *args: Any, **kwargs: Any) -> Any:
            self._tensors["pixels"] = _copy(pixels[:, :, 0])
            return encode(pixels, *args, **kwargs)

        return encoded

    def _encoded(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._prompts.append((args[0] if args else kwargs["input_ids"], output[0]))

    def _predicted(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given, channels = kwargs["hidden_states"], output[0].shape[2]
        self._tensors.setdefault("image", _copy(given[-1:, :, channels:]))
        self._predictions = output[0].split(1)

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if not self._timesteps:
                for name, draw in zip(("draw.posterior", "draw.initial"), self._draws, strict=True):
                    self._tensors[name] = _copy(draw)
            self._draws.clear()
            result, given = step(*args, **kwargs), signature.bind(*args, **kwargs).arguments
            index = len(self._timesteps)
            self._timesteps.append(int(given["timestep"]))
            self._guidance.append(float(self._pipe.guidance_scale))
            kept = {"latents": result[0].to(given["sample"].dtype)}
            if self._draws:
                kept["noise"] = self._draws[-1]
            if index in self._keep_steps:
                names = ("unconditional", "conditional")[-len(self._predictions) :]
                kept |= dict(zip(names, self._predictions, strict=True))
                kept["guided"] = given["model_output"]
                if given.get("old_pred_original_sample") is not None:
                    kept["x0_prev"] = given["old_pred_original_sample"]
            self._tensors |= {f"{name}.{index}": _copy(tensor) for name, tensor in kept.items()}
            return result

        return stepped


def _copy(tensor: Any) -> Any:
    """A contiguous copy on the host, which later changes do not affect."""
    return tensor.detach().cpu().clone().contiguous()
