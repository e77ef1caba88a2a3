"""Executables that outlive their process: found again, never wrong, and no worse than none when
their file is broken."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from platformdirs import user_cache_path

from cogi2v_jax.devices import compiling
from cogi2v_jax.devices.compiling import Program
from cogi2v_jax.devices.executables import CHECKSUM, _checksum
from cogi2v_jax.models import layers
from cogi2v_jax.sampling import noise

WORDS = np.array([[1, 2], [3, 4]], np.uint32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where executables are kept. What jax itself remembers of a program would keep XLA from
    compiling it afresh."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, least = (
        jax.config.values["jax_compilation_cache_dir"],
        jax.config.values["jax_persistent_cache_min_compile_time_secs"],
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    jax.clear_caches()
    yield user_cache_path("cogi2v-jax") / "executables"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was handed to the compiler."""
    seen, compile_with = [], compiling.compile_with

    def count(options, program):
        seen.append(program)
        return compile_with(options, program)

    monkeypatch.setattr(compiling, "compile_with", count)
    return seen


def program() -> Program:
    """One that has compiled nothing in this process."""
    return Program(noise.draw, static=("stream", "shape"))


def drawn(words: np.ndarray = WORDS) -> np.ndarray:
    return np.asarray(program().compile(words, stream=1, shape=(2, 3))(words))


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_program_is_loaded_where_it_was_compiled_before(folder: Path, lowered: list) -> None:
    first = drawn()
    assert len(lowered) == len(kept(folder)) == 1
    np.testing.assert_array_equal(drawn(), first)
    np.testing.assert_array_equal(drawn(WORDS[::-1]), first[::-1])
    assert len(lowered) == 1
    np.testing.assert_array_equal(first, noise.draw(jnp.asarray(WORDS), 1, (2, 3)))


def test_files_are_for_their_owner_alone(folder: Path) -> None:
    drawn()
    (file,) = kept(folder)
    assert file.stat().st_mode & 0o777 == 0o600


def whole(file: Path, content: bytes) -> None:
    file.write_bytes(_checksum(file.name, content) + content)


def renamed(file: Path) -> None:
    """Another program's, under this name."""
    Program(layers.silu).compile(np.ones(3, np.float32))
    (other,) = (path for path in file.parent.iterdir() if path != file)
    other.replace(file)


def linked(file: Path) -> None:
    elsewhere = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(elsewhere)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


FAULTS = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "one bit": flipped,
    "garbage": lambda file: file.write_bytes(os.urandom(5000)),
    "no pickle": lambda file: whole(file, b"garbage"),
    "another pickle": lambda file: whole(file, pickle.dumps({"format": 2})),
    "another payload": lambda file: whole(file, pickle.dumps((b"garbage", 0))),
    "of another program": renamed,
    "writable by the group": lambda file: file.chmod(0o660),
    "writable by all": lambda file: file.chmod(0o606),
    "a link": linked,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_of_no_use_is_one_line_and_replaced(
    fault: str, folder: Path, lowered: list, capfd
) -> None:
    right = drawn()
    (file,) = kept(folder)
    FAULTS[fault](file)
    jax.clear_caches()
    lowered.clear()
    capfd.readouterr()
    np.testing.assert_array_equal(drawn(), right)
    assert len(lowered) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cached executable {file} must be ")
    if fault != "a folder":
        np.testing.assert_array_equal(drawn(), right)
        assert len(lowered) == 1
        assert capfd.readouterr().err == ""


def test_a_file_of_another_user_is_not_unpickled(
    folder: Path, lowered: list, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = drawn()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    monkeypatch.setattr(pickle, "loads", lambda content: pytest.fail("unpickled"))
    np.testing.assert_array_equal(drawn(), right)
    assert len(lowered) == 2
    assert f"others can write (owner {user}" in capfd.readouterr().err


def test_nothing_is_kept_or_read_where_jax_s_cache_is_switched_off(
    folder: Path, lowered: list
) -> None:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        drawn()
        assert kept(folder) == []
        jax.config.update("jax_enable_compilation_cache", True)
        jax.clear_caches()
        drawn()
        assert len(kept(folder)) == 1
        jax.config.update("jax_enable_compilation_cache", False)
        drawn()
        assert len(lowered) == 3
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def test_without_a_place_to_keep_them_programs_compile_silently(
    folder: Path, lowered: list, capfd
) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("in the way")
    assert drawn().shape == (2, 2, 3)
    assert len(lowered) == 1
    assert capfd.readouterr().err == ""


def test_what_has_no_name_compiles_silently(folder: Path, lowered: list, capfd) -> None:
    one = np.ones(2, np.float32)
    assert Program(lambda x: x + 1).compile(one)(one).shape == (2,)
    assert len(lowered) == 1
    assert kept(folder) == []
    assert capfd.readouterr().err == ""


def test_what_can_t_be_serialised_compiles_silently(
    folder: Path, lowered: list, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "fingerprint", lambda *_: "0" * 64)
    one = np.ones(2, np.float32)
    for _ in range(2):
        called = Program(lambda x: jax.pure_callback(np.sin, x, x)).compile(one)(one)
        np.testing.assert_allclose(called, np.sin(one), rtol=1e-6)
    assert len(lowered) == 2
    assert kept(folder) == []
    assert capfd.readouterr().err == ""


def test_a_program_over_eight_devices_is_loaded_onto_the_same_eight(
    folder: Path, lowered: list
) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "pair", "context"))
    sharding = NamedSharding(mesh, PartitionSpec("pair", "context"))
    x = jax.device_put(np.arange(32, dtype=np.float32).reshape(4, 8), sharding)
    first, second = (Program(layers.silu).compile(x)(x) for _ in range(2))
    assert len(lowered) == 1
    np.testing.assert_array_equal(first, second)
    assert second.sharding.is_equivalent_to(sharding, 2)
    turned = Mesh(np.array(jax.devices()[::-1]).reshape(1, 2, 4), ("data", "pair", "context"))
    other = jax.device_put(x, NamedSharding(turned, PartitionSpec("pair", "context")))
    third = Program(layers.silu).compile(other)(other)
    assert len(lowered) == 2
    assert third.sharding == other.sharding


def test_shapes_compile_what_arrays_then_find(folder: Path, lowered: list) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "pair", "context"))
    sharding = NamedSharding(mesh, PartitionSpec("pair", "context"))
    shared = Program(layers.silu)
    ahead = shared.compile(jax.ShapeDtypeStruct((4, 8), np.float32, sharding=sharding))
    x = jax.device_put(np.ones((4, 8), np.float32), sharding)
    assert shared.compile(x) is ahead
    again = Program(layers.silu).compile(x)
    assert len(lowered) == 1
    np.testing.assert_array_equal(again(x), ahead(x))


def test_threads_that_ask_for_one_program_get_one_executable(
    lowered: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, found, build = Program(lambda x: 2 * x), [], Program._build
    entered, release = threading.Event(), threading.Event()

    def slowly(self, *given):
        entered.set()
        assert release.wait(60)
        return build(self, *given)

    monkeypatch.setattr(Program, "_build", slowly)
    threads = [
        threading.Thread(target=lambda: found.append(shared.compile(np.ones(3, np.float32))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    monkeypatch.setattr(Program, "_build", build)
    other = shared.compile(np.ones(4, np.float32))  # another one doesn't wait for it
    release.set()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert other is not found[0]
    assert len(lowered) == 2


def test_a_failure_is_told_to_all_who_wait_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, build = Program(lambda x: 2 * x), Program._build

    def fail(self, *given):
        raise MemoryError("too large")

    monkeypatch.setattr(Program, "_build", fail)
    with pytest.raises(MemoryError, match="too large"):
        shared.compile(np.ones(3, np.float32))
    monkeypatch.setattr(Program, "_build", build)
    np.testing.assert_array_equal(
        shared.compile(np.ones(3, np.float32))(np.ones(3, np.float32)), [2, 2, 2]
    )


SCRIPT = """
import jax, numpy as np
from jax import monitoring
from cogi2v_jax.compiled import keep_compilations
from cogi2v_jax.phases import START
from cogi2v_jax.sharding import Sizes, make_mesh
heard = []
monitoring.register_event_duration_secs_listener(lambda event, _, **__: heard.append(event.rpartition("/")[2]))
monitoring.register_event_listener(lambda event, **_: heard.append(event.rpartition("/")[2]))
keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
words = np.array([[1, 2]], np.uint32)
executable = START.compile(None, words, shape=(2, 3), mesh=make_mesh(Sizes(), jax.devices()[:1]))
seen = [heard.count(event) for event in ("jaxpr_trace_duration", "backend_compile_duration", "cache_hits")]
print(*seen, float(np.asarray(executable(None, words)[0]).sum()))
"""


def test_a_second_process_neither_traces_nor_compiles_and_a_third_that_finds_jax_s_cache_alone_is_right(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run() -> tuple[list[int], str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        *counts, value = done.stdout.split()
        return [int(count) for count in counts], value

    folder = tmp_path / "cogi2v-jax" / "executables"
    (traced, compiles, hits), value = run()
    assert (traced > 0, compiles, hits) == (True, 1, 0)
    assert run() == ([0, 0, 0], value)
    (file,) = kept(folder)
    file.unlink()
    # XLA:CPU would write an executable from here that loads and then doesn't run, so none may be
    # kept.
    for _ in range(2):
        (traced, compiles, hits), again = run()
        assert (traced > 0, compiles, hits, again) == (True, 1, 1, value)
    assert kept(folder) == []


def test_a_file_is_a_checksum_and_a_pickle_of_bytes_and_outputs(folder: Path) -> None:
    drawn()
    (file,) = kept(folder)
    payload, outputs = pickle.loads(file.read_bytes()[CHECKSUM:])
    assert isinstance(payload, bytes)
    assert outputs == 0
