"""The CogVideoX transformer: text and video tokens in one sequence, both streams through the same
weights, told apart only by their modulation. Both generations: 1x2x2 patches with a learned table
(1.0), 2x2x2 patches with `ofs` (1.5)."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from ..config import TransformerConfig
from ..devices.sharding import Layout
from .layers import LayerNorm, Linear, gelu, rounded, silu, stacked
from .positions import Positions

QK_EPSILON = 1e-6  # of the norms on q and k; fixed in the reference, unlike the blocks' own


class Shifts(NamedTuple):
    """All that the timestep decides, evaluated before the loop. Its axis of 6: shift, scale, gate
    for attention, then for the mlp."""

    blocks: Float[Array, "*steps l 6 stream d"]  # stream: video, text
    out: Float[Array, "*steps 2 d"]  # shift, scale


class TimeEmbedding(nnx.Module):
    """Two layers over a sinusoid."""

    def __init__(self, inputs: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_1 = Linear(inputs, width, axes=("embed", None), dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, axes=(None, None), dtype=dtype, rngs=rngs)

    def __call__(self, sinusoid: Float[Array, "i inputs"]) -> Float[Array, "i e"]:
        hidden = self.linear_1(sinusoid.astype(self.linear_1.kernel.dtype))
        return self.linear_2(silu(hidden).astype(hidden.dtype))


class BlockModulation(nnx.Module):
    """One block's shifts, scales and gates from the time embedding."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn = Linear(
            config.time_embed_dim, 6 * config.width, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )
        self.mlp = Linear(
            config.time_embed_dim, 6 * config.width, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )

    def __call__(self, temb: Float[Array, "i e"]) -> Float[Array, "i 6 2 d"]:
        parts = [
            rearrange(part(temb), "i (stream three d) -> i three stream d", stream=2, three=3)
            for part in (self.attn, self.mlp)
        ]
        return jnp.concatenate(parts, axis=1)


class Modulation(nnx.Module):
    """The timestep's whole influence: a seventh of the parameters, and none of them needed once a
    request's steps are known."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.time = TimeEmbedding(config.width, config.time_embed_dim, dtype=dtype, rngs=rngs)
        self.ofs = (
            TimeEmbedding(config.ofs_embed_dim, config.time_embed_dim, dtype=dtype, rngs=rngs)
            if config.ofs_embed_dim
            else None
        )
        self.blocks = stacked(
            config.num_layers, lambda keys: BlockModulation(config, dtype=dtype, rngs=keys), rngs
        )
        self.out = Linear(
            config.time_embed_dim, 2 * config.width, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )

    def __call__(self, time: Float[Array, "i d"], ofs: Float[Array, "1 e"] | None) -> Shifts:
        """From the sinusoids of every timestep and of `ofs` (None for 1.0)."""
        temb = self.time(time)
        if self.ofs is not None:
            assert ofs is not None  # the pipeline's to give
            temb = temb + self.ofs(ofs)
        temb = silu(temb).astype(temb.dtype)
        graph, layers = nnx.split(self.blocks)
        _, blocks = lax.scan(
            lambda carry, layer: (carry, nnx.merge(graph, layer)(temb)), None, layers
        )
        return Shifts(
            jnp.moveaxis(blocks, 0, 1), rearrange(self.out(temb), "i (two d) -> i two d", two=2)
        )


class Attention(nnx.Module):
    """Self-attention over the joint sequence, with normed and rotated queries and keys. A head's
    channel pairs lie half a head apart (`convert/` reorders them), so that rotating is two
    contiguous slices instead of interleaved lanes."""

    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, k = config.width, config.attention_head_dim
        self.q = Linear(d, d, axes=("embed", "heads"), int8=int8, dtype=dtype, rngs=rngs)
        self.k = Linear(d, d, axes=("embed", "heads"), int8=int8, dtype=dtype, rngs=rngs)
        self.v = Linear(d, d, axes=("embed", "heads"), int8=int8, dtype=dtype, rngs=rngs)
        self.norm_q = LayerNorm(k, epsilon=QK_EPSILON, dtype=dtype, rngs=rngs)
        self.norm_k = LayerNorm(k, epsilon=QK_EPSILON, dtype=dtype, rngs=rngs)
        self.out = Linear(d, d, axes=("heads", "embed"), int8=int8, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s d"], positions: Positions, layout: Layout
    ) -> Float[Array, "b s d"]:
        q, k, v = (rounded(part(x), x.dtype) for part in (self.q, self.k, self.v))
        return self.out(layout.exchange((q, k, v), (self.norm_q, self.norm_k), positions))


class Mlp(nnx.Module):
    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = Linear(
            config.width, 4 * config.width, axes=("embed", "mlp"), int8=int8, dtype=dtype, rngs=rngs
        )
        self.down = Linear(
            4 * config.width, config.width, axes=("mlp", "embed"), int8=int8, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down(rounded(gelu(self.up(x)), x.dtype))


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attn = Attention(config, int8=int8, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config, int8=int8, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        shifts: Float[Array, "6 2 d"],
        positions: Positions,
        layout: Layout,
    ) -> Float[Array, "b s d"]:
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = (
            by_stream(part, positions.is_text) for part in shifts
        )
        y = (self.attn_norm(x) * (1 + attn_scale) + attn_shift).astype(x.dtype)
        x = (x + attn_gate * self.attn(y, positions, layout)).astype(x.dtype)
        y = (self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift).astype(x.dtype)
        return (x + mlp_gate * self.mlp(y)).astype(x.dtype)


class Transformer(nnx.Module):
    """Predicts v. Evaluate `modulation` once for all steps, then call the network with one step's
    shifts. `int8` is of blocks' kernels."""

    def __init__(
        self, config: TransformerConfig, *, int8: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        d, patch = config.width, config.patch
        points = patch[0] * patch[1] * patch[2]
        self.patch = patch
        self.modulation = Modulation(config, dtype=dtype, rngs=rngs)
        self.text_in = Linear(
            config.text_embed_dim, d, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )
        # The 1.5 layout has a bias whatever its config says: the reference reads patch_bias only
        # where patches are flat.
        bias = config.patch_bias or config.patch_size_t is not None
        self.video_in = Linear(
            points * config.in_channels, d, axes=(None, "embed"), bias=bias, dtype=dtype, rngs=rngs
        )
        learned = config.use_learned_positional_embeddings
        self.table = (
            nnx.Param(jnp.zeros((config.table_rows, d), dtype), axes=(None, "embed"))
            if learned
            else None
        )
        self.blocks = stacked(
            config.num_layers, lambda keys: Block(config, int8=int8, dtype=dtype, rngs=keys), rngs
        )
        self.norm = LayerNorm(d, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.out_norm = LayerNorm(d, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.out = Linear(
            d, points * config.out_channels, axes=("embed", None), dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],  # noisy latents, then the image's, on channels
        text: Float[Array, "b p d"],  # as `text_in` makes it: the same in every step
        shifts: Shifts,  # of one step
        # As many rows as the joint sequence, rounded up to what the layout splits.
        positions: Positions,
        layout: Layout,
    ) -> Float[Array, "b t h w c2"]:
        (t, r, c), (_, frames, rows, columns, _) = self.patch, latents.shape
        video = self.video_in(
            rearrange(latents, "b (f t) (h r) (w c) z -> b (f h w) (t r c z)", t=t, r=r, c=c)
        )
        x = jnp.concatenate([text, video], axis=1)
        # Frames are the table's slowest axis, so fewer frames than it was made for are a prefix of
        # it.
        table = positions.table if self.table is None else self.table[: x.shape[1]]
        if table is not None:
            x = x + table.astype(x.dtype)
        tokens = x.shape[1]
        # Joined and evened out before it is split: 226 tokens of text divide by little, and an
        # exchange would be made of the joining.
        x = layout.split(jnp.pad(layout.join(x), ((0, 0), (0, layout.padded - tokens), (0, 0))))

        graph, layers = nnx.split(self.blocks)

        def block(x: Float[Array, "b s d"], layer: tuple) -> tuple[Float[Array, "b s d"], None]:
            params, shifts = layer
            return layout.split(
                nnx.merge(graph, layout.gather(params))(x, shifts, positions, layout)
            ), None

        x, _ = lax.scan(block, x, (layers, shifts.blocks))
        y = self.out_norm(self.norm(x).astype(x.dtype))
        shift, scale = shifts.out.astype(jnp.float32)
        v = self.out((y * (1 + scale) + shift).astype(x.dtype))
        # Only here, where a token is narrow: cutting a split sequence moves it.
        v = layout.join(v)[:, text.shape[1] : tokens]
        sizes = {"f": frames // t, "h": rows // r, "w": columns // c, "t": t, "r": r, "c": c}
        return rearrange(v, "b (f h w) (t r c z) -> b (f t) (h r) (w c) z", **sizes)


def by_stream(part: Float[Array, "2 d"], is_text: Bool[Array, " s"]) -> Float[Array, "s d"]:
    """A modulation row for every token, in float32."""
    video, text = part.astype(jnp.float32)
    return jnp.where(is_text[:, None], text, video)
