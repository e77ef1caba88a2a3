"""Parity with transformers' T5EncoderModel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from tolerances import TOLERANCE, assert_close, relative_error
from transformers.models.t5.modeling_t5 import T5Attention

from cogi2v_jax.models.t5 import buckets

run = jax.jit(lambda network, ids: network(ids))


def reference(module: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(ids)).last_hidden_state.float().numpy()


@pytest.mark.parametrize("tokens", [1, 10, 226])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_heads": 2, "d_kv": 12, "num_layers": 1}],
    ids=["square", "heads narrower than the width"],
)
def test_embeddings_are_the_references(
    tokens: int, settings: dict[str, Any], rng: np.random.Generator
) -> None:
    module = twins.t5(**settings)
    network, _ = twins.twin("text_encoder", module)
    ids = rng.integers(0, 39, (2, tokens)).astype(np.int32)
    ids[1, tokens // 2 :] = 0  # padding, which is attended like all tokens
    assert_close(run(network, ids), reference(module, ids), TOLERANCE["module"])


def test_buckets_are_the_references_at_every_distance() -> None:
    relative = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    theirs = T5Attention._relative_position_bucket(
        relative, bidirectional=True, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(buckets(300), theirs.numpy())


def test_bfloat16_is_no_further_from_the_truth_than_the_references_is(
    rng: np.random.Generator,
) -> None:
    error_ours, error_theirs = [], []
    for seed in range(8):
        half = twins.t5(seed).to(torch.bfloat16)
        full = twins.t5(seed)
        full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
        network, _ = twins.twin("text_encoder", full, jnp.bfloat16)
        ids = rng.integers(0, 39, (1, 40)).astype(np.int32)
        truth = reference(full, ids)
        error_ours.append(relative_error(np.float32(run(network, ids)), truth))
        error_theirs.append(relative_error(reference(half, ids), truth))
    ours, theirs = (np.sqrt(np.mean(np.square(e))) for e in (error_ours, error_theirs))
    assert ours <= TOLERANCE["bfloat16"] * theirs
    assert min(error_theirs) > 1e-4
