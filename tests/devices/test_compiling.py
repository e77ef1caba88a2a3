"""Compiled programs, counted in this process and in the next; and the clock of the stages."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from jax import monitoring

from cogi2v_jax.devices.compiling import Program, Stopwatch, keep_compilations
from cogi2v_jax.weights.pieces import abstract, piece, shard_piece

FOLDER, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def compiles() -> Iterator[list[str]]:
    """An entry for each program that XLA compiles while a test runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def settings() -> Iterator[Any]:
    """jax's settings, restored afterwards."""
    before = {name: jax.config.values[name] for name in (FOLDER, ENABLED, LEAST)}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def affine(x: Any, scale: dict[str, Any], shift: int = 0, kind: str = "sum") -> Any:
    y = scale["by"] * x + shift
    return y.sum() if kind == "sum" else y


@pytest.fixture
def program() -> Program:
    """Of a new function each time, because jax caches what it compiled for an old one."""

    def fresh(x: Any, scale: dict[str, Any], *, shift: int = 0, kind: str = "sum") -> Any:
        return affine(x, scale, shift, kind)

    return Program(fresh)


def arguments(rows: int = 3, by: float = 2.0, dtype: Any = np.float32) -> tuple:
    return np.arange(rows, dtype=dtype), {"by": np.asarray(by, dtype)}


# programs


def test_a_program_computes_its_function(program: Program) -> None:
    executable = program.compile(*arguments(), shift=1, kind="all")
    np.testing.assert_array_equal(executable(*arguments()), [1, 3, 5])


def test_new_values_compile_nothing(program: Program, compiles: list[str]) -> None:
    on_device = jax.tree.map(jnp.asarray, arguments(by=3.0))
    compiles.clear()
    first = program.compile(*arguments(), shift=1, kind="sum")
    assert float(first(*arguments())) == 9
    assert len(compiles) == 1
    again = program.compile(*arguments(by=5.0), shift=1, kind="sum")
    assert again is first
    assert float(again(*arguments(by=5.0))) == 18
    # So do static values in another order.
    assert program.compile(*on_device, kind="sum", shift=1) is first
    assert len(compiles) == 1


@pytest.mark.parametrize(
    ("given", "static"),
    [
        (arguments(rows=4), {}),
        (arguments(dtype=np.int32), {}),
        ((arguments()[0], {"by": np.ones(3, np.float32)}), {}),
        (arguments(), {"shift": 2}),
        (arguments(), {"kind": "all"}),
    ],
)
def test_new_shapes_dtypes_and_static_values_compile_once_each(
    given: tuple, static: dict[str, Any], program: Program, compiles: list[str]
) -> None:
    usual = {"shift": 1, "kind": "sum"}
    program.compile(*arguments(), **usual)
    assert len(compiles) == 1
    changed = usual | static
    executable = program.compile(*given, **changed)
    assert len(compiles) == 2
    np.testing.assert_array_equal(executable(*given), affine(*given, **changed))
    assert program.compile(*given, **changed) is executable
    program.compile(*arguments(), **usual)
    assert len(compiles) == 2


def test_a_program_is_compiled_separately_for_an_argument_that_is_none(
    compiles: list[str],
) -> None:
    program = Program(lambda x, y: x if y is None else x + y)
    one = np.ones(2, np.float32)
    assert program.compile(one, None) is not program.compile(one, one)
    np.testing.assert_array_equal(program.compile(one, one)(one, one), [2, 2])
    np.testing.assert_array_equal(program.compile(one, None)(one, None), [1, 1])
    assert len(compiles) == 2


def test_programs_do_not_share_executables() -> None:
    doubled, tripled = Program(lambda x: 2 * x), Program(lambda x: 3 * x)
    one = np.ones(1, np.float32)
    assert float(doubled.compile(one)(one)[0]) == 2
    assert float(tripled.compile(one)(one)[0]) == 3


# the stopwatch


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances a clock that stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_outer_clock_stands_still_while_an_inner_name_runs(
    wait: Callable[[float], None],
) -> None:
    watch = Stopwatch()
    wait(5)  # before any name
    with watch("outer"):
        wait(1)
        with watch("inner"):
            wait(10)
            with watch("innermost"):
                wait(100)
        wait(2)
    wait(50)  # between names
    with watch("inner"):
        wait(20)
    assert watch.seconds == {"outer": 3, "inner": 30, "innermost": 100}


def test_a_name_inside_itself_counts_once(wait: Callable[[float], None]) -> None:
    watch = Stopwatch()
    with watch("load"):
        wait(1)
        with watch("load"):
            wait(2)
    assert watch.seconds == {"load": 3}


def test_an_error_stops_the_clock_of_its_name(wait: Callable[[float], None]) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch("inner"):
            wait(1)
            raise KeyError

    with watch("outer"):
        with pytest.raises(KeyError):
            fail()
        wait(2)
    assert watch.seconds == {"inner": 1, "outer": 2}


# the persistent cache


def test_compilations_are_kept_in_the_user_s_cache_folder(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.update(FOLDER, None)
    keep_compilations()
    assert settings.values[FOLDER] == str(tmp_path / "cogi2v-jax" / "xla")
    assert 0 < settings.values[LEAST] < 1


def test_without_a_folder_nothing_is_kept(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settings.update(FOLDER, None)
    keep_compilations()
    assert settings.values[FOLDER] is None


def test_in_a_folder_whose_name_is_no_text_nothing_is_kept(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caf\udce9"))
    settings.update(FOLDER, None)
    keep_compilations()
    assert settings.values[FOLDER] is None


def test_a_cache_folder_that_the_user_chose_is_used(settings: Any, tmp_path: Path) -> None:
    settings.update(FOLDER, str(tmp_path))
    settings.update(LEAST, 7.0)
    keep_compilations()
    assert settings.values[FOLDER] == str(tmp_path)
    assert settings.values[LEAST] == 7.0


def test_a_cache_that_the_user_switched_off_stays_off(settings: Any) -> None:
    settings.update(FOLDER, None)
    settings.update(ENABLED, False)
    keep_compilations()
    assert settings.values[FOLDER] is None


PROGRAM = """
import jax, numpy as np
from jax import monitoring
from cogi2v_jax.devices.compiling import Program, keep_compilations
events = []
monitoring.register_event_listener(lambda event, **_: events.append(event))
def counts():
    return [events.count(f"/jax/compilation_cache/cache_{kind}") for kind in ("hits", "misses")]
keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # this one is quick
def step(x):
    return jax.lax.scan(lambda x, _: (np.float32(0.5) * x @ x, None), x, None, length=4)[0]
x = np.ones((8, 8), np.float32)
before = counts()
total = float(np.asarray(Program(step).compile(x)(x)).sum())
print(total, *before, *counts())
"""


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "cogi2v-jax" / "xla").glob("*-cache")}


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run() -> list[str]:
        command, captured = [sys.executable, "-c", PROGRAM], {"capture_output": True, "text": True}
        done = subprocess.run(command, env=environment, timeout=120, **captured)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    result, *first = run()
    kept = entries(tmp_path)
    assert len(kept) == 1
    same, *second = run()
    assert entries(tmp_path) == kept
    # Hits and misses before, then after.
    assert first == ["0", "0", "0", "1"]
    assert second == ["0", "0", "1", "0"]
    assert result == same


CHANGED = {
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_enable_custom_prng": True,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_legacy_prng_key": "error",
    "jax_random_seed_offset": 1,
}


@pytest.mark.parametrize("setting", CHANGED)
def test_no_setting_of_jax_changes_a_program(setting: str) -> None:
    small = lowering.target(jax.devices()[:1], "float32", num_inference_steps=2)

    def texts() -> dict[str, str]:
        calls = [call for stage in ("text", "image", "denoise") for call in small.calls(stage)]
        return {call.stage.program.function.__name__: call.lower().as_text() for call in calls}

    expected, before = texts(), jax.config.values[setting]
    for made_once in (piece, shard_piece, abstract):
        made_once.cache_clear()
    assert expected.keys() >= {"draw_image", "draw_start", "denoise"}
    jax.config.update(setting, CHANGED[setting])
    try:
        assert texts() == expected
    finally:
        jax.config.update(setting, before)
