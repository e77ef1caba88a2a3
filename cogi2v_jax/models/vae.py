"""The 3-D causal VAE (diffusers' AutoencoderKLCogVideoX): layers, encoder and decoder, the VAE, the
posterior. vae_chunks.py runs the encoder and the decoder chunk by chunk over time.

The input of every convolution is an elementwise function of a stored tensor. A layer can therefore
run over strips of rows (vae_strips.py): only stored tensors and the convolution cache exist as a
whole, and a layer overwrites those that nothing reads after it. `strips` says how many strips each
resolution has."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ..config import VAEConfig
from .convolutions import Conv, convolve
from .layers import GroupNorm, Linear, NormCoefficients, param, silu
from .vae_chunks import DECODE_CHUNK, ENCODE_CHUNK, Cached, ConvCache, in_chunks
from .vae_strips import Strip, in_strips, strip_counts

EPSILON = 1e-6  # of the norms for which the reference ignores the config's norm_eps

StripCounts = Callable[[int], int]  # the number of strips of a picture with so many rows
NewNorm = Callable[[int], nnx.Module]  # a norm of so many channels


class CausalConv(nnx.Module):
    """3x3x3, over the present and the two past frames."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype):
        axes = (None, None, None, "inputs", "channels")
        self.kernel = param((3, 3, 3, inputs, outputs), axes, dtype)
        self.bias = param((outputs,), ("channels",), dtype)

    def __call__(
        self,
        strip: Strip,
        cached: Float[Array, "b 2 h w c"] | None,
        x: Float[Array, "b f h w c"],
        cache: ConvCache,
    ) -> tuple[Float[Array, "b 2 h2 w c"], Float[Array, "b f h2 w c2"]]:
        """(the frames to cache, the convolution), both without halo, of a strip with its halo."""
        x = strip.zero_outside(x)
        if strip.count > 1 and cached is not None:
            # All of the cache that a strip reads is read before the strip overwrites its own part.
            # Without this order the compiler copies the whole cache for every strip.
            x, cached = lax.optimization_barrier((x, strip.zero_outside(cached)))
        still = cached is None and x.shape[1] == 1
        x = cache.prepend(x, cached)
        y = convolve(x, self.kernel[...], self.bias[...], strip.padding, (1, 1), 1, still)
        return strip.without_halo(x[:, -2:]), y


class SpatialNorm(nnx.Module):
    """Group norm with scale and shift from the latents. Both stay at latent resolution until they
    are applied. This equals the reference's 1x1 convolution of nearest-resized latents exactly, at
    a fraction of the work."""

    def __init__(self, channels: int, config: VAEConfig, *, dtype: jnp.dtype):
        self.norm = GroupNorm(channels, config.norm_num_groups, epsilon=EPSILON, dtype=dtype)
        axes = (None, "channels")
        self.scale = Linear(config.latent_channels, channels, axes=axes, dtype=dtype)
        self.shift = Linear(config.latent_channels, channels, axes=axes, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        frame_weights: Float[Array, " f"],
        latents: Float[Array, "b t h2 w2 z"],
    ) -> NormCoefficients:
        scale, shift = (part(latents).astype(jnp.float32) for part in (self.scale, self.shift))
        plain = self.norm(x, frame_weights)
        return NormCoefficients(plain.mean, plain.scale * scale, plain.shift * scale + shift)


def norm_silu_conv(
    norm: Any,
    conv: CausalConv,
    x: Float[Array, "b f h w c"],
    latents: Float[Array, "b t h2 w2 z"] | None,
    cache: ConvCache,
) -> Callable[..., tuple[Array, Array]]:
    """conv(silu(norm(x))) as a layer that is given strips of x. A decoder's norm takes the
    latents."""
    weights = cache.frame_weights(x.shape[1])
    mean, *affine = norm(x, weights) if latents is None else norm(x, weights, latents)

    def layer(strip: Strip, cached: Any, rows: Array) -> tuple[Array, Array]:
        # Columns are not repeated but broadcast: whole, the compiler stores scale and shift, which
        # are each twice as large as rows in bfloat16.
        size = (*rows.shape[1:3], affine[0].shape[3])
        scale, shift = (resize_at(strip, part, size)[..., None, :] for part in affine)
        x = rearrange(rows.astype(jnp.float32), "b f h (w k) c -> b f h w k c", w=size[2])
        x = silu((x - mean[..., None, :]) * scale + shift).astype(rows.dtype)
        return conv(strip, cached, rearrange(x, "b f h w k c -> b f h (w k) c"), cache)

    return layer


def resize_at(
    strip: Strip, x: Float[Array, "b t h w c"], size: tuple[int, ...]
) -> Float[Array, "b f h2 w2 c"]:
    """The rows of x at a strip with its halo, resized to `size`, which is the strip's."""
    if x.shape[1:4] == (1, 1, 1):  # it broadcasts
        return x
    x, (frames, height, width) = strip.with_halo(x), size
    factor = (height - 2 * strip.halo) // (x.shape[2] - 2 * strip.halo)
    # The coarse halo has `factor` rows of x on each side, of which one is needed.
    return strip.without_halo(resize(x, (frames, factor * x.shape[2], width)), factor - 1)


def resize(x: Float[Array, "b t h w c"], size: tuple[int, ...]) -> Float[Array, "b f h2 w2 c"]:
    """Nearest-neighbour resize by whole factors to (frames, rows, columns). The first frame of an
    odd number is not repeated in time."""
    frames, height, width = size
    x = jnp.repeat(jnp.repeat(x, height // x.shape[2], axis=2), width // x.shape[3], axis=3)
    if frames % 2 and frames > 1:
        first, later = x[:, :1], x[:, 1:]
        later = jnp.repeat(later, (frames - 1) // later.shape[1], axis=1)
        return jnp.concatenate([first, later], axis=1)
    return jnp.repeat(x, frames // x.shape[1], axis=1)


class Resnet(nnx.Module):
    """norm, silu, conv, twice, around a shortcut. x comes in parts of its channels. Where these
    have as many channels as the result, the residual and the first convolution overwrite them."""

    def __init__(self, inputs: int, outputs: int, norm: NewNorm, *, dtype: jnp.dtype):
        self.norm_1 = norm(inputs)
        self.conv_1 = CausalConv(inputs, outputs, dtype=dtype)
        self.norm_2 = norm(outputs)
        self.conv_2 = CausalConv(outputs, outputs, dtype=dtype)
        axes = ("inputs", "channels")
        self.shortcut = (
            Linear(inputs, outputs, axes=axes, dtype=dtype) if inputs != outputs else None
        )

    def __call__(
        self,
        x: Sequence[Float[Array, "b f h w c"]],
        latents: Float[Array, "b t h2 w2 z"] | None,
        cache: ConvCache,
        strips: int,
    ) -> Float[Array, "b f h w c2"]:
        conv_1 = norm_silu_conv(
            self.norm_1, self.conv_1, jnp.concatenate(x, axis=-1), latents, cache
        )

        def first(strip: Strip, cached: Any, *x: Array) -> Sequence[Any]:
            rows = jnp.concatenate(x, axis=-1)
            cached, y = conv_1(strip, cached, rows)
            shortcut = self.shortcut and self.shortcut(strip.without_halo(rows))
            return cached, shortcut, y

        residual, y = cache.in_strips(first, strips, *x)
        conv_2 = norm_silu_conv(self.norm_2, self.conv_2, y, latents, cache)

        def second(strip: Strip, cached: Any, residual: Array, y: Array) -> Sequence[Array]:
            cached, y = conv_2(strip, cached, y)
            return cached, strip.without_halo(residual) + y

        return cache.in_strips(second, strips, residual, y)[0]


class Stage(nnx.Module):
    """Resnets at one resolution, then an optional change of resolution."""

    def __init__(
        self, widths: Sequence[int], norm: NewNorm, resample: nnx.Module | None, *, dtype: jnp.dtype
    ):
        self.resnets = nnx.List([Resnet(*pair, norm, dtype=dtype) for pair in pairwise(widths)])
        self.resample = resample

    def __call__(
        self,
        x: Sequence[Float[Array, "b f h w c"]],
        latents: Float[Array, "b t h2 w2 z"] | None,
        cache: ConvCache,
        strips: StripCounts,
    ) -> Sequence[Float[Array, "b f2 h3 w3 c2"]]:
        for _, equal in groupby(self.resnets, lambda resnet: resnet.conv_1.kernel.shape):
            x = [run_equal(list(equal), x, latents, cache, strips(x[0].shape[2]))]
        return x if self.resample is None else self.resample(*x, strips)


def run_equal(
    resnets: Sequence[Resnet],
    x: Sequence[Float[Array, "b f h w c"]],
    latents: Float[Array, "b t h2 w2 z"] | None,
    cache: ConvCache,
    strips: int,
) -> Float[Array, "b f h w c2"]:
    """Resnets of equal shapes in turn, as one scan, which compiles in a fraction of the time."""
    if len(resnets) == 1:
        return resnets[0](x, latents, cache, strips)
    graphs, params = zip(*(nnx.split(resnet) for resnet in resnets), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def run(carry: tuple[Array, Cached], given: tuple[Any, Array]) -> tuple[Any, Cached]:
        (x, cached), (params, index) = carry, given
        own_cache = ConvCache(jax.tree.map(lambda frames: frames[index], cached), cache.is_first)
        x = nnx.merge(graphs[0], params)([x], latents, own_cache, strips)
        if cached is None:
            return (x, None), own_cache.new
        # What a scan carries is overwritten in place; what it returns would be a second cache.
        cached = jax.tree.map(lambda old, new: old.at[index].set(new), cached, own_cache.new)
        return (x, cached), None

    indices = jnp.arange(len(resnets))
    (y, cached), new = lax.scan(run, (x[0], cache.pop()), (params, indices))
    cache.new.append(new if cached is None else cached)
    return y


class Downsample(nnx.Module):
    """Halves rows and columns by a strided convolution. With `time`, halves frames too by averaging
    pairs, of an odd number all but the first."""

    def __init__(self, channels: int, time: bool, *, dtype: jnp.dtype):
        self.conv = Conv(channels, channels, 3, stride=2, dtype=dtype)
        self.time = time

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: StripCounts
    ) -> Sequence[Float[Array, "b f2 h2 w2 c2"]]:
        if self.time and x.shape[1] > 1:
            odd = x.shape[1] % 2
            later = x[:, odd:].astype(jnp.float32)
            means = rearrange(later, "b (f two) h w c -> b f two h w c", two=2).mean(axis=2)
            x = jnp.concatenate([x[:, :odd], means.astype(x.dtype)], axis=1)
        return [self.conv(x, rows=(0, 1), columns=(0, 1))]


class Upsample(nnx.Module):
    """Doubles rows and columns by repeating, then convolves. With `time`, doubles frames too, of an
    odd number all but the first. Returns the channels in `parts`, which the next layer overwrites
    one by one."""

    def __init__(self, channels: int, time: bool, parts: int, *, dtype: jnp.dtype):
        self.conv = Conv(channels, channels, 3, dtype=dtype)
        self.time, self.parts = time, parts

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: StripCounts
    ) -> Sequence[Float[Array, "b f2 h2 w2 c2"]]:
        frames = x.shape[1]
        if self.time and frames > 1:
            frames = 2 * frames - frames % 2

        def layer(strip: Strip, rows: Float[Array, "b f h w c"]) -> Sequence[Array]:
            rows = strip.zero_outside(rows)
            rows = resize(rows, (frames, 2 * rows.shape[2], 2 * rows.shape[3]))
            y = self.conv(strip.without_halo(rows), rows=strip.padding, columns=(1, 1))
            return jnp.split(y, self.parts, axis=-1)

        return in_strips(layer, strips(2 * x.shape[2]), x)


class Encoder(nnx.Module):
    """A chunk of pixels to the moments of its latents."""

    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype):
        widths, depth = config.block_out_channels, config.layers_per_block
        norm = partial(GroupNorm, groups=config.norm_num_groups, dtype=dtype)
        inner = partial(norm, epsilon=config.norm_eps)
        self.conv_in = CausalConv(config.in_channels, widths[0], dtype=dtype)
        stages = []
        for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
            down = Downsample(outputs, level < 2, dtype=dtype) if level < len(widths) - 1 else None
            stages.append(Stage([inputs, *[outputs] * depth], inner, down, dtype=dtype))
        self.stages = nnx.List(stages)
        self.middle = Stage([widths[-1]] * 3, inner, None, dtype=dtype)
        self.norm_out = norm(widths[-1], epsilon=EPSILON)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, dtype=dtype)

    def __call__(
        self, pixels: Float[Array, "b f h w c"], cache: ConvCache, strips: StripCounts
    ) -> Float[Array, "b t h2 w2 c2"]:
        conv_in = partial(self.conv_in, cache=cache)
        x = cache.in_strips(conv_in, strips(pixels.shape[2]), pixels)
        for stage in (*self.stages, self.middle):
            x = stage(x, None, cache, strips)
        conv_out = norm_silu_conv(self.norm_out, self.conv_out, x[0], None, cache)
        return cache.in_strips(conv_out, 1, x[0])[0]


class Decoder(nnx.Module):
    """A chunk of latents to pixels."""

    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype):
        widths, depth = config.block_out_channels[::-1], config.layers_per_block + 1
        norm = partial(SpatialNorm, config=config, dtype=dtype)
        self.conv_in = CausalConv(config.latent_channels, widths[0], dtype=dtype)
        self.middle = Stage([widths[0]] * 3, norm, None, dtype=dtype)
        stages = []
        neighbours = zip((widths[0], *widths), widths, (*widths[1:], 0), strict=False)
        for level, (inputs, outputs, finer) in enumerate(neighbours):
            parts = 2 if outputs == 2 * finer else 1
            up = Upsample(outputs, level < 2, parts, dtype=dtype) if finer else None
            stages.append(Stage([inputs, *[outputs] * depth], norm, up, dtype=dtype))
        self.stages = nnx.List(stages)
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype)

    def __call__(
        self, latents: Float[Array, "b t h w z"], cache: ConvCache, strips: StripCounts
    ) -> Float[Array, "b f h2 w2 c"]:
        x = cache.in_strips(partial(self.conv_in, cache=cache), 1, latents)
        for stage in (self.middle, *self.stages):
            x = stage(x, latents, cache, strips)
        conv_out = norm_silu_conv(self.norm_out, self.conv_out, x[0], latents, cache)
        return cache.in_strips(conv_out, strips(x[0].shape[2]), x[0])[0]


class VAE(nnx.Module):
    """`strips` is static and must divide the latent rows. It bounds the memory at the finest
    resolution; results don't depend on it."""

    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype):
        self.spatial_ratio = config.spatial_ratio
        self.encoder = Encoder(config, dtype=dtype)
        self.decoder = Decoder(config, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        return self.encoder.conv_in.kernel.dtype

    def encode(
        self, video: Float[Array, "b f h w c"], strips: int = 1
    ) -> Float[Array, "b t h2 w2 z2"]:
        """Pixels in [-1, 1] to moments, which `posterior` splits: (f - 1) // 4 + 1 latent frames,
        a `spatial_ratio`-th of the rows and columns."""
        counts = strip_counts(strips, video.shape[2], self.spatial_ratio)
        return in_chunks(self.encoder, video, ENCODE_CHUNK, counts)

    def decode(
        self, latents: Float[Array, "b t h w z"], strips: int = 1
    ) -> Float[Array, "b f h2 w2 c"]:
        """Unscaled latents to pixels, not clipped: 4 (t - 1) + 1 frames if t is odd, 4 t if it is
        even."""
        counts = strip_counts(strips, self.spatial_ratio * latents.shape[2], self.spatial_ratio)
        return in_chunks(self.decoder, latents, DECODE_CHUNK, counts)


def strips_within(
    budget: int, config: VAEConfig, rows: int, columns: int, itemsize: int = 2
) -> int:
    """The fewest strips with which one device decodes latents of `rows` and `columns` within
    `budget` bytes, beside the weights and the video. An estimate: for 768x1360 in bfloat16 and 32
    strips it gives 14.5 GiB, the TPU compiler 14.4. Raises ValueError if no number of strips is
    enough."""
    widths, finest = config.block_out_channels[::-1], config.spatial_ratio**2
    frames = config.temporal_compression_ratio * DECODE_CHUNK + 1
    # Channels of all convolutions' inputs, multiplied by their points per latent point.
    channels = 4 * widths[0] + finest * widths[-1]
    for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
        channels += 4**level * (inputs + (2 * config.layers_per_block + 1) * outputs)
    # The last upsampling has a quarter as much as its result for input. Where the next layer cannot
    # overwrite the result, its own two come beside it.
    resampled, narrow = widths[-2], 2 * widths[-1]
    wide = resampled + (resampled // 4 if resampled == narrow else narrow)
    whole = 2 * channels + frames * finest * wide
    # A convolution's input: normalised, with its past frames, shifted for each of 3 columns, and
    # the float32 scale of its norm.
    strip = (frames + 2) * finest * 6 * resampled
    sizes = {
        count: itemsize * rows * columns * (whole + strip // count)
        for count in range(1, rows + 1)
        if rows % count == 0
    }
    if fitting := [count for count, size in sizes.items() if size <= budget]:
        return fitting[0]
    raise ValueError(
        f"decoding {rows}x{columns} latents must fit {budget / 2**30:.1f} GiB: it takes "
        f"{sizes[rows] / 2**30:.1f} GiB in {rows} strips; use more devices, a smaller size, or the "
        "reference's tiles (vae_tiling)"
    )


def posterior(
    moments: Float[Array, "b t h w z2"],
) -> tuple[Float[Array, "b t h w z"], Float[Array, "b t h w z"]]:
    """(mean, log-variance), the latter clipped as in the reference."""
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
