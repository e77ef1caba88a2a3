"""Checkpoints of a run, written by orbax while training goes on. One that is not whole is never
seen: orbax renames it when all is written."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..disk import check_space, first_line
from ..weights.checkpoint import plain_path
from .state import State


class Checkpoints:
    """The last `count` states of a run in a folder; of all processes together."""

    def __init__(self, folder: Path, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=count, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        # What goes wrong is raised as well; this would show the stacks of all its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder
        self._manager = ocp.CheckpointManager(plain_path(folder), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self._manager.latest_step()

    def restore(self, state: State) -> State:
        """The last state, in the dtypes and shardings of `state`; `state` itself where there is
        none. Raises ValueError, in one line, for one that can't be read."""
        step = self.latest
        if step is None:
            return state
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        try:
            restored: Any = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
            return restored
        except (ValueError, OSError, KeyError, TypeError) as error:
            way = "delete it to go on from the one before"
            raise ValueError(
                f"{self.folder / str(step)} must be a whole checkpoint of this run: "
                f"{first_line(error)}; {way}"
            ) from None

    def save(self, state: State) -> None:
        """Copies the state to the host, and writes it in another thread. Raises OSError, in one
        line, where this one can't be begun or the one before was not written."""
        # Where the disk is full, threads of orbax would print their stacks.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        check_space(self.folder, size, "a checkpoint")
        with self._writing():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state), force=True)

    def close(self) -> None:
        """Waits until all is written. Raises OSError, in one line, where it was not."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            must = f"{self.folder} must take a checkpoint: {first_line(error)}"
            last = "none" if self.latest is None else f"step {self.latest}"
            raise OSError(f"{must}; the last whole one: {last}") from None
