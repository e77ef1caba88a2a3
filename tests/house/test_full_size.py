"""The released checkpoints at full size, without their weights: every stage is traced from shapes
alone."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cogi2v_jax import config
from cogi2v_jax.devices.mesh import sizes_of, undivided, work_of
from cogi2v_jax.request import Request
from cogi2v_jax.sampling.programs import Call, RequestTarget, mesh_for
from cogi2v_jax.weights.pieces import piece

NATIVE = {
    "cogvideox-5b-i2v": ((13, 60, 90, 16), (49, 480, 720, 3), 17776),
    "cogvideox1.5-5b-i2v": ((22, 96, 170, 16), (81, 768, 1360, 3), 45106),
}
HALF = jnp.dtype(jnp.bfloat16)


def traced(call: Call) -> object:
    """The shapes and dtypes of a program's results."""
    results = jax.eval_shape(partial(call.stage.program.function, **call.static), *call.args)
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), results)


def target(name: str, mesh: str) -> RequestTarget:
    checkpoint = config.named(name)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    devices = mesh_for(checkpoint, HALF, mesh, 1, True, jax.devices(), 2**40)
    return RequestTarget(checkpoint, HALF, devices, 2**40, request, "xla")


@pytest.mark.parametrize("mesh", ["cpu", "v5e-8"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_stage_of_a_released_checkpoint_has_published_shapes(name: str, mesh: str) -> None:
    latents, video, tokens = NATIVE[name]
    made_for = target(name, mesh)
    assert (*made_for.shape[:4],) == latents
    assert made_for.layout.tokens == tokens
    assert made_for.layout.padded % sizes_of(mesh).context == 0
    stages = ("text", "image", "denoise", "decode")
    results = {stage: [traced(call) for call in made_for.calls(stage)] for stage in stages}
    assert results["text"] == [((2, 226, 4096), "bfloat16")]
    moments, image = results["image"]
    assert moments == ((1, 1, *latents[1:3], 32), "bfloat16")
    assert image == ((1, *latents), "float32")
    modulation, start, loop = results["denoise"]
    assert modulation.blocks == ((50, 42, 6, 2, 3072), "bfloat16")
    state = (1, *latents), "float32"
    assert start == loop == (state, (state,))
    frames, (whole, finite) = results["decode"]
    assert (frames, whole) == (((1, *video), "bfloat16"), ((1, *video), "uint8"))
    assert finite == ((), "bool")


@pytest.mark.parametrize("mesh", config.meshes()["meshes"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_axis_divides_on_every_named_mesh(name: str, mesh: str) -> None:
    checkpoint = config.named(name)
    networks = {name: piece(checkpoint, name, HALF) for name in ("text_encoder", "transformer")}
    assert undivided(sizes_of(mesh), work_of(checkpoint, networks, videos=1, guided=True)) == []


@pytest.mark.parametrize("name", NATIVE)
def test_a_split_sequence_is_padded_to_a_multiple_of_its_parts_and_no_more(name: str) -> None:
    for ways in (1, 2, 4, 8):
        made_for = target(name, f"context={ways}")
        assert made_for.layout.padded == -(-NATIVE[name][2] // ways) * ways
        where = made_for.positions()
        assert where.cos.shape[0] == where.is_text.shape[0] == made_for.layout.padded
