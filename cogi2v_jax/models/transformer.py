"""The CogVideoX transformer: text and video tokens in one sequence through the same weights; only
their modulation differs. Both generations: 1x2x2 patches with a learned position table (1.0), and
2x2x2 patches with `ofs` (1.5)."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..config import TransformerConfig
from ..devices.sharding import Layout
from .layers import LayerNorm, Linear, exact, gelu, param, rounded, silu, stacked, wide
from .positions import Positions

LAYER = "layer"  # the name of a layer's input, for policies of `jax.checkpoint`
QK_EPSILON = 1e-6  # of the norms on q and k; fixed in the reference, unlike the blocks' own


class Modulation(NamedTuple):
    """All that depends on the timestep: shift, scale and gate for attention, then for the mlp, of
    every block; shift and scale of the output. Of several steps, or in training of several videos,
    each of which has a timestep of its own."""

    blocks: Float[Array, "*times l 6 stream d"]  # stream: video, text
    out: Float[Array, "*times 2 d"]


class TimeEmbedding(nnx.Module):
    """Two layers over a sinusoid."""

    def __init__(self, inputs: int, width: int, *, dtype: jnp.dtype):
        self.linear_1 = Linear(inputs, width, axes=("embed", None), dtype=dtype)
        self.linear_2 = Linear(width, width, axes=(None, None), dtype=dtype)

    def __call__(self, sinusoid: Float[Array, "i inputs"]) -> Float[Array, "i e"]:
        hidden = self.linear_1(sinusoid.astype(self.linear_1.kernel.dtype))
        return self.linear_2(silu(hidden).astype(hidden.dtype))


class BlockModulation(nnx.Module):
    """Shifts, scales and gates of one block from the time embedding."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype):
        e, d, axes = config.time_embed_dim, config.width, (None, "modulation")
        self.attn = Linear(e, 6 * d, axes=axes, dtype=dtype)
        self.mlp = Linear(e, 6 * d, axes=axes, dtype=dtype)

    def __call__(self, temb: Float[Array, "i e"]) -> Float[Array, "i 6 2 d"]:
        pattern = "i (stream three d) -> i three stream d"
        parts = (rearrange(f(temb), pattern, stream=2, three=3) for f in (self.attn, self.mlp))
        return jnp.concatenate([*parts], axis=1)


class ModulationNetwork(nnx.Module):
    """From timesteps to modulation: a seventh of the parameters, and none of them is needed once
    the steps of a request are known."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype):
        d, e, ofs = config.width, config.time_embed_dim, config.ofs_embed_dim

        self.time = TimeEmbedding(d, e, dtype=dtype)
        self.ofs = TimeEmbedding(ofs, e, dtype=dtype) if ofs else None
        self.blocks = stacked(config.num_layers, BlockModulation(config, dtype=dtype))
        self.out = Linear(e, 2 * d, axes=(None, "embed"), dtype=dtype)

    def __call__(self, time: Float[Array, "i d"], ofs: Float[Array, "1 e"] | None) -> Modulation:
        """From the sinusoids of every timestep, and of `ofs` for 1.5 (None for 1.0)."""
        temb = self.time(time)
        if self.ofs is not None:
            assert ofs is not None
            temb = temb + self.ofs(ofs)
        temb = silu(temb).astype(temb.dtype)
        _, blocks = lax.scan(lambda _, block: (None, block(temb)), None, self.blocks)
        out = rearrange(self.out(temb), "i (two d) -> i two d", two=2)
        return Modulation(jnp.moveaxis(blocks, 0, 1), out)


class Attention(nnx.Module):
    """Self-attention over the joint sequence with QK norm and rotary embedding. The channels that
    are rotated together lie half a head apart (`convert/` reorders the reference's interleaved
    pairs), so that rotating takes two contiguous slices."""

    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype):
        d, k, axes = config.width, config.attention_head_dim, ("embed", "heads")
        self.q = Linear(d, d, axes=axes, int8=int8, dtype=dtype)
        self.k = Linear(d, d, axes=axes, int8=int8, dtype=dtype)
        self.v = Linear(d, d, axes=axes, int8=int8, dtype=dtype)
        self.norm_q = LayerNorm(k, epsilon=QK_EPSILON, dtype=dtype)
        self.norm_k = LayerNorm(k, epsilon=QK_EPSILON, dtype=dtype)
        self.out = Linear(d, d, axes=("heads", "embed"), int8=int8, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b s d"], positions: Positions, layout: Layout
    ) -> Float[Array, "b s d"]:
        q, k, v = (rounded(f(x), x.dtype) for f in (self.q, self.k, self.v))
        return self.out(layout.attend(q, k, v, (self.norm_q, self.norm_k), positions))


class Mlp(nnx.Module):
    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype):
        d, m = config.width, 4 * config.width
        self.up = Linear(d, m, axes=("embed", "mlp"), int8=int8, dtype=dtype)
        self.down = Linear(m, d, axes=("mlp", "embed"), int8=int8, dtype=dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down(rounded(gelu(self.up(x)), x.dtype))


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, *, int8: bool, dtype: jnp.dtype):
        d, epsilon = config.width, config.norm_eps
        self.attn_norm = LayerNorm(d, epsilon=epsilon, dtype=dtype)
        self.attn = Attention(config, int8=int8, dtype=dtype)
        self.mlp_norm = LayerNorm(d, epsilon=epsilon, dtype=dtype)
        self.mlp = Mlp(config, int8=int8, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        modulation: Float[Array, "*b 6 2 d"],
        positions: Positions,
        layout: Layout,
    ) -> Float[Array, "b s d"]:
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = (
            by_token(streams, positions.is_text) for streams in jnp.moveaxis(modulation, -3, 0)
        )
        y = (self.attn_norm(x) * (1 + attn_scale) + attn_shift).astype(x.dtype)
        x = (x + attn_gate * self.attn(y, positions, layout)).astype(x.dtype)
        y = (self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift).astype(x.dtype)
        return (x + mlp_gate * self.mlp(y)).astype(x.dtype)


def by_token(streams: Float[Array, "*b 2 d"], is_text: Bool[Array, " s"]) -> Float[Array, "*b s d"]:
    """A row of modulation for every token, in float32."""
    video, text = jnp.split(wide(streams), 2, axis=-2)
    return jnp.where(is_text[:, None], text, video)


class Transformer(nnx.Module):
    """Predicts v. Evaluate `modulation` once for all steps, then call the network with the
    modulation of one step. With `int8` the kernels of the blocks are int8."""

    def __init__(self, config: TransformerConfig, *, int8: bool = False, dtype: jnp.dtype):
        d, (t, r, c) = config.width, config.patch
        inputs, outputs = t * r * c * config.in_channels, t * r * c * config.out_channels
        # The reference reads patch_bias only where patches have one frame; 1.5 always has a bias.
        bias = config.patch_bias or config.patch_size_t is not None
        text = config.text_embed_dim

        self.patch = config.patch
        self.modulation = ModulationNetwork(config, dtype=dtype)
        self.text_in = Linear(text, d, axes=(None, "embed"), dtype=dtype)
        self.video_in = Linear(inputs, d, axes=(None, "embed"), bias=bias, dtype=dtype)
        learned, table = config.use_learned_positional_embeddings, (config.table_rows, d)
        self.table = param(table, (None, "embed"), dtype) if learned else None
        self.blocks = stacked(config.num_layers, Block(config, int8=int8, dtype=dtype))
        self.norm = LayerNorm(d, epsilon=config.norm_eps, dtype=dtype)
        self.out_norm = LayerNorm(d, epsilon=config.norm_eps, dtype=dtype)
        self.out = Linear(d, outputs, axes=("embed", None), dtype=dtype)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],  # noisy latents, then the image's, on channels
        text: Float[Array, "b p d"],  # from `text_in`: the same in every step
        modulation: Modulation,  # of one step, or of every video
        positions: Positions,  # of the padded joint sequence
        layout: Layout,
    ) -> Float[Array, "b t h w c2"]:
        (t, r, c), (_, frames, rows, columns, _) = self.patch, latents.shape
        patches = rearrange(latents, "b (f t) (h r) (w c) z -> b (f h w) (t r c z)", t=t, r=r, c=c)
        x = jnp.concatenate([text, self.video_in(patches)], axis=1)
        if (table := self.position_table(positions, text.shape[1], x.shape[1])) is not None:
            x = x + table.astype(x.dtype)

        def block(
            x: Float[Array, "b s d"], layer: tuple[Block, Array]
        ) -> tuple[Float[Array, "b s d"], None]:
            block, row = layer
            x = checkpoint_name(x, LAYER)
            return layout.shard(layout.gather(block)(x, row, positions, layout)), None

        layers = self.blocks, jnp.moveaxis(modulation.blocks, -4, 0)
        x, _ = lax.scan(layout.rematerialise(block), layout.pad(x), layers)
        y = self.out_norm(self.norm(x).astype(x.dtype))
        shift, scale = jnp.split(wide(modulation.out), 2, axis=-2)
        v = self.out((y * (1 + scale) + shift).astype(x.dtype))
        v = layout.unpad(v)[:, text.shape[1] :]
        grid = {"f": frames // t, "h": rows // r, "w": columns // c, "t": t, "r": r, "c": c}
        return rearrange(v, "b (f h w) (t r c z) -> b (f t) (h r) (w c) z", **grid)

    def position_table(
        self, positions: Positions, text: int, tokens: int
    ) -> Float[Array, "s d"] | None:
        """What is added to so many tokens, of which `text` are the prompt's: the given table, or
        the learned one."""
        if self.table is None:
            return positions.table
        if positions.resize is None:
            # Frames are the slowest axis of the learned table: fewer frames read a prefix of it.
            return self.table[:tokens]
        prompt, video = wide(self.table[:text]), wide(self.table[text:])
        sizes = [matrix.shape[1] for matrix in positions.resize]
        video = video.reshape(*sizes, -1)
        video = jnp.einsum("fi, hj, wk, ijkd -> fhwd", *positions.resize, video, **exact(video))
        return jnp.concatenate([prompt, video.reshape(-1, video.shape[-1])])
