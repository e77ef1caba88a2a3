"""Attention behind one call: `attend(q, k, v)`. A backend is a function and a row of BACKENDS; models are handed one and know no other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
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


BACKENDS: dict[str, Attend] = {"xla": xla, "cudnn": cudnn}


def choose(name: str, dtype: jnp.dtype) -> Attend:
    """A backend by name; `auto` takes the fastest that computes `dtype` on the default device."""
    if name == "auto":
        name = "cudnn" if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 else "xla"
    if name not in BACKENDS:
        raise ValueError(f"attention must be auto, {', '.join(BACKENDS)}: got {name!r}")
    return BACKENDS[name]
