"""Attention of queries and keys that have yet to be turned (norm, rotation), from the flat layout,
where a token's heads lie side by side, into the same. A backend is a row of BACKENDS; models get
one by way of `sharding.Layout`. Keys from `tokens` on only even a sequence out, and have no
weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

from .. import config
from ..kernels.heads import LANES, merge_heads, split_heads, turn_heads
from .layers import LayerNorm, precision
from .positions import Positions

# Queries are taken in slices whose float32 logits about fit a CPU's cache (16 MiB), but of no fewer
# rows than fill a matrix unit.
LOGITS = 4 * 2**20
ROWS = 128


def xla(
    q: Float[Array, "b s n k"],
    k: Float[Array, "b s2 n k"],
    v: Float[Array, "b s2 n k"],
    tokens: int,
) -> Float[Array, "b s n k"]:
    """Plain attention in slices of queries, which keeps memory linear in the sequence; for every
    device. Softmax and sums are float32."""
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k[:, :tokens], v[:, :tokens]))
    b, n, s, width = q.shape
    rows = min(s, max(ROWS, LOGITS // (b * n * s)))
    slices = -(-s // rows)
    rows = -(-s // slices)  # even slices, so that padding is less than a row each
    q = jnp.pad(q, _after(4, 2, slices * rows - s)).reshape(b, n, slices, rows, width)
    out = lax.map(partial(_rows, k=k, v=v), jnp.moveaxis(q, 2, 0))
    return rearrange(out, "slices b n rows k -> b (slices rows) n k")[:, :s]


def _rows(
    q: Float[Array, "b n q k"], k: Float[Array, "b n s k"], v: Float[Array, "b n s k"]
) -> Float[Array, "b n q k"]:
    exact = precision(q.dtype)
    logits = (
        jnp.einsum("bnqk,bnsk->bnqs", q, k, precision=exact, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    out = jnp.einsum(
        "bnqs,bnsk->bnqk",
        weights.astype(v.dtype),
        v,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def cudnn(
    q: Float[Array, "b s n k"],
    k: Float[Array, "b s2 n k"],
    v: Float[Array, "b s2 n k"],
    tokens: int,
) -> Float[Array, "b s n k"]:
    """NVIDIA's fused kernel; bfloat16 only."""
    return jax.nn.dot_product_attention(q, k[:, :tokens], v[:, :tokens], implementation="cudnn")


class Tile(NamedTuple):
    """What the TPU kernel holds on the chip: so many rows of queries, and of keys, which it takes a
    few at once. Near enough: a sequence is cut evenly."""

    queries: int
    keys: int
    at_once: int


# What the compiler schedules fastest at 17,776 tokens, by generation. The library's own tiles of
# 128 leave the matrix unit idle most of the time; more keys at once than here don't fit the
# registers, more in all don't fit the memory. v4 has little of it.
TILES = {
    "v4": Tile(1280, 1792, 896),
    "v5e": Tile(1280, 8960, 896),
    "v5p": Tile(1280, 3584, 896),
    "v6e": Tile(1792, 8960, 1792),
}
# What the compiler's schedules say of other tiles: a step over a block of keys takes the time of so
# many more rows of them, and a tile of half the size is slower by this share.
STEP, SMALL = 200, 0.07
FAR = -1e30  # a logit whose weight is zero


@dataclass(frozen=True)
class Backend:
    """A kernel for one device that takes queries and keys as they are turned here, by plain
    operations in float32. Every part of a split sequence has a multiple of `unit` rows."""

    kernel: Callable[..., Float[Array, "b s n k"]]
    unit: int = 1

    def rows(self, tokens: int, parts: int) -> int:
        """The length that a sequence in so many parts is best evened out to."""
        return even(tokens, self.unit * parts)

    def __call__(
        self,
        q: Float[Array, "b s d"],
        k: Float[Array, "b s d"],
        v: Float[Array, "b s d"],
        norms: tuple[LayerNorm, LayerNorm],  # of a head's queries and of its keys
        positions: Positions,
        tokens: int,
    ) -> Float[Array, "b s d"]:
        q, k, v = (
            rearrange(x, "b s (n k) -> b s n k", k=norms[0].scale.shape[0]) for x in (q, k, v)
        )
        q, k = (
            rotate(norm(x), positions).astype(x.dtype)
            for norm, x in zip(norms, (q, k), strict=True)
        )
        return rearrange(self.kernel(q, k, v, tokens), "b s n k -> b s (n k)")


def rotate(x: Float[Array, "b s n k"], positions: Positions) -> Float[Array, "b s n k"]:
    """Turns channel i with channel i + k/2 by the token's angle, in float32."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = positions.cos[:, None], positions.sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass(frozen=True)
class Splash:
    """jax's TPU kernel, a tile of logits at a time, after our own for norm and rotation. What evens
    a sequence out is told apart by one more channel, of ones for queries and of zeros for real
    keys: free, since a head's 64 channels take 128 lanes."""

    tile: Tile
    interpret: bool = False

    def rows(self, tokens: int, parts: int) -> int:
        return even(fitted(self.tile, tokens)[1], parts)

    def __call__(
        self,
        q: Float[Array, "b s d"],
        k: Float[Array, "b s d"],
        v: Float[Array, "b s d"],
        norms: tuple[LayerNorm, LayerNorm],
        positions: Positions,
        tokens: int,
    ) -> Float[Array, "b s d"]:
        given, width = q.shape[1], norms[0].scale.shape[0]
        tile, rows = fitted(self.tile, tokens)
        # More than there are keys where a mesh evens out further.
        queries = -(-given // tile.queries) * tile.queries
        q, k, v = (jnp.pad(x, _after(3, 1, queries - given)) for x in (q, k, v))
        cos, sin = (
            jnp.pad(x, _after(2, 0, queries - given)) for x in (positions.cos, positions.sin)
        )
        of_step: Any = {"rows": tile.queries, "interpret": self.interpret}
        norm_of: Any = {"precision": precision, **of_step}
        far = jnp.where(jnp.arange(queries) < tokens, 0.0, FAR)
        q, k = (
            turn_heads(
                x,
                norm.scale[...],
                norm.bias[...],
                cos,
                sin,
                last,
                epsilon=norm.epsilon,
                factor=factor,
                **norm_of,
            )
            for x, norm, last, factor in zip(
                (q, k), norms, (jnp.ones(queries), far), (width**-0.5, 1.0), strict=True
            )
        )
        v = split_heads(v, width, **of_step)
        mask = splash_mask.MultiHeadMask([splash_mask.FullMask((queries, rows))] * v.shape[1])
        sizes = splash_kernel.BlockSizes(
            block_q=tile.queries, block_kv=tile.keys, block_kv_compute=tile.at_once
        )
        attend: Any = splash_kernel.make_splash_mha_single_device(
            mask, block_sizes=sizes, interpret=self.interpret
        )
        return merge_heads(jax.vmap(attend)(q, k[:, :, :rows], v[:, :, :rows]), **of_step)[
            :, :given
        ]


def _after(axes: int, axis: int, count: int) -> list[tuple[int, int]]:
    """`jnp.pad`'s widths for the end of one axis."""
    return [(0, count if axis == which else 0) for which in range(axes)]


def even(count: int, unit: int) -> int:
    """The next multiple."""
    return math.ceil(count / unit) * unit


def fitted(wanted: Tile, tokens: int) -> tuple[Tile, int]:
    """(the quickest tile no larger than the wanted one, rows of a sequence that it evens out)."""

    def sizes(most: int) -> range:
        return range(LANES, even(most, LANES) + LANES, LANES)

    def cost(tile: Tile) -> float:
        rows = even(tokens, math.lcm(tile.queries, tile.keys))
        small = wanted.at_once / tile.at_once + wanted.queries / tile.queries
        return rows**2 * (1 + STEP / tile.keys + SMALL * small)

    groups = range(1, wanted.keys // wanted.at_once + 1)
    tiles = (
        Tile(queries, group * once, once)
        for queries in sizes(wanted.queries)
        for group in groups
        for once in sizes(wanted.at_once)
    )
    tile = min(tiles, key=cost)
    return tile, even(tokens, math.lcm(tile.queries, tile.keys))


def tokamax(
    q: Float[Array, "b s n k"],
    k: Float[Array, "b s2 n k"],
    v: Float[Array, "b s2 n k"],
    tokens: int,
) -> Float[Array, "b s n k"]:
    """The tokamax library's kernels for NVIDIA devices: Mosaic where it has one for the device,
    else Triton."""
    from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]

    return dot_product_attention(
        q, k[:, :tokens], v[:, :tokens], implementation=("mosaic_gpu", "triton")
    )


# XLA evens the rows of every bfloat16 product of an NVIDIA device out to this, by a copy before and
# one after it.
UNIT = 8
BACKENDS: dict[str, Backend | Splash] = {
    "xla": Backend(xla),
    "cudnn": Backend(cudnn, UNIT),
    "splash": Splash(TILES["v5e"]),
    "tokamax": Backend(tokamax, UNIT),
}
# And bfloat16: their float32 is not float32.
NEEDS = {"cudnn": "gpu", "splash": "tpu", "tokamax": "gpu"}
FASTEST = {"gpu": "cudnn", "tpu": "splash"}


def resolved(name: str, dtype: jnp.dtype, device: Any) -> str:
    """The name that `auto` stands for."""
    fastest = FASTEST.get(device.platform, "xla") if dtype == jnp.bfloat16 else "xla"
    return fastest if name == "auto" else name


def choose(name: str, dtype: jnp.dtype, device: Any = None) -> Backend | Splash:
    """A backend by name; `auto` takes the fastest that computes `dtype` on the device, or on the
    default one. Raises ValueError for a name that is unknown or no good there."""
    device = jax.devices()[0] if device is None else device
    name = resolved(name, dtype, device)
    if name not in BACKENDS:
        raise ValueError(f"attention must be auto, {', '.join(BACKENDS)}: got {name!r}")
    if name in NEEDS and (device.platform, dtype) != (NEEDS[name], jnp.bfloat16):
        what = f"attention {name} must have bfloat16 on a {NEEDS[name].upper()}"
        raise ValueError(f"{what}: got {dtype} on {device.device_kind}; auto or xla will do")
    if name == "tokamax" and not find_spec("tokamax"):
        raise ValueError("attention tokamax must have its library: pip install tokamax")
    backend = BACKENDS[name]
    if isinstance(backend, Splash):
        kinds = {
            generation["kind"]: name for name, generation in config.meshes()["generations"].items()
        }
        backend = replace(backend, tile=TILES.get(kinds.get(device.device_kind, ""), backend.tile))
    return backend
