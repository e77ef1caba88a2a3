"""The 3-D causal VAE. Frames go through in the reference's temporal chunks, each seeing the last
two frames of the one before it through every convolution's cache; chunk sizes and the statistics
taken over a chunk are part of the numerics, not tuning.

A layer is a convolution of something made from its input value by value. So a chunk's layers can
each run over strips of rows: only a layer's input and output, and the caches, are ever whole.
Networks take the number of strips of their finest resolution; coarser ones have fewer."""

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from ..config import VAEConfig
from .layers import Conv, GroupNorm, Linear, NormCoefficients, convolve, param, silu
from .vae_strips import Strip, in_strips

ENCODE_CHUNK = 8  # pixel frames
DECODE_CHUNK = 2  # latent frames
EPSILON = 1e-6  # of the norms that the reference keeps from the config's norm_eps

Kept = Any  # a tree of [b 2 h w c], the last two frames of what causal convolutions read
Rows = Callable[[Strip], Float[Array, "b f h w c"]]  # what there is of something at a strip
Strips = Callable[[int], int]  # into how many strips a picture of so many rows is cut


class Past:
    """What a network kept of the chunk before, in the order it asks for it; `next` collects the
    same for the chunk to come. At the start of a video there is nothing, and a chunk's first frame
    stands in for what was before.

    The first chunk of an odd number of frames has one more than the others. Those get an idle frame
    in front of theirs, which no statistics count and no convolution reads, so that all chunks are
    one program, compiled once. `first` says which chunk it is."""

    def __init__(self, kept: Sequence[Kept] | None = None, first: Bool[Array, ""] | bool = True):
        self._kept = None if kept is None else iter(kept)
        self.first = first
        self.next: list[Kept] = []

    def take(self) -> Kept:
        return None if self._kept is None else next(self._kept)

    def before(self, x: Float[Array, "b f h w c"], kept: Kept) -> Float[Array, "b f+2 h w c"]:
        """x behind the two frames that precede it."""
        start = jnp.repeat(x[:, :1], 2, axis=1)
        if kept is not None:
            idle = x.shape[1] % 2
            front = jnp.where(
                self.first,
                jnp.concatenate([start, x[:, :idle]], axis=1),
                jnp.concatenate([x[:, :idle], kept], axis=1),
            )
            return jnp.concatenate([front, x[:, idle:]], axis=1)
        return jnp.concatenate([start, x], axis=1)

    def shares(self, frames: int) -> Float[Array, " f"]:
        """Of each frame in a mean over frames."""
        counts = (
            jnp.ones(frames).at[0].set(1.0 if frames % 2 == 0 else jnp.where(self.first, 1.0, 0.0))
        )
        return counts / counts.sum()


class CausalConv(nnx.Module):
    """3x3x3, seeing the present and two past frames. At the start of a video its first frame stands
    in for them."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = (None, None, None, "inputs", "channels")
        self.kernel = param((3, 3, 3, inputs, outputs), axes, dtype, rngs, (27 * inputs) ** -0.5)
        self.bias = param((outputs,), ("channels",), dtype, rngs, 0.02)

    def __call__(
        self, wide: Rows, past: Past, strips: int = 1, onto: Rows | None = None
    ) -> Float[Array, "b f h w c2"]:
        """Of what `wide` gives for a strip and its neighbours' rows; added to what `onto` gives for
        the strip."""
        kept = past.take()

        def layer(strip: Strip) -> tuple[Float[Array, "b f h2 w c2"], Float[Array, "b 2 h2 w c"]]:
            x = strip.blank(wide(strip))
            x = past.before(x, None if kept is None else strip.blank(strip.wide(kept)))
            y = convolve(x, self.kernel[...], self.bias[...], strip.padding, (1, 1))
            return y if onto is None else onto(strip) + y, strip.narrow(x[:, -2:])

        y, kept = in_strips(layer, strips)
        past.next.append(kept)
        return y


class PlainNorm(GroupNorm):
    """The encoder's group norm, under the call the decoder's norm has."""

    def __init__(
        self,
        channels: int,
        config: VAEConfig,
        *,
        epsilon: float | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            channels,
            config.norm_num_groups,
            epsilon=epsilon or config.norm_eps,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "b f h w c"], shares: Float[Array, " f"], latents: None = None
    ) -> NormCoefficients:
        return super().__call__(x, shares)


class SpatialNorm(nnx.Module):
    """A group norm whose scale and offset come from the latents. They stay at latent resolution
    until they are used, which a 1x1 convolution of nearest-resized latents equals exactly, at a
    fraction of the work."""

    def __init__(self, channels: int, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(
            channels, config.norm_num_groups, epsilon=EPSILON, dtype=dtype, rngs=rngs
        )
        self.scale = Linear(
            config.latent_channels, channels, axes=(None, "channels"), dtype=dtype, rngs=rngs
        )
        self.shift = Linear(
            config.latent_channels, channels, axes=(None, "channels"), dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        shares: Float[Array, " f"],
        latents: Float[Array, "b t h2 w2 z"],
    ) -> NormCoefficients:
        scale, shift = (part(latents).astype(jnp.float32) for part in (self.scale, self.shift))
        normed = self.norm(x, shares)
        return NormCoefficients(normed.mean, normed.scale * scale, normed.shift * scale + shift)


def normed(norm: NormCoefficients, x: Float[Array, "b f h w c"]) -> Rows:
    """silu(norm(x)), strip by strip."""

    def wide(strip: Strip) -> Float[Array, "b f h w c"]:
        rows = strip.wide(x)
        scale, shift = (fit(strip, part, rows.shape[1:4]) for part in (norm.scale, norm.shift))
        return silu((rows.astype(jnp.float32) - norm.mean) * scale + shift).astype(x.dtype)

    return wide


def fit(
    strip: Strip, part: Float[Array, "b t h w c"], size: tuple[int, ...]
) -> Float[Array, "b f h2 w2 c"]:
    """The rows of a coarser `part` at a wide strip of `size`."""
    if part.shape[1:4] == (1, 1, 1):  # the same for all
        return part
    part, (frames, height, width) = strip.wide(part), size
    factor = (height - 2 * strip.halo) // (part.shape[2] - 2 * strip.halo)
    return strip.narrow(spread(part, (frames, factor * part.shape[2], width)), factor - 1)


class Resnet(nnx.Module):
    """norm, silu, conv, twice, around a shortcut. The kind of norm says whether it follows the
    latents, as in the decoder."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: type,
        config: VAEConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = norm(inputs, config, dtype=dtype, rngs=rngs)
        self.conv_1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm_2 = norm(outputs, config, dtype=dtype, rngs=rngs)
        self.conv_2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = (
            Linear(inputs, outputs, axes=("inputs", "channels"), dtype=dtype, rngs=rngs)
            if inputs != outputs
            else None
        )

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        latents: Float[Array, "b t h2 w2 z"] | None,
        past: Past,
        strips: int,
    ) -> Float[Array, "b f h w c2"]:
        def onto(strip: Strip) -> Float[Array, "b f h3 w c2"]:
            return strip.rows(x) if self.shortcut is None else self.shortcut(strip.rows(x))

        y = self.conv_1(normed(self.norm_1(x, past.shares(x.shape[1]), latents), x), past, strips)
        return self.conv_2(
            normed(self.norm_2(y, past.shares(y.shape[1]), latents), y), past, strips, onto
        )


class Stage(nnx.Module):
    """Resnets of one resolution, then a change of it."""

    def __init__(
        self,
        widths: Sequence[int],
        norm: type,
        resample: nnx.Module | None,
        config: VAEConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            [
                Resnet(inputs, outputs, norm, config, dtype=dtype, rngs=rngs)
                for inputs, outputs in pairwise(widths)
            ]
        )
        self.resample = resample

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        latents: Float[Array, "b t h2 w2 z"] | None,
        past: Past,
        strips: Strips,
    ) -> Float[Array, "b f2 h3 w3 c2"]:
        for _, equal in groupby(self.resnets, lambda resnet: resnet.conv_1.kernel.shape):
            x = chain(list(equal), x, latents, past, strips(x.shape[2]))
        return x if self.resample is None else self.resample(x, strips)


def chain(
    resnets: Sequence[Resnet],
    x: Float[Array, "b f h w c"],
    latents: Float[Array, "b t h2 w2 z"] | None,
    past: Past,
    strips: int,
) -> Float[Array, "b f h w c2"]:
    """Equal resnets, one after the other, as one scanned program, which takes a fraction of the
    time to compile."""
    graphs, params = zip(*(nnx.split(resnet) for resnet in resnets), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def one(
        x: Float[Array, "b f h w c"], given: tuple[Any, Kept]
    ) -> tuple[Float[Array, "b f h w c2"], Kept]:
        inner = Past(given[1], past.first)
        x = nnx.merge(graphs[0], given[0])(x, latents, inner, strips)
        return x, inner.next

    if len(resnets) == 1:
        return resnets[0](x, latents, past, strips)
    x, kept = lax.scan(one, x, (params, past.take()))
    past.next.append(kept)
    return x


class Downsample(nnx.Module):
    """Halves rows and columns, and frames too where `time`: pairs are averaged, and the first of an
    odd number stays itself."""

    def __init__(self, channels: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, stride=2, dtype=dtype, rngs=rngs)
        self.time = time

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: Strips
    ) -> Float[Array, "b f2 h2 w2 c"]:
        if self.time and x.shape[1] > 1:
            odd = x.shape[1] % 2
            pairs = rearrange(
                x[:, odd:].astype(jnp.float32), "b (f two) h w c -> b f two h w c", two=2
            ).mean(axis=2)
            x = jnp.concatenate([x[:, :odd], pairs.astype(x.dtype)], axis=1)
        return self.conv(x, rows=(0, 1), columns=(0, 1))


class Upsample(nnx.Module):
    """Doubles rows and columns by repeating, and frames too where `time`, save the first of an odd
    number."""

    def __init__(self, channels: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.time = time

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: Strips
    ) -> Float[Array, "b f2 h2 w2 c"]:
        frames = x.shape[1]
        if self.time and frames > 1:
            frames = 2 * frames - frames % 2

        def layer(strip: Strip) -> Float[Array, "b f2 h3 w2 c"]:
            rows = strip.blank(strip.wide(x))
            rows = strip.narrow(spread(rows, (frames, 2 * rows.shape[2], 2 * rows.shape[3])))
            return self.conv(rows, rows=strip.padding, columns=(1, 1))

        return in_strips(layer, strips(2 * x.shape[2]))


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, keys = config.block_out_channels, {"dtype": dtype, "rngs": rngs}
        self.conv_in = CausalConv(config.in_channels, widths[0], **keys)
        stages = []
        for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            down = Downsample(outputs, level < 2, **keys) if level < len(widths) - 1 else None
            stages.append(
                Stage(
                    (inputs, *[outputs] * config.layers_per_block), PlainNorm, down, config, **keys
                )
            )
        self.stages = nnx.List(stages)
        self.middle = Stage([widths[-1]] * 3, PlainNorm, None, config, **keys)
        self.norm_out = PlainNorm(widths[-1], config, epsilon=EPSILON, **keys)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **keys)

    def __call__(
        self, x: Float[Array, "b f h w c"], past: Past, strips: Strips
    ) -> Float[Array, "b t h2 w2 c2"]:
        whole = x
        x = self.conv_in(lambda strip: strip.wide(whole), past, strips(x.shape[2]))
        for stage in (*self.stages, self.middle):
            x = stage(x, None, past, strips)
        return self.conv_out(normed(self.norm_out(x, past.shares(x.shape[1])), x), past)


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, keys = config.block_out_channels[::-1], {"dtype": dtype, "rngs": rngs}
        self.conv_in = CausalConv(config.latent_channels, widths[0], **keys)
        self.middle = Stage([widths[0]] * 3, SpatialNorm, None, config, **keys)
        stages = []
        for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            up = Upsample(outputs, level < 2, **keys) if level < len(widths) - 1 else None
            stages.append(
                Stage(
                    (inputs, *[outputs] * (config.layers_per_block + 1)),
                    SpatialNorm,
                    up,
                    config,
                    **keys,
                )
            )
        self.stages = nnx.List(stages)
        self.norm_out = SpatialNorm(widths[-1], config, **keys)
        self.conv_out = CausalConv(widths[-1], config.out_channels, **keys)

    def __call__(
        self, latents: Float[Array, "b t h w z"], past: Past, strips: Strips
    ) -> Float[Array, "b f h2 w2 c"]:
        x = self.conv_in(lambda strip: strip.wide(latents), past)
        for stage in (self.middle, *self.stages):
            x = stage(x, latents, past, strips)
        return self.conv_out(
            normed(self.norm_out(x, past.shares(x.shape[1]), latents), x), past, strips(x.shape[2])
        )


class VAE(nnx.Module):
    """`strips`, a static number that divides the latents' rows, bounds what is in memory at the
    finest resolution; results don't depend on it."""

    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.spatial_ratio = config.spatial_ratio
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.encoder.conv_in.kernel.dtype

    def encode(
        self, video: Float[Array, "b f h w c"], strips: int = 1
    ) -> tuple[Float[Array, "b t h2 w2 z"], Float[Array, "b t h2 w2 z"]]:
        """Pixels in [-1, 1] to the posterior's (mean, log-variance); (f - 1) // 4 + 1 latent
        frames, an eighth of the size."""
        return posterior(self.moments(video, strips))

    def moments(
        self, video: Float[Array, "b f h w c"], strips: int = 1
    ) -> Float[Array, "b t h2 w2 z2"]:
        """What `posterior` reads."""
        return in_chunks(self.encoder, video, ENCODE_CHUNK, cut(strips, video.shape[2]))

    def decode(
        self, latents: Float[Array, "b t h w z"], strips: int = 1
    ) -> Float[Array, "b f h2 w2 c"]:
        """Unscaled latents to pixels, not clipped: 4 (t - 1) + 1 frames where t is odd, 4 t where
        it is even."""
        return in_chunks(self.decoder, latents, DECODE_CHUNK, cut(strips, 8 * latents.shape[2]))


def cut(strips: int, finest: int) -> Strips:
    """Strips at every resolution, of about as many values each as a strip of the `finest` rows has.
    Each is a whole number of latent rows."""
    if finest // 8 % strips:
        raise ValueError(f"strips must divide the {finest // 8} latent rows: got {strips}")

    def at(rows: int) -> int:
        most = max(1, strips * rows**2 // finest**2)
        return max(count for count in range(1, most + 1) if finest // 8 % count == 0)

    return at


def strips_within(
    budget: int, config: VAEConfig, rows: int, columns: int, itemsize: int = 2
) -> int:
    """The fewest strips with which one device decodes latents of so many rows and columns within
    `budget` bytes. It is an estimate: for 480x720 in bfloat16 and six strips it says 9.7 GiB, and
    the TPU compiler 9.6. Raises ValueError where none suffice."""
    widths, frames = (
        config.block_out_channels[::-1],
        config.temporal_compression_ratio * DECODE_CHUNK + 1,
    )
    # Channels of all convolutions' inputs, each weighted by its points in units of the latents'.
    kept = 4 * widths[0]
    for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        kept += 4**level * (inputs + (2 * config.layers_per_block + 1) * outputs)
    finest = config.spatial_ratio**2
    kept += finest * widths[-1]
    # Caches, old and new; a layer's input, output and shortcut.
    whole = 2 * 2 * kept + frames * finest * (widths[-2] + 2 * widths[-1])
    # What a convolution reads, made, extended, and shifted for each of three columns.
    strip = (frames + 2) * finest * 5 * widths[-2]
    sizes = {
        count: itemsize * rows * columns * (whole + strip // count)
        for count in range(1, rows + 1)
        if rows % count == 0
    }
    if fitting := [count for count, size in sizes.items() if size <= budget]:
        return fitting[0]
    raise ValueError(
        f"decoding {rows}x{columns} latents must fit {budget / 2**30:.1f} GiB: it takes {sizes[rows] / 2**30:.1f} GiB in {rows} strips; "
        "use more devices, a smaller size, or the reference's tiles (vae_tiling)"
    )


def posterior(
    moments: Float[Array, "b t h w z2"],
) -> tuple[Float[Array, "b t h w z"], Float[Array, "b t h w z"]]:
    """(mean, log-variance), the latter within what the reference allows."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def sample_posterior(
    mean: Float[Array, "b t h w z"],
    log_variance: Float[Array, "b t h w z"],
    noise: Float[Array, "b t h w z"],
) -> Float[Array, "b t h w z"]:
    """mean + exp(log_variance / 2) noise."""
    deviation = jnp.exp(0.5 * log_variance.astype(jnp.float32))
    return (mean.astype(jnp.float32) + deviation * noise.astype(jnp.float32)).astype(mean.dtype)


def in_chunks(
    network: Encoder | Decoder, x: Float[Array, "b f h w c"], chunk: int, strips: Strips
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Runs `network` over time: the remainder joins the first chunk, and all chunks are one scanned
    program that carries what the convolutions keep."""
    extra = x.shape[1] % chunk
    if x.shape[1] <= chunk + extra:
        return network(x, Past(), strips)
    if extra > 1:
        raise ValueError(
            f"frames of a video in several chunks must be {chunk}k or {chunk}k+1: got {x.shape[1]}"
        )
    # Every chunk comes with the frame before it, where the first one has a frame more: it is the
    # others' idle frame.
    starts = range(0, x.shape[1] - extra, chunk)
    parts = jnp.stack([x[:, start : start + chunk + extra] for start in starts])
    graph, params = nnx.split(network)

    def one(
        kept: list[Kept] | None, part: Float[Array, "b f h w c"], first: Bool[Array, ""] | bool
    ) -> tuple[list[Kept], Array]:
        past = Past(kept, first)
        y = nnx.merge(graph, params)(part, past, strips)
        return past.next, y

    nothing = jax.tree.map(
        lambda kept: jnp.zeros(kept.shape, kept.dtype),
        jax.eval_shape(lambda part: one(None, part, True)[0], parts[0]),
    )
    _, y = lax.scan(
        lambda kept, given: one(kept, *given), nothing, (parts, jnp.arange(len(starts)) == 0)
    )
    rest = rearrange(y[1:, :, extra:], "chunks b f h w c -> b (chunks f) h w c")
    return jnp.concatenate([y[0], rest], axis=1)


def spread(x: Float[Array, "b t h w c"], size: tuple[int, ...]) -> Float[Array, "b f h2 w2 c"]:
    """Nearest-neighbour resize by whole factors to (frames, rows, columns). The first frame of an
    odd number is not repeated in time."""
    frames, height, width = size
    x = jnp.repeat(jnp.repeat(x, height // x.shape[2], axis=2), width // x.shape[3], axis=3)
    if frames % 2 and frames > 1:
        return jnp.concatenate(
            [x[:, :1], jnp.repeat(x[:, 1:], (frames - 1) // (x.shape[1] - 1), axis=1)], axis=1
        )
    return jnp.repeat(x, frames // x.shape[1], axis=1)
