"""The 3-D causal VAE (diffusers' AutoencoderKLCogVideoX): layers, encoder and decoder, the VAE, the
posterior. vae_chunks.py runs the encoder and the decoder chunk by chunk over time.

The input of every convolution is an elementwise function of a stored tensor. A layer can therefore
run over strips of rows (vae_strips.py): only its input, its output and the convolution cache exist
as a whole. `strips` says how many strips each resolution has."""

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
from .layers import Conv, GroupNorm, Linear, NormCoefficients, convolve, param, silu
from .vae_chunks import DECODE_CHUNK, ENCODE_CHUNK, Cached, ConvCache, in_chunks
from .vae_strips import Strip, in_strips, strip_counts

EPSILON = 1e-6  # of the norms for which the reference ignores the config's norm_eps

AtStrip = Callable[[Strip], Float[Array, "b f h w c"]]  # a strip's rows, computed when called
StripCounts = Callable[[int], int]  # the number of strips of a picture with so many rows
NewNorm = Callable[[int], nnx.Module]  # a norm of so many channels


class CausalConv(nnx.Module):
    """3x3x3, over the present and the two past frames. `init` is dtype and rngs, here and below."""

    def __init__(self, inputs: int, outputs: int, **init: Any):
        axes = (None, None, None, "inputs", "channels")
        self.kernel = param((3, 3, 3, inputs, outputs), axes, scale=(27 * inputs) ** -0.5, **init)
        self.bias = param((outputs,), ("channels",), scale=0.02, **init)

    def __call__(
        self, x_at: AtStrip, cache: ConvCache, strips: int = 1, residual_at: AtStrip | None = None
    ) -> Float[Array, "b f h w c2"]:
        """The convolution of x, plus the residual. `x_at` returns a strip with its halo,
        `residual_at` one without."""
        cached = cache.pop()

        def layer(strip: Strip) -> tuple[Float[Array, "b f h2 w c2"], Float[Array, "b 2 h2 w c"]]:
            x = strip.zero_outside(x_at(strip))
            past = None if cached is None else strip.zero_outside(strip.with_halo(cached))
            x = cache.prepend(x, past)
            y = convolve(x, self.kernel[...], self.bias[...], strip.padding, (1, 1))
            y = y if residual_at is None else residual_at(strip) + y
            return y, strip.without_halo(x[:, -2:])

        y, last_frames = in_strips(layer, strips)
        cache.new.append(last_frames)
        return y


class SpatialNorm(nnx.Module):
    """Group norm with scale and shift from the latents. Both stay at latent resolution until they
    are applied. This equals the reference's 1x1 convolution of nearest-resized latents exactly, at
    a fraction of the work."""

    def __init__(self, channels: int, config: VAEConfig, **init: Any):
        self.norm = GroupNorm(channels, config.norm_num_groups, epsilon=EPSILON, **init)
        axes = (None, "channels")
        self.scale = Linear(config.latent_channels, channels, axes=axes, **init)
        self.shift = Linear(config.latent_channels, channels, axes=axes, **init)

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        frame_weights: Float[Array, " f"],
        latents: Float[Array, "b t h2 w2 z"],
    ) -> NormCoefficients:
        scale, shift = (part(latents).astype(jnp.float32) for part in (self.scale, self.shift))
        plain = self.norm(x, frame_weights)
        return NormCoefficients(plain.mean, plain.scale * scale, plain.shift * scale + shift)


def norm_silu(
    norm: Any,
    x: Float[Array, "b f h w c"],
    latents: Float[Array, "b t h2 w2 z"] | None,
    cache: ConvCache,
) -> AtStrip:
    """silu(norm(x)), applied strip by strip. A decoder's norm takes the latents."""
    weights = cache.frame_weights(x.shape[1])
    mean, *affine = norm(x, weights) if latents is None else norm(x, weights, latents)

    def at(strip: Strip) -> Float[Array, "b f h w c"]:
        rows = strip.with_halo(x)
        scale, shift = (resize_at(strip, part, rows.shape[1:4]) for part in affine)
        return silu((rows.astype(jnp.float32) - mean) * scale + shift).astype(x.dtype)

    return at


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
    """norm, silu, conv, twice, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, norm: NewNorm, **init: Any):
        self.norm_1 = norm(inputs)
        self.conv_1 = CausalConv(inputs, outputs, **init)
        self.norm_2 = norm(outputs)
        self.conv_2 = CausalConv(outputs, outputs, **init)
        axes = ("inputs", "channels")
        self.shortcut = Linear(inputs, outputs, axes=axes, **init) if inputs != outputs else None

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        latents: Float[Array, "b t h2 w2 z"] | None,
        cache: ConvCache,
        strips: int,
    ) -> Float[Array, "b f h w c2"]:
        def residual_at(strip: Strip) -> Float[Array, "b f h3 w c2"]:
            return strip.own(x) if self.shortcut is None else self.shortcut(strip.own(x))

        y = self.conv_1(norm_silu(self.norm_1, x, latents, cache), cache, strips)
        return self.conv_2(norm_silu(self.norm_2, y, latents, cache), cache, strips, residual_at)


class Stage(nnx.Module):
    """Resnets at one resolution, then an optional change of resolution."""

    def __init__(
        self, widths: Sequence[int], norm: NewNorm, resample: nnx.Module | None, **init: Any
    ):
        self.resnets = nnx.List([Resnet(*pair, norm, **init) for pair in pairwise(widths)])
        self.resample = resample

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        latents: Float[Array, "b t h2 w2 z"] | None,
        cache: ConvCache,
        strips: StripCounts,
    ) -> Float[Array, "b f2 h3 w3 c2"]:
        for _, equal in groupby(self.resnets, lambda resnet: resnet.conv_1.kernel.shape):
            x = run_equal(list(equal), x, latents, cache, strips(x.shape[2]))
        return x if self.resample is None else self.resample(x, strips)


def run_equal(
    resnets: Sequence[Resnet],
    x: Float[Array, "b f h w c"],
    latents: Float[Array, "b t h2 w2 z"] | None,
    cache: ConvCache,
    strips: int,
) -> Float[Array, "b f h w c2"]:
    """Resnets of equal shapes in turn, as one scan, which compiles in a fraction of the time."""
    graphs, params = zip(*(nnx.split(resnet) for resnet in resnets), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def run(
        x: Float[Array, "b f h w c"], given: tuple[Any, Cached]
    ) -> tuple[Float[Array, "b f h w c2"], Cached]:
        own_cache = ConvCache(given[1], cache.is_first)
        x = nnx.merge(graphs[0], given[0])(x, latents, own_cache, strips)
        return x, own_cache.new

    if len(resnets) == 1:
        return resnets[0](x, latents, cache, strips)
    x, cached = lax.scan(run, x, (params, cache.pop()))
    cache.new.append(cached)
    return x


class Downsample(nnx.Module):
    """Halves rows and columns by a strided convolution. With `time`, halves frames too by averaging
    pairs, of an odd number all but the first."""

    def __init__(self, channels: int, time: bool, **init: Any):
        self.conv = Conv(channels, channels, 3, stride=2, **init)
        self.time = time

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: StripCounts
    ) -> Float[Array, "b f2 h2 w2 c"]:
        if self.time and x.shape[1] > 1:
            odd = x.shape[1] % 2
            later = x[:, odd:].astype(jnp.float32)
            means = rearrange(later, "b (f two) h w c -> b f two h w c", two=2).mean(axis=2)
            x = jnp.concatenate([x[:, :odd], means.astype(x.dtype)], axis=1)
        return self.conv(x, rows=(0, 1), columns=(0, 1))


class Upsample(nnx.Module):
    """Doubles rows and columns by repeating, then convolves. With `time`, doubles frames too, of an
    odd number all but the first."""

    def __init__(self, channels: int, time: bool, **init: Any):
        self.conv = Conv(channels, channels, 3, **init)
        self.time = time

    def __call__(
        self, x: Float[Array, "b f h w c"], strips: StripCounts
    ) -> Float[Array, "b f2 h2 w2 c"]:
        frames = x.shape[1]
        if self.time and frames > 1:
            frames = 2 * frames - frames % 2

        def layer(strip: Strip) -> Float[Array, "b f2 h3 w2 c"]:
            rows = strip.zero_outside(strip.with_halo(x))
            rows = resize(rows, (frames, 2 * rows.shape[2], 2 * rows.shape[3]))
            return self.conv(strip.without_halo(rows), rows=strip.padding, columns=(1, 1))

        return in_strips(layer, strips(2 * x.shape[2]))


class Encoder(nnx.Module):
    """A chunk of pixels to the moments of its latents."""

    def __init__(self, config: VAEConfig, **init: Any):
        widths, depth = config.block_out_channels, config.layers_per_block
        norm = partial(GroupNorm, groups=config.norm_num_groups, **init)
        inner = partial(norm, epsilon=config.norm_eps)
        self.conv_in = CausalConv(config.in_channels, widths[0], **init)
        stages = []
        for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
            down = Downsample(outputs, level < 2, **init) if level < len(widths) - 1 else None
            stages.append(Stage([inputs, *[outputs] * depth], inner, down, **init))
        self.stages = nnx.List(stages)
        self.middle = Stage([widths[-1]] * 3, inner, None, **init)
        self.norm_out = norm(widths[-1], epsilon=EPSILON)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **init)

    def __call__(
        self, pixels: Float[Array, "b f h w c"], cache: ConvCache, strips: StripCounts
    ) -> Float[Array, "b t h2 w2 c2"]:
        x = self.conv_in(lambda strip: strip.with_halo(pixels), cache, strips(pixels.shape[2]))
        for stage in (*self.stages, self.middle):
            x = stage(x, None, cache, strips)
        return self.conv_out(norm_silu(self.norm_out, x, None, cache), cache)


class Decoder(nnx.Module):
    """A chunk of latents to pixels."""

    def __init__(self, config: VAEConfig, **init: Any):
        widths, depth = config.block_out_channels[::-1], config.layers_per_block + 1
        norm = partial(SpatialNorm, config=config, **init)
        self.conv_in = CausalConv(config.latent_channels, widths[0], **init)
        self.middle = Stage([widths[0]] * 3, norm, None, **init)
        stages = []
        for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
            up = Upsample(outputs, level < 2, **init) if level < len(widths) - 1 else None
            stages.append(Stage([inputs, *[outputs] * depth], norm, up, **init))
        self.stages = nnx.List(stages)
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, **init)

    def __call__(
        self, latents: Float[Array, "b t h w z"], cache: ConvCache, strips: StripCounts
    ) -> Float[Array, "b f h2 w2 c"]:
        x = self.conv_in(lambda strip: strip.with_halo(latents), cache)
        for stage in (self.middle, *self.stages):
            x = stage(x, latents, cache, strips)
        x_at = norm_silu(self.norm_out, x, latents, cache)
        return self.conv_out(x_at, cache, strips(x.shape[2]))


class VAE(nnx.Module):
    """`strips` is static and must divide the latent rows. It bounds the memory at the finest
    resolution; results don't depend on it."""

    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.spatial_ratio = config.spatial_ratio
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.encoder.conv_in.kernel.dtype

    def encode(
        self, video: Float[Array, "b f h w c"], strips: int = 1
    ) -> Float[Array, "b t h2 w2 z2"]:
        """Pixels in [-1, 1] to moments, which `posterior` splits: (f - 1) // 4 + 1 latent frames,
        an eighth of the rows and columns."""
        return in_chunks(self.encoder, video, ENCODE_CHUNK, strip_counts(strips, video.shape[2]))

    def decode(
        self, latents: Float[Array, "b t h w z"], strips: int = 1
    ) -> Float[Array, "b f h2 w2 c"]:
        """Unscaled latents to pixels, not clipped: 4 (t - 1) + 1 frames if t is odd, 4 t if it is
        even."""
        counts = strip_counts(strips, 8 * latents.shape[2])
        return in_chunks(self.decoder, latents, DECODE_CHUNK, counts)


def strips_within(
    budget: int, config: VAEConfig, rows: int, columns: int, itemsize: int = 2
) -> int:
    """The fewest strips with which one device decodes latents of `rows` and `columns` within
    `budget` bytes. An estimate: for 480x720 in bfloat16 and six strips it gives 9.7 GiB, the TPU
    compiler 9.6. Raises ValueError if no number of strips is enough."""
    widths, finest = config.block_out_channels[::-1], config.spatial_ratio**2
    frames = config.temporal_compression_ratio * DECODE_CHUNK + 1
    # Channels of all convolutions' inputs, multiplied by their points per latent point.
    channels = 4 * widths[0] + finest * widths[-1]
    for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
        channels += 4**level * (inputs + (2 * config.layers_per_block + 1) * outputs)
    # The caches, old and new, of two frames each; a layer's input, output and shortcut.
    whole = 2 * 2 * channels + frames * finest * (widths[-2] + 2 * widths[-1])
    # A convolution's input: normalised, with its past frames, and shifted for each of 3 columns.
    strip = (frames + 2) * finest * 5 * widths[-2]
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
