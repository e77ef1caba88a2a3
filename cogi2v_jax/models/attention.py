"""Attention backends. Each takes q, k, v [b s d] with a token's heads side by side, applies QK norm
and rotary embedding, attends, and returns [b s d]. Keys from `tokens` on are padding and get no
weight. A backend is a row of BACKENDS; networks reach it through `sharding.Layout`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

from .. import config
from ..kernels.heads import LANES, merge_heads, split_heads, split_rotated_heads
from .layers import LayerNorm, exact, precision, wide
from .positions import Positions

Flat = Float[Array, "b s d"]
Heads = Float[Array, "b s n k"]
Keys = Float[Array, "b s2 n k"]  # or values, without padding
Norms = tuple[LayerNorm, LayerNorm]  # over the channels of a head, of queries and of keys
Given = tuple[Flat, Flat, Flat, Norms]  # q, k and v with their norms

# Plain attention takes queries in slices whose float32 logits about fit a CPU's cache (16 MiB), but
# of no fewer rows than fill a matrix unit.
LOGITS = 4 * 2**20
ROWS = 128
# Of every bfloat16 product on an NVIDIA device: XLA pads other row counts by a copy before and one
# after the product.
NVIDIA_ROWS = 8
FAR = -1e30  # a logit whose weight is zero
ATTENTION = "attention"  # the name of its result, for policies of `jax.checkpoint`


def multiple(count: int, unit: int) -> int:
    """The least multiple of `unit` that is at least `count`."""
    return math.ceil(count / unit) * unit


def pad_end(x: Any, axis: int, count: int) -> Array:
    """Zeros after the end of one axis."""
    return jnp.pad(x, [(0, count if axis == which else 0) for which in range(x.ndim)])


def rotate(x: Heads, positions: Positions) -> Heads:
    """Rotary embedding in float32: rotates the pair of channels i and i + k/2 by the token's
    angle."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = positions.cos[:, None], positions.sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotated_heads(
    q: Flat, k: Flat, v: Flat, norms: Norms, positions: Positions
) -> tuple[Heads, Heads, Heads]:
    """Heads of q and k with QK norm and rotary embedding, rounded once, and of v."""
    width = norms[0].scale.shape[0]
    q, k, v = (rearrange(x, "b s (n k) -> b s n k", k=width) for x in (q, k, v))
    pairs = zip(norms, (q, k), strict=True)
    q, k = (rotate(norm(x), positions).astype(x.dtype) for norm, x in pairs)
    return q, k, v


@jax.custom_vjp
def attend(
    q: Float[Array, "b n q k"], k: Float[Array, "b n s k"], v: Float[Array, "b n s k"]
) -> Float[Array, "b n q k"]:
    """softmax(q k^T / sqrt(width)) v of every head. Softmax and sums are float32. The backward pass
    computes the softmax again, which is as large as the logits."""
    logits = jnp.einsum("bnqk,bnsk->bnqs", q, k, **exact(q)) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    y = jnp.einsum("bnqs,bnsk->bnqk", weights.astype(v.dtype), v, **exact(q))
    return (y / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def _plain_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    return attend(q, k, v), (q, k, v)


def _plain_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    # A CPU takes bfloat16 products of these shapes two or three times as long as float32 ones.
    cpu, others = (partial(_plain_gradients, rounds=rounds) for rounds in (False, True))
    return lax.platform_dependent(*saved, grad, cpu=cpu, default=others)


def _plain_gradients(
    q: Array, k: Array, v: Array, grad: Array, *, rounds: bool
) -> tuple[Array, ...]:
    """Of q, k and v. Products over queries are written with the keys last, in which form a CPU
    takes half of the time."""

    def operand(x: Array) -> Array:
        return x.astype(q.dtype) if rounds else wide(x)

    logits = jnp.einsum("bnqk,bnsk->bnqs", q, k, **exact(q)) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1)
    of_v = jnp.einsum("bnqs,bnqk->bnks", operand(weights), operand(grad), **exact(operand(q)))
    of_weights = jnp.einsum("bnqk,bnsk->bnqs", grad.astype(q.dtype), v, **exact(q))
    mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
    of_logits = operand(weights * (of_weights - mean) * q.shape[-1] ** -0.5)
    of_q = jnp.einsum("bnqs,bnsk->bnqk", of_logits, operand(k), **exact(of_logits))
    of_k = jnp.einsum("bnqs,bnqk->bnks", of_logits, operand(q), **exact(of_logits))
    return tuple(x.astype(q.dtype) for x in (of_q, of_k.swapaxes(2, 3), of_v.swapaxes(2, 3)))


attend.defvjp(_plain_forward, _plain_backward)


@dataclass(frozen=True)
class Backend:
    """Every part of a split sequence has a multiple of `unit` rows."""

    unit: int = 1

    def padded(self, tokens: int, parts: int) -> int:
        """The best length for a sequence of `tokens` that is split into `parts`."""
        return multiple(tokens, self.unit * parts)


@dataclass(frozen=True)
class Xla(Backend):
    """Plain attention in slices of queries, so that memory is linear in the sequence; for every
    device. Softmax and sums are float32."""

    def __call__(
        self, q: Flat, k: Flat, v: Flat, norms: Norms, positions: Positions, tokens: int
    ) -> Flat:
        q, k, v = (jnp.moveaxis(x, 1, 2) for x in rotated_heads(q, k, v, norms, positions))
        k, v, (b, n, s, width) = k[:, :, :tokens], v[:, :, :tokens], q.shape
        rows = min(s, max(ROWS, LOGITS // (b * n * s)))
        slices = -(-s // rows)
        rows = -(-s // slices)  # of equal slices, so that padding is less than a row each
        q = pad_end(q, 2, slices * rows - s).reshape(b, n, slices, rows, width)
        y = lax.map(partial(attend, k=k, v=v), jnp.moveaxis(q, 2, 0))
        y = rearrange(y, "slices b n rows k -> b (slices rows) (n k)")[:, :s]
        return checkpoint_name(y, ATTENTION)


@dataclass(frozen=True, kw_only=True)
class Fused(Backend):
    """A library's fused attention of q, k, v [b s n k]."""

    unit: int = NVIDIA_ROWS
    kernel: Callable[[Heads, Keys, Keys], Heads]

    def __call__(
        self, q: Flat, k: Flat, v: Flat, norms: Norms, positions: Positions, tokens: int
    ) -> Flat:
        q, k, v = rotated_heads(q, k, v, norms, positions)
        y = self.kernel(q, k[:, :tokens], v[:, :tokens])
        return checkpoint_name(rearrange(y, "b s n k -> b s (n k)"), ATTENTION)


def cudnn(q: Heads, k: Keys, v: Keys) -> Heads:
    """NVIDIA's kernel; bfloat16 only."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def tokamax(q: Heads, k: Keys, v: Keys) -> Heads:
    """The tokamax library's kernels for NVIDIA devices: Mosaic where it has one for the device,
    else Triton."""
    from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]

    return dot_product_attention(q, k, v, implementation=("mosaic_gpu", "triton"))


class Tile(NamedTuple):
    """Rows of queries and of keys that the TPU kernel holds on the chip, and how many keys it takes
    at once."""

    queries: int
    keys: int
    keys_at_once: int


# The tiles with the fewest scheduled cycles at 17,776 tokens, by generation. The library's default
# tiles of 128 leave the matrix unit idle most of the time; more keys at once do not fit the
# registers, more keys in all do not fit the memory (of which v4 has little).
TILES = {
    "v4": Tile(1280, 1792, 896),
    "v5e": Tile(1280, 8960, 896),
    "v5p": Tile(1280, 3584, 896),
    "v6e": Tile(1792, 8960, 1792),
    "tpu7x": Tile(1920, 3584, 1792),
}
# Fitted to the compiler's schedules of other tiles: one step over a block of keys costs the time of
# so many more rows of keys, and a tile of half the size is slower by this share.
STEP_ROWS, HALF_TILE = 200, 0.07


def fit_tile(largest: Tile, tokens: int) -> tuple[Tile, int]:
    """(the fastest tile that is no larger, the padded length of a sequence that it divides)."""

    def padded(tile: Tile) -> int:
        return multiple(tokens, math.lcm(tile.queries, tile.keys))

    def cost(tile: Tile) -> float:
        halves = largest.keys_at_once / tile.keys_at_once + largest.queries / tile.queries
        return padded(tile) ** 2 * (1 + STEP_ROWS / tile.keys + HALF_TILE * halves)

    def sizes(most: int) -> range:
        return range(LANES, multiple(most, LANES) + LANES, LANES)

    tile = min(
        (
            Tile(queries, group * at_once, at_once)
            for queries in sizes(largest.queries)
            for group in range(1, largest.keys // largest.keys_at_once + 1)
            for at_once in sizes(largest.keys_at_once)
        ),
        key=cost,
    )
    return tile, padded(tile)


# In training: the backward kernel needs more memory, and the forward kernel writes sums for it, for
# which v4 lacks the memory with 1280 queries. Fewer queries cost the forward kernel 2 to 4 %. The
# backward kernel takes 2.1 ms a head at 17,920 tokens on v5e by the compiler's schedule, 97 % of it
# with a busy matrix unit.
TRAINING_QUERIES, TRAINING_KEYS_AT_ONCE = 640, 896


def fit_training_tile(largest: Tile, queries: int, keys: int) -> Tile:
    """The largest tile of the backward kernel that divides padded queries and keys. `largest` is
    the forward kernel's."""

    def divisor(length: int, most: int, unit: int = LANES) -> int:
        return max(size for size in range(unit, most + 1, unit) if length % size == 0)

    at_once = divisor(keys, min(TRAINING_KEYS_AT_ONCE, largest.keys))
    return Tile(divisor(queries, TRAINING_QUERIES), divisor(keys, largest.keys, at_once), at_once)


@dataclass(frozen=True)
class Splash:
    """jax's TPU kernel, one tile of logits at a time, behind our own kernel for QK norm and rotary
    embedding. One more channel masks the padding: ones for queries; for keys zeros, and FAR where
    they are padding. It costs nothing, since the 64 channels of a head take 128 lanes."""

    tile: Tile
    interpret: bool = False

    def padded(self, tokens: int, parts: int) -> int:
        return multiple(fit_tile(self.tile, tokens)[1], parts)

    def __call__(
        self, q: Flat, k: Flat, v: Flat, norms: Norms, positions: Positions, tokens: int
    ) -> Flat:
        given, tile = q.shape[1], fit_tile(self.tile, tokens)[0]
        added = multiple(given, tile.queries) - given
        q, k, v = (pad_end(x, 1, added) for x in (q, k, v))
        cos, sin = (pad_end(x, 0, added) for x in (positions.cos, positions.sin))
        positions = positions._replace(cos=cos, sin=sin)
        y: Any = _attend(self, tokens, (q, k, v, norms), positions)
        return y[:, :given]

    def blocks(self, tokens: int) -> dict[str, Any]:
        """Arguments of our own kernels."""
        return {"rows": fit_tile(self.tile, tokens)[0].queries, "interpret": self.interpret}

    def heads(self, tokens: int, given: Given, positions: Positions) -> tuple[Array, Array, Array]:
        """What the library's kernel takes: [b n s k+1], [b n s2 k+1] and [b n s2 k]."""
        (q, k, v, norms), keys = given, fit_tile(self.tile, tokens)[1]
        rows, width = q.shape[1], norms[0].scale.shape[0]  # more rows than keys: the mesh's padding
        call: Any = {"precision": precision, **self.blocks(tokens)}
        rotated: Any = partial(split_rotated_heads, cos=positions.cos, sin=positions.sin, **call)
        mask = jnp.where(jnp.arange(rows) < tokens, 0.0, FAR)
        q = rotated(q, *_parameters(norms[0]), last=jnp.ones(rows), factor=width**-0.5)
        k = rotated(k, *_parameters(norms[1]), last=mask, factor=1.0)[:, :, :keys]
        v: Any = split_heads(v, width, **self.blocks(tokens))
        return q, k, v[:, :, :keys]

    def kernel(self, tokens: int, q: Array, training: bool = False) -> Any:
        """The library's kernel for such heads q [b n s k+1], of one video. In training it returns
        (its result, (logarithms of the sums of weights,))."""
        (tile, keys), (heads, queries) = fit_tile(self.tile, tokens), q.shape[1:3]
        sizes: Any = {"block_q": tile.queries, "block_kv": tile.keys}
        sizes["block_kv_compute"] = tile.keys_at_once
        if training:
            tile = fit_training_tile(self.tile, queries, keys)
            sizes |= {"block_q": tile.queries, "block_q_dkv": tile.queries}
            sizes |= {"block_kv_dkv": tile.keys, "block_kv_dkv_compute": tile.keys_at_once}
            sizes["use_fused_bwd_kernel"] = True
        return splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([splash_mask.FullMask((queries, keys))] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            save_residuals=training,
            interpret=self.interpret,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(how: Splash, tokens: int, given: Given, positions: Positions) -> Flat:
    """The attention of a Splash backend, where its tile divides the sequence."""
    heads = how.heads(tokens, given, positions)
    return merge_heads(jax.vmap(how.kernel(tokens, heads[0]))(*heads), **how.blocks(tokens))


def _attend_forward(
    how: Splash, tokens: int, given: Given, positions: Positions
) -> tuple[Flat, tuple[Any, ...]]:
    """Keeps flat arrays for the backward pass: heads take twice the memory, since the 64 channels
    of a head fill half of the lanes."""
    heads = how.heads(tokens, given, positions)
    y, (sums,) = jax.vmap(how.kernel(tokens, heads[0], training=True))(*heads)
    y = merge_heads(y, **how.blocks(tokens))
    y, sums = checkpoint_name((y, sums), ATTENTION)
    return y, (given, positions, y, sums)


def _attend_backward(
    how: Splash, tokens: int, kept: tuple[Any, ...], grad: Any
) -> tuple[Given, None]:
    given, positions, y, sums = kept
    heads, pull = jax.vjp(partial(how.heads, tokens, positions=positions), given)
    width = heads[2].shape[-1]
    y, grad = (split_heads(x, width, **how.blocks(tokens)) for x in (y, grad))
    kernel = how.kernel(tokens, heads[0], training=True)

    def backward(q: Any, k: Any, v: Any, y: Any, sums: Any, grad: Any) -> tuple[Array, ...]:
        # `jax.vjp` of the kernel would run the forward kernel again.
        masks = kernel.dq_mask_info, kernel.dkv_mask_info
        kept = q, k, v, None, None, y, sums, *masks
        return splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=grad)[3:6]

    grads = jax.vmap(backward)(*heads, y, sums, grad)
    return *pull(grads), None  # positions are constants


_attend.defvjp(_attend_forward, _attend_backward)


def _parameters(norm: LayerNorm) -> tuple[Array, Array, float]:
    return norm.scale[...], norm.bias[...], norm.epsilon


BACKENDS: dict[str, Xla | Fused | Splash] = {
    "xla": Xla(),
    "cudnn": Fused(kernel=cudnn),
    "splash": Splash(TILES["v5e"]),
    "tokamax": Fused(kernel=tokamax),
}
# The platform of each; bfloat16 too, since their float32 products are not float32.
NEEDS = {"cudnn": "gpu", "splash": "tpu", "tokamax": "gpu"}
FASTEST = {"gpu": "cudnn", "tpu": "splash"}


def resolve(name: str, dtype: jnp.dtype, device: Any) -> str:
    """The name of a backend; of the fastest one for the device and dtype where it is "auto"."""
    fastest = FASTEST.get(device.platform, "xla") if dtype == jnp.bfloat16 else "xla"
    return fastest if name == "auto" else name


def choose(name: str, dtype: jnp.dtype, device: Any = None) -> Xla | Fused | Splash:
    """A backend by name or "auto", for a device (None: the default one). Raises ValueError for an
    unknown name and for a backend that does not compute `dtype` there."""
    device = jax.devices()[0] if device is None else device
    name = resolve(name, dtype, device)
    if name not in BACKENDS:
        raise ValueError(f"attention must be auto, {', '.join(BACKENDS)}: got {name!r}")
    if name in NEEDS and (device.platform, dtype) != (NEEDS[name], jnp.bfloat16):
        what = f"attention {name} must have bfloat16 on a {NEEDS[name].upper()}"
        raise ValueError(f"{what}: got {dtype} on {device.device_kind}; use auto or xla")
    if name == "tokamax" and not find_spec("tokamax"):
        raise ValueError("attention tokamax needs its library: pip install tokamax")
    backend = BACKENDS[name]
    if isinstance(backend, Splash):
        generations = config.meshes()["generations"].items()
        names = {generation["kind"]: name for name, generation in generations}
        backend = replace(backend, tile=TILES.get(names.get(device.device_kind, ""), backend.tile))
    return backend
