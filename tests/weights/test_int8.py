"""Int8 weights: results, memory, precision, and what is refused."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import loras
import lowering
import numpy as np
import pytest
import twins
from cogi2v_convert.conversion import to_flax
from folders import scale_of, units
from PIL import Image
from tolerances import TOLERANCE, assert_close, relative_error

import cogi2v_jax
from cogi2v_jax import Models, Request, config, pipeline
from cogi2v_jax.models import layers
from cogi2v_jax.models.layers import Linear
from cogi2v_jax.weights.checkpoint import (
    MANIFEST,
    list_weights,
    open_folder,
    unit_path,
    write_unit,
)
from cogi2v_jax.weights.pieces import (
    bytes_per_device,
    leaf_names,
    piece,
    shard_piece,
)

FLOAT32, HALF = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Networks with all axes divisible by eight."""
    pipe = twins.pipeline("1.0")
    heads = {"num_attention_heads": 8, "attention_head_dim": 16, "num_layers": 2}
    pipe.transformer = twins.transformer(
        **{
            **twins.FAMILIES["1.0"],
            **heads,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 9,
        }
    )
    pipe.text_encoder = twins.t5(1, d_ff=40)
    pipe.vae = twins.vae(2, layers_per_block=1)
    return pipe


@pytest.fixture(scope="module")
def source(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.save(pipe, tmp_path_factory.mktemp("source") / "even")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied, not changed."""
    return to_flax(source, tmp_path_factory.mktemp("converted") / "int8", "int8")


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in floating point: int8 times scale, in float32."""
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("plain") / "float32"))
    for part in config.BLOCKS:
        for layer, leaves in units(folder, part):
            if layer is not None:
                kernels = {
                    name: leaf * leaves[scale_of(name)]
                    for name, leaf in leaves.items()
                    if leaf.dtype == np.int8
                }
                rest = {
                    name: leaf
                    for name, leaf in leaves.items()
                    if name not in {*kernels, *map(scale_of, kernels)}
                }
                shutil.rmtree(unit_path(copy, part, layer))
                write_unit(copy, part, layer, rest | kernels)
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["int8"]
    (copy / MANIFEST).write_text(json.dumps(manifest | {"files": list_weights(copy)}))
    return copy


def ask(**settings: Any) -> Request:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return Request(image, "the red circle", seed=7, num_inference_steps=2, num_frames=9, **settings)


@pytest.mark.parametrize("form", ["default", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_same_as_with_a_floating_point_kernel(
    bias: bool, dtype: str, form: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.lax, "platform_dependent", lambda *args, **forms: forms[form](*args))
    sizes: dict[str, Any] = {"axes": (None, None), "bias": bias, "dtype": jnp.dtype(dtype)}
    layer, floating = Linear(64, 48, int8=True, **sizes), Linear(64, 48, **sizes)
    layer.kernel.set_value(jnp.asarray(rng.integers(-128, 128, (64, 48)), jnp.int8))
    assert layer.scale is not None
    layer.scale.set_value(jnp.asarray(rng.uniform(0.001, 0.1, 48), jnp.float32))
    floating.kernel.set_value((layer.kernel[...] * layer.scale[...]).astype(dtype))
    if layer.bias is not None and floating.bias is not None:
        layer.bias.set_value(jnp.asarray(rng.normal(size=48), dtype))
        floating.bias.set_value(layer.bias[...])
    x = jnp.asarray(rng.normal(size=(5, 64)), dtype)
    assert layer(x).dtype == x.dtype
    if dtype == "float32":
        assert_close(layer(x), floating(x), TOLERANCE["module"])
    elif form == "cuda":
        # Its kernel is the one that to-torch gives.
        np.testing.assert_array_equal(layer(x), floating(x))
    else:
        truth = np.asarray(x, np.float64) @ (
            np.asarray(layer.kernel[...], np.float64) * np.asarray(layer.scale[...], np.float64)
        )
        truth += 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
        exact = np.asarray(truth.astype(np.float32).astype(HALF), np.float64)
        # Rounded once.
        assert relative_error(layer(x), truth) <= 1.01 * relative_error(exact, truth)


class Enough(Exception):
    """Ends a run before its latents are decoded: the VAE has no int8 weights."""


def latents(models: Models) -> np.ndarray:
    seen = []

    def keep(latents: np.ndarray, _: Any) -> None:
        seen.append(latents)
        raise Enough

    with contextlib.suppress(Enough):
        cogi2v_jax.generate(models, ask(), on_latents=keep)
    return seen[0]


@pytest.fixture(scope="module")
def alone(folder: Path) -> np.ndarray:
    return latents(cogi2v_jax.load(folder, "float32"))


def test_the_pipeline_computes_the_same_as_with_floating_point_weights(
    plain: Path, alone: np.ndarray
) -> None:
    models = cogi2v_jax.load(plain, "float32")
    assert models.config.int8 == ()
    assert_close(alone, latents(models), TOLERANCE["module"])


def test_latents_of_the_embedded_model_are_near_the_unquantised_ones(
    tmp_path: Path,
) -> None:
    models = cogi2v_jax.load(to_flax(twins.TINY, tmp_path / "int8", "int8"), "float32")
    assert models.config.int8 == config.BLOCKS
    # Measured: 0.0024.
    assert (
        5e-4
        < relative_error(latents(models), latents(cogi2v_jax.load("cogi2v-tiny", "float32")))
        < 0.005
    )


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_with_floating_point_weights(
    folder: Path, plain: Path, alone: np.ndarray
) -> None:
    ours, theirs = (
        relative_error(latents(cogi2v_jax.load(each, "bfloat16")), alone)
        for each in (folder, plain)
    )
    assert 0 < ours < 1.2 * theirs  # measured: 0.0218 and 0.0225


def places_of(models: Models, name: str) -> Any:
    return pipeline.target_of(models, ask().resolve(models.config)).network(name)


def test_eight_devices_compute_the_same_as_one(
    folder: Path, alone: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogi2v_jax.weights.pieces.REPLICATED", 0.0)
    shard_piece.cache_clear()
    models = cogi2v_jax.load(folder, "float32", mesh="pair=2,context=4")
    assert_close(latents(models), alone, 1e-5)
    for name in config.BLOCKS:
        leaves = leaf_names(models.piece(name, places_of(models, name)))
        for leaf, ways in (
            ("blocks.mlp.up.kernel", 8),
            ("blocks.mlp.up.scale", 8),
            ("blocks.mlp.down.kernel", 8),
            ("blocks.mlp.down.scale", 1),
        ):
            assert leaves[leaf].size == leaves[leaf].addressable_shards[0].data.size * ways
    shard_piece.cache_clear()


# Memory.


@pytest.mark.parametrize(
    ("name", "most"), [("transformer", 0.51), ("text_encoder", 0.52), ("modulation", 1.0)]
)
def test_a_released_checkpoint_takes_about_half_of_the_memory(name: str, most: float) -> None:
    full = config.named("cogvideox-5b-i2v")
    small = dataclasses.replace(full, int8=config.BLOCKS)
    share = bytes_per_device(piece(small, name, HALF)) / bytes_per_device(piece(full, name, HALF))
    assert most - 0.02 < share <= most


@pytest.mark.parametrize("dtype", [FLOAT32, HALF])
def test_a_device_holds_no_more_than_the_shapes_say(dtype: jnp.dtype, folder: Path) -> None:
    models = open_folder(folder, dtype)
    for name in ("transformer", "text_encoder"):
        leaves = leaf_names(models.piece(name))
        assert sum(leaf.nbytes for leaf in leaves.values()) == bytes_per_device(
            piece(models.config, name, dtype)
        )
        assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.int8), FLOAT32, dtype}


@pytest.mark.parametrize("stage", ["text", "denoise"])
def test_no_program_converts_more_than_one_layer_to_floating_point_at_a_time(
    stage: str, folder: Path
) -> None:
    models = open_folder(folder, HALF)
    place = pipeline.target_of(models, ask().resolve(models.config))
    call = place.calls(stage)[-1]
    text = call.compile().as_text()
    network = leaf_names(place.network(call.stage.piece))
    stacks = {",".join(map(str, leaf.shape)) for leaf in network.values() if leaf.dtype == jnp.int8}
    assert all(f"s8[{shape}]" in text for shape in stacks)
    assert [
        f"{kind}[{shape}]"
        for kind in ("f32", "bf16")
        for shape in stacks
        if f"{kind}[{shape}]" in text
    ] == []


# Precision.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of `lowering`, with int8 weights."""
    small = dataclasses.replace(lowering.checkpoint(), int8=config.BLOCKS)
    monkeypatch.setattr(lowering, "checkpoint", lambda: small)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["text", "denoise"])
def test_products_and_arithmetic_are_as_exact_as_without_int8(stage: str) -> None:
    text = lowering.stablehlo(stage, "bfloat16")
    assert "xi8>" in text
    products = list(lowering.operations(text, lowering.PRODUCTS))
    assert len(products) >= 5
    assert [line for kind, _, line in products if kind != "f32" or line.count("bf16>") != 2] == []
    found = list(lowering.operations(text, lowering.ROUNDING))
    assert [line for kind, operation, line in found if kind == "bf16" and operation != "add"] == []
    products = list(lowering.operations(lowering.stablehlo(stage, "float32"), lowering.PRODUCTS))
    assert [line for kind, _, line in products if kind != "f32" or line.count("HIGHEST") != 2] == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["text", "denoise"])
def test_nvidia_devices_scale_a_kernel_before_a_product_that_rounds_once(stage: str) -> None:
    text = lowering.stablehlo_for_nvidia(stage, "bfloat16")
    assert "xi8>" in text
    kinds = [kind for kind, _, _ in lowering.operations(text, lowering.PRODUCTS)]
    assert kinds.count("f32") == 2  # attention's
    assert kinds.count("bf16") >= 7
    assert [line for kind, _, line in lowering.operations(text, "multiply") if kind == "bf16"] == []


def test_a_lora_for_weights_that_are_not_int8_is_added(
    pipe: Any, folder: Path, alone: np.ndarray, tmp_path: Path
) -> None:
    file = loras.save(
        tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer, ("linear",), rank=4))
    )
    assert relative_error(latents(cogi2v_jax.load(folder, "float32", loras=[file])), alone) > 1e-3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda errors: errors.update(vae={"a": 0.1}),
            r"int8 must be of transformer and text_encoder: got 'vae'",
        ),
        (
            lambda errors: errors.update(transformer={}),
            "must give the errors of every int8 part's tensors",
        ),
        (
            lambda errors: errors.update(transformer=["a"]),
            "must give the errors of every int8 part's tensors",
        ),
        (
            lambda errors: errors.update(transformer={"a": "b"}),
            "must give the errors of every int8 part's tensors",
        ),
        (lambda errors: errors.pop("transformer"), "attn.q.scale not of this network"),
    ],
)
def test_a_manifest_with_invalid_errors_is_refused(
    change: Any, expected: str, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "int8"))
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest["int8"])
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=expected) as caught:
        open_folder(copy, FLOAT32).piece("transformer")
    assert "\n" not in str(caught.value)
