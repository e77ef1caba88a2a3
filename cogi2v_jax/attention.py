"""Attention behind one call: `attend(q, k, v)`. A backend is a function and a row of BACKENDS; models are handed one and know no other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .layers import precision

Attend = Callable[[Float[Array, "b s n k"], Float[Array, "b s n k"], Float[Array, "b s n k"]], Float[Array, "b s n k"]]

# Logits of one slice of queries stay below this many float32 values (256 MiB): memory is linear in the sequence.
LOGITS = 64 * 2**20


def xla(q: Float[Array, "b s n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Plain attention in slices of queries; runs on every device. Softmax and sums are float32."""
    b, s, n, width = q.shape
    rows = max(1, min(s, LOGITS // (b * n * s)))
    slices = -(-s // rows)
    if slices == 1:
        return _rows(q, k, v)
    rows = -(-s // slices)  # even slices, so that padding is at most one row each
    padded = jnp.pad(q, ((0, 0), (0, slices * rows - s), (0, 0), (0, 0)))
    out = lax.map(partial(_rows, k=k, v=v), jnp.moveaxis(padded.reshape(b, slices, rows, n, width), 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(b, slices * rows, n, width)[:, :s]


def _rows(q: Float[Array, "b q n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]) -> Float[Array, "b q n k"]:
    exact = precision(q.dtype)
    logits = jnp.einsum("bqnk,bsnk->bnqs", q, k, precision=exact, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bnqs,bsnk->bqnk", weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32)
    return (out / jnp.moveaxis(total, 1, 2)[..., None]).astype(q.dtype)


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
