"""What runs on the devices: a compiled program for each phase, and all that one is compiled for.
The pipeline calls them with weights and values, `benchmarks/tpu_compile.py` with shapes alone, for
machines that are not there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, UInt32

from ..config import CheckpointConfig
from ..devices import compiler_options
from ..devices.compiling import Program
from ..devices.mesh import GUIDED, choose_sizes, make_mesh, spatial, work_of
from ..devices.sharding import AXES, Layout, put, split
from ..models.attention import choose, resolved
from ..models.positions import Positions, positions, sinusoid, token_count
from ..models.vae import strips_within
from ..request import LatentShape, Resolved
from ..weights.pieces import bytes_per_device, fits_whole, piece, placed, places
from .schedule import Tableau, tableau
from .stages import (
    OFS,
    decode_latents,
    denoise,
    draw_image,
    draw_start,
    encode_image,
    encode_text,
    modulate,
    to_bytes,
)

SPARE = 0.9  # of a device's memory: what an estimate may fill
LONG = 8192  # tokens from which one sequence keeps a device's matrix units busy


def frames_lie(mesh: Mesh, **_: Any) -> NamedSharding:
    """A pin would do but for a TPU's compiler, which then hands 60x90 latents' video over in other
    parts than those of the mesh."""
    return split(mesh, "video", None, "rows", "columns")


TEXT = Program(encode_text, static=("mesh",))
MOMENTS = Program(encode_image, static=("mesh",))
IMAGE = Program(draw_image, static=("frames", "mesh"))
SHIFTS = Program(modulate, static=("mesh",))
START = Program(draw_start, static=("shape", "mesh"))
DENOISE = Program(denoise, static=("slab", "layout"), loop=True)
DECODE = Program(decode_latents, static=("strips", "mesh"), lies=frames_lie)
BYTES = Program(to_bytes, static=("mesh",))


class Call(NamedTuple):
    """A program with its arguments, or with their shapes. The network that comes first is asked for
    by its name in `checkpoint.PIECES`."""

    program: Program
    piece: str | None
    args: tuple[Any, ...]
    static: dict[str, Any]

    def compile(self, place: "Place") -> Any:
        """The executable, from the network's shapes alone."""
        return self.program.compile(*self._network(place), *self.args, **self.static)

    def lower(self, place: "Place") -> jax.stages.Lowered:
        """The program as XLA is given it."""
        return self.program.lower(*self._network(place), *self.args, **self.static)

    def _network(self, place: "Place") -> tuple[nnx.Module, ...]:
        return () if self.piece is None else (place.network(self.piece),)


def mesh_for(
    config: CheckpointConfig,
    dtype: jnp.dtype,
    text: str,
    videos: int,
    guided: bool,
    devices: Sequence[Any],
    memory: int,
) -> Mesh:
    """The mesh asked for, or ("auto") the one that suits a request for so many videos. Raises
    ValueError as `choose_sizes` does."""
    networks = {"text_encoder": piece(config, "text_encoder", dtype)}
    if not fits_whole(transformer := piece(config, "transformer", dtype), memory):
        networks["transformer"] = transformer
    return make_mesh(
        choose_sizes(text, work_of(config, networks, videos, guided), devices), devices
    )


@dataclass(frozen=True)
class Place:
    """A checkpoint on a mesh whose devices have `memory` bytes each."""

    config: CheckpointConfig
    dtype: jnp.dtype
    mesh: Mesh
    memory: int

    def report(self) -> list[str]:
        """What was chosen for this machine, as lines to print."""
        first = self.mesh.devices.flat[0]
        sizes = ",".join(f"{axis}={self.mesh.shape[axis]}" for axis in AXES)
        mesh = f"mesh: {sizes} on {self.mesh.size} of {jax.device_count()} x {first.device_kind}"
        int8 = (
            [f"int8 weights: in the blocks of {' and '.join(self.config.int8)}"]
            if self.config.int8
            else []
        )
        return [mesh, *compiler_options.report(first.device_kind), *int8]

    def network(self, name: str) -> nnx.Module:
        """A piece's shapes, and where they lie."""
        return placed(self.config, name, self.dtype, self.mesh, self.memory)

    def moments(self, pixels: Float[Any, "b 1 h w 3"]) -> Call:
        ratio = self.config.vae.spatial_ratio
        rows, columns = (side // ratio for side in pixels.shape[2:4])
        return Call(MOMENTS, "vae", (pixels,), {"mesh": spatial(self.mesh, rows, columns)})

    def decode(self, latents: Float[Any, "b t h w c"]) -> Call:
        """Of scaled latents without padding."""
        strips, mesh = self.strips(*latents.shape[2:4]), spatial(self.mesh, *latents.shape[2:4])
        factor = np.float32(self.config.vae.scaling_factor)
        return Call(DECODE, "vae", (latents, factor), {"strips": strips, "mesh": mesh})

    def strips(self, rows: int, columns: int) -> int:
        """In how many strips a device decodes: one where several share the picture. Raises
        ValueError where it doesn't fit in any."""
        view = spatial(self.mesh, rows, columns)
        if view.shape["rows"] * view.shape["columns"] > 1:
            return 1
        room = SPARE * self.memory - bytes_per_device(self.network("vae"))
        return strips_within(int(room), self.config.vae, rows, columns, self.dtype.itemsize)

    def to_bytes(self, video: Float[Any, "b f h w 3"]) -> Call:
        return Call(BYTES, None, (video,), {"mesh": self.mesh})


@dataclass(frozen=True)
class Phases(Place):
    """What a request's programs are compiled for."""

    request: Resolved
    attention: str

    def report(self) -> list[str]:
        split_up = "" if self.layout.whole else ", weights split and gathered a layer at a time"
        name = resolved(self.attention, self.dtype, self.mesh.devices.flat[0])
        return [
            *super().report(),
            f"attention: {name}, {self.layout.tokens} tokens evened out to {self.layout.padded}{split_up}",
        ]

    @cached_property
    def shape(self) -> LatentShape:
        return self.request.latent_shape(self.config)

    @cached_property
    def rows(self) -> Tableau:
        """Raises ValueError for a schedule that does not exist."""
        r = self.request
        return tableau(
            self.config.scheduler,
            r.scheduler,
            r.num_inference_steps,
            r.guidance_scale,
            r.use_dynamic_cfg,
        )

    @cached_property
    def layout(self) -> Layout:
        backend = choose(self.attention, self.dtype, self.mesh.devices.flat[0])
        tokens = token_count(self.config.transformer, self.shape[:3])
        whole = all(place.is_fully_replicated for place in places(self.network("transformer")))
        return Layout(self.mesh, backend, tokens, whole, turns=tokens >= LONG)

    def text(self, ids: Int[Any, "pairs p"]) -> Call:
        return Call(TEXT, "text_encoder", (ids,), {"mesh": self.mesh})

    def image(
        self,
        moments: Float[Any, "b 1 h w c2"],
        noise: Float[Any, "b 1 h w c"] | None,
        words: UInt32[Any, "b 2"],
    ) -> Call:
        scale = np.float32(self.request.latent_scale(self.config))
        return Call(
            IMAGE,
            None,
            (moments, noise, words, scale),
            {"frames": self.shape.frames, "mesh": self.mesh},
        )

    def shifts(self) -> Call:
        network = self.config.transformer
        ofs = sinusoid(np.array([OFS]), network.ofs_embed_dim) if network.ofs_embed_dim else None
        return Call(
            SHIFTS,
            "modulation",
            (sinusoid(self.rows.timestep, network.width), ofs),
            {"mesh": self.mesh},
        )

    def start(self, noise: Float[Any, "b t h w c"] | None, words: UInt32[Any, "b 2"]) -> Call:
        return Call(
            START, None, (noise, words), {"shape": tuple(self.shape[:4]), "mesh": self.mesh}
        )

    def denoise(
        self,
        carry: Any,
        first: int,
        rows: Tableau,
        shifts: Any,
        noise: Any,
        words: Any,
        image: Any,
        text: Any,
        where: Any,
        slab: int,
    ) -> Call:
        args = (carry, np.int32(first), rows, shifts, noise, words, image, text, where)
        return Call(DENOISE, "transformer", args, {"slab": slab, "layout": self.layout})

    def positions(self) -> Positions:
        """Every token's place, on the devices: they are read in every step."""
        where = positions(self.config.transformer, self.shape[:3], self.layout.padded)
        return jax.tree.map(put, where, self._places(where))

    def _places(self, where: Positions) -> Positions:
        """Rotations are made where a device has whole sequences; whose modulation a token has is
        asked where it has its part."""
        everywhere, table = split(self.mesh), None if where.table is None else split(self.mesh)
        return Positions(everywhere, everywhere, split(self.mesh, "sequence"), table)

    def loop(
        self, videos: int, slab: int, noise: Float[Any, "{slab} b t h w c"] | None = None
    ) -> Call:
        """`denoise` before its arguments are there, but for noise that is given."""
        network, copies = self.config.transformer, GUIDED if self.request.guided else 1
        image = self._shape((videos, *self.shape[:4]), jnp.float32, "video")
        text = self._shape(
            (copies * videos, network.max_text_seq_length, network.text_embed_dim),
            self.dtype,
            "batch",
        )
        shifts = jax.eval_shape(
            partial(modulate, mesh=self.mesh), self.network("modulation"), *self.shifts().args
        )
        shifts = jax.tree.map(lambda leaf: self._shape(leaf.shape, leaf.dtype), shifts)
        where = jax.eval_shape(lambda: positions(network, self.shape[:3], self.layout.padded))
        where = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            where,
            self._places(where),
        )
        words = self._shape((videos, 2), np.uint32)
        return self.denoise(
            (image, image), 0, self.rows, shifts, noise, words, image, text, where, slab
        )

    def _shape(self, shape: tuple[int, ...], dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split(self.mesh, *axes))

    def calls(self, phase: str, videos: int = 1) -> list[Call]:
        """The programs of a phase ("text", "encode", "denoise", "decode") of a request for so many
        videos, with nothing but shapes: to be compiled, for machines anywhere. Raises ValueError
        for what no such machine can hold."""
        request, vae, shape, words = (
            self.request,
            self.config.vae,
            self.shape,
            self._shape((videos, 2), np.uint32),
        )
        if phase == "text":
            ids = (
                (GUIDED if request.guided else 1) * videos,
                self.config.transformer.max_text_seq_length,
            )
            return [self.text(np.zeros(ids, np.int32))]
        if phase == "encode":
            pixels = np.zeros(
                (videos, 1, request.height, request.width, vae.in_channels), np.float32
            )
            moments = self._shape((videos, 1, *shape[1:3], 2 * shape.channels), self.dtype, "video")
            return [self.moments(pixels), self.image(moments, None, words)]
        if phase == "denoise":
            return [
                self.shifts(),
                self.start(None, words),
                self.loop(videos, request.num_inference_steps),
            ]
        frames = (videos, request.num_frames, request.height, request.width, vae.out_channels)
        video = jax.ShapeDtypeStruct(
            frames, self.dtype, sharding=frames_lie(spatial(self.mesh, *shape[1:3]))
        )
        return [
            self.decode(np.zeros((videos, shape.frames - shape.padding, *shape[1:4]), np.float32)),
            self.to_bytes(video),
        ]
