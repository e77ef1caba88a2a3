"""Gradients of the TPU backend, in interpret mode, against those of plain attention, which jax
differentiates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import relative_error

from cogi2v_jax.models import attention
from cogi2v_jax.models.layers import LayerNorm
from cogi2v_jax.models.positions import Positions

WIDTH = 64
XLA = attention.BACKENDS["xla"]
# Several tiles of queries and of keys, in the backward kernel too.
SPLASH = attention.Splash(attention.Tile(256, 256, 128), interpret=True)
KEEP = jax.checkpoint_policies.save_only_these_names(attention.ATTENTION)
Attend = attention.Xla | attention.Splash | Callable[..., jax.Array]


def given(rng: np.random.Generator, rows: int, tokens: int, heads: int) -> tuple[Any, ...]:
    """(q, k, v, norms, positions, the gradient of the result), where padding is large."""
    q, k, v, grad = rng.normal(size=(4, 2, rows, heads * WIDTH)).astype(np.float32)
    for x in (q, k, v):
        x[:, tokens:] *= 1e4
    norms = tuple(LayerNorm(WIDTH, epsilon=1e-2, dtype=jnp.dtype(jnp.float32)) for _ in range(2))
    for norm in norms:
        for leaf in (norm.scale, norm.bias):
            leaf.set_value(jnp.asarray(1 + rng.normal(size=WIDTH) / 2, jnp.float32))
    angles = rng.normal(size=(rows, WIDTH // 2)).astype(np.float32)
    tables = Positions(np.cos(angles), np.sin(angles), np.zeros(rows, bool), None)
    return q, k, v, norms, tables, grad


def gradients(attend: Attend, tokens: int, *given: Any) -> dict[str, np.ndarray]:
    """Of q, k, v, and of scale and bias of both norms."""
    q, k, v, norms, positions, grad = given

    @jax.jit
    def pull(q: Any, k: Any, v: Any, norms: Any) -> Any:
        def run(q: Any, k: Any, v: Any, norms: Any) -> jax.Array:
            return attend(q, k, v, norms, positions, tokens)

        return jax.vjp(run, q, k, v, norms)[1](jnp.asarray(grad))

    *flat, (norm_q, norm_k) = pull(q, k, v, norms)
    of_norms = (norm_q.scale, norm_q.bias, norm_k.scale, norm_k.bias)
    names = ("q", "k", "v", "q scale", "q bias", "k scale", "k bias")
    return {n: np.asarray(x[...]) for n, x in zip(names, (*flat, *of_norms), strict=True)}


def keeping(q: Any, k: Any, v: Any, norms: Any, positions: Any, tokens: int) -> jax.Array:
    """Under `jax.checkpoint`, which keeps the result of attention alone."""
    attend = partial(SPLASH, positions=positions, tokens=tokens)
    return jax.checkpoint(attend, policy=KEEP)(q, k, v, norms)


@pytest.mark.parametrize(
    ("rows", "tokens", "heads"),
    [
        pytest.param(512, 512, 1, id="whole tiles", marks=pytest.mark.slow),
        pytest.param(384, 300, 2, id="padding"),
        pytest.param(300, 300, 3, id="no tile divides the length"),
        pytest.param(768, 200, 2, id="more queries than keys", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_attention(
    rows: int, tokens: int, heads: int, rng: np.random.Generator
) -> None:
    case = given(rng, rows, tokens, heads)
    theirs = gradients(XLA, tokens, *case)
    for attend in (SPLASH, keeping):
        ours = gradients(attend, tokens, *case)
        errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
        assert max(errors.values()) < 1e-5, errors
        assert all(np.isfinite(x).all() for x in ours.values())
        assert not ours["k"][:, tokens:].any()
        assert not ours["v"][:, tokens:].any()


# jax 0.10 leaves a kernel in the program whose results nothing reads, for XLA to remove.
READS_ALL = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 counts it twice")


@pytest.mark.parametrize(
    ("backend", "forward"),
    [
        pytest.param(XLA, "scan[", id="xla"),
        pytest.param(SPLASH, "name=splash_mha_fwd", id="splash", marks=READS_ALL),
    ],
)
def test_attention_is_not_computed_again_where_a_policy_keeps_it(
    backend: attention.Xla | attention.Splash, forward: str, rng: np.random.Generator
) -> None:
    q, k, v, norms, positions, _ = given(rng, 256, 256, 2)
    k, v = jnp.asarray(k), jnp.asarray(v)

    def times(policy: Callable[..., Any]) -> int:
        def loss(q: Any) -> jax.Array:
            return jnp.sum(jnp.square(backend(q, k, v, norms, positions, 256)))

        step = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
        return str(jax.make_jaxpr(step)(q)).count(forward)

    assert times(KEEP) == times(jax.checkpoint_policies.nothing_saveable) - 1


@pytest.mark.parametrize("generation", attention.TILES)
@pytest.mark.parametrize("tokens", [1, 58, 2146, 8922, 17776, 45106, 85906])
def test_tiles_of_the_backward_kernel_divide_what_the_forward_kernel_takes(
    generation: str, tokens: int
) -> None:
    largest = attention.TILES[generation]
    tile, keys = attention.fit_tile(largest, tokens)
    queries = attention.multiple(keys, tile.queries)
    back = attention.fit_training_tile(largest, queries, keys)
    assert queries % back.queries == keys % back.keys == back.keys % back.keys_at_once == 0
    assert {size % attention.LANES for size in back} == {0}
    assert back.keys <= largest.keys
    # A tile of few rows leaves the matrix unit idle.
    assert back.queries >= min(384, queries)
    assert back.keys_at_once >= min(384, keys)
