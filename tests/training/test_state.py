"""The optimiser, the learning rate and the average, against their formulas."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import assert_close

from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.models.layers import Linear
from cogi2v_jax.training.recipe import OPTIMIZERS, Recipe
from cogi2v_jax.training.state import begin, learning_rate, take_apart, update

RECIPE = Recipe(method="full", data="", output="", steps=40, warmup=4, learning_rate=0.01)
MESH = make_mesh(Sizes(), jax.devices()[:1])


def leaves(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {"a.kernel": (3, 4, 5), "a.bias": (3, 5), "b.kernel": (4, 6)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def test_adamw_with_clipping_and_warm_up_steps_as_torchs(rng: np.random.Generator) -> None:
    recipe = dataclasses.replace(RECIPE, weight_decay=0.1, schedule="cosine", final_rate=0.1)
    start = leaves(rng)
    state = begin(recipe, start, MESH)
    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(leaf))) for n, leaf in start.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1, betas=(0.9, 0.95), weight_decay=0.1)
    step = jax.jit(lambda state, grads: update(recipe, state, grads))
    for number in range(12):
        grads = leaves(rng)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(np.array(grads[name]))
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        if number < 4:  # a linear rise, then a cosine from the peak to a tenth of it
            rate = 0.01 * ((number / 4) * (4 / 5) + 1 / 5)
        else:
            cosine = 0.5 * (1 + np.cos(np.pi * (number - 4) / 36))
            rate = 0.01 * (0.9 * cosine + 0.1)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert learning_rate(recipe)(number) == pytest.approx(rate, rel=1e-5)
        state, ours = step(state, grads)
        assert ours == pytest.approx(norm.item(), rel=1e-5)
    assert state.step == 12
    for name, parameter in theirs.items():
        assert_close(np.asarray(state.leaves[name]), parameter.detach().numpy(), 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_downhill(optimizer: str, rng: np.random.Generator) -> None:
    rate = 1.0 if optimizer == "prodigy" else 0.02
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, learning_rate=rate, steps=200)
    goal, state = leaves(rng), begin(recipe, leaves(rng), MESH)

    def loss(leaves: Any) -> Any:
        return sum(jnp.sum(jnp.square(leaves[name] - goal[name])) for name in goal)

    step = jax.jit(lambda state: update(recipe, state, jax.grad(loss)(state.leaves)))
    before = loss(state.leaves)
    for _ in range(100):
        state, _ = step(state)
    assert loss(state.leaves) < 0.3 * before


@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("linear.kernel", (6, 5), (1, 6, 5)),
        ("stack.kernel", (3, 6, 5), (3, 6, 5)),
        ("lora.up", (3, 4, 8), (3, 4, 8)),
        ("image.kernel", (3, 3, 4, 6), (1, 36, 6)),
        ("video.kernel", (3, 3, 3, 4, 6), (1, 108, 6)),
    ],
)
def test_muon_steps_along_orthogonal_matrices(
    name: str, shape: Sequence[int], matrices: Sequence[int], rng: np.random.Generator
) -> None:
    """By a gradient in which one direction is twenty times another."""
    recipe = dataclasses.replace(RECIPE, optimizer="muon", weight_decay=0.0)
    state = begin(recipe, {name: jnp.zeros(shape)}, MESH)
    stretched = rng.normal(size=matrices) * np.geomspace(1, 20, matrices[-1])
    gradient = stretched @ np.linalg.qr(rng.normal(size=(matrices[-1],) * 2))[0]
    new, _ = update(recipe, state, {name: jnp.asarray(gradient.reshape(shape), jnp.float32)})
    change = np.asarray(new.leaves[name]).reshape(matrices)
    stretches = np.linalg.svd(change, compute_uv=False)
    assert stretches.max() < 2 * stretches.min()


def test_the_average_follows_its_formula_and_is_the_result(rng: np.random.Generator) -> None:
    recipe = dataclasses.replace(RECIPE, ema=0.6)
    state = begin(recipe, leaves(rng), MESH)
    expected = {name: np.asarray(leaf, np.float64) for name, leaf in state.leaves.items()}
    for step in range(8):
        state, _ = update(recipe, state, leaves(rng))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, leaf in state.leaves.items():
            expected[name] = decay * expected[name] + (1 - decay) * np.asarray(leaf)
    for name, value in expected.items():
        assert_close(np.asarray(state.result[name]), value, 1e-6)
    assert begin(RECIPE, leaves(rng), MESH).average == {}


def test_a_network_is_taken_apart_and_put_together(rng: np.random.Generator) -> None:
    axes: Any = (None, None)
    layer = Linear(3, 4, axes=axes, dtype=jnp.dtype(jnp.bfloat16))
    structure, trained, frozen = take_apart(layer, lambda name: name == "kernel")
    assert hash(structure) == hash(take_apart(layer, lambda name: name == "kernel")[0])
    layer.kernel.set_value(jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16))
    layer.bias.set_value(jnp.ones(4, jnp.bfloat16))
    assert trained["kernel"].dtype == jnp.float32
    assert {name: leaf.dtype for name, leaf in frozen.items()} == {"bias": jnp.bfloat16}
    kernel = jnp.asarray(layer.kernel[...], jnp.float32)
    again = structure.network({"kernel": kernel}, {"bias": layer.bias[...]})
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert np.array_equal(again(x), layer(x))
