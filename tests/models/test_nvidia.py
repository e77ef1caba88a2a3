"""The forms of products and convolutions for NVIDIA devices, read in programs that are lowered for
them; and theirs and the TPU's, run on this machine."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
import torch
import twins
from lowering import stablehlo_for_nvidia
from tolerances import TOLERANCE, assert_close, relative_error

from cogi2v_jax.devices.compiler_options import compiler_options
from cogi2v_jax.models import layers
from cogi2v_jax.models.attention import BACKENDS


def products(stage: str, dtype: str, names: str = lowering.PRODUCTS) -> list[tuple[str, str]]:
    """(element type of the result, line) of every product in a stage's program."""
    found = lowering.operations(stablehlo_for_nvidia(stage, dtype), names)
    return [(kind, line) for kind, _, line in found]


def test_products_with_weights_are_bfloat16() -> None:
    """Float32 sums would be written to memory and read again before the bias is added."""
    attention = 2  # logits and weighted values are float32
    for stage, least in (("text", 7), ("denoise", 8)):
        kinds = [kind for kind, _ in products(stage, "bfloat16")]
        assert kinds.count("f32") == attention
        assert kinds.count("bf16") >= least


def test_convolutions_are_two_dimensional_channels_last_and_bfloat16() -> None:
    found = products("decode", "bfloat16", "convolution")
    assert len(found) >= 5
    assert {kind for kind, _ in found} == {"bf16"}
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for _, line in found)


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_every_product_of_a_float32_network_states_full_precision(stage: str) -> None:
    found = products(stage, "float32")
    assert len(found) >= 5
    for kind, line in found:
        assert kind == "f32", line
        assert line.count("HIGHEST") == 2, line


@pytest.fixture(params=["cuda", "default"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the form for NVIDIA devices, or the TPU's, on this machine."""
    chosen = request.param
    monkeypatch.setattr(
        layers.lax, "platform_dependent", lambda *args, **forms: forms[chosen](*args)
    )


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "VAE decode": (partial(twins.vae, layers_per_block=2), (1, 4, 5, 3, 6)),
    "VAE encode": (partial(twins.vae, layers_per_block=2), (1, 3, 9, 24, 16)),
    "T5": (twins.t5, (2, 11)),
}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_network_is_the_references(name: str, dtype: str) -> None:
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(3)
    if name == "T5":
        given = torch.randint(2, 39, shape, generator=generator)
    else:
        given = torch.randn(shape, generator=generator)
    ours, truth, theirs = [], [], []
    for seed in range(1 if dtype == "float32" else 4):
        module = make(seed)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.copy_(tensor.bfloat16())
        network, _ = twins.twin("text_encoder" if name == "T5" else "vae", module, dtype)
        truth.append(reference(name, module, given))
        theirs.append(reference(name, module.to(getattr(torch, dtype)), given))
        ours.append(np.asarray(mine(name, network, given, jnp.dtype(dtype)), np.float32))
    if dtype == "float32":
        assert_close(ours[0], truth[0], TOLERANCE["module"])
        return
    error_ours, error_theirs = (
        relative_error(np.stack(results), np.stack(truth)) for results in (ours, theirs)
    )
    assert error_ours <= TOLERANCE["bfloat16"] * error_theirs


def reference(name: str, module: Any, given: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        if name == "T5":
            return module(given)[0].float().numpy()
        given = given.to(module.dtype)
        result = module.decode(given).sample if name == "VAE decode" else module._encode(given)
        return twins.channels_last(result)


def mine(name: str, network: Any, given: torch.Tensor, dtype: jnp.dtype) -> Any:
    if name == "T5":
        return jax.jit(lambda network, ids: network(ids))(network, given.numpy().astype(np.int32))
    method = "decode" if name == "VAE decode" else "encode"
    run = jax.jit(lambda network, video: getattr(network, method)(video))
    return run(network, jnp.asarray(twins.channels_last(given), dtype))


def test_a_sequence_is_padded_so_that_products_of_each_part_have_a_multiple_of_8_rows() -> None:
    sizes = ((17776, 1), (45106, 1), (45106, 8))
    for name in ("cudnn", "tokamax"):
        assert [BACKENDS[name].padded(*size) for size in sizes] == [17776, 45112, 45120]
    assert BACKENDS["xla"].padded(45106, 1) == 45106


def test_all_nvidia_devices_leave_products_to_cublas() -> None:
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA L4"):
        assert compiler_options(kind) == {"xla_gpu_enable_triton_gemm": "false"}
    assert compiler_options("TPU v9") == {}
