"""The T5 v1.1 encoder. There is no attention mask: the video transformer was trained on embeddings
computed without one, those of the padding included."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ..config import TextEncoderConfig
from .layers import Linear, RMSNorm, exact, gelu, param, stacked

# The first distance of each bucket from 8 on: logarithmic steps up to 128, computed exactly. A
# floating-point log would move the integers.
BUCKET_STARTS = (8, 12, 16, 23, 32, 46, 64, 91)


def buckets(tokens: int) -> Int[np.ndarray, "p p"]:
    """The relative position bucket of every query and key. Each direction has 16: one for each
    distance below 8, then logarithmic ones."""
    relative = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    distance = np.abs(relative)
    far = 7 + np.searchsorted(BUCKET_STARTS, distance, side="right")
    return np.where(relative > 0, 16, 0) + np.where(distance < 8, distance, far)


class Attention(nnx.Module):
    """T5 does not scale its logits, and all its layers share one position bias."""

    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype):
        width, inner = config.d_model, config.num_heads * config.d_kv
        axes = ("embed", "heads")
        self.q = Linear(width, inner, axes=axes, bias=False, int8=int8, dtype=dtype)
        self.k = Linear(width, inner, axes=axes, bias=False, int8=int8, dtype=dtype)
        self.v = Linear(width, inner, axes=axes, bias=False, int8=int8, dtype=dtype)
        self.out = Linear(inner, width, axes=axes[::-1], bias=False, int8=int8, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b p d"], bias: Float[Array, "n p p"]
    ) -> Float[Array, "b p d"]:
        q, k, v = (
            rearrange(part(x), "b p (n k) -> b p n k", n=bias.shape[0])
            for part in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("bqnk,bpnk->bnqp", q, k, **exact(x))
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(x.dtype)
        out = jnp.einsum("bnqp,bpnk->bqnk", weights, v, **exact(x))
        return self.out(rearrange(out.astype(x.dtype), "b p n k -> b p (n k)"))


class Mlp(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype):
        width, inner, axes = config.d_model, config.d_ff, ("embed", "mlp")
        self.gate = Linear(width, inner, axes=axes, bias=False, int8=int8, dtype=dtype)
        self.up = Linear(width, inner, axes=axes, bias=False, int8=int8, dtype=dtype)
        self.down = Linear(inner, width, axes=axes[::-1], bias=False, int8=int8, dtype=dtype)

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        return self.down((gelu(self.gate(x)) * self.up(x)).astype(x.dtype))


class Block(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype):
        width, epsilon = config.d_model, config.layer_norm_epsilon
        self.attn_norm = RMSNorm(width, epsilon=epsilon, dtype=dtype)
        self.attn = Attention(config, int8=int8, dtype=dtype)
        self.mlp_norm = RMSNorm(width, epsilon=epsilon, dtype=dtype)
        self.mlp = Mlp(config, int8=int8, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b p d"], bias: Float[Array, "n p p"]
    ) -> Float[Array, "b p d"]:
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class T5(nnx.Module):
    """Token ids to embeddings. The residual stream is float32 in every compute dtype, because its
    values become too large for the resolution of bfloat16. With `int8` the blocks' kernels are
    int8."""

    def __init__(self, config: TextEncoderConfig, *, int8: bool = False, dtype: jnp.dtype):
        width, table = config.d_model, (config.relative_attention_num_buckets, config.num_heads)
        axes = ("vocabulary", "embed")
        self.embedding = param((config.vocab_size, width), axes, dtype)
        self.position_bias = param(table, (None, None), dtype)
        self.blocks = stacked(config.num_layers, Block(config, int8=int8, dtype=dtype))
        self.norm = RMSNorm(width, epsilon=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, ids: Int[Array, "b p"]) -> Float[Array, "b p d"]:
        x = self.embedding[ids].astype(jnp.float32)
        bias = self.position_bias[buckets(ids.shape[1])].astype(jnp.float32)
        bias = rearrange(bias, "q p n -> n q p")
        x, _ = lax.scan(lambda x, block: (block(x, bias), None), x, self.blocks)
        return self.norm(x)
