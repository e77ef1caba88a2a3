"""Strips of rows and shards over devices: the memory changes, the result does not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tolerances import TOLERANCE, assert_close

from cogi2v_jax.config import VAEConfig, named
from cogi2v_jax.models.vae import VAE, posterior, strips_within
from cogi2v_jax.models.vae_strips import Strip, in_strips, strip_counts

SIZES = {"layers_per_block": 2, "norm_num_groups": 2, "latent_channels": 4}
FOUR, THREE = (
    VAEConfig(block_out_channels=channels, **SIZES) for channels in ((4, 4, 8, 8), (4, 8, 8))
)

encode = jax.jit(
    lambda network, video, strips: posterior(network.encode(video, strips)), static_argnums=2
)
decode = jax.jit(lambda network, latents, strips: network.decode(latents, strips), static_argnums=2)


@pytest.fixture(scope="module", params=[FOUR], ids=["four levels"])
def network(request: pytest.FixtureRequest) -> VAE:
    return twins.filled(VAE(request.param, dtype=jnp.dtype("float32")), twins.random_leaf)


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


LATENTS = normal(2, 5, 8, 8, 4)


@pytest.mark.parametrize(
    ("network", "strips"),
    [
        pytest.param(FOUR, 4, id="four levels", marks=pytest.mark.slow),
        pytest.param(THREE, 4, id="three levels"),
    ],
    indirect=["network"],
)
def test_decoding_in_strips_is_decoding(network: VAE, strips: int) -> None:
    assert_close(decode(network, LATENTS, strips), decode(network, LATENTS, 1), TOLERANCE["module"])


def test_encoding_in_strips_is_encoding(network: VAE) -> None:
    video = normal(1, 17, 32, 24, 3)
    for ours, whole in zip(encode(network, video, 4), encode(network, video, 1), strict=True):
        assert_close(ours, whole, TOLERANCE["module"])


def test_coarser_resolutions_have_fewer_strips_of_as_many_values() -> None:
    assert [strip_counts(12, 480, 8)(rows) for rows in (480, 240, 120, 60)] == [12, 3, 1, 1]
    assert [strip_counts(10, 480, 8)(rows) for rows in (480, 240, 120, 60)] == [10, 2, 1, 1]
    assert [strip_counts(32, 768, 8)(rows) for rows in (768, 384, 192, 96)] == [32, 8, 2, 1]
    assert [strip_counts(1, 480, 8)(rows) for rows in (480, 60)] == [1, 1]
    assert [strip_counts(8, 96, 4)(rows) for rows in (96, 48, 24)] == [8, 2, 1]


@pytest.mark.parametrize(("ratio", "rows"), [(8, 60), (4, 120)])
def test_strips_that_split_a_latent_row_are_refused(ratio: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"strips must divide the {rows} latent rows: got 7"):
        strip_counts(7, 480, ratio)


def test_the_fewest_strips_that_fit_are_chosen_and_none_is_an_error() -> None:
    vae, gib = named("cogvideox-5b-i2v").vae, 2**30
    assert [strips_within(size * gib, vae, 60, 90) for size in (16, 10, 9, 7)] == [1, 2, 3, 5]
    assert strips_within(16 * gib, vae, 60, 90, itemsize=4) > strips_within(16 * gib, vae, 60, 90)
    assert [strips_within(int(size * gib), vae, 96, 170) for size in (14.5, 14)] == [48, 96]
    with pytest.raises(
        ValueError,
        match=r"96x170 latents must fit 13.0 GiB: it takes .* in 96 strips; use more devices",
    ):
        strips_within(13 * gib, vae, 96, 170)


def test_a_strip_reads_what_its_neighbours_overwrite() -> None:
    def add_neighbours(strip: Strip, rows: Any) -> list[Any]:
        rows = jnp.pad(strip.zero_outside(rows), ((0, 0), (0, 0), strip.padding, (0, 0), (0, 0)))
        return [rows[:, :, :-2] + rows[:, :, 2:]]

    [whole], [in_place] = (
        in_strips(add_neighbours, count, jnp.asarray(LATENTS)) for count in (1, 4)
    )
    np.testing.assert_array_equal(in_place, whole)


@pytest.mark.parametrize("count", [1, 4])
def test_a_layer_can_leave_a_tensor_as_it_is(count: int) -> None:
    def copy(strip: Strip, none: None, rows: Any) -> list[Any]:
        return [none, None, strip.without_halo(rows)]

    none, *both = in_strips(copy, count, None, jnp.asarray(LATENTS))
    assert none is None
    for result in both:
        np.testing.assert_array_equal(result, LATENTS)


@pytest.mark.parametrize(
    ("network", "mesh"),
    [
        pytest.param(THREE, (4, 2), id="three levels"),
        *(
            pytest.param(FOUR, mesh, id=str(mesh), marks=pytest.mark.slow)
            for mesh in ((4, 2), (1, 8), (2, 4), (8, 1))
        ),
    ],
    indirect=["network"],
)
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_sharded_picture_gives_the_same_result(
    network: VAE, part: str, mesh: tuple[int, int]
) -> None:
    devices = Mesh(np.array(jax.devices()).reshape(mesh), ("rows", "columns"))
    split = NamedSharding(devices, PartitionSpec(None, None, "rows", "columns"))
    # The encoder's coarsest pictures, four rows of eight columns, have fewer rows than the mesh has
    # devices, or a number that it doesn't divide.
    x = normal(1, 1, 32, 64, 3) if part == "encode" else LATENTS
    run: Any = encode if part == "encode" else decode
    weights = jax.device_put(network, NamedSharding(devices, PartitionSpec()))
    pair = run(weights, jax.device_put(x, split), 1), run(network, x, 1)
    for sharded, whole in zip(*map(jax.tree.leaves, pair), strict=True):
        assert_close(sharded, whole, TOLERANCE["module"])
