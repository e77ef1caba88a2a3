"""Batches of prepared clips, loaded by grain in threads. What a step trains on depends on the seed
and the step alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .clips import Bucket
from .shards import Prepared

THREADS = 4
AHEAD = 4  # steps loaded ahead


class Rows(NamedTuple):
    """Some rows of a step's batch, whose clips are all of one bucket."""

    bucket: Bucket
    clips: tuple[int, ...]  # numbers of the whole batch
    values: dict[str, np.ndarray]  # as of `Prepared.read`, of the rows asked for, stacked


def batches(
    prepared: Prepared,
    seed: int,
    accumulate: int,
    batch: int,
    start_step: int,
    rows: Sequence[int],
) -> Iterator[Rows]:
    """The batches of `accumulate` x `batch` clips of all steps from `start_step` on, without end:
    `rows` of them, which are those of this process's devices. An epoch of a bucket has each of its
    clips once, in an order of its own; buckets take turns by their number of clips. Raises
    ValueError, naming the file, for one that can't be read."""
    import grain

    size = accumulate * batch
    buckets: dict[int, list[int]] = {}
    for clip in prepared.clips.values():
        buckets.setdefault(clip.bucket, []).append(clip.number)

    def order(bucket: int) -> Any:
        # Repeated before batches are made, as a bucket may have fewer clips than a batch.
        numbers = grain.MapDataset.source(buckets[bucket]).seed(seed + bucket)
        return numbers.shuffle().repeat(None).batch(size)

    def load(clips: np.ndarray) -> Rows:
        read = [prepared.read(int(clips[row])) for row in rows]
        values = {name: np.stack([clip[name] for clip in read]) for name in read[0]}
        numbers = tuple(map(int, clips))
        return Rows(prepared.buckets[prepared.clips[numbers[0]].bucket], numbers, values)

    weights = [len(buckets[bucket]) for bucket in sorted(buckets)]
    steps = grain.MapDataset.mix([order(bucket) for bucket in sorted(buckets)], weights)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(steps.map(load)[start_step:].to_iter_dataset(options))
