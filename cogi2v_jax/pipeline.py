"""Image-to-video, top to bottom: encode the text, encode the image, denoise, decode."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8, UInt32

from .config import CheckpointConfig
from .devices.compiling import Stopwatch, workspace
from .devices.sharding import fetch, put, split
from .media.images import fit_image, read_image
from .models.tokenizer import tokenize
from .models.vae_tiles import decode_tiled, encode_tiled, sides
from .request import Noise, Request, Resolved
from .sampling import noise as streams
from .sampling.programs import Call, Phases, Place, mesh_for
from .sampling.schedule import draws
from .weights.checkpoint import Models
from .weights.pieces import memory_limit

OnStep = Callable[[int, int, Any], None]  # (step, steps, latents), on the host, after every step
OnLatents = Callable[[Any, Resolved], None]  # (latents, resolved request), before they are decoded


@dataclass(frozen=True)
class Result:
    """A batch of videos, and all it takes to make them again."""

    video: UInt8[np.ndarray, "b f h2 w2 3"]
    latents: Float[np.ndarray, "b t h w c"]  # scaled; the padding frame of 1.5 is dropped
    request: Resolved
    # By phase: load, text, image, compile, denoise, decode.
    seconds: dict[str, float] = field(default_factory=dict)


def generate(
    models: Models,
    request: Request,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Result:
    """Makes the request's videos. Noise is drawn from the seeds unless given. `on_step` is called
    between slabs of the loop, and raising in it cancels; `on_latents` before decoding starts.
    Raises ValueError for what the network can't compute."""
    watch = Stopwatch()
    prepared = prepare(models, request, noise)
    latents = _sample(models, prepared, on_step, watch)
    if on_latents is not None:
        on_latents(latents, prepared.request)
    return Result(
        decode(models, latents, watch, prepared.phases), latents, prepared.request, watch.seconds
    )


class Prepared(NamedTuple):
    """A request with all of it done that needs no weights."""

    request: Resolved
    phases: Phases
    noise: Noise
    words: UInt32[np.ndarray, "b 2"]
    pixels: Float[np.ndarray, "b 1 h w 3"]
    ids: Int[np.ndarray, "pairs p"]  # negative prompts first, where guided


def prepare(models: Models, request: Request, noise: Noise | None = None) -> Prepared:
    """Every check there is, before anything slow begins. Raises ValueError as `generate` does."""
    resolved = request.resolve(models.config)
    videos = resolved.videos
    phases = phases_of(models, resolved)
    noise = noise or Noise()
    if not phases.rows.noise.any():
        noise = dataclasses.replace(noise, steps=None)  # ddim reads none
    noise = noise.check(phases.shape, len(videos), resolved.num_inference_steps)
    if models.vae_tiling:
        sides(models.config.vae, encodes=False)
    else:
        phases.strips(phases.shape.height, phases.shape.width)
    words = streams.seed_words([video.seed for video in videos])
    images = [
        fit_image(read_image(video.image), resolved.height, resolved.width, resolved.fit)
        for video in videos
    ]
    prompts = [video.prompt for video in videos]
    ids = tokens(
        models.config,
        models.folder,
        [video.negative_prompt for video in videos] + prompts if resolved.guided else prompts,
    )
    return Prepared(resolved, phases, noise, words, np.stack(images)[:, None], ids)


def _sample(
    models: Models, prepared: Prepared, on_step: OnStep | None, watch: Stopwatch
) -> Float[np.ndarray, "b t h w c"]:
    """A prepared request's final latents, scaled, without padding."""
    with watch("denoise"):
        prepared = prepared._replace(noise=_noise(prepared))
    phases, noise = prepared.phases, prepared.noise
    slab = prepared.request.num_inference_steps if on_step is None else 1
    with ThreadPoolExecutor(1) as background:
        ahead = background.submit(
            _get_ready,
            models,
            phases,
            phases.loop(len(prepared.words), slab, noise.of_slab(0, slab)),
        )
        given = condition(models, prepared, watch)
        with watch("compile"):
            ahead.result()
    return fetch(denoise(models, prepared, given, slab, on_step, watch))[:, phases.shape.padding :]


class Conditions(NamedTuple):
    """What the loop is given beside noise, on the devices."""

    text: Float[Any, "pairs p d"]
    moments: Float[Any, "b 1 h w c2"]  # of the image; the loop has no use for them
    image: Float[Any, "b t h w c"]
    shifts: Any


def condition(models: Models, prepared: Prepared, watch: Stopwatch) -> Conditions:
    """The text's and the image's encoding, and what the timesteps decide."""
    phases, words = prepared.phases, put(prepared.words, split(prepared.phases.mesh))
    text = run(models, phases, watch, "text", phases.text(prepared.ids))
    moments = encode(models, prepared.pixels, watch, phases)
    image = run(
        models, phases, watch, "image", phases.image(moments, prepared.noise.posterior, words)
    )
    return Conditions(text, moments, image, run(models, phases, watch, "denoise", phases.shifts()))


def denoise(
    models: Models,
    prepared: Prepared,
    given: Conditions,
    slab: int,
    on_step: OnStep | None,
    watch: Stopwatch,
) -> Any:
    """The final latents on the devices, padding included; `on_step` is called after every `slab`
    steps."""
    request, phases, noise, *_ = prepared
    words, steps = put(prepared.words, split(phases.mesh)), request.num_inference_steps
    carry = run(models, phases, watch, "denoise", phases.start(noise.initial, words))
    constant = (words, given.image, given.text, phases.positions())

    def call(first: int) -> Call:
        return phases.denoise(
            carry,
            first,
            phases.rows,
            given.shifts,
            noise.of_slab(first, slab),
            *constant,
            slab=slab,
        )

    loop = ready(models, phases, watch, call(0))
    for first in range(0, steps, slab):
        with watch("denoise"):
            carry = jax.block_until_ready(loop(*call(first).args))
        if on_step is not None:
            on_step(first + slab, steps, carry[0])
    return carry[0]


def _noise(prepared: Prepared) -> Noise:
    """What was given, and the rest of torch's stream where the request means that; what is None
    still the devices draw."""
    request, phases, given, *_ = prepared
    if request.noise != "torch":
        return given
    counts = draws(phases.config.scheduler, request.scheduler, request.num_inference_steps)
    drawn = streams.draw_as_torch(
        [video.seed for video in request.videos], phases.dtype, phases.shape[:4], counts
    )
    return Noise(
        *(
            own if array is None else array
            for own, array in zip(drawn, vars(given).values(), strict=True)
        )
    )


def _get_ready(models: Models, phases: Phases, call: Call) -> None:
    """Compiles a program ahead of its phase, and loads its network if that fits beside what others
    still need."""
    assert call.piece
    models.piece(
        call.piece, phases.network(call.piece), workspace(call.compile(phases)), ahead=True
    )


def ready(models: Models, place: Place, watch: Stopwatch, call: Call) -> Callable[..., Any]:
    """A program with its network, which is loaded when it is known what else the devices must hold:
    a function of the call's arguments."""
    with watch("compile"):
        executable = call.compile(place)
    if call.piece is None:
        return executable
    with watch("load"):
        return partial(
            executable, models.piece(call.piece, place.network(call.piece), workspace(executable))
        )


def run(models: Models, place: Place, watch: Stopwatch, phase: str, call: Call) -> Any:
    """A program's results, when they are there."""
    program = ready(models, place, watch, call)
    with watch(phase):
        return jax.block_until_ready(program(*call.args))


def encode(
    models: Models, pixels: Float[Any, "b 1 h w 3"], watch: Stopwatch, place: Place
) -> Float[Any, "b 1 h2 w2 c"]:
    """Pixels in [-1, 1] to the moments of their latents."""

    def network(pixels: Float[Any, "b 1 h w 3"]) -> Float[Any, "b 1 h2 w2 c"]:
        return run(models, place, watch, "image", place.moments(pixels))

    return (
        encode_tiled(network, pixels, models.config.vae) if models.vae_tiling else network(pixels)
    )


def decode(
    models: Models,
    latents: Float[Any, "b t h w c"],
    watch: Stopwatch | None = None,
    place: Place | None = None,
) -> UInt8[np.ndarray, "b f h2 w2 3"]:
    """Scaled latents to frames: 4 (t - 1) + 1 of them where t is odd, 4 t where it is even."""
    watch, place = (
        watch or Stopwatch(),
        place or Place(*_where(models, videos=len(latents), guided=True)),
    )
    latents = np.asarray(latents, np.float32)
    videos = []
    # A decoder is the hungriest program of all.
    for first in range(0, len(latents), side_by_side := place.mesh.shape["data"]):
        video = decode_part(models, latents[first : first + side_by_side], watch, place)
        videos.append(fetch(run(models, place, watch, "decode", place.to_bytes(video))))
    return np.concatenate(videos)


def decode_part(
    models: Models, latents: Float[Any, "b t h w c"], watch: Stopwatch, place: Place
) -> Float[Any, "b f h2 w2 3"]:
    """As many videos as the mesh takes side by side, in [-1, 1] or a little beyond, on the
    devices."""

    def network(latents: Float[Any, "b t h w c"]) -> Float[Any, "b f h2 w2 3"]:
        return run(models, place, watch, "decode", place.decode(latents))

    return (
        decode_tiled(network, latents, models.config.vae) if models.vae_tiling else network(latents)
    )


def phases_of(models: Models, request: Resolved) -> Phases:
    """A request's programs on this machine."""
    return Phases(*_where(models, len(request.videos), request.guided), request, models.attention)


def videos_at_once(models: Models, request: Request) -> int:
    """How many of a request's videos the mesh for all of them makes side by side. Raises ValueError
    as `generate` does."""
    return phases_of(models, request.resolve(models.config)).mesh.shape["data"]


def _where(
    models: Models, videos: int, guided: bool
) -> tuple[CheckpointConfig, jnp.dtype, Mesh, int]:
    """A checkpoint's place on this machine."""
    memory = memory_limit()
    mesh = mesh_for(models.config, models.dtype, models.mesh, videos, guided, jax.devices(), memory)
    return models.config, models.dtype, mesh, memory


def tokens(
    config: CheckpointConfig, folder: Path, prompts: Sequence[str]
) -> Int[np.ndarray, "b p"]:
    """Token ids by the tokenizer of a checkpoint's folder. Raises ValueError for a prompt that the
    network has no positions for; where it has, the rest of it is cut off with a warning."""
    length = config.transformer.max_text_seq_length
    ids, counts = tokenize(folder / "tokenizer", prompts, length)
    for prompt, count in zip(prompts, counts, strict=True):
        what = f"prompt must be at most {length} tokens for {config.title}, its end mark included: got {count} in {prompt!r}"
        if count > length and config.transformer.use_learned_positional_embeddings:
            raise ValueError(what)
        if count > length:
            warnings.warn(f"{what}; the rest is cut off", stacklevel=4)
    return ids
