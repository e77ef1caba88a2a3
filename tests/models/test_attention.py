"""Every backend against plain attention in float64."""

import sys
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from tolerances import assert_close

from cogi2v_jax import config
from cogi2v_jax.models import attention
from cogi2v_jax.models.layers import LayerNorm
from cogi2v_jax.models.positions import Positions

HEADS = 3  # an odd number: TPU kernels take two at a time
XLA = attention.BACKENDS["xla"]
SPLASH = attention.Splash(attention.Tile(256, 768, 384), interpret=True)
AnyBackend = attention.Xla | attention.Fused | attention.Splash


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Plain attention in float64, of q, k, v [b s n k]."""
    logits = np.einsum("bqnk,bsnk->bnqs", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnqs,bsnk->bqnk", weights / weights.sum(-1, keepdims=True), v)


def given(rng: np.random.Generator, rows: int, width: int = 64) -> tuple:
    """(q, k, v, norms, positions) of two videos."""
    q, k, v = rng.normal(size=(3, 2, rows, HEADS, width)).astype(np.float32)
    norms = tuple(LayerNorm(width, epsilon=1e-2, dtype=jnp.dtype(jnp.float32)) for _ in range(2))
    for norm in norms:
        for leaf in (norm.scale, norm.bias):
            leaf.set_value(jnp.asarray(1 + rng.normal(size=width) / 2, jnp.float32))
    angles = rng.normal(size=(rows, width // 2)).astype(np.float32)
    return q, k, v, norms, Positions(np.cos(angles), np.sin(angles), np.zeros(rows, bool), None)


def flat(x: Any) -> jax.Array:
    return rearrange(jnp.asarray(x), "b s n k -> b s (n k)")


def rotated(x: np.ndarray, norm: LayerNorm, positions: Positions) -> np.ndarray:
    """QK norm and rotary embedding in float64; a rotated pair of channels as a complex number."""
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.epsilon)
    first, second = np.split(x * norm.scale[...] + norm.bias[...], 2, axis=-1)
    pairs = (first + 1j * second) * (positions.cos + 1j * positions.sin)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("tokens", [1, 7, 64, 131])
@pytest.mark.parametrize(
    "rows", [attention.ROWS, 10, 1], ids=["one or two slices", "some rows at a time", "row by row"]
)
def test_attention_is_exact_in_slices_of_any_size(
    tokens: int, rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LOGITS", 1)
    monkeypatch.setattr(attention, "ROWS", rows)
    q, k, v, norms, positions = given(rng, tokens, 16)
    ours = XLA(*map(flat, (q, k, v)), norms, positions, tokens)
    q, k = (rotated(x, norm, positions) for x, norm in zip((q, k), norms, strict=True))
    assert_close(ours, flat(exact(q, k, v)), 2e-6)


def test_large_logits_do_not_overflow(rng: np.random.Generator) -> None:
    q, k, v, norms, positions = given(rng, 20, 16)
    for norm in norms:
        norm.scale[...] = 60 * norm.scale[...]
    ours = XLA(*map(flat, (q, k, v)), norms, positions, 20)
    q, k = (rotated(x, norm, positions) for x, norm in zip((q, k), norms, strict=True))
    assert np.einsum("bqnk,bsnk->bnqs", q, k).max() > 4 * 1e4  # exp overflows from 89 on
    assert_close(ours, flat(exact(q, k, v)), 1e-4)


def test_memory_is_linear_in_the_sequence(rng: np.random.Generator) -> None:
    def temporaries(tokens: int) -> int:
        q, k, v, norms, positions = given(rng, tokens, 16)
        run = jax.jit(partial(XLA, tokens=tokens))
        compiled = run.lower(*map(flat, (q, k, v)), norms, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Sixteen times the tokens have 256 times the logits; these must not be in memory together.
    assert temporaries(16 * 4096) < 20 * temporaries(4096)


WHOLE = [(7, 7, 64), (131, 131, 64), (300, 300, 32), (1000, 1000, 64), (512, 512, 64)]
PADDED = [(131, 130, 64), (300, 130, 64), (384, 300, 64)]


@pytest.mark.parametrize("backend", [XLA, SPLASH], ids=["xla", "splash"])
@pytest.mark.parametrize(("rows", "tokens", "width"), WHOLE + PADDED)
def test_a_backend_normalises_rotates_and_attends_and_gives_no_weight_to_padding(
    rows: int, tokens: int, width: int, backend: AnyBackend, rng: np.random.Generator
) -> None:
    q, k, v, norms, positions = given(rng, rows, width)
    k[:, tokens:], v[:, tokens:] = 1e4 * k[:, tokens:], -1e4
    ours = np.asarray(backend(*map(flat, (q, k, v)), norms, positions, tokens))
    assert ours.shape == flat(v).shape
    assert np.isfinite(ours).all()
    q, k = (rotated(x, norm, positions)[:, :tokens] for x, norm in zip((q, k), norms, strict=True))
    assert_close(ours[:, :tokens], flat(exact(q, k, v[:, :tokens])), 2e-6)


def test_padding_has_no_weight_where_all_real_logits_are_far_below_zero(
    rng: np.random.Generator,
) -> None:
    q, k, v, norms, positions = given(rng, 130)
    norms[0].scale[...], norms[0].bias[...] = np.zeros(64), np.full(64, 10.0)
    norms[1].scale[...], norms[1].bias[...] = np.ones(64), np.full(64, -10.0)
    cos, sin = np.ones((130, 32), np.float32), np.zeros((130, 32), np.float32)
    still = positions._replace(cos=cos, sin=sin)
    ours = SPLASH(*map(flat, (q, k, v)), norms, still, 130)
    q, k = (rotated(x, norm, still) for x, norm in zip((q, k), norms, strict=True))
    assert np.einsum("bqnk,bsnk->bnqs", q, k).max() < -400
    assert_close(ours, flat(exact(q, k, v)), 1e-4)


@pytest.mark.parametrize("generation", attention.TILES)
@pytest.mark.parametrize("tokens", [1, 58, 2146, 8922, 17776, 45106, 85906])
def test_tiles_add_little_padding_to_a_sequence(generation: str, tokens: int) -> None:
    largest = attention.TILES[generation]
    tile, rows = attention.fit_tile(largest, tokens)
    assert tokens <= rows == attention.Splash(largest).padded(tokens, parts=1)
    assert rows % tile.queries == rows % tile.keys == tile.keys % tile.keys_at_once == 0
    assert {size % attention.LANES for size in tile} == {0}
    assert all(size <= most for size, most in zip(tile, largest, strict=True))
    assert rows <= max(1.03 * tokens, tokens + 2 * attention.LANES)
    # Larger than the library's default.
    assert tile.queries >= min(1024, attention.LANES * (tokens // attention.LANES))


def test_every_generation_of_tpus_has_tiles() -> None:
    """Those of another may not fit: v7x refuses the loop with the tiles of v5e."""
    meshes = config.meshes()["meshes"].values()
    assert {mesh["generation"] for mesh in meshes if "topology" in mesh} == attention.TILES.keys()


def device(platform: str, kind: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform=platform, device_kind=kind)


V5E, V6E = device("tpu", "TPU v5 lite"), device("tpu", "TPU v6 lite")
H100, CPU = device("gpu", "NVIDIA H100 80GB HBM3"), device("cpu", "cpu")
HALF, FULL = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.mark.parametrize(
    ("where", "dtype", "expected"),
    [
        (V5E, HALF, attention.Splash(attention.TILES["v5e"])),
        (V6E, HALF, attention.Splash(attention.TILES["v6e"])),
        (device("tpu", "TPU7x"), HALF, attention.Splash(attention.TILES["tpu7x"])),
        (device("tpu", "TPU v9"), HALF, attention.Splash(attention.TILES["v5e"])),
        (V5E, FULL, XLA),
        (H100, HALF, attention.BACKENDS["cudnn"]),
        (H100, FULL, XLA),
        (CPU, HALF, XLA),
    ],
)
def test_auto_takes_the_fastest_backend_that_is_exact(
    where: types.SimpleNamespace, dtype: jnp.dtype, expected: AnyBackend
) -> None:
    assert attention.choose("auto", dtype, where) == expected


WRONG = [("splash", HALF, CPU), ("splash", FULL, V5E), ("tokamax", HALF, CPU)]
WRONG += [("cudnn", HALF, V5E), ("cudnn", FULL, H100)]


@pytest.mark.parametrize(("name", "dtype", "where"), WRONG)
def test_a_backend_is_refused_where_it_cannot_run(
    name: str, dtype: jnp.dtype, where: types.SimpleNamespace
) -> None:
    line = rf"attention {name} must have bfloat16 on a (TPU|GPU): got .*; use auto or xla"
    with pytest.raises(ValueError, match=line):
        attention.choose(name, dtype, where)


def test_tokamax_gets_the_names_of_its_kernels_and_a_missing_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tokamax"):
        attention.choose("tokamax", HALF, H100)
    names = []

    def attend(q: Any, k: Any, v: Any, implementation: Any) -> Any:
        names.append(implementation)
        return q

    library = types.SimpleNamespace(dot_product_attention=attend)
    monkeypatch.setitem(sys.modules, "tokamax", library)
    x = jnp.arange(24.0).reshape(1, 3, 2, 4)
    np.testing.assert_array_equal(attention.tokamax(x, x, x), x)
    assert names == [("mosaic_gpu", "triton")]


@pytest.mark.parametrize("name", ["", "flash", "XLA"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    line = "attention must be auto, xla, cudnn, splash, tokamax: got"
    with pytest.raises(ValueError, match=line):
        attention.choose(name, jnp.dtype(jnp.float32))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="these kernels need an NVIDIA device")
@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_a_gpu_kernel_is_as_exact_as_bfloat16_allows(name: str, rng: np.random.Generator) -> None:
    if name == "tokamax":
        pytest.importorskip("tokamax")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 131, HEADS, 64)))
    ours = np.float32(attention.BACKENDS[name].kernel(q, k, v))
    assert_close(ours, exact(*(np.float32(x) for x in (q, k, v))), 8e-3)


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="these kernels need a TPU")
def test_the_tpu_kernels_are_as_exact_as_bfloat16_allows(rng: np.random.Generator) -> None:
    q, k, v, norms, positions = given(rng, 2146)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    ours = attention.choose("splash", HALF)(*map(flat, (q, k, v)), norms, positions, 2146)
    q, k = (rotated(np.float32(x), norm, positions) for x, norm in zip((q, k), norms, strict=True))
    assert_close(np.float32(ours), flat(exact(q, k, np.float32(v))), 1e-2)
