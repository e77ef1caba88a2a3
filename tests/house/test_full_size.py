"""The released checkpoints at full size, without their weights: every phase is traced with shapes
alone."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cogi2v_jax import config
from cogi2v_jax.devices.mesh import misfits, sizes_of, work_of
from cogi2v_jax.request import Request
from cogi2v_jax.sampling import programs, stages
from cogi2v_jax.weights.pieces import piece

NATIVE = {
    "cogvideox-5b-i2v": ((13, 60, 90, 16), (49, 480, 720, 3), 17776),
    "cogvideox1.5-5b-i2v": ((22, 96, 170, 16), (81, 768, 1360, 3), 45106),
}
HALF = jnp.dtype(jnp.bfloat16)


def traced(call: programs.Call, place: programs.Phases) -> object:
    """Shapes and dtypes of a program's results."""
    network = () if call.piece is None else (place.network(call.piece),)
    function = {
        program: function
        for function, program in vars(programs).items()
        if isinstance(program, programs.Program)
    }
    results = jax.eval_shape(
        partial(PROGRAMS[function[call.program]], **call.static), *network, *call.args
    )
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), results)


PROGRAMS = {
    "TEXT": stages.encode_text,
    "MOMENTS": stages.encode_image,
    "IMAGE": stages.draw_image,
    "SHIFTS": stages.modulate,
    "START": stages.draw_start,
    "DENOISE": stages.denoise,
    "DECODE": stages.decode_latents,
    "BYTES": stages.to_bytes,
}


@pytest.mark.parametrize("mesh", ["cpu", "v5e-8"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_phase_of_a_released_checkpoint_has_its_published_shapes(
    name: str, mesh: str
) -> None:
    latents, video, tokens = NATIVE[name]
    checkpoint = config.named(name)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    where = programs.mesh_for(checkpoint, HALF, mesh, 1, True, jax.devices(), 2**40)
    place = programs.Phases(checkpoint, HALF, where, 2**40, request, "xla")
    assert (*place.shape[:4],) == latents
    assert place.layout.tokens == tokens
    assert place.layout.padded % sizes_of(mesh).context == 0
    calls = {phase: place.calls(phase) for phase in ("text", "encode", "denoise", "decode")}
    assert traced(calls["text"][0], place) == ((2, 226, 4096), "bfloat16")
    moments, image = (traced(call, place) for call in calls["encode"])
    assert moments == ((1, 1, *latents[1:3], 32), "bfloat16")
    assert image == ((1, *latents), "float32")
    shifts, start, loop = (traced(call, place) for call in calls["denoise"])
    assert shifts.blocks == ((50, 42, 6, 2, 3072), "bfloat16")
    assert start == loop == (((1, *latents), "float32"),) * 2
    assert [traced(call, place) for call in calls["decode"]] == [
        ((1, *video), "bfloat16"),
        ((1, *video), "uint8"),
    ]


@pytest.mark.parametrize("mesh", config.meshes()["meshes"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_axis_divides_on_every_named_mesh(name: str, mesh: str) -> None:
    checkpoint = config.named(name)
    networks = {name: piece(checkpoint, name, HALF) for name in ("text_encoder", "transformer")}
    assert misfits(sizes_of(mesh), work_of(checkpoint, networks, videos=1, guided=True)) == []


@pytest.mark.parametrize("name", NATIVE)
def test_a_split_sequence_is_evened_out_and_no_more(name: str) -> None:
    checkpoint = config.named(name)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    for ways in (1, 2, 4, 8):
        where = programs.mesh_for(
            checkpoint, HALF, f"context={ways}", 1, True, jax.devices(), 2**40
        )
        layout = programs.Phases(checkpoint, HALF, where, 2**40, request, "xla").layout
        assert layout.padded == -(-NATIVE[name][2] // ways) * ways
        where = jax.eval_shape(
            partial(programs.positions, checkpoint.transformer, NATIVE[name][0][:3], layout.padded)
        )
        assert where.cos.shape[0] == where.is_text.shape[0] == layout.padded
