"""The released checkpoints at full size, without their weights: every phase is traced with shapes alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogi2v_jax import config
from cogi2v_jax.attention import xla
from cogi2v_jax.checkpoint import abstract
from cogi2v_jax.pipeline import decode_latents, denoise, encode_image, encode_text, modulate
from cogi2v_jax.positions import positions, sinusoid
from cogi2v_jax.request import Request
from cogi2v_jax.schedule import tableau

NATIVE = {
    "cogvideox-5b-i2v": ((13, 60, 90, 16), (49, 480, 720, 3), 17776),
    "cogvideox1.5-5b-i2v": ((22, 96, 170, 16), (81, 768, 1360, 3), 45106),
}


@pytest.mark.parametrize("name", NATIVE)
def test_every_phase_of_a_released_checkpoint_has_its_published_shapes(name: str) -> None:
    latents, video, tokens = NATIVE[name]
    checkpoint = config.named(name)
    request = Request("photo.jpg", "a prompt").resolve(checkpoint)
    shape = request.latent_shape(checkpoint)
    assert (*shape[:4],) == latents
    networks = {part: abstract(checkpoint, part, jnp.dtype(jnp.bfloat16)) for part in ("transformer", "vae", "text_encoder")}
    half = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    full = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    words = jax.ShapeDtypeStruct((1, 2), np.uint32)

    text = jax.eval_shape(encode_text, networks["text_encoder"], jax.ShapeDtypeStruct((2, 226), np.int32))
    assert text == half((2, 226, 4096))

    pixels = full((1, 1, *video[1:]))
    image = jax.eval_shape(partial(encode_image, noise=None, frames=shape.frames), networks["vae"], pixels, words=words, scale=full(()))
    assert image == full((1, *latents))

    rows = tableau(checkpoint.scheduler, request.scheduler, request.num_inference_steps, request.guidance_scale, request.use_dynamic_cfg)
    ofs = sinusoid(np.array([2.0]), 512) if checkpoint.transformer.ofs_embed_dim else None
    shifts = jax.eval_shape(modulate, networks["transformer"].modulation, sinusoid(rows.timestep, 3072), ofs)
    assert shifts.blocks == half((50, 42, 6, 2, 3072))

    where = positions(checkpoint.transformer, latents[:3])
    assert len(where.is_text) == tokens
    walk = partial(denoise, slab=50, attend=xla)
    x, x0 = jax.eval_shape(walk, networks["transformer"], (image, image), np.int32(0), rows, shifts, None, words, image, text, where)
    assert (x, x0) == (image, image)

    decoded = jax.eval_shape(decode_latents, networks["vae"], full((1, shape.frames - shape.padding, *latents[1:])), full(()))
    assert decoded == jax.ShapeDtypeStruct((1, *video), np.uint8)
