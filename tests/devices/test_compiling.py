"""Compile once: counted, in this process and in the next."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from cogi2v_jax.devices.compiling import Program, Stopwatch, keep_compilations

FOLDER, ENABLED, LEAST = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def compiles():
    """Everything XLA compiles while a test runs, one entry each."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def settings():
    """jax's own settings, put back afterwards."""
    before = {name: jax.config.values[name] for name in (FOLDER, ENABLED, LEAST)}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def affine(x, scale, shift: int = 0, kind: str = "sum"):
    y = scale["by"] * x + shift
    return y.sum() if kind == "sum" else y


@pytest.fixture
def program():
    """A new function each time: jax remembers what it compiled for an old one."""

    def fresh(x, scale, *, shift: int = 0, kind: str = "sum"):
        return affine(x, scale, shift, kind)

    return Program(fresh)


def arguments(rows: int = 3, by: float = 2.0, dtype=np.float32) -> tuple:
    return np.arange(rows, dtype=dtype), {"by": np.asarray(by, dtype)}


# programs


def test_a_program_computes_its_function(program):
    executable = program.compile(*arguments(), shift=1, kind="all")
    np.testing.assert_array_equal(executable(*arguments()), [1, 3, 5])


def test_new_values_compile_nothing(program, compiles):
    on_device = jax.tree.map(jnp.asarray, arguments(by=3.0))
    compiles.clear()
    first = program.compile(*arguments(), shift=1, kind="sum")
    assert float(first(*arguments())) == 9
    assert len(compiles) == 1
    again = program.compile(*arguments(by=5.0), shift=1, kind="sum")
    assert again is first
    assert float(again(*arguments(by=5.0))) == 18
    # Static values in another order, too.
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
def test_new_shapes_dtypes_and_static_values_compile_once_each(given, static, program, compiles):
    program.compile(*arguments(), **{"shift": 1, "kind": "sum"})
    assert len(compiles) == 1
    changed = {"shift": 1, "kind": "sum", **static}
    executable = program.compile(*given, **changed)
    assert len(compiles) == 2
    np.testing.assert_array_equal(executable(*given), affine(*given, **changed))
    assert program.compile(*given, **changed) is executable
    program.compile(*arguments(), **{"shift": 1, "kind": "sum"})
    assert len(compiles) == 2


def test_none_is_another_structure_and_not_a_value(compiles):
    program = Program(lambda x, y: x if y is None else x + y)
    one = np.ones(2, np.float32)
    assert program.compile(one, None) is not program.compile(one, one)
    np.testing.assert_array_equal(program.compile(one, one)(one, one), [2, 2])
    np.testing.assert_array_equal(program.compile(one, None)(one, None), [1, 1])
    assert len(compiles) == 2


def test_programs_keep_their_executables_apart():
    doubled, tripled = Program(lambda x: 2 * x), Program(lambda x: 3 * x)
    one = np.ones(1, np.float32)
    assert float(doubled.compile(one)(one)[0]) == 2
    assert float(tripled.compile(one)(one)[0]) == 3


# the stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""

    def tick(seconds: float) -> None:
        now[0] += seconds

    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return tick


def test_a_phase_inside_another_stops_the_outer_clock(clock):
    watch = Stopwatch()
    clock(5)  # before any phase
    with watch("outer"):
        clock(1)
        with watch("inner"):
            clock(10)
            with watch("innermost"):
                clock(100)
        clock(2)
    clock(50)  # between phases
    with watch("inner"):
        clock(20)
    assert watch.seconds == {"outer": 3, "inner": 30, "innermost": 100}


def test_a_phase_inside_itself_counts_once(clock):
    watch = Stopwatch()
    with watch("load"):
        clock(1)
        with watch("load"):
            clock(2)
    assert watch.seconds == {"load": 3}


def test_an_error_ends_its_phase(clock):
    watch = Stopwatch()

    def fail():
        with watch("inner"):
            clock(1)
            raise KeyError

    with watch("outer"):
        with pytest.raises(KeyError):
            fail()
        clock(2)
    assert watch.seconds == {"inner": 1, "outer": 2}


def test_phases_sum_to_the_wall_clock():
    watch = Stopwatch()
    started = time.perf_counter()
    with watch("a"):
        time.sleep(0.02)
        with watch("b"):
            time.sleep(0.03)
    wall = time.perf_counter() - started
    assert watch.seconds["a"] >= 0.02
    assert watch.seconds["b"] >= 0.03
    assert 0.9 * wall < sum(watch.seconds.values()) <= wall


# the persistent cache


def test_compilations_are_kept_in_the_user_s_cache(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.update(FOLDER, None)
    keep_compilations()
    assert settings.values[FOLDER] == str(tmp_path / "cogi2v-jax" / "xla")
    assert 0 < settings.values[LEAST] < 1


def test_without_a_place_for_them_nothing_is_kept(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settings.update(FOLDER, None)
    keep_compilations()
    assert settings.values[FOLDER] is None


def test_a_cache_folder_that_the_user_chose_is_kept(settings, tmp_path):
    settings.update(FOLDER, str(tmp_path))
    settings.update(LEAST, 7.0)
    keep_compilations()
    assert settings.values[FOLDER] == str(tmp_path)
    assert settings.values[LEAST] == 7.0


def test_a_cache_that_the_user_switched_off_stays_off(settings):
    settings.update(FOLDER, None)
    settings.update(ENABLED, False)
    keep_compilations()
    assert settings.values[FOLDER] is None


PROGRAM = """
import jax, numpy as np
from jax import monitoring
from cogi2v_jax.devices.compiling import Program, keep_compilations
hits, misses = [], []
monitoring.register_event_listener(lambda event, **_: hits.append(1) if event == "/jax/compilation_cache/cache_hits" else None)
monitoring.register_event_listener(lambda event, **_: misses.append(1) if event == "/jax/compilation_cache/cache_misses" else None)
keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # these are quick
def step(x):
    return jax.lax.scan(lambda x, _: (np.float32(0.5) * x @ x, None), x, None, length=4)[0]
x = np.ones((8, 8), np.float32)
print(len(hits), len(misses), float(np.asarray(Program(step).compile(x)(x)).sum()), len(hits), len(misses))
"""


def entries(cache: Path) -> set[str]:
    return {
        path.name
        for path in (cache / "cogi2v-jax" / "xla").iterdir()
        if path.name.endswith("-cache")
    }


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first = run()
    kept = entries(tmp_path)
    assert len(kept) == 1
    second = run()
    assert entries(tmp_path) == kept
    assert [first[index] for index in (0, 1, 3, 4)] == ["0", "0", "0", "1"]
    assert [second[index] for index in (0, 1, 3, 4)] == ["0", "0", "1", "0"]
    assert first[2] == second[2]
