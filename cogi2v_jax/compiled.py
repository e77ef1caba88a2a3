"""Compile once and know how long it took: programs that keep their executables apart from their runs, jax's persistent cache in the
user's cache folder, and a clock by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from platformdirs import user_cache_path


def keep_compilations() -> None:
    """Lets a second process find what this one compiled, unless the user chose a cache folder or switched the cache off."""
    chosen, enabled = (jax.config.values[f"jax_{name}"] for name in ("compilation_cache_dir", "enable_compilation_cache"))
    if chosen is None and enabled:
        folder = user_cache_path("cogi2v-jax") / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # compiling anew is what is left
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Program:
    """A jitted function that keeps an executable for every set of shapes, so that compiling can be done, timed and counted apart."""

    def __init__(self, function: Callable[..., Any], static: tuple[str, ...] = ()):
        self._jit = jax.jit(function, static_argnames=static)
        self._executables: dict[Any, Callable[..., Any]] = {}

    def compile(self, *args: Any, **static: Any) -> Callable[..., Any]:
        """The executable for arguments of these shapes, to be called with `args` alone."""
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), tuple(sorted(static.items())))
        if key not in self._executables:
            self._executables[key] = self._jit.lower(*args, **static).compile()
        return self._executables[key]


class Stopwatch:
    """Wall seconds by phase. Phases nest: what runs inside another stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge()
        self._running.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def run(self, phase: str, program: Program, *args: Any, **static: Any) -> Any:
        """Runs a program to its end, with its compilation charged to `compile` and the rest to `phase`."""
        with self("compile"):
            executable = program.compile(*args, **static)
        with self(phase):
            return jax.block_until_ready(executable(*args))


def workspace(executable: Any) -> int:
    """Bytes a device that a program takes beside its arguments."""
    memory = executable.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
