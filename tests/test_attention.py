"""Every backend against plain attention in float64."""

import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from cogi2v_jax import attention


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    logits = np.einsum("bnqk,bnsk->bnqs", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnqs,bnsk->bnqk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tokens", [1, 7, 64, 131])
@pytest.mark.parametrize("rows", [attention.ROWS, 10, 1], ids=["one or two slices", "a few rows at a time", "row by row"])
def test_attention_is_exact_however_it_is_sliced(tokens: int, rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LOGITS", 1)
    monkeypatch.setattr(attention, "ROWS", rows)
    q, k, v = rng.normal(size=(3, 2, 3, tokens, 16)).astype(np.float32)
    assert_close(attention.xla(*map(jnp.asarray, (q, k, v)), tokens), exact(q, k, v), 2e-6)


def test_large_logits_do_not_overflow(rng: np.random.Generator) -> None:
    q, k, v = 60 * rng.normal(size=(3, 1, 1, 20, 16)).astype(np.float32)
    assert_close(attention.xla(*map(jnp.asarray, (q, k, v)), 20), exact(q, k, v), 1e-4)


def test_memory_is_linear_in_the_sequence() -> None:
    def temporaries(tokens: int) -> int:
        x = jax.ShapeDtypeStruct((1, 2, tokens, 16), jnp.float32)
        run = jax.jit(partial(attention.xla, tokens=tokens))
        return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    # Sixteen times the tokens are 256 times the logits; they must not be there at once.
    assert temporaries(16 * 4096) < 20 * temporaries(4096)


SPLASH = attention.Splash(attention.Tile(256, 768, 384), interpret=True)


@pytest.mark.parametrize(
    ("tokens", "width"),
    [(7, 64), (131, 64), (300, 32), (1000, 64)],
    ids=["part of a tile", "one tile", "two", "several"],
)
def test_the_tpu_kernels_tiles_do_not_change_the_result(tokens: int, width: int, rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(3, 2, 3, tokens, width)).astype(np.float32)
    ours = SPLASH(*map(jnp.asarray, (q, k, v)), tokens)
    assert_close(ours, exact(q, k, v), 2e-6)
    assert_close(ours, attention.xla(*map(jnp.asarray, (q, k, v)), tokens), 2e-6)


@pytest.mark.parametrize("backend", [attention.xla, SPLASH], ids=["xla", "splash"])
@pytest.mark.parametrize("filled", [131, 200, 256, 300])
def test_what_evens_a_sequence_out_has_no_weight(filled: int, backend: attention.Attend, rng: np.random.Generator) -> None:
    tokens = 130
    q, k, v = rng.normal(size=(3, 1, 1, filled, 64)).astype(np.float32)
    k[:, :, tokens:], v[:, :, tokens:] = 1e4, -1e4
    ours = np.asarray(backend(*map(jnp.asarray, (q, k, v)), tokens))
    assert ours.shape == q.shape
    assert np.isfinite(ours).all()
    assert_close(ours[:, :, :tokens], exact(*(x[:, :, :tokens] for x in (q, k, v))), 2e-6)


def test_it_has_none_even_where_all_real_logits_are_far_below_zero(rng: np.random.Generator) -> None:
    q = np.ones((1, 1, 130, 64), np.float32)
    k = -100 * q + rng.normal(size=q.shape).astype(np.float32)
    v = rng.normal(size=q.shape).astype(np.float32)
    assert_close(SPLASH(*map(jnp.asarray, (q, k, v)), 130), exact(q, k, v), 1e-4)


@pytest.mark.parametrize("generation", attention.TILES)
@pytest.mark.parametrize("tokens", [1, 58, 2146, 8922, 17776, 45106, 85906])
def test_tiles_even_a_sequence_out_with_little_left_over(generation: str, tokens: int) -> None:
    wanted = attention.TILES[generation]
    tile, rows = attention.fitted(wanted, tokens)
    assert tokens <= rows == attention.Splash(wanted).rows(tokens)
    assert rows % tile.queries == rows % tile.keys == tile.keys % tile.at_once == 0
    assert {size % attention.LANES for size in tile} == {0}
    assert all(size <= most for size, most in zip(tile, wanted, strict=True))
    assert rows <= max(1.03 * tokens, tokens + 2 * attention.LANES)
    assert tile.queries >= min(1024, attention.LANES * (tokens // attention.LANES))  # never the library's default


def device(platform: str, kind: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform=platform, device_kind=kind)


V5E, V6E, H100, CPU = (
    device("tpu", "TPU v5 lite"),
    device("tpu", "TPU v6 lite"),
    device("gpu", "NVIDIA H100 80GB HBM3"),
    device("cpu", "cpu"),
)
HALF, FULL = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.mark.parametrize(
    ("where", "dtype", "expected"),
    [
        (V5E, HALF, attention.Splash(attention.TILES["v5e"])),
        (V6E, HALF, attention.Splash(attention.TILES["v6e"])),
        (device("tpu", "TPU v9"), HALF, attention.Splash(attention.TILES["v5e"])),
        (V5E, FULL, attention.xla),
        (H100, HALF, attention.cudnn),
        (H100, FULL, attention.xla),
        (CPU, HALF, attention.xla),
    ],
)
def test_auto_takes_the_fastest_that_is_exact(where: types.SimpleNamespace, dtype: jnp.dtype, expected: attention.Attend) -> None:
    assert attention.choose("auto", dtype, where) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "where"),
    [("splash", HALF, CPU), ("splash", FULL, V5E), ("cudnn", HALF, V5E), ("cudnn", FULL, H100), ("tokamax", HALF, CPU)],
)
def test_a_backend_is_refused_where_it_cannot_run(name: str, dtype: jnp.dtype, where: types.SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=rf"attention {name} must have bfloat16 on a (TPU|GPU): got .*; auto or xla will do"):
        attention.choose(name, dtype, where)


def test_tokamax_is_asked_for_by_its_kernels_and_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tokamax"):
        attention.choose("tokamax", HALF, H100)
    asked = []
    library = types.SimpleNamespace(dot_product_attention=lambda q, k, v, implementation: asked.append(implementation) or q)
    monkeypatch.setitem(sys.modules, "tokamax", library)
    x = jnp.arange(24.0).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(attention.tokamax(x, x, x, 3), x)
    assert asked == [("mosaic_gpu", "triton")]


@pytest.mark.parametrize("name", ["", "flash", "XLA"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="attention must be auto, xla, cudnn, splash, tokamax: got"):
        attention.choose(name, jnp.dtype(jnp.float32))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="these kernels need an NVIDIA device")
@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_a_gpu_kernel_is_as_exact_as_bfloat16_allows(name: str, rng: np.random.Generator) -> None:
    if name == "tokamax":
        pytest.importorskip("tokamax")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 3, 131, 64)))
    assert_close(np.float32(attention.BACKENDS[name](q, k, v, 131)), exact(*(np.float32(x) for x in (q, k, v))), 8e-3)


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="the kernel needs a TPU")
def test_the_tpu_kernel_is_as_exact_as_bfloat16_allows(rng: np.random.Generator) -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 3, 2146, 64)))
    backend = attention.choose("splash", HALF)
    assert_close(np.float32(backend(q, k, v, 2146)), exact(*(np.float32(x) for x in (q, k, v))), 8e-3)
