"""Whole steps of training: the same weights however the work is shared, and after a restart."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tolerances import relative_error

from cogi2v_jax import Request
from cogi2v_jax.devices.sharding import to_host
from cogi2v_jax.training import run as runs
from cogi2v_jax.training.checkpoints import Checkpoints
from cogi2v_jax.training.run import Run, crop
from cogi2v_jax.training.state import State

# Float32 sums in another order. Adam divides gradients by their size: a leaf whose gradients nearly
# cancel (queries' and keys') carries their rounding.
SHARED = {"all": 1e-5, "leaf": 1e-4}


def train(run: Run, state: State, steps: int) -> tuple[State, list[float]]:
    """The state after so many more steps, and their losses."""
    losses, done = [], int(state.step)
    for step, rows in zip(range(done + 1, done + steps + 1), run.batches(done), strict=False):
        state, figures = run.step(state, rows, step)
        losses.append(float(figures.loss))
    return state, losses


def values(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: to_host(leaf) for name, leaf in leaves.items()}


def assert_shared(ours: State, theirs: State, start: State) -> None:
    """All leaves have changed, and in the same way."""
    begun = values(start.leaves)
    pairs = values(ours.leaves), values(theirs.leaves)
    whole = (np.concatenate([leaf.ravel() for leaf in leaves.values()]) for leaves in pairs)
    assert relative_error(*whole) <= SHARED["all"]
    for name in begun:
        error = relative_error(*(leaves[name] for leaves in pairs))
        assert error <= SHARED["leaf"], f"{name}: {error:g}"
        assert not np.array_equal(pairs[0][name], begun[name]), name


def quiet(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1.5"], indirect=True)
def test_a_mesh_trains_to_the_weights_of_one_device(studio: Any, tmp_path: Path) -> None:
    keys = {"mesh": "data=2,context=3", "batch": 2, "accumulate": 2}
    one, shared = (Run(studio.recipe(tmp_path, **own), quiet) for own in ({"mesh": "data=1"}, keys))
    assert (one.mesh.size, shared.mesh.size) == (1, 6)
    states = [train(run, run.begin(), 20)[0] for run in (one, shared)]
    assert_shared(*states, one.begin())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1.5"], indirect=True)
@pytest.mark.parametrize("keys", [{"mesh": "data=4"}, {"mesh": "context=3"}, {"accumulate": 4}])
def test_every_way_to_share_work_trains_to_the_same_weights(
    studio: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"mesh": "data=1", "batch": 4 // keys.get("accumulate", 1), **keys}
    one, shared = (Run(studio.recipe(tmp_path, **own), quiet) for own in ({"mesh": "data=1"}, keys))
    states = [train(run, run.begin(), 20)[0] for run in (one, shared)]
    assert_shared(*states, one.begin())


def test_devices_of_a_guidance_pair_share_the_sequence(studio: Any, tmp_path: Path) -> None:
    run = Run(studio.recipe(tmp_path, batch=2, mesh="data=2,pair=3"), quiet)
    assert dict(run.mesh.shape) | {"copies": 1} == {"copies": 1, "data": 2, "pair": 1, "context": 3}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_all_weights_of_a_network_train_the_same_when_they_are_split(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"method": "full", "batch": 3, "learning_rate": 1e-3}
    one = Run(studio.recipe(tmp_path, mesh="data=1", **settings), quiet)
    monkeypatch.setattr(runs, "memory_limit", lambda: 1)  # nothing fits on one device
    split = Run(studio.recipe(tmp_path, mesh="data=3", **settings), quiet)
    states = [train(run, run.begin(), 5)[0] for run in (one, split)]
    up = states[1].leaves["blocks.mlp.up.kernel"]
    assert up.addressable_shards[0].data.size * 3 == up.size
    moments = states[1].optimizer[1][0].mu["blocks.mlp.up.kernel"]
    assert moments.sharding == up.sharding
    assert_shared(*states, one.begin())


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("1.5", {"ema": 0.9, "targets": ("attention", "mlp", "text_in")}),
        pytest.param("1.0", {"method": "full", "optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param(
            "1.0", {"method": "vae", "crop": 16, "stills": 2, "batch": 2}, marks=pytest.mark.slow
        ),
    ],
    indirect=["family"],
    ids=["lora", "full", "vae"],
)
def test_a_restored_run_goes_on_to_the_bit(
    studio: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    recipe = studio.recipe(tmp_path, **keys)
    whole = Run(recipe, quiet)
    through, losses = train(whole, whole.begin(), 4)
    assert len({*losses}) == 4
    first = Run(recipe, quiet)
    state, before = train(first, first.begin(), 2)
    with closing(Checkpoints(tmp_path / "checkpoints", 2)) as kept:
        kept.save(state)
    again = Run(recipe, quiet)
    with closing(Checkpoints(tmp_path / "checkpoints", 2)) as kept:
        restored = kept.restore(again.begin())
    assert restored.step == 2
    resumed, after = train(again, restored, 2)
    assert before + after == losses
    for name, value in values(through.result).items():
        assert np.array_equal(value, to_host(resumed.result[name])), name


def test_only_lora_leaves_are_trained_and_begin_at_no_change(studio: Any, tmp_path: Path) -> None:
    run = Run(studio.recipe(tmp_path), quiet)
    state = run.begin()
    layers = ("q", "k", "v", "out")
    names = {f"blocks.attn.{layer}.lora.{side}" for layer in layers for side in ("down", "up")}
    assert state.leaves.keys() == names
    assert all(not leaf.any() for name, leaf in state.leaves.items() if name.endswith("up"))
    for name, leaf in state.leaves.items():
        if name.endswith("down"):
            assert 0.9 < abs(leaf).max() * leaf.shape[-2] ** 0.5 <= 1


@pytest.mark.parametrize(
    "keys",
    [{"ema": 0.9, "batch": 2, "mesh": "data=2"}, {"method": "full", "optimizer": "muon"}],
    ids=["lora", "full"],
)
@pytest.mark.parametrize("family", ["1.5"], indirect=True)
def test_a_step_is_compiled_from_shapes_alone(
    studio: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(studio.recipe(tmp_path, **keys), quiet)
    (bucket,) = run.prepared.buckets
    sizes = {"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    request = Request("", "", **sizes).resolve(run.models.config)
    sampling = run.target.sampling(request, "auto")
    program, static = run.target.program(sampling)
    program.compile(*run.target.arguments(sampling), **static)
    kept = len(program._executables)
    train(run, run.begin(), 1)
    assert len(program._executables) == kept


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_decoder_trains_on_latents_that_stay_as_they_are(studio: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "vae", "decoder_only": True, "crop": 16, "batch": 2}
    run = Run(studio.recipe(tmp_path, **keys), quiet)
    before = values(run.whole(run.begin().leaves))
    state, _ = train(run, run.begin(), 1)
    after = values(run.whole(state.result))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}
    assert any(name.startswith("encoder.") for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_network_can_begin_from_nothing(studio: Any, tmp_path: Path) -> None:
    run = Run(studio.recipe(tmp_path, method="full", init="random"), quiet)
    state = run.begin()
    assert not state.leaves["out.kernel"].any()
    _, losses = train(run, state, 2)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(1.0, abs=0.5)  # of a prediction of zero: v has that variance


def test_crops_and_stills_depend_on_the_step_and_the_row_alone(studio: Any, tmp_path: Path) -> None:
    recipe = studio.recipe(tmp_path, method="vae", crop=16, stills=3)
    pixels = np.arange(2 * 9 * 48 * 80 * 3).reshape(2, 9, 48, 80, 3).astype(np.uint8)
    both = crop(recipe, pixels, [0, 1], 4)
    assert both.shape == (2, 9, 16, 16, 3)
    assert np.array_equal(crop(recipe, pixels[1:], [1], 4), both[1:])
    assert not np.array_equal(crop(recipe, pixels, [0, 1], 5), both)
    assert crop(recipe, pixels, [0, 1], 6).shape == (2, 1, 16, 16, 3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"targets": ("attention", "nose")}, "targets must be among attention, mlp, all, blocks"),
        ({"mesh": "data=3"}, "request: video .4. must be divisible by 3"),
        ({"method": "vae", "crop": 64}, "crop must be at most the sides of 9x48x80: got 64"),
        ({"method": "vae", "crop": 20}, "crop must be a multiple of 8: got 20"),
        ({"init": "no such file"}, "no such file"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    studio: Any, keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=said) as caught:
        Run(studio.recipe(tmp_path, **keys), quiet).begin()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"ema": 0.9, "targets": ("attention", "text_in")},
        {"optimizer": "prodigy"},
        {"method": "full", "optimizer": "muon", "ema": 0.9},
        {"method": "vae", "decoder_only": True},
    ],
    ids=["lora", "prodigy", "muon", "decoder"],
)
def test_a_state_takes_the_bytes_that_are_asked_of_the_disk(
    studio: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(studio.recipe(tmp_path, **keys), quiet)
    state = run.begin()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - state.step.nbytes
    assert run.target.bytes_of_state == held


def test_data_of_another_kind_or_model_are_refused(
    studio: Any, base: dict[str, Path], family: str, tmp_path: Path
) -> None:
    recipe = studio.recipe(tmp_path, method="vae")
    with pytest.raises(ValueError, match="data must hold latents to train method lora"):
        Run(studio.recipe(tmp_path).__class__(**{**vars(recipe), "method": "lora"}), quiet)
    recipe = studio.recipe(tmp_path)
    with pytest.raises(ValueError, match="prepare the clips again with --model"):
        Run(recipe.__class__(**{**vars(recipe), "model": str(base[family])}), quiet)
