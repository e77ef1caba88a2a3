"""What a step trains on depends on the seed and the step alone."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cogi2v_jax.training import shards
from cogi2v_jax.training.clips import Bucket, Clip
from cogi2v_jax.training.data import Rows, batches
from cogi2v_jax.training.shards import PIXELS, Plan, Prepared

SIZES = {Bucket(1, 4, 6): 10, Bucket(1, 6, 4): 3}  # clips of each bucket
COUNT = sum(SIZES.values())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Clips whose pixels are their number, those of the smaller bucket last."""
    folder = tmp_path_factory.mktemp("prepared")
    clips = [Clip(f"{k}.mp4", folder / f"{k}.mp4", "it moves") for k in range(COUNT)]
    plan = Plan(PIXELS, clips, list(SIZES), 8.0, "uint8", {"title": "cogi2v-tiny"})
    buckets = [bucket for bucket, size in enumerate(SIZES.values()) for _ in range(size)]
    for shard in plan.videos:
        chosen = {number: buckets[number] for number in shard.numbers}
        tensors = {
            f"{number}.pixels": np.full((*plan.buckets[bucket], 3), number, np.uint8)
            for number, bucket in chosen.items()
        }
        shards.write_shard(folder, shard, tensors, chosen)
    shards.write_manifest(folder, plan, {})
    return shards.open(folder)


def steps(prepared: Prepared, count: int, start: int = 0, **settings) -> list[Rows]:
    chosen = {"seed": 1, "accumulate": 2, "batch": 2, "rows": range(4)} | settings
    return list(itertools.islice(batches(prepared, start_step=start, **chosen), count))


def order(found: list[Rows]) -> list[tuple[int, ...]]:
    return [rows.clips for rows in found]


def test_a_run_that_starts_later_goes_on_as_one_from_the_start(prepared: Prepared) -> None:
    whole = steps(prepared, 30)
    assert order(steps(prepared, 30)) == order(whole)
    for start in (1, 17):
        assert order(steps(prepared, 30 - start, start)) == order(whole)[start:]
    assert order(steps(prepared, 30, seed=2)) != order(whole)
    assert steps(prepared, 1, seed=2**64 - 1)


def test_every_clip_comes_once_an_epoch_in_another_order_each_time(prepared: Prepared) -> None:
    clips = [number for rows in steps(prepared, 60) for number in rows.clips]
    of_bucket = [number for number in clips if number < 10]
    epochs = [tuple(of_bucket[first : first + 10]) for first in range(0, 100, 10)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(10))}
    assert len(set(epochs)) == 10


def test_buckets_take_turns_by_their_number_of_clips_and_never_mix(prepared: Prepared) -> None:
    found = steps(prepared, 4 * COUNT)
    assert Counter(rows.bucket for rows in found) == {b: 4 * size for b, size in SIZES.items()}
    assert all(len({number < 10 for number in rows.clips}) == 1 for rows in found)


def test_a_bucket_with_fewer_clips_than_a_batch_fills_it(prepared: Prepared) -> None:
    found = [rows.clips for rows in steps(prepared, 40) if min(rows.clips) >= 10]
    clips = [number for numbers in found for number in numbers]
    assert {tuple(sorted(clips[first : first + 3])) for first in range(0, 27, 3)} == {(10, 11, 12)}


def test_a_process_loads_the_rows_of_its_devices(prepared: Prepared) -> None:
    everything = steps(prepared, 12)
    for rows in ([0, 1], [3], [2, 0]):
        for whole, part in zip(everything, steps(prepared, 12, rows=rows), strict=True):
            assert (part.bucket, part.clips) == (whole.bucket, whole.clips)
            assert part.values["pixels"].shape == (len(rows), *part.bucket, 3)
            expected = [whole.clips[row] for row in rows]
            assert part.values["pixels"][:, 0, 0, 0, 0].tolist() == expected


def test_a_file_that_cannot_be_read_is_named(prepared: Prepared, tmp_path: Path) -> None:
    moved = Prepared(**(vars(prepared) | {"folder": tmp_path}))
    with pytest.raises(ValueError, match=r"clips-0000\d\.safetensors must be a whole shard"):
        steps(moved, 1)
