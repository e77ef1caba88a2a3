"""Meshes: how they are named, chosen and refused, and that no result of a stage depends on one."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from PIL import Image
from tolerances import assert_close

import cogi2v_jax
from cogi2v_jax import Models, Request, config, pipeline
from cogi2v_jax.devices.mesh import (
    Sizes,
    Work,
    by_blocks,
    choose_sizes,
    make_mesh,
    sizes_of,
    spatial,
    undivided,
    work_of,
)
from cogi2v_jax.devices.sharding import RULES, put, split, to_host
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import Session
from cogi2v_jax.weights.pieces import bytes_per_device, piece, shard_piece

FLOAT32 = jnp.dtype(jnp.float32)
EIGHT = [
    Sizes(data, pair, context)
    for data in (1, 2, 4, 8)
    for pair in (1, 2)
    for context in (1, 2, 4, 8)
    if data * pair * context == 8
]
# All axes together; each as long as it can be, or two of them; the others.
FAST, SLOW = (Sizes(2, 2, 2),), (Sizes(1, 1, 8), Sizes(1, 2, 4), Sizes(8, 1, 1))


class Device(types.SimpleNamespace):
    """The attributes of a device that a mesh reads."""

    def __hash__(self) -> int:
        return self.id


def device(index: int = 0, platform: str = "tpu", process: int = 0, **attributes: Any) -> Any:
    return Device(id=index, platform=platform, process_index=process, **attributes)


def grid(*extents: int) -> list[Any]:
    """The devices of a TPU slice in jax's order: x fastest."""
    places = enumerate(np.ndindex(*reversed(extents)))
    return [device(number, coords=tuple(reversed(place))) for number, place in places]


def devices(count: int, *where: Any) -> list[Any]:
    return [device(number, *where) for number in range(count)]


# names


def test_a_mesh_is_named_or_spelled_out() -> None:
    assert sizes_of("v5e-8") == Sizes(1, 2, 4)
    assert sizes_of("v5e-16") == Sizes(1, 2, 8)
    assert sizes_of("cpu") == sizes_of("h100-1") == Sizes(1, 1, 1)
    assert sizes_of(" context = 4 , pair=2") == Sizes(1, 2, 4)
    assert sizes_of(str(Sizes(3, 2, 5))) == Sizes(3, 2, 5)


WRONG = ["", "v5e-9", "pair", "pair=", "pair=0", "pair=-1", "pair=2,pair=2", "rows=2"]
WRONG += ["pair=2;context=4", "context=1.5"]


@pytest.mark.parametrize("text", WRONG)
def test_an_unknown_mesh_is_refused_with_the_known_ones(text: str) -> None:
    line = r"mesh must be auto, v5e-1, .*cpu, or sizes like data=1,pair=2,context=4: got"
    with pytest.raises(ValueError, match=line):
        sizes_of(text)


@pytest.mark.parametrize("name", config.meshes()["meshes"])
def test_a_named_mesh_has_as_many_devices_as_its_machine(name: str) -> None:
    mesh = config.meshes()["meshes"][name]
    generation = config.meshes()["generations"][mesh["generation"]]
    assert generation["kind"]
    if "topology" in mesh:
        chips = np.prod([int(extent) for extent in mesh["topology"].split("x")])
        cores = 2 if generation["kind"] == "TPU7x" else 1  # each is a device of its own
        assert sizes_of(name).devices == chips * cores
    assert 48 % sizes_of(name).context == 0


# choosing

HEADS = Work("heads", 48, "transformer", ("context",))


def work_for(videos: int = 1, guided: bool = True, heads: int = 48) -> list[Work]:
    return [
        Work("video", videos, "request", ("data",)),
        Work("pair", 2 if guided else 1, "request", ("pair",)),
        Work("heads", heads, "transformer blocks.attn", ("context",)),
    ]


@pytest.mark.parametrize(
    ("count", "work", "sizes"),
    [
        (1, work_for(), Sizes(1, 1, 1)),
        (2, work_for(), Sizes(1, 2, 1)),
        (4, work_for(), Sizes(1, 2, 2)),
        (8, work_for(), Sizes(1, 2, 4)),
        (16, work_for(), Sizes(1, 2, 8)),
        (8, work_for(guided=False), Sizes(1, 1, 8)),
        (8, work_for(videos=2), Sizes(2, 2, 2)),
        (8, work_for(videos=8), Sizes(8, 1, 1)),
        (8, work_for(videos=3), Sizes(1, 2, 4)),  # data=3 would leave two devices idle
        (8, work_for(heads=5), Sizes(1, 1, 5)),
        (8, work_for(heads=7, guided=True), Sizes(1, 1, 7)),
    ],
)
def test_auto_splits_videos_first_then_the_pair_then_the_sequence(
    count: int, work: list[Work], sizes: Sizes
) -> None:
    assert choose_sizes("auto", work, devices(count)) == sizes


def test_auto_does_not_split_the_threads_of_one_cpu_but_uses_every_process() -> None:
    assert choose_sizes("auto", work_for(), devices(8, "cpu")) == Sizes()
    spread = [device(number, "cpu", process=number // 2) for number in range(8)]
    assert choose_sizes("auto", work_for(), spread) == Sizes(1, 2, 2)


HEADS_5 = "transformer blocks.attn: heads (48) must be divisible by 5 (context) for mesh data=1"
VIDEO_2 = "request: video (1) must be divisible by 2 (data) for mesh data=2,pair=1,context=1"
PAIR_2 = "request: pair (1) must be divisible by 2 (pair) for mesh data=1,pair=2,context=4"
TOO_MANY = "mesh v5e-16 must have at most the 8 devices that there are: got 16"


@pytest.mark.parametrize(
    ("text", "work", "line"),
    [
        ("context=5", work_for(), f"{HEADS_5},pair=1,context=5"),
        ("data=2", work_for(), VIDEO_2),
        ("v5e-8", work_for(guided=False), PAIR_2),
        ("v5e-16", work_for(), TOO_MANY),
        ("context=7,pair=2", work_for(), "mesh context=7,pair=2 must have at most"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does(
    text: str, work: list[Work], line: str
) -> None:
    with pytest.raises(ValueError, match="nearest mesh that works is ") as caught:
        choose_sizes(text, work, devices(8))
    assert line in str(caught.value)
    nearest = str(caught.value).rpartition(" is ")[2]
    assert undivided(sizes_of(nearest), work) == []
    assert sizes_of(nearest).devices <= 8


@pytest.mark.parametrize(("count", "nearest"), [(16, "pair=2,context=6"), (8, "pair=2,context=4")])
def test_the_nearest_mesh_has_the_nearest_sizes(count: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"is data=1,{nearest}$"):
        choose_sizes("pair=2,context=5", work_for(), devices(count))


def test_one_parameter_that_does_not_divide_is_named_and_others_like_it_are_counted() -> None:
    checkpoint = config.named("cogi2v-tiny")
    networks = {"text_encoder": piece(checkpoint, "text_encoder", FLOAT32)}
    work = work_of(checkpoint, networks, videos=1, guided=True)
    with pytest.raises(ValueError, match="5 more like it") as caught:
        choose_sizes("context=3", work, devices(8))
    rule = "heads (64) must be divisible by 3 (data x pair x context)"
    line = f"text_encoder blocks.attn.k.kernel: {rule} for mesh data=1,pair=1,context=3"
    assert str(caught.value).startswith(line)


# grids


@pytest.mark.parametrize(
    ("extents", "group", "block"),
    [
        ((2, 4), 4, (2, 2)),
        ((4, 4), 8, (2, 4)),
        ((4, 4), 4, (2, 2)),
        ((4, 4), 2, (1, 2)),
        ((2, 2, 1), 2, (1, 2, 1)),
        ((2, 4), 8, (2, 4)),
    ],
)
def test_a_sequence_group_is_a_compact_block_of_the_grid(
    extents: tuple[int, ...], group: int, block: tuple[int, ...]
) -> None:
    ordered = by_blocks(grid(*extents), group)
    assert sorted(one.id for one in ordered) == list(range(len(ordered)))
    for start in range(0, len(ordered), group):
        places = np.array([one.coords for one in ordered[start : start + group]])
        assert tuple(places.max(0) - places.min(0) + 1) == block


@pytest.mark.parametrize("given", [grid(2, 4)[:7], devices(8), grid(2, 3)])
def test_devices_without_a_whole_grid_keep_their_order(given: list[Any]) -> None:
    assert by_blocks(given, 4) == given


def test_spare_devices_are_idle_in_one_process_and_repeat_the_work_in_several() -> None:
    with pytest.warns(UserWarning, match="6 of 8 devices stay idle"):
        assert make_mesh(Sizes(1, 2, 1), grid(2, 4)).devices.shape == (1, 1, 2, 1)
    spread = [device(number, "cpu", process=number // 2) for number in range(8)]
    assert make_mesh(Sizes(1, 2, 1), spread).devices.shape == (4, 1, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "image", "ways"),
    [
        (Sizes(1, 2, 4), (60, 90), (4, 2)),
        (Sizes(1, 2, 4), (96, 170), (8, 1)),
        (Sizes(2, 1, 4), (60, 90), (4, 1)),
        (Sizes(1, 1, 8), (7, 9), (1, 1)),
        (Sizes(1, 1, 8), (3, 8), (1, 8)),
    ],
)
def test_an_image_is_split_as_far_as_its_sides_divide(
    sizes: Sizes, image: tuple[int, int], ways: tuple[int, int]
) -> None:
    mesh = make_mesh(sizes, jax.devices())
    view = spatial(mesh, *image)
    assert (view.shape["rows"], view.shape["columns"]) == ways
    assert view.shape["data"] == sizes.data
    assert list(view.devices.flat) == list(mesh.devices.flat)


# arrays


def test_an_array_is_split_by_the_rules_of_its_axes() -> None:
    mesh = make_mesh(Sizes(2, 2, 2), jax.devices())
    whole = np.arange(4 * 8 * 3, dtype=np.float32).reshape(4, 8, 3)
    array = put(whole, split(mesh, "batch", "sequence"))
    assert {shard.data.shape for shard in array.addressable_shards} == {(1, 4, 3)}
    np.testing.assert_array_equal(to_host(array), whole)
    assert split(make_mesh(Sizes(), jax.devices()), "batch", "sequence").spec == split(mesh).spec


def test_an_axis_without_a_rule_is_refused_with_those_that_have_one() -> None:
    mesh = make_mesh(Sizes(), jax.devices())
    with pytest.raises(ValueError, match=r"axis must be one of .*: got 'nonsense'") as caught:
        split(mesh, "nonsense")
    assert all(axis in str(caught.value) for axis in RULES)
    with pytest.raises(ValueError, match="got 'Video'"):
        split(mesh, None, "video", "Video")


def test_weights_are_replicated_where_they_fit_and_else_split_and_t5_is_always_split() -> None:
    checkpoint, mesh = config.named("cogvideox-5b-i2v"), make_mesh(Sizes(1, 2, 4), jax.devices())
    half = jnp.dtype(jnp.bfloat16)

    def bytes_on_a_device(name: str, memory: float) -> float:
        return (
            bytes_per_device(shard_piece(checkpoint, name, half, mesh, int(memory * 2**30))) / 2**30
        )

    assert bytes_on_a_device("transformer", 15.75) == pytest.approx(9.0, abs=0.1)
    assert bytes_on_a_device("transformer", 10) < 1.6
    assert bytes_on_a_device("text_encoder", 95) < 1.5
    assert bytes_on_a_device("vae", 15.75) == pytest.approx(0.4, abs=0.05)


# numbers

VIDEOS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint with axes that are all divisible by eight, except for the sequence."""
    pipe = twins.pipeline("1.0")
    heads = {"num_attention_heads": 8, "attention_head_dim": 16, "num_layers": 2}
    size = {"sample_height": 8, "sample_width": 8, "sample_frames": 9}
    pipe.transformer = twins.transformer(**{**twins.FAMILIES["1.0"], **heads, **size})
    pipe.text_encoder = twins.t5(1, d_ff=40)
    pipe.vae = twins.vae(2, layers_per_block=1)
    return twins.save(pipe, tmp_path_factory.mktemp("source") / "even")


@pytest.fixture(scope="module")
def request_of_eight() -> Request:
    pictures = np.random.default_rng(0).integers(0, 256, (VIDEOS, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in pictures]
    prompts = ["the red circle", "a blue square", "grows", "spins"]
    prompts += ["the", "a", "moves left", "stays still"]
    seeds = list(range(VIDEOS))
    return Request(images, prompts, seed=seeds, num_inference_steps=2, num_frames=9)


def results_of(
    models: Models, request: Request, given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of every stage on the host. The inputs of a stage are those `given`, or what the
    stages before it made."""
    job, results = pipeline.prepare(models, request), {}
    run = Session(models, job)

    def stage(name: str, function: Any, *args: Any, axes: Any = (), **static: Any) -> Any:
        results[name] = jax.tree.map(to_host, run(function, *args, **static))
        value = (given or results)[name]
        return jax.tree.map(lambda leaf: put(leaf, split(job.mesh, *axes)), value)

    text = stage("text", stages.encode_text, job.ids, axes=("batch",))
    moments = stage("moments", stages.encode_image, job.pixels, axes=("video",))
    draw = moments, None, job.keys, job.image_scale
    image = stage("image", stages.draw_image, *draw, axes=("video",), frames=job.shape.frames)
    modulation = stage("modulation", stages.modulate, *job.time)
    latents, video = tuple(job.shape[:4]), ("video",)
    start = stage("start", stages.draw_start, None, job.keys, axes=video, shape=latents)
    inputs = job.tableau, modulation, None, job.keys, image, text, job.positions()
    state = stage("denoised", stages.denoise, start, np.int32(0), *inputs, axes=video, steps=2)
    results["video"] = pipeline.decode_batch(run, np.asarray(state.x))
    return results


@pytest.fixture(scope="module")
def unsharded(folder: Any, request_of_eight: Request) -> dict[str, Any]:
    return results_of(cogi2v_jax.load(folder, "float32"), request_of_eight)


@pytest.mark.parametrize(
    "sizes",
    [
        *FAST,
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW),
        *(
            pytest.param(sizes, marks=pytest.mark.release)
            for sizes in EIGHT
            if sizes not in FAST + SLOW
        ),
    ],
    ids=str,
)
def test_the_results_of_no_stage_depend_on_the_mesh(
    sizes: Sizes, folder: Any, request_of_eight: Request, unsharded: dict[str, Any]
) -> None:
    models = cogi2v_jax.load(folder, "float32", mesh=str(sizes))
    sharded = results_of(models, request_of_eight, unsharded)
    shape = pipeline.prepare(models, request_of_eight).mesh.shape
    assert shape == {"copies": 1, **sizes._asdict()}
    for name in ("text", "moments", "image"):
        assert_close(sharded[name], unsharded[name], 1e-5)
    for here, there in zip(sharded["modulation"], unsharded["modulation"], strict=True):
        assert_close(here, there, 1e-5)
    # A seed's noise is the same on every mesh.
    np.testing.assert_array_equal(sharded["start"][0], unsharded["start"][0])
    assert_close(sharded["denoised"][0], unsharded["denoised"][0], 1e-5)
    # Rounding to bytes may go either way.
    assert np.abs(sharded["video"].astype(int) - unsharded["video"]).max() <= 1


def test_the_same_seed_is_the_same_video_on_any_mesh(
    folder: Any, request_of_eight: Request
) -> None:
    first, *_ = request_of_eight.batches(1)
    alone, spread = (
        cogi2v_jax.generate(cogi2v_jax.load(folder, "float32", mesh=mesh), first)
        for mesh in ("cpu", "pair=2,context=4")
    )
    assert_close(spread.latents, alone.latents, 1e-5)
    assert np.abs(spread.video.astype(int) - alone.video).max() <= 1


def test_weights_that_do_not_fit_are_gathered_a_layer_at_a_time(
    folder: Any,
    request_of_eight: Request,
    unsharded: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cogi2v_jax.weights.pieces.REPLICATED", 0.0)
    shard_piece.cache_clear()
    models = cogi2v_jax.load(folder, "float32", mesh="data=2,pair=2,context=2")
    job = pipeline.prepare(models, request_of_eight)
    assert not job.layout.replicated
    whole = bytes_per_device(piece(models.config, "transformer", FLOAT32))
    assert bytes_per_device(job.network("transformer")) < whole / 4
    sharded = results_of(models, request_of_eight, unsharded)
    assert_close(sharded["denoised"][0], unsharded["denoised"][0], 1e-5)
    shard_piece.cache_clear()


@pytest.mark.parametrize("mesh", ["cpu", pytest.param("data=2,pair=2", marks=pytest.mark.slow)])
def test_long_sequences_are_computed_one_after_another_with_the_same_result(
    mesh: str,
    folder: Any,
    request_of_eight: Request,
    unsharded: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cogi2v_jax.sampling.programs.LONG", 1)
    results = results_of(cogi2v_jax.load(folder, "float32", mesh=mesh), request_of_eight, unsharded)
    assert_close(results["denoised"][0], unsharded["denoised"][0], 1e-5)
