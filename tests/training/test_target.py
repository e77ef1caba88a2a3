"""Steps compiled for machines that are not here."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import topologies

from cogi2v_jax import Request
from cogi2v_jax.config import named
from cogi2v_jax.training.recipe import Recipe
from cogi2v_jax.training.target import StepTarget, mesh_for
from cogi2v_jax.weights.pieces import bytes_of

HALF = jnp.dtype(jnp.bfloat16)
CONFIG = named("cogi2v-tiny")
RECIPE = Recipe(
    method="lora", data="data", output="out", steps=1, warmup=0, batch=2, mesh="data=2,pair=2"
)


def target_on(devices: Sequence[Any], memory: int, **changes: Any) -> StepTarget:
    recipe = dataclasses.replace(RECIPE, **changes)
    mesh = mesh_for(recipe, CONFIG, HALF, devices, memory)
    return StepTarget(recipe, CONFIG, HALF, mesh, memory)


def kept(target: StepTarget) -> str:
    return target.kept(target.sampling(Request("", "").resolve(CONFIG), "xla"))


def test_the_more_memory_the_more_is_kept() -> None:
    chips, memories = topologies.chips("v5e-8"), range(2**29, 2**30, 2**23)
    chosen = [kept(target_on(chips, memory, batch=64)) for memory in memories]
    assert [*dict.fromkeys(chosen)] == ["host", "layers", "attention"]
    enough = memories[chosen.index("attention")]
    assert kept(target_on(chips, enough, batch=128)) != "attention"
    # What the recipe says is not changed, and a CPU's memory is not counted.
    assert kept(target_on(chips, 2**29, kept="all")) == "all"
    assert kept(target_on(jax.devices()[:4], 0)) == "layers"


def test_all_weights_are_trained_in_parts_where_they_do_not_fit_whole() -> None:
    """Leaves, their average and the optimiser's, of the released network on sixteen chips."""
    config, memory = named("cogvideox-5b-i2v"), int(15.75 * 2**30)
    recipe = dataclasses.replace(RECIPE, method="full", ema=0.99, batch=1, mesh="v5e-16")
    mesh = mesh_for(recipe, config, HALF, topologies.chips("v5e-16"), memory)
    target = StepTarget(recipe, config, HALF, mesh, memory)
    held = sum(map(bytes_of, jax.tree.leaves(target.state)))
    assert held < 1.1 * target.bytes_of_state / 16


@pytest.mark.slow
def test_gradients_of_a_lora_are_summed_over_chips_in_float32() -> None:
    mesh = mesh_for(RECIPE, CONFIG, HALF, topologies.chips("v5e-8"), 2**34)
    target = StepTarget(RECIPE, CONFIG, HALF, mesh, 2**34)
    sampling = target.sampling(Request("", "").resolve(CONFIG), "xla")
    program, static = target.program(sampling)
    text = program.compile(*target.arguments(sampling), **static).as_text()
    summed = re.findall(r" = (\(.*?\)|\S+) all-reduce(?:-start)?\(", text)
    shapes = {shape for one in summed for shape in re.findall(r"\w+\[[\d,]*\]", one)}
    width = CONFIG.transformer.width
    for sizes in (f"{width},{RECIPE.rank}", f"{RECIPE.rank},{width}"):
        factors = [shape for shape in shapes if re.search(rf"\b{sizes}\]", shape)]
        assert {shape.partition("[")[0] for shape in factors} == {"f32"}, shapes
