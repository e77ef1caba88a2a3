"""Compile once and know how long it took: programs that keep their executables apart from their
runs, jax's persistent cache in the user's cache folder, and a clock by phase."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import jax
from platformdirs import user_cache_path

from .compiler_options import compile_with, compiler_options
from .executables import compiling, load, store
from .fingerprint import UnnamedError, describe, devices, fingerprint, placement


def keep_compilations() -> None:
    """Lets a second process find what this one compiled, unless the user chose a cache folder or
    switched the cache off."""
    chosen, enabled = (
        jax.config.values[f"jax_{name}"]
        for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if chosen is None and enabled:
        folder = user_cache_path("cogi2v-jax") / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # compiling anew is what is left
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Program:
    """A jitted function that keeps an executable for every set of shapes, so that compiling can be
    done, timed and counted apart. Threads may share it, and processes find each other's executables
    in the user's cache folder. The denoising `loop` is compiled with options of its own. `lies`
    says of the static arguments where results lie, where the compiler must not choose."""

    def __init__(
        self,
        function: Callable[..., Any],
        static: tuple[str, ...] = (),
        loop: bool = False,
        lies: Callable[..., Any] | None = None,
    ):
        self._function, self._static = function, static
        self.loop, self._lies = loop, lies
        self._executables: dict[Any, Future[Callable[..., Any]]] = {}
        self._lock = threading.Lock()

    def compile(self, *args: Any, **static: Any) -> Callable[..., Any]:
        """The executable for arguments of these shapes and places, to be called with `args` alone.
        Shapes with shardings do in place of arrays, before there are any. A thread that asks for
        what another one is compiling waits for it."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple(
            (leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False), placement(leaf))
            for leaf in leaves
        )
        key = (
            tree,
            shapes,
            tuple(sorted((name, _comparable(value)) for name, value in static.items())),
        )
        with self._lock:
            missing = key not in self._executables
            future = self._executables.setdefault(key, Future())
        if missing:
            try:
                future.set_result(self._build(args, static))
            except BaseException as error:
                with self._lock:
                    del self._executables[key]  # the next call tries again
                future.set_exception(error)
        return future.result()

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        """The program as XLA is given it."""
        lies = {} if self._lies is None else {"out_shardings": self._lies(**static)}
        return jax.jit(self._function, static_argnames=self._static, **lies).lower(*args, **static)

    def _build(self, args: tuple[Any, ...], static: dict[str, Any]) -> Callable[..., Any]:
        used = devices(args)
        options = compiler_options(used[0].device_kind, self.loop)
        name = fingerprint(self._function, args, static, options)
        if name is not None and (kept := load(name, args, used)) is not None:
            return kept
        with compiling() as seen:
            executable = compile_with(options, self.lower(*args, **static))
        if name is not None and (seen.fresh or used[0].platform != "cpu"):
            store(name, executable)
        return executable


def _comparable(value: Any) -> Any:
    """Equal where it computes the same: two partials of one function and its arguments are, which
    functools leaves different."""
    try:
        return describe(value)
    except UnnamedError:
        return value


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


def workspace(executable: Any) -> int:
    """Bytes a device that a program takes beside its arguments."""
    memory = executable.memory_analysis()
    return (
        0
        if memory is None
        else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
