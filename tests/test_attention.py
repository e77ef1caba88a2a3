"""Every backend against plain attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from cogi2v_jax import attention


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    logits = np.einsum("bqnk,bsnk->bnqs", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnqs,bsnk->bqnk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tokens", [1, 7, 64, 131])
@pytest.mark.parametrize("rows", [attention.ROWS, 10, 1], ids=["one or two slices", "a few rows at a time", "row by row"])
def test_attention_is_exact_however_it_is_sliced(tokens: int, rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LOGITS", 1)
    monkeypatch.setattr(attention, "ROWS", rows)
    q, k, v = rng.normal(size=(3, 2, tokens, 3, 16)).astype(np.float32)
    assert_close(attention.xla(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), exact(q, k, v), 2e-6)


def test_large_logits_do_not_overflow(rng: np.random.Generator) -> None:
    q, k, v = 60 * rng.normal(size=(3, 1, 20, 1, 16)).astype(np.float32)
    assert_close(attention.xla(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), exact(q, k, v), 1e-4)


def test_memory_is_linear_in_the_sequence() -> None:
    def temporaries(tokens: int) -> int:
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
        return jax.jit(attention.xla).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    # Sixteen times the tokens are 256 times the logits; they must not be there at once.
    assert temporaries(16 * 4096) < 20 * temporaries(4096)


@pytest.mark.parametrize("name", ["", "flash", "XLA"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="attention must be auto, xla, cudnn: got"):
        attention.choose(name, jnp.dtype(jnp.float32))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA device")
def test_cudnn_is_as_exact_as_bfloat16_allows(rng: np.random.Generator) -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 131, 3, 64)))
    assert_close(np.float32(attention.cudnn(q, k, v)), exact(*(np.float32(x) for x in (q, k, v))), 8e-3)
