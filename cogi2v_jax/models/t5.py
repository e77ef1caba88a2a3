"""The T5 v1.1 encoder. No mask anywhere: the video network was trained with what the padding
says."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ..config import TextEncoderConfig
from .layers import Linear, RMSNorm, gelu, param, precision, stacked

# First distance of each bucket from 8 on (128 / 8 in logarithmic steps, computed exactly: an
# approximate log moves the whole numbers).
BUCKET_STARTS = (8, 12, 16, 23, 32, 46, 64, 91)


def buckets(tokens: int) -> Int[np.ndarray, "p p"]:
    """Relative position bucket of every query and key: 16 for each direction, distances below 8
    exactly, then logarithmically."""
    relative = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    distance = np.abs(relative)
    far = 7 + np.searchsorted(BUCKET_STARTS, distance, side="right")
    return np.where(relative > 0, 16, 0) + np.where(distance < 8, distance, far)


class Attention(nnx.Module):
    """T5 does not scale its logits; the position bias is the same in all layers."""

    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, inner = config.d_model, config.num_heads * config.d_kv
        self.q = Linear(
            d, inner, axes=("embed", "heads"), bias=False, int8=int8, dtype=dtype, rngs=rngs
        )
        self.k = Linear(
            d, inner, axes=("embed", "heads"), bias=False, int8=int8, dtype=dtype, rngs=rngs
        )
        self.v = Linear(
            d, inner, axes=("embed", "heads"), bias=False, int8=int8, dtype=dtype, rngs=rngs
        )
        self.out = Linear(
            inner, d, axes=("heads", "embed"), bias=False, int8=int8, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "b p d"], bias: Float[Array, "n p p"]
    ) -> Float[Array, "b p d"]:
        exact = precision(x.dtype)
        q, k, v = (
            rearrange(part(x), "b p (n k) -> b p n k", n=bias.shape[0])
            for part in (self.q, self.k, self.v)
        )
        logits = jnp.einsum(
            "bqnk,bpnk->bnqp", q, k, precision=exact, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(x.dtype)
        out = jnp.einsum(
            "bnqp,bpnk->bqnk", weights, v, precision=exact, preferred_element_type=jnp.float32
        )
        return self.out(rearrange(out.astype(x.dtype), "b p n k -> b p (n k)"))


class Mlp(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = Linear(
            config.d_model,
            config.d_ff,
            axes=("embed", "mlp"),
            bias=False,
            int8=int8,
            dtype=dtype,
            rngs=rngs,
        )
        self.up = Linear(
            config.d_model,
            config.d_ff,
            axes=("embed", "mlp"),
            bias=False,
            int8=int8,
            dtype=dtype,
            rngs=rngs,
        )
        self.down = Linear(
            config.d_ff,
            config.d_model,
            axes=("mlp", "embed"),
            bias=False,
            int8=int8,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        return self.down((gelu(self.gate(x)) * self.up(x)).astype(x.dtype))


class Block(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs
        )
        self.attn = Attention(config, int8=int8, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs
        )
        self.mlp = Mlp(config, int8=int8, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b p d"], bias: Float[Array, "n p p"]
    ) -> Float[Array, "b p d"]:
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class T5(nnx.Module):
    """Token ids to embeddings. The residual stream is float32 in every compute dtype: its values
    grow past what bfloat16 resolves. `int8` is of the blocks' kernels."""

    def __init__(
        self, config: TextEncoderConfig, *, int8: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.embedding = param(
            (config.vocab_size, config.d_model), ("vocabulary", "embed"), dtype, rngs, 1.0
        )
        self.position_bias = param(
            (config.relative_attention_num_buckets, config.num_heads),
            (None, None),
            dtype,
            rngs,
            1.0,
        )
        self.blocks = stacked(
            config.num_layers, lambda keys: Block(config, int8=int8, dtype=dtype, rngs=keys), rngs
        )
        self.norm = RMSNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "b p"]) -> Float[Array, "b p d"]:
        x = self.embedding[ids].astype(jnp.float32)
        bias = rearrange(
            self.position_bias[buckets(ids.shape[1])].astype(jnp.float32), "q p n -> n q p"
        )
        graph, layers = nnx.split(self.blocks)
        x, _ = lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x, bias), None), x, layers)
        return self.norm(x)
