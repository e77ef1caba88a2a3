"""What the stages are compiled for, and the session that runs them: it loads the network of a
stage, compiles, and keeps the clock. `benchmarks/tpu_compile.py` compiles the same programs from
shapes alone, for machines that are not there."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ..config import CheckpointConfig
from ..devices import compiler_options
from ..devices.compiling import Program, Stopwatch, jax_defaults, workspace
from ..devices.mesh import GUIDED, choose_sizes, make_mesh, spatial, work_of
from ..devices.sharding import AXES, Layout, put, split
from ..models.attention import choose, resolve
from ..models.positions import Positions, positions, sinusoid, token_count
from ..models.vae import strips_within
from ..request import LatentShape, Resolved
from ..weights.checkpoint import Models
from ..weights.lora import Ranks
from ..weights.pieces import (
    bytes_per_device,
    can_replicate,
    memory_limit,
    piece,
    shard_piece,
    shardings,
)
from . import stages
from .low_pass import low_pass_matrix
from .schedule import Guidance, Tableau, loop_shifts, tableau

SPARE = 0.94  # of a device's memory that an estimate may fill
LONG = 8192  # tokens from which one sequence keeps a device's matrix units busy
WRAPPED = (
    4  # latent frames of a loop that are decoded once more in front of the first, an even number
)
OFS = 2.0  # the constant conditioning value of the 1.5 network


class Stage(NamedTuple):
    """How a function of stages.py is run."""

    name: str  # text, image, denoise or decode: in the stopwatch, --plan and benchmarks
    piece: str | None  # of `pieces.PIECES`: the network that it gets as its first argument
    program: Program


STAGES: dict[Callable[..., Any], Stage] = {
    stages.encode_text: Stage("text", "text_encoder", Program(stages.encode_text)),
    stages.add_noise: Stage("image", None, Program(stages.add_noise)),
    stages.encode_image: Stage("image", "vae", Program(stages.encode_image)),
    stages.draw_image: Stage("image", None, Program(stages.draw_image)),
    stages.place_image: Stage("image", None, Program(stages.place_image)),
    stages.low_pass: Stage("image", None, Program(stages.low_pass)),
    stages.modulate: Stage("denoise", "modulation", Program(stages.modulate)),
    stages.draw_start: Stage("denoise", None, Program(stages.draw_start)),
    stages.start_from_clip: Stage("denoise", None, Program(stages.start_from_clip)),
    stages.denoise: Stage("denoise", "transformer", Program(stages.denoise, loop=True)),
    stages.decode: Stage(
        "decode", "vae", Program(stages.decode, out_shardings=stages.decoded_sharding)
    ),
    stages.to_bytes: Stage("decode", None, Program(stages.to_bytes)),
}


def mesh_for(
    config: CheckpointConfig,
    dtype: jnp.dtype,
    text: str,
    videos: int,
    guided: bool,
    devices: Sequence[Any],
    memory: int,
) -> Mesh:
    """The mesh asked for, or ("auto") the best one, for a request of so many videos. Raises
    ValueError as `choose_sizes` does."""
    networks = {"text_encoder": piece(config, "text_encoder", dtype)}
    transformer = piece(config, "transformer", dtype)
    if not can_replicate(transformer, memory):
        networks["transformer"] = transformer
    return make_mesh(
        choose_sizes(text, work_of(config, networks, videos, guided), devices), devices
    )


def this_machine(models: Models, videos: int, guided: bool) -> tuple[Mesh, int]:
    """(the mesh for so many videos on the devices of this machine, or of all processes; the bytes
    of a device). Raises ValueError as `mesh_for` does."""
    memory, devices = memory_limit(), jax.devices()
    work = models.config, models.dtype, models.mesh, videos, guided
    return mesh_for(*work, devices, memory), memory


class Call(NamedTuple):
    """A stage with its arguments, or with shapes in their place: what its program is compiled
    for."""

    stage: Stage
    args: tuple[Any, ...]  # the shapes of its network first, if it has one
    static: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        return self.stage.program.lower(*self.args, **self.static)

    def compile(self) -> jax.stages.Compiled:
        return self.stage.program.compile(*self.args, **self.static)


@dataclass(frozen=True)
class Target:
    """What programs are compiled for: a checkpoint on a mesh whose devices have `memory` bytes
    each. Enough to decode latents."""

    config: CheckpointConfig
    dtype: jnp.dtype
    mesh: Mesh
    memory: int
    ranks: Ranks = field(default=(), kw_only=True)  # of branches beside int8 kernels, for LoRAs

    def network(self, name: str) -> nnx.Module:
        """The shapes and shardings of a piece."""
        return shard_piece(self.config, name, self.dtype, self.mesh, self.memory, self.ranks)

    def call(self, function: Callable[..., Any], *args: Any, **static: Any) -> Call:
        """A function of stages.py with its arguments. The target adds the network, and of the
        static arguments mesh and layout."""
        stage = STAGES[function]
        network = () if stage.piece is None else (self.network(stage.piece),)
        for name in {"mesh", "layout"} & {*stage.program.static}:
            static[name] = getattr(self, name)
        return Call(stage, (*network, *args), static)

    def strips(self, rows: int, columns: int) -> int:
        """The strips in which a device decodes latents of this size; one where several devices
        share a frame. Raises ValueError where it does not fit in any number of strips."""
        grid = spatial(self.mesh, rows, columns)
        if grid.shape["rows"] * grid.shape["columns"] > 1:
            return 1
        room = SPARE * self.memory - bytes_per_device(self.network("vae"))
        return strips_within(int(room), self.config.vae, rows, columns, self.dtype.itemsize)

    def report(self) -> list[str]:
        """What was chosen for this machine, as lines to print."""
        kind = self.mesh.devices.flat[0].device_kind
        sizes = ",".join(f"{axis}={self.mesh.shape[axis]}" for axis in AXES)
        lines = [f"mesh: {sizes} on {self.mesh.size} of {jax.device_count()} x {kind}"]
        lines += compiler_options.report(kind)
        if self.config.int8:
            lines.append(f"int8 weights: in the blocks of {' and '.join(self.config.int8)}")
        return lines


@dataclass(frozen=True)
class RequestTarget(Target):
    """What the programs of a request are compiled for."""

    request: Resolved
    attention: str

    @cached_property
    def shape(self) -> LatentShape:
        return self.request.latent_shape(self.config)

    @cached_property
    def tableau(self) -> Tableau:
        """As many rows as the request has steps, so that `strength` is data: those that are left
        out are like the first one that is run. Raises ValueError for a schedule that does not
        exist."""
        r = self.request
        rows = tableau(
            self.config.scheduler,
            r.scheduler,
            r.num_inference_steps,
            r.guidance_scale,
            r.use_dynamic_cfg,
            motion=r.motion,
            guidance_interval=r.guidance_interval,
            guidance_skip=r.guidance_skip,
            image_guidance=r.image_guidance,
            first=r.first_step,
        )
        return Tableau(*(np.concatenate([c[:1]] * r.first_step + [c]) for c in rows))

    @property
    def steps(self) -> int:
        """Steps that are run."""
        return self.request.num_inference_steps - self.request.first_step

    @property
    def shifts(self) -> Int[np.ndarray, " i"] | None:
        """By how much the latents of a loop are shifted in each step."""
        if not self.request.loop:
            return None
        return loop_shifts(self.shape.frames, self.request.num_inference_steps)

    @property
    def guidance(self) -> Guidance:
        """What the loop computes. It skips nothing unless the request says so, since that is
        another program, nor where the pair is on several devices, which would save nothing."""
        r, rows = self.request, self.tableau
        asked = (
            r.guidance_interval != (0, 1) or r.guidance_skip or isinstance(r.guidance_scale, tuple)
        )
        skips = bool(asked) and r.guided and self.mesh.shape["pair"] == 1
        return Guidance(r.guidance_method, skips, bool((rows.image_guidance != 1).any()))

    @property
    def low_pass(self) -> tuple[Float[np.ndarray, "h h"], Float[np.ndarray, "w w"]] | None:
        """The matrices of the low-passed image, if a step wants it. At most, at motion 1, it is as
        one of a quarter of the height and width."""
        if not self.request.motion:
            return None
        factor = 1 - 0.75 * self.request.motion
        height, width = (low_pass_matrix(side, factor) for side in self.shape[1:3])
        return height, width

    @cached_property
    def layout(self) -> Layout:
        backend = choose(self.attention, self.dtype, self.mesh.devices.flat[0])
        tokens = token_count(self.config.transformer, self.shape[:3])
        network = self.network("transformer")
        replicated = all(sharding.is_fully_replicated for sharding in shardings(network))
        return Layout(self.mesh, backend, tokens, replicated, sequential=tokens >= LONG)

    @property
    def image_scale(self) -> np.float32:
        """What the image's latents are multiplied by."""
        return np.float32(self.request.latent_scale(self.config))

    @property
    def time(self) -> tuple[Float[np.ndarray, "i d"], Float[np.ndarray, "1 e"] | None]:
        """The sinusoids of all timesteps, and of `ofs` for 1.5."""
        network = self.config.transformer
        ofs = sinusoid(np.array([OFS]), network.ofs_embed_dim) if network.ofs_embed_dim else None
        return sinusoid(self.tableau.timestep, network.width), ofs

    def positions(self) -> Positions:
        """The positions of all tokens, on the devices: every step reads them."""
        where = self._positions()
        return jax.tree.map(put, where, self._position_shardings(where))

    def position_shapes(self) -> Positions:
        """The shapes and shardings of `positions`."""
        where = jax.eval_shape(self._positions)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            where,
            self._position_shardings(where),
        )

    def _positions(self) -> Positions:
        return positions(self.config.transformer, self.shape[:3], self.layout.padded)

    def _position_shardings(self, where: Positions) -> Positions:
        """Rotations are applied where a device has whole sequences, modulation where it has its
        part of one."""
        replicated = split(self.mesh)
        table, resize = (
            jax.tree.map(lambda _: replicated, part) for part in (where.table, where.resize)
        )
        return Positions(replicated, replicated, split(self.mesh, "sequence"), table, resize)

    def loop(
        self, videos: int, steps: int, noise: Float[Any, "{steps} b t h w c"] | None = None
    ) -> Call:
        """`stages.denoise` with shapes for its arguments, but for noise that is given."""
        network, pairs = self.config.transformer, self._pairs(videos)
        latents = self._shaped((videos, *self.shape[:4]), jnp.float32, "video")
        text = (pairs, network.max_text_seq_length, network.text_embed_dim)
        text = self._shaped(text, self.dtype, "batch")
        modulate = partial(stages.modulate, mesh=self.mesh)
        with jax_defaults():
            modulation = jax.eval_shape(modulate, self.network("modulation"), *self.time)
        modulation = jax.tree.map(lambda x: self._shaped(x.shape, x.dtype), modulation)
        past = (latents,) * self.tableau.past.shape[1]
        state, keys = stages.State(latents, past), self._keys(videos)
        given = noise, keys, latents, text, self.position_shapes()
        low = latents if self.low_pass else None
        args = (state, np.int32(0), self.tableau, modulation, *given, low, self.shifts)
        return self.call(stages.denoise, *args, steps=steps, guidance=self.guidance)

    def calls(self, name: str, videos: int = 1) -> list[Call]:
        """The programs of a stage (text, image, denoise, decode) for so many videos, with nothing
        but shapes: to be compiled for machines anywhere. Raises ValueError for what no such machine
        can hold."""
        request, vae, shape = self.request, self.config.vae, self.shape
        keys, size = self._keys(videos), (request.height, request.width)
        if name == "text":
            ids = self._pairs(videos), self.config.transformer.max_text_seq_length
            return [self.call(stages.encode_text, np.zeros(ids, np.int32))]
        if name == "image":
            pixels = np.zeros((videos, 1, *size, vae.in_channels), np.float32)
            moments = (videos, 1, *shape[1:3], 2 * shape.channels)
            moments = self._shaped(moments, self.dtype, "video")
            draw = moments, None, keys, self.image_scale
            drawn = self.call(stages.draw_image, *draw, frames=shape.frames)
            image = [self.call(stages.encode_image, pixels), drawn]
            if request.noise_aug:
                image.append(self.call(stages.add_noise, pixels, keys, np.float32(0)))
            latents = self._shaped((videos, *shape[:4]), jnp.float32, "video")
            if request.pictures(self.config):
                given = latents, moments, keys, self.image_scale, np.int32(0)
                image.append(self.call(stages.place_image, *given))
            if self.low_pass:
                image.append(self.call(stages.low_pass, latents, *self.low_pass))
            return image
        if name == "denoise":
            past = self.tableau.past.shape[1]
            start = self.call(stages.draw_start, None, keys, shape=tuple(shape[:4]), past=past)
            loop = self.loop(videos, self.steps)
            return [self.call(stages.modulate, *self.time), start, loop]
        frames = shape.frames - shape.padding + (WRAPPED if request.loop else 0)
        latents = np.zeros((videos, frames, *shape[1:4]), np.float32)
        factor, strips = np.float32(vae.scaling_factor), self.strips(*shape[1:3])
        grid = split(spatial(self.mesh, *shape[1:3]), "video", None, "rows", "columns")
        decoded = (videos, vae.decoded_frames(frames), *size, vae.out_channels)
        video = jax.ShapeDtypeStruct(decoded, self.dtype, sharding=grid)
        decoded = self.call(stages.decode, latents, factor, strips=strips)
        return [decoded, self.call(stages.to_bytes, video)]

    def _pairs(self, videos: int) -> int:
        return (GUIDED if self.request.guided else 1) * videos

    def _keys(self, videos: int) -> jax.ShapeDtypeStruct:
        return self._shaped((videos, 2), np.uint32)

    def _shaped(self, shape: tuple[int, ...], dtype: Any, *axes: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split(self.mesh, *axes))

    def report(self) -> list[str]:
        name = resolve(self.attention, self.dtype, self.mesh.devices.flat[0])
        sequence = f"{self.layout.tokens} tokens padded to {self.layout.padded}"
        gathered = "" if self.layout.replicated else ", weights gathered a layer at a time"
        return [*super().report(), f"attention: {name}, {sequence}{gathered}"]


class Session:
    """Runs stages on a target: `session(stages.encode_text, ids)`. Weights stay on the devices
    until another stage needs the room, executables as long as the process."""

    def __init__(self, models: Models, target: Target, clock: Stopwatch | None = None):
        self.models, self.target, self.clock = models, target, clock or Stopwatch()
        self._last: tuple[Any, ...] = ()  # program and network of the last stage that has a network

    def __call__(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """The results of a stage, once they are computed."""
        stage, shapes, static = self.target.call(function, *args, **static)
        with self.clock("compile"):
            program = stage.program.compile(*shapes, **static)
        with self.clock("load"):
            network = () if stage.piece is None else (self._network(stage.piece, program),)
        with self.clock(stage.name):
            return jax.block_until_ready(program(*network, *args))

    @contextmanager
    def ahead(self, call: Call) -> Iterator[None]:
        """Meanwhile, in another thread: compiles a stage, and loads its network if that fits beside
        what is loaded."""

        def prepare() -> None:
            program = call.stage.program.compile(*call.args, **call.static)
            if call.stage.piece is not None:
                self._load(call.stage.piece, program, ahead=True)

        with ThreadPoolExecutor(1) as thread:
            ready = thread.submit(prepare)
            yield
            with self.clock("compile"):
                ready.result()

    def _network(self, name: str, program: jax.stages.Compiled) -> Any:
        if self._last[:1] != (program,):  # equal in every step of the loop
            self._last = ()  # frees its network, if another stage needs the room
            self._last = program, self._load(name, program)
        return self._last[1]

    def _load(self, name: str, program: jax.stages.Compiled, ahead: bool = False) -> Any:
        return self.models.piece(name, self.target.network(name), workspace(program), ahead)
