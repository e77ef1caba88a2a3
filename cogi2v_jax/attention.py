"""Attention behind one call: `attend(q, k, v)`. A backend is a function and a row of BACKENDS; models are handed one and know no other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

from .layers import precision

Attend = Callable[[Float[Array, "b s n k"], Float[Array, "b s n k"], Float[Array, "b s n k"]], Float[Array, "b s n k"]]

# Queries are taken in slices whose float32 logits about fit a CPU's cache (16 MiB), but of no fewer rows than fill a matrix unit.
LOGITS = 4 * 2**20
ROWS = 128


def xla(q: Float[Array, "b s n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Plain attention in slices of queries, which keeps memory linear in the sequence; for every device. Softmax and sums are float32."""
    b, s, n, width = q.shape
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))  # once, and not in every slice
    rows = min(s, max(ROWS, LOGITS // (b * n * s)))
    slices = -(-s // rows)
    rows = -(-s // slices)  # even slices, so that padding is less than a row each
    q = jnp.pad(q, ((0, 0), (0, 0), (0, slices * rows - s), (0, 0))).reshape(b, n, slices, rows, width)
    out = lax.map(partial(_rows, k=k, v=v), jnp.moveaxis(q, 2, 0))
    return jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(b, slices * rows, n, width)[:, :s]


def _rows(q: Float[Array, "b n q k"], k: Float[Array, "b n s k"], v: Float[Array, "b n s k"]) -> Float[Array, "b n q k"]:
    exact = precision(q.dtype)
    logits = jnp.einsum("bnqk,bnsk->bnqs", q, k, precision=exact, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    out = jnp.einsum("bnqs,bnsk->bnqk", weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def cudnn(q: Float[Array, "b s n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """NVIDIA's fused kernel; bfloat16 only."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


# Rows of queries and of keys that the TPU kernel holds at once, by generation: what the compiler schedules fastest within on-chip memory.
# (The library's own 128 x 128 leave the matrix unit idle four fifths of the time.)
TILES = {"v4": (1280, 1792), "v5e": (1280, 1792), "v5p": (1280, 1792), "v6e": (1280, 1792)}
LANES = 128


@dataclass(frozen=True)
class Splash:
    """jax's TPU kernel, one tile of logits at a time. Sequences are evened out to whole tiles; the keys that this adds are told apart by one
    more channel, of ones for queries and of zeros for real keys, which costs nothing: the kernel's lanes have room for it."""

    queries: int  # rows of a tile, about
    keys: int
    interpret: bool = False

    def __call__(self, q: Float[Array, "b s n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
        tokens, heads = q.shape[1:3]
        q_tile, k_tile = (even_tile(tokens, rows) for rows in (self.queries, self.keys))
        q_rows, k_rows = (-(-tokens // tile) * tile for tile in (q_tile, k_tile))
        # Half of a head's 128 lanes are empty at the width of 64; a power of two scales without rounding.
        q = jnp.pad((q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype), ((0, 0),) * 3 + ((0, 1),), constant_values=1)
        k = jnp.pad(k, ((0, 0),) * 3 + ((0, 1),))
        k = jnp.pad(k, ((0, 0), (0, k_rows - tokens), (0, 0), (0, 0)))
        k = k.at[:, tokens:, :, -1].set(FAR)
        q = jnp.pad(q, ((0, 0), (0, q_rows - tokens), (0, 0), (0, 0)))
        v = jnp.pad(v, ((0, 0), (0, k_rows - tokens), (0, 0), (0, 0)))
        mask = splash_mask.MultiHeadMask([splash_mask.FullMask((q_rows, k_rows))] * heads)
        sizes = splash_kernel.BlockSizes(block_q=q_tile, block_kv=k_tile, block_kv_compute=k_tile)
        kernel = splash_kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=self.interpret)
        out = jax.vmap(kernel)(*(jnp.moveaxis(x, 2, 1) for x in (q, k, v)))
        return jnp.moveaxis(out, 1, 2)[:, :tokens].astype(q.dtype)


def even_tile(tokens: int, rows: int) -> int:
    """The rows of a tile, near the wanted number, that leave the least over at the end of a sequence."""
    tiles = max(1, round(tokens / rows))
    return -(-(-(-tokens // tiles)) // LANES) * LANES


FAR = -1e30  # a logit whose weight is zero


BACKENDS: dict[str, Attend] = {"xla": xla, "cudnn": cudnn}


def choose(name: str, dtype: jnp.dtype, device: Any = None) -> Attend:
    """A backend by name; `auto` takes the fastest that computes `dtype` on the device, or on the default one."""
    platform = jax.default_backend() if device is None else device.platform
    if name == "auto":
        name = "cudnn" if platform == "gpu" and dtype == jnp.bfloat16 else "xla"
    if name not in BACKENDS:
        raise ValueError(f"attention must be auto, {', '.join(BACKENDS)}: got {name!r}")
    return BACKENDS[name]
