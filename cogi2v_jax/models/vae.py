"""The 3-D causal VAE. Frames go through in the reference's temporal chunks, each seeing the last two frames of the one before it through
every convolution's cache; chunk sizes and the statistics taken over a chunk are part of the numerics, not tuning."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ..config import VAEConfig
from ..layers import Conv, GroupNorm, Linear, convolve, param, silu

ENCODE_CHUNK = 8  # pixel frames
DECODE_CHUNK = 2  # latent frames
EPSILON = 1e-6  # of the norms that the reference keeps from the config's norm_eps


class Past:
    """The two frames before a chunk at every causal convolution, in the order the network visits them; `next` collects the same for the
    chunk to come. At the start of a video there are none, and the first frame stands in for them."""

    def __init__(self, frames: Sequence[Float[Array, "b 2 h w c"]] | None = None):
        self._frames: Iterator[Float[Array, "b 2 h w c"]] | None = None if frames is None else iter(frames)
        self.next: list[Float[Array, "b 2 h w c"]] = []

    def extend(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f+2 h w c"]:
        before = jnp.repeat(x[:, :1], 2, axis=1) if self._frames is None else next(self._frames)
        x = jnp.concatenate([before, x], axis=1)
        self.next.append(x[:, -2:])
        return x


class CausalConv(nnx.Module):
    """3x3x3, seeing the present and two past frames: the sum of one 2-D convolution a time tap, which XLA runs faster than its 3-D form."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = (None, None, None, "inputs", "channels")
        self.kernel = param((3, 3, 3, inputs, outputs), axes, dtype, rngs, (27 * inputs) ** -0.5)
        self.bias = param((outputs,), ("channels",), dtype, rngs, 0.02)

    def __call__(self, x: Float[Array, "b f h w c"], past: Past) -> Float[Array, "b f h w c2"]:
        frames = x.shape[1]
        x = past.extend(x)
        y = sum(convolve(x[:, tap : tap + frames], kernel, 1, (1, 1)) for tap, kernel in enumerate(self.kernel[...]))
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class SpatialNorm(nnx.Module):
    """A group norm whose scale and offset come from the latents. They are made at latent resolution and repeated, which a 1x1 convolution
    of nearest-resized latents equals exactly, at a fraction of the work."""

    def __init__(self, channels: int, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config.norm_num_groups, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.scale = Linear(config.latent_channels, channels, axes=(None, "channels"), dtype=dtype, rngs=rngs)
        self.shift = Linear(config.latent_channels, channels, axes=(None, "channels"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], latents: Float[Array, "b t h2 w2 z"]) -> Float[Array, "b f h w c"]:
        scale, shift = (spread(part(latents), x.shape[1:4]).astype(jnp.float32) for part in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class Resnet(nnx.Module):
    """norm, silu, conv, twice, around a shortcut. The kind of norm says whether it follows the latents, as in the decoder."""

    def __init__(self, inputs: int, outputs: int, norm: type, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_1 = norm(inputs, config, dtype=dtype, rngs=rngs)
        self.conv_1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm_2 = norm(outputs, config, dtype=dtype, rngs=rngs)
        self.conv_2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = Linear(inputs, outputs, axes=("inputs", "channels"), dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b f h w c"], latents: Float[Array, "b t h2 w2 z"] | None, past: Past) -> Float[Array, "b f h w c2"]:
        y = self.conv_1(silu(self.norm_1(x, latents)).astype(x.dtype), past)
        y = self.conv_2(silu(self.norm_2(y, latents)).astype(x.dtype), past)
        return (x if self.shortcut is None else self.shortcut(x)) + y


class PlainNorm(GroupNorm):
    """The encoder's group norm, under the call the decoder's norm has."""

    def __init__(self, channels: int, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(channels, config.norm_num_groups, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], latents: None = None) -> Float[Array, "b f h w c"]:
        return super().__call__(x)


class Stage(nnx.Module):
    """Resnets of one resolution, then a change of it."""

    def __init__(
        self, widths: Sequence[int], norm: type, resample: nnx.Module | None, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.resnets = nnx.List([Resnet(inputs, outputs, norm, config, dtype=dtype, rngs=rngs) for inputs, outputs in pairwise(widths)])
        self.resample = resample

    def __call__(
        self, x: Float[Array, "b f h w c"], latents: Float[Array, "b t h2 w2 z"] | None, past: Past
    ) -> Float[Array, "b f2 h3 w3 c2"]:
        for resnet in self.resnets:
            x = resnet(x, latents, past)
        return x if self.resample is None else self.resample(x)


class Downsample(nnx.Module):
    """Halves rows and columns, and frames too where `time`: pairs are averaged, and the first of an odd number stays itself."""

    def __init__(self, channels: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)
        self.time = time

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 c"]:
        if self.time and x.shape[1] > 1:
            odd = x.shape[1] % 2
            pairs = rearrange(x[:, odd:].astype(jnp.float32), "b (f two) h w c -> b f two h w c", two=2).mean(axis=2)
            x = jnp.concatenate([x[:, :odd], pairs.astype(x.dtype)], axis=1)
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles rows and columns by repeating, and frames too where `time`, save the first of an odd number."""

    def __init__(self, channels: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, padding=(1, 1), dtype=dtype, rngs=rngs)
        self.time = time

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 c"]:
        frames, height, width = x.shape[1:4]
        if self.time and frames > 1:
            frames = 2 * frames - frames % 2
        return self.conv(spread(x, (frames, 2 * height, 2 * width)))


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, keys = config.block_out_channels, {"dtype": dtype, "rngs": rngs}
        self.conv_in = CausalConv(config.in_channels, widths[0], **keys)
        stages = []
        for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            down = Downsample(outputs, level < 2, **keys) if level < len(widths) - 1 else None
            stages.append(Stage((inputs, *[outputs] * config.layers_per_block), PlainNorm, down, config, **keys))
        self.stages = nnx.List(stages)
        self.middle = Stage([widths[-1]] * 3, PlainNorm, None, config, **keys)
        self.norm_out = GroupNorm(widths[-1], config.norm_num_groups, epsilon=EPSILON, **keys)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **keys)

    def __call__(self, x: Float[Array, "b f h w c"], past: Past) -> Float[Array, "b t h2 w2 c2"]:
        x = self.conv_in(x, past)
        for stage in (*self.stages, self.middle):
            x = stage(x, None, past)
        return self.conv_out(silu(self.norm_out(x)).astype(x.dtype), past)


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, keys = config.block_out_channels[::-1], {"dtype": dtype, "rngs": rngs}
        self.conv_in = CausalConv(config.latent_channels, widths[0], **keys)
        self.middle = Stage([widths[0]] * 3, SpatialNorm, None, config, **keys)
        stages = []
        for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            up = Upsample(outputs, level < 2, **keys) if level < len(widths) - 1 else None
            stages.append(Stage((inputs, *[outputs] * (config.layers_per_block + 1)), SpatialNorm, up, config, **keys))
        self.stages = nnx.List(stages)
        self.norm_out = SpatialNorm(widths[-1], config, **keys)
        self.conv_out = CausalConv(widths[-1], config.out_channels, **keys)

    def __call__(self, latents: Float[Array, "b t h w z"], past: Past) -> Float[Array, "b f h2 w2 c"]:
        x = self.conv_in(latents, past)
        for stage in (self.middle, *self.stages):
            x = stage(x, latents, past)
        return self.conv_out(silu(self.norm_out(x, latents)).astype(x.dtype), past)


class VAE(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, video: Float[Array, "b f h w c"]) -> tuple[Float[Array, "b t h2 w2 z"], Float[Array, "b t h2 w2 z"]]:
        """Pixels in [-1, 1] to the posterior's (mean, log-variance); (f - 1) // 4 + 1 latent frames, an eighth of the size."""
        moments = in_chunks(self.encoder, video, ENCODE_CHUNK)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b t h w z"]) -> Float[Array, "b f h2 w2 c"]:
        """Unscaled latents to pixels, not clipped: 4 (t - 1) + 1 frames where t is odd, 4 t where it is even."""
        return in_chunks(self.decoder, latents, DECODE_CHUNK)


def sample_posterior(
    mean: Float[Array, "b t h w z"], log_variance: Float[Array, "b t h w z"], noise: Float[Array, "b t h w z"]
) -> Float[Array, "b t h w z"]:
    """mean + exp(log_variance / 2) noise."""
    deviation = jnp.exp(0.5 * log_variance.astype(jnp.float32))
    return (mean.astype(jnp.float32) + deviation * noise.astype(jnp.float32)).astype(mean.dtype)


def in_chunks(network: Encoder | Decoder, x: Float[Array, "b f h w c"], chunk: int) -> Float[Array, "b f2 h2 w2 c2"]:
    """Runs `network` over time: the remainder joins the first chunk, and the equal ones that follow are one scanned program that carries
    the convolutions' past."""
    first = min(x.shape[1], chunk + x.shape[1] % chunk)
    past = Past()
    head = network(x[:, :first], past)
    if first == x.shape[1]:
        return head
    rest = rearrange(x[:, first:], "b (chunks f) h w c -> chunks b f h w c", f=chunk)
    graph, params = nnx.split(network)

    def advance(frames: list[Array], part: Float[Array, "b f h w c"]) -> tuple[list[Array], Float[Array, "b f2 h2 w2 c2"]]:
        past = Past(frames)
        y = nnx.merge(graph, params)(part, past)
        return past.next, y

    _, tail = lax.scan(advance, past.next, rest)
    return jnp.concatenate([head, rearrange(tail, "chunks b f h w c -> b (chunks f) h w c")], axis=1)


def spread(x: Float[Array, "b t h w c"], size: tuple[int, ...]) -> Float[Array, "b f h2 w2 c"]:
    """Nearest-neighbour resize by whole factors to (frames, rows, columns). The first frame of an odd number is not repeated in time."""
    frames, height, width = size
    x = jnp.repeat(jnp.repeat(x, height // x.shape[2], axis=2), width // x.shape[3], axis=3)
    if frames % 2 and frames > 1:
        return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], (frames - 1) // (x.shape[1] - 1), axis=1)], axis=1)
    return jnp.repeat(x, frames // x.shape[1], axis=1)
