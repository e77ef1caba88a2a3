"""What `benchmarks/gpu_compile.py` replaces in a private module of jax."""

from functools import partial

import gpu_compile
import jax
import jax.numpy as jnp
import pytest


def test_jax_lowers_cudnn_attention_without_a_gpu_by_the_functions_that_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = gpu_compile.ABILITIES.keys() - vars(gpu_compile.fused).keys()
    assert not missing, f"{gpu_compile.fused.__name__} of jax {jax.__version__} has no {missing}"
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    heads = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    for name, answer in gpu_compile.ABILITIES.items():
        monkeypatch.setattr(gpu_compile.fused, name, answer)
    traced = jax.jit(attend).trace(heads, heads, heads)
    assert "__cudnn$fmhaSoftmax" in traced.lower(lowering_platforms=("cuda",)).as_text()
