"""The stages of a request at full size, each as two callables on one device, ours and the
reference's, with equal weights and inputs."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from full_networks import build_ours, build_reference, configure
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.devices.compiler_options import compile_with
from cogi2v_jax.devices.sharding import put, split
from cogi2v_jax.request import Request
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.noise import seed_keys
from cogi2v_jax.sampling.programs import OFS, RequestTarget, mesh_for
from cogi2v_jax.weights.pieces import memory_limit

GUIDANCE = 6.0
# Ways to run the reference: a mode of torch.compile and the attention kernel that torch must use.
VARIANTS: dict[str, tuple[str | None, SDPBackend | None]] = {
    "eager": (None, None),
    "eager, cuDNN attention": (None, SDPBackend.CUDNN_ATTENTION),
    "compile": ("default", None),
    "compile, cuDNN attention": ("default", SDPBackend.CUDNN_ATTENTION),
    "compile, flash attention": ("default", SDPBackend.FLASH_ATTENTION),
    "compile max-autotune": ("max-autotune-no-cudagraphs", None),
}
VARIANTS["compile max-autotune, cuDNN attention"] = (
    VARIANTS["compile max-autotune"][0],
    SDPBackend.CUDNN_ATTENTION,
)


@dataclass(frozen=True)
class Case:
    """One measurement: a checkpoint's architecture at a size and in a dtype, on the first device of
    both frameworks."""

    model: str
    size: str
    dtype: str
    steps: int
    attention: str = "auto"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def config(self) -> CheckpointConfig:
        return configure(self.model, self.size)[0]

    @cached_property
    def target(self) -> RequestTarget:
        config, asked = configure(self.model, self.size)
        settings: dict[str, Any] = {"num_inference_steps": self.steps, "scheduler": "ddim"}
        settings |= {"guidance_scale": GUIDANCE, "use_dynamic_cfg": False}
        with warnings.catch_warnings(action="ignore"):  # about sizes outside the published range
            request = Request("none.png", "none", **settings, **asked).resolve(config)
        dtype, memory = jnp.dtype(self.dtype), memory_limit()
        mesh = mesh_for(config, dtype, "data=1", 1, True, jax.devices()[:1], memory)
        return RequestTarget(config, dtype, mesh, memory, request, self.attention)

    def draw_normal(self, seed: int, *shape: int) -> torch.Tensor:
        """Draws float32 values that bfloat16 represents exactly, so that all dtypes have equal
        inputs."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device)
        return values.bfloat16().float()


class Program(NamedTuple):
    """Our compiled side of a stage: `call` runs it; `peak` is the memory of its executables in
    bytes, including weights and arguments."""

    call: Callable[[], Any]
    peak: int


@dataclass(frozen=True)
class Stage:
    """A stage as computed by the reference and by us. `inner` is the reference's module for
    torch.compile; times are divided by `parts`."""

    inner: torch.nn.Module
    theirs: Callable[[], torch.Tensor]  # already in our layout
    # Compiles ours. That of a step takes `options` in place of those of compiler_options.py.
    ours: Callable[..., Program]
    parts: int = 1

    def make_variant(self, name: str) -> Callable[[], torch.Tensor]:
        """Returns a call of the reference in one of VARIANTS, which torch.compile compiles only
        once."""
        mode, kernel = VARIANTS[name]
        plain = type(self.inner).forward

        def with_kernel(*args: Any, **settings: Any) -> Any:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return plain(self.inner, *args, **settings)

        forward = with_kernel if mode is None else torch.compile(with_kernel, mode=mode)

        def run() -> torch.Tensor:
            self.inner.forward = forward
            try:
                return self.theirs()
            finally:
                del self.inner.forward

        return run


def video_to_ours(video: torch.Tensor) -> torch.Tensor:
    """The reference's video, [b c f h w], as our [b f h w c]."""
    return video.permute(0, 2, 3, 4, 1)


def latents_to_ours(latents: torch.Tensor) -> torch.Tensor:
    """The reference's latents, [b t c h w], as our [b t h w c]."""
    return latents.permute(0, 1, 3, 4, 2)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same values as a jax array on the same device."""
    return jnp.array(jax.dlpack.from_dlpack(tensor.contiguous()))


def read_peak(*executables: Any) -> int:
    """Returns the most bytes of arguments, outputs and temporaries of one executable, as the
    compiler plans them."""
    sizes = []
    for executable in executables:
        m = executable.memory_analysis()
        both = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        sizes.append(both + m.temp_size_in_bytes)
    return max(sizes)


def make_text_stages(case: Case) -> dict[str, Stage]:
    """Makes `text`: the T5 embeddings of a prompt and a negative prompt."""
    module = build_reference("text_encoder", case.config, case.torch_dtype, case.device)
    network, target = build_ours("text_encoder", module, case.target), case.target
    sizes = (2, case.config.transformer.max_text_seq_length)
    vocabulary, generator = case.config.text_encoder.vocab_size, torch.manual_seed(1)
    ids = torch.randint(2, vocabulary, sizes, generator=generator).to(case.device)

    def program() -> Program:
        tokens = to_jax(ids.int())
        executable = target.call(stages.encode_text, tokens).compile()
        return Program(lambda: executable(network, tokens), read_peak(executable))

    return {"text": Stage(module, lambda: module(ids)[0], program)}


def make_vae_stages(case: Case) -> dict[str, Stage]:
    """Makes `image`, from a picture to its moments, and `decode`, from latents to a video."""
    module = build_reference("vae", case.config, case.torch_dtype, case.device)
    network, target, dtype = build_ours("vae", module, case.target), case.target, case.torch_dtype
    request, (frames, rows, columns, channels, padding) = target.request, target.shape
    pixels = case.draw_normal(2, 1, 1, request.height, request.width, 3).clamp(-1, 1)
    latents = case.draw_normal(3, 1, frames - padding, rows, columns, channels)

    def program(function: Any, *args: Any, **static: Any) -> Program:
        executable = target.call(function, *args, **static).compile()
        return Program(lambda: executable(network, *args), read_peak(executable))

    def decode() -> Program:
        factor, strips = case.config.vae.scaling_factor, target.strips(rows, columns)
        return program(stages.decode, to_jax(latents), np.float32(factor), strips=strips)

    def moments() -> torch.Tensor:
        return video_to_ours(module._encode(pixels.permute(0, 4, 1, 2, 3).to(dtype)))

    def video() -> torch.Tensor:
        unscaled = latents.permute(0, 4, 1, 2, 3).to(dtype) / case.config.vae.scaling_factor
        return video_to_ours(module.decode(unscaled, return_dict=False)[0])

    return {
        "image": Stage(
            module.encoder, moments, lambda: program(stages.encode_image, to_jax(pixels))
        ),
        "decode": Stage(module.decoder, video, decode),
    }


def make_transformer_stages(case: Case) -> dict[str, Stage]:
    """Makes the two parts of `denoise`: one prediction of the transformer, and steps of the loop
    with guidance. Ours include the modulation."""
    module = build_reference("transformer", case.config, case.torch_dtype, case.device)
    target, request, config = case.target, case.target.request, case.config.transformer
    modulation, network = (
        build_ours(name, module, target) for name in ("modulation", "transformer")
    )
    frames, rows, columns, channels, _ = target.shape
    start = case.draw_normal(3, 1, frames, channels, rows, columns)
    first = case.draw_normal(4, 1, 1, channels, rows, columns)
    image = torch.cat([first, torch.zeros_like(start[:, 1:])], dim=1)
    text = case.draw_normal(5, 2, config.max_text_seq_length, config.text_embed_dim).to(
        case.torch_dtype
    )
    settings = vars(case.config.scheduler) | case.config.scheduler.REQUIRED
    scheduler = diffusers.CogVideoXDDIMScheduler(**settings)
    # Only for its rotary tables.
    pipe = diffusers.CogVideoXImageToVideoPipeline(None, None, None, module, scheduler)
    rotary = pipe._prepare_rotary_positional_embeddings(
        request.height, request.width, frames, case.device
    )
    more = {"image_rotary_emb": rotary, "return_dict": False}
    if config.ofs_embed_dim:
        more["ofs"] = torch.full((1,), OFS, dtype=case.torch_dtype, device=case.device)

    def predict(x: torch.Tensor, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x.to(text.dtype), image.to(text.dtype)], dim=2)
        copies = len(text) // len(x)
        return module(torch.cat([both] * copies), text, t.expand(len(text)), **more)[0].float()

    def theirs() -> torch.Tensor:
        scheduler.set_timesteps(case.steps, device=case.device)
        x = start.to(text.dtype)
        for t in scheduler.timesteps:
            unconditional, conditional = predict(x, text, t).chunk(2)
            v = unconditional + GUIDANCE * (conditional - unconditional)
            x = scheduler.step(v, t, x, return_dict=False)[0].to(text.dtype)
        return latents_to_ours(x)

    def one() -> torch.Tensor:
        scheduler.set_timesteps(case.steps, device=case.device)
        return latents_to_ours(predict(start, text[1:], scheduler.timesteps[0]))

    def program(
        tableau: Any, text: torch.Tensor, steps: int, options: Mapping[str, str] | None = None
    ) -> Program:
        before = target.call(stages.modulate, *target.time).compile()
        x = to_jax(latents_to_ours(start))
        inputs = (
            None,
            put(seed_keys([0]), split(target.mesh)),
            to_jax(latents_to_ours(image)),
            to_jax(text),
            target.positions(),
        )

        def arguments() -> tuple[Any, ...]:
            state = stages.State(x, (jnp.zeros_like(x),))
            return state, np.int32(0), tableau, before(modulation, *target.time), *inputs

        call = target.call(stages.denoise, *arguments(), steps=steps)
        loop = call.compile() if options is None else compile_with(options, call.lower())
        return Program(lambda: loop(network, *arguments()).x, read_peak(before, loop))

    # A schedule whose step returns v.
    zeros = {name: np.zeros_like(column) for name, column in target.tableau._asdict().items()}
    ones = np.ones_like(target.tableau.x0)
    kept = {"timestep": target.tableau.timestep, "sigma": -ones, "x0": ones}
    returns_v = target.tableau._replace(**zeros | kept)
    return {
        "denoise, one prediction": Stage(module, one, lambda: program(returns_v, text[1:], 1)),
        "denoise, one step": Stage(
            module,
            theirs,
            lambda **options: program(target.tableau, text, case.steps, **options),
            parts=case.steps,
        ),
    }


NETWORKS = {
    "text_encoder": make_text_stages,
    "vae": make_vae_stages,
    "transformer": make_transformer_stages,
}
