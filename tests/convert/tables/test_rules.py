"""The weight tables, read in both directions, and complete at full size (shapes alone)."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cogi2v_convert.sources.matching import TABLES, targets
from cogi2v_convert.tables import rules, t5, vae
from cogi2v_convert.tables.rules import (
    Rule,
    Target,
    contiguous,
    expand,
    linear,
    misfits,
    norm,
    refuse,
)
from diffusers import CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel
from twins import new_vae

from cogi2v_jax.config import TransformerConfig, named
from cogi2v_jax.weights.pieces import NETWORKS, abstract, is_stacked, layer_count, leaf_names

FULL_SIZE = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
# Counts of tensors and parameters in the released files.
PUBLISHED = {
    ("cogvideox-5b-i2v", "transformer"): (1025, 5_625_087_552),
    ("cogvideox1.5-5b-i2v", "transformer"): (1028, 5_571_594_880),
    ("cogvideox-5b-i2v", "vae"): (436, 215_583_907),
    ("cogvideox1.5-5b-i2v", "vae"): (436, 215_583_907),
    ("cogvideox-5b-i2v", "text_encoder"): (219, 4_762_310_656),
    ("cogvideox1.5-5b-i2v", "text_encoder"): (219, 4_762_310_656),
}


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def rule_of(table: tuple[Rule, ...], torch_name: str) -> Rule:
    (rule,) = (rule for rule in table if rule.torch == torch_name)
    return rule


# one rule


@pytest.mark.parametrize("on_cpu", [True, False], ids=["by XLA", "without a CPU backend"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_row_major_order_changes_no_bit(axes, dtype, on_cpu, monkeypatch, rng):
    if not on_cpu:
        monkeypatch.setattr(rules, "_cpu", lambda: None)
    # Of numbers, infinities and all kinds of NaN.
    bits = rng.integers(0, 256, (5, 33, 40, jnp.dtype(dtype).itemsize), np.uint8)
    permuted = bits.view(dtype)[..., 0].transpose(axes)
    made = contiguous(permuted)
    assert (made.flags.c_contiguous, made.dtype, made.tobytes()) == (
        True,
        permuted.dtype,
        permuted.tobytes(),
    )


@pytest.mark.parametrize(
    ("rule", "theirs", "ours"),
    [
        (Rule("a", "b"), (3, 2), (3, 2)),
        (Rule("a", "b", "o i -> i o"), (5, 3), (3, 5)),
        (Rule("a", "b", "(n k r) i -> i (n r k)", {"n": 2, "r": 2}), (12, 5), (5, 12)),
        (Rule("a", "b", "(k r) -> (r k)", {"r": 2}), (8,), (8,)),
        (Rule("a", "b", "o c p q -> (p q c) o", {"p": 2, "q": 2}), (5, 3, 2, 2), (12, 5)),
        (Rule("a", "b", "o (c t p q) -> (t p q c) o", {"t": 2, "p": 2, "q": 2}), (5, 24), (24, 5)),
        (Rule("a", "b", "o i 1 1 1 -> i o"), (5, 3, 1, 1, 1), (3, 5)),
        (Rule("a", "b", "1 s d -> s d"), (1, 4, 3), (4, 3)),
        (Rule("a", "b", "o i t h w -> t h w i o"), (5, 2, 3, 3, 3), (3, 3, 3, 2, 5)),
    ],
)
def test_a_rule_reads_both_ways(rule, theirs, ours):
    tensor = numbered(*theirs)
    array = rule.to_flax(tensor)
    assert array.shape == ours
    np.testing.assert_array_equal(rule.to_torch(array), tensor)
    assert rule.torch_shape(ours) == theirs


LINEAR = [
    pytest.param(rule, id=f"{name}-{rule.flax}")
    for name in FULL_SIZE
    for rule in TABLES["transformer"](named(name).transformer)
    if rule.is_linear
]


@pytest.mark.parametrize("rule", LINEAR)
def test_low_rank_factors_go_both_ways_and_their_product_is_the_weight(rule):
    rank, ours = 3, (256, 384)  # inputs and outputs that every rule can split
    outputs, *inputs = rule.torch_shape(ours)
    down, up = numbered(rank, *inputs), numbered(outputs, rank)
    pair = rule.factors(down, up)
    assert [factor.shape for factor in pair] == [(256, rank), (rank, 384)]
    np.testing.assert_array_equal(pair[0] @ pair[1], rule.to_flax(np.tensordot(up, down, 1)))
    for back, theirs in zip(rule.torch_factors(*pair), (down, up), strict=True):
        np.testing.assert_array_equal(back, theirs)


def test_a_linear_weight_is_transposed_and_its_bias_is_not():
    weight, bias = linear("there", "here")
    assert (weight.torch, weight.flax, bias.torch, bias.flax) == (
        "there.weight",
        "here.kernel",
        "there.bias",
        "here.bias",
    )
    np.testing.assert_array_equal(weight.to_flax(numbered(3, 2)), numbered(3, 2).T)
    np.testing.assert_array_equal(bias.to_flax(numbered(3)), numbered(3))
    assert linear("there", "here", bias=False) == (weight,)


def test_a_norm_weight_is_our_scale():
    assert norm("there", "here") == (
        Rule("there.weight", "here.scale"),
        Rule("there.bias", "here.bias"),
    )


def test_a_causal_convolution_has_time_first_and_outputs_last():
    kernel, _ = vae.causal("there", "here")
    tensor = numbered(5, 4, 3, 2, 2)  # o i t h w
    assert kernel.to_flax(tensor)[2, 1, 0, 3, 4] == tensor[4, 3, 2, 1, 0]


def test_rotary_pairs_change_from_adjacent_channels_to_halves_of_a_head():
    table = TABLES["transformer"](TransformerConfig(num_attention_heads=2, attention_head_dim=16))
    width = 32
    rows = np.arange(width, dtype=np.float32)
    columns = rule_of(table, "transformer_blocks.{}.attn1.to_q.weight").to_flax(
        np.broadcast_to(rows[:, None], (width, width))
    )[0]
    halves = np.concatenate(
        [[*range(head, head + 16, 2), *range(head + 1, head + 16, 2)] for head in (0, 16)]
    )
    np.testing.assert_array_equal(columns, halves)
    np.testing.assert_array_equal(
        rule_of(table, "transformer_blocks.{}.attn1.to_k.bias").to_flax(rows), halves
    )
    np.testing.assert_array_equal(
        rule_of(table, "transformer_blocks.{}.attn1.norm_q.weight").to_flax(rows[:16]), halves[:16]
    )
    np.testing.assert_array_equal(
        rule_of(table, "transformer_blocks.{}.attn1.to_v.bias").to_flax(rows), rows
    )


# a table


def test_expanding_gives_a_target_for_each_layer_or_one_without_layers():
    one, each = Rule("first.weight", "first"), Rule("blocks.{}.weight", "blocks.weight")
    assert expand((one, each), 3) == {
        "first.weight": Target(one, None),
        "blocks.0.weight": Target(each, 0),
        "blocks.1.weight": Target(each, 1),
        "blocks.2.weight": Target(each, 2),
    }


TABLE = (Rule("in.weight", "in", "o i -> i o"), Rule("blocks.{}.weight", "blocks.w", "o i -> i o"))
LEAVES = {"in": (4, 3), "blocks.w": (2, 3, 5)}
FOUND = {"in.weight": (3, 4), "blocks.0.weight": (5, 3), "blocks.1.weight": (5, 3)}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"blocks.1.weight": None}, ["blocks.1.weight is missing"]),
        ({"blocks.2.weight": (5, 3)}, ["blocks.2.weight has no rule"]),
        ({"in.weight": (4, 3)}, ["in.weight must have the shape [3, 4]: got [4, 3]"]),
        ({"blocks.1.weight": (3, 5)}, ["blocks.1.weight must have the shape [5, 3]: got [3, 5]"]),
        (
            {"blocks.1.weight": (5,), "in.weight": None, "new.bias": ()},
            [
                "new.bias has no rule",
                "in.weight is missing",
                "blocks.1.weight must have the shape [5, 3]: got [5]",
            ],
        ),
    ],
)
def test_misfits_name_every_tensor_that_is_missing_unknown_or_wrongly_shaped(change, faults):
    found = {name: shape for name, shape in {**FOUND, **change}.items() if shape is not None}
    assert misfits(expand(TABLE, 2), LEAVES, found) == faults


def test_refusing_collects_the_faults_in_one_line():
    refuse("folder", [])
    with pytest.raises(
        ValueError, match=r"^folder must fit the network: a is missing; b has no rule$"
    ):
        refuse("folder", ["a is missing", "b has no rule"])


def test_refusing_shows_at_most_twenty_faults():
    with pytest.raises(ValueError, match=r"f19; and 5 more$") as caught:
        refuse("folder", (f"f{number}" for number in range(25)))
    assert "f20" not in str(caught.value)


# full size


@pytest.fixture(scope="module")
def state_dicts():
    """Names and shapes of the reference classes at full size, on a device without memory."""
    found = {}
    for name in FULL_SIZE:
        config = named(name)
        parts = {part: dataclasses.asdict(getattr(config, part)) for part in NETWORKS}
        with torch.device("meta"):
            modules = {
                "transformer": CogVideoXTransformer3DModel(**parts["transformer"]),
                "vae": new_vae(**parts["vae"]),
                "text_encoder": T5EncoderModel(
                    T5Config(**parts["text_encoder"], feed_forward_proj="gated-gelu")
                ),
            }
        for part, module in modules.items():
            tensors = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            found[name, part] = {key: shape for key, shape in tensors.items() if key not in t5.TIED}
    return found


@pytest.fixture(scope="module")
def leaves():
    """Our names and shapes at full size."""
    networks = {
        (name, part): abstract(named(name), part, jnp.dtype(jnp.bfloat16))
        for name in FULL_SIZE
        for part in NETWORKS
    }
    return {
        key: {name: leaf.shape for name, leaf in leaf_names(network).items()}
        for key, network in networks.items()
    }


@pytest.mark.parametrize(("name", "part"), PUBLISHED)
def test_every_key_of_a_released_checkpoint_has_one_rule_and_every_rule_its_keys(
    name, part, state_dicts, leaves
):
    theirs = state_dicts[name, part]
    places = targets(named(name), part)
    assert theirs.keys() == places.keys()
    assert misfits(places, leaves[name, part], theirs) == []


@pytest.mark.parametrize(("name", "part"), PUBLISHED)
def test_every_leaf_of_ours_is_filled_once_a_layer(name, part, leaves):
    config = named(name)
    filled = Counter(rule.flax for rule, _ in targets(config, part).values())
    layers = layer_count(config, part)
    assert filled == {leaf: layers if is_stacked(leaf) else 1 for leaf in leaves[name, part]}
    names = [rule.torch for rule in TABLES[part](getattr(config, part))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "part"), PUBLISHED)
def test_tensors_and_parameters_are_as_many_as_published(name, part, state_dicts, leaves):
    tensors, parameters = PUBLISHED[name, part]
    assert len(targets(named(name), part)) == tensors
    assert (
        sum(int(np.prod(shape, dtype=np.int64)) for shape in leaves[name, part].values())
        == parameters
    )
    theirs = state_dicts[name, part].values()
    assert (len(theirs), sum(int(np.prod(shape, dtype=np.int64)) for shape in theirs)) == (
        tensors,
        parameters,
    )


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"use_learned_positional_embeddings": True}, set()),
        ({}, {"patch_embed.pos_embedding"}),
        ({"patch_bias": False}, {"patch_embed.pos_embedding", "patch_embed.proj.bias"}),
        # The linear layer of 1.5 has a bias in any case.
        ({"patch_size_t": 2, "patch_bias": False}, {"patch_embed.pos_embedding"}),
    ],
)
def test_a_network_without_a_part_has_no_rule_for_it(settings, absent):
    sizes = {
        "num_attention_heads": 2,
        "num_layers": 1,
        "in_channels": 8,
        "out_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
    }
    positions = {
        "use_rotary_positional_embeddings": True,
        "sample_height": 4,
        "sample_width": 4,
        "sample_frames": 5,
    }
    config = TransformerConfig(**sizes, **positions, **settings)
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel(**dataclasses.asdict(config)).state_dict().keys()
    ours = expand(TABLES["transformer"](config), config.num_layers).keys()
    assert ours == theirs
    assert {"patch_embed.pos_embedding", "patch_embed.proj.bias"} - ours == absent
