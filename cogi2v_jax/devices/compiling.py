"""Compiled programs, jax's persistent compilation cache in the user's cache folder, and a clock for
the stages of a run."""

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax

from ..disk import cache_folder, is_text
from .compiler_options import compile_with, compiler_options


def keep_compilations() -> None:
    """Lets later processes find what this one compiles, unless the user chose a cache folder or
    switched jax's cache off. A later start still traces and lowers each program, which takes 4 s in
    all for the 5B model (ahead of time for one v5e, on two CPU cores)."""
    chosen, enabled = (
        jax.config.values[f"jax_{name}"]
        for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if chosen is not None or not enabled:
        return
    folder = cache_folder("xla")
    if not is_text(str(folder)):
        return  # jax takes no such name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a folder every process compiles for itself
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Program:
    """A function compiled ahead of its calls, one executable for each set of shapes, shardings and
    static values, so that compiling can be timed, done in another thread, and done from shapes
    alone. Keyword-only arguments of the function are static. The denoising `loop` has compiler
    options of its own. `out_shardings(*args, **static)` places the results; None leaves that to the
    compiler. Results may overwrite the positional arguments `donated`."""

    def __init__(
        self,
        function: Callable[..., Any],
        loop: bool = False,
        out_shardings: Callable[..., Any] | None = None,
        donated: tuple[int, ...] = (),
    ):
        parameters = inspect.signature(function).parameters.values()
        self.static = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self.loop, self.donated = loop, donated
        self.function, self._out_shardings = function, out_shardings
        self._executables: dict[Any, Future[jax.stages.Compiled]] = {}
        self._lock = threading.Lock()

    def compile(self, *args: Any, **static: Any) -> jax.stages.Compiled:
        """The executable for arguments like `args` (arrays, or shapes with shardings), to be called
        with arrays alone. A thread that asks for what another thread compiles waits for it."""
        leaves, tree = jax.tree.flatten(args)
        key = (
            tree,
            tuple(map(_signature, leaves)),
            tuple(sorted(static.items(), key=lambda s: s[0])),
        )
        with self._lock:
            missing = key not in self._executables
            future = self._executables.setdefault(key, Future())
        if missing:
            try:
                options = compiler_options(_device(leaves).device_kind, self.loop)
                with jax_defaults():
                    lowered = self._jitted(*args, **static).lower(*args, **static)
                future.set_result(compile_with(options, lowered))
            except BaseException as error:
                with self._lock:
                    del self._executables[key]  # the next call tries again
                future.set_exception(error)
        return future.result()

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        """The program as XLA is given it, whatever settings of jax the process has."""
        with jax_defaults():
            return self._jitted(*args, **static).lower(*args, **static)

    def _jitted(self, *args: Any, **static: Any) -> Any:
        settings: dict[str, Any] = {"static_argnames": self.static, "donate_argnums": self.donated}
        if self._out_shardings is not None:
            settings["out_shardings"] = self._out_shardings(*args, **static)
        return jax.jit(self.function, **settings)


@contextmanager
def jax_defaults() -> Iterator[None]:
    """jax's default for every setting that changes the random numbers, the dtypes or the broadcasts
    of a program: a seed's noise is the same bits in every process."""
    with (
        jax.threefry_partitionable(True),
        jax.default_prng_impl("threefry2x32"),
        jax.enable_custom_prng(False),
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _signature(leaf: Any) -> tuple[Any, ...]:
    """What an executable depends on of an argument. Shardings that place the same parts on the same
    devices are equal, however they are spelled."""
    sharding, where = getattr(leaf, "sharding", None), None
    if sharding is not None and getattr(leaf, "committed", True):
        parts = sharding.devices_indices_map(leaf.shape).items()
        where = sharding.memory_kind, *((device, str(part)) for device, part in parts)
    return leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False), where


def _device(leaves: list[Any]) -> jax.Device:
    """One of the devices that a program with these arguments runs on."""
    for leaf in leaves:
        if getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True):
            return min(leaf.sharding.device_set, key=lambda device: device.id)
    default = jax.config.values["jax_default_device"]
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]


@cache
def workspace(executable: jax.stages.Compiled) -> int:
    """Bytes that a program takes on a device beside its arguments. XLA takes about 12 ms to
    answer for a program of the embedded model."""
    memory: Any = executable.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


class Stopwatch:
    """Wall-clock seconds by name. While an inner name runs, the outer one's clock stands still, so
    that all seconds add up to the time passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._add()
        self._running.append(name)
        try:
            yield
        finally:
            self._add()
            self._running.pop()

    def _add(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
