"""Damaged headers, indexes and configurations: each is read, or refused in one line, and nothing is
made."""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import twins
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.sources.gather import gather
from cogi2v_convert.sources.matching import match
from cogi2v_convert.sources.tensor_files import open_file
from cogi2v_convert.tables.rules import refuse
from folders import PARTS, weights
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cogi2v_jax import config
from cogi2v_jax.weights.pieces import NETWORKS

# The same cases every time, and no search for a smaller failing case: every case writes a file.
CASES = settings(
    max_examples=25,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            0,
            1,
            -1,
            2**60,
            2**63,
            "..",
            "../../etc/passwd",
            "/etc/passwd",
            "",
            "F32",
            "BF16",
            "F8_E4M3",
            "I64",
            "gelu",
            "model",
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    found = [here] if here else []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += paths(inner, (*here, key))
    return found


def changed(draw: Callable[..., Any], value: Any) -> Any:
    """A JSON value with one to three places replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = paths(value)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        parent = value
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                parent[last] = draw(VALUES)
            case "remove":
                del parent[last]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=12))] = parent.pop(last)
    return value


def damaged(draw: Callable[..., Any], data: bytes) -> bytes:
    """Bytes with some overwritten, cut off, or put in."""
    at = draw(st.integers(0, len(data)))
    junk = draw(st.binary(max_size=24))
    match draw(st.sampled_from(["overwrite", "cut", "insert"])):
        case "overwrite":
            return data[:at] + junk + data[at + len(junk) :]
        case "cut":
            return data[:at]
    return data[:at] + junk + data[at:]


@st.composite
def headers(draw: Callable[..., Any], header: dict[str, Any], rest: bytes) -> bytes:
    """A safetensors file whose header is changed as JSON, as bytes, or in its stated
    length."""
    text = json.dumps(changed(draw, header)).encode()
    length = draw(
        st.sampled_from(
            [
                len(text),
                len(text),
                len(text),
                len(text) + 1,
                len(text) - 1,
                0,
                2**60,
                2**64 - 1,
                2**63,
            ]
        )
    )
    data = struct.pack("<Q", length) + text + rest
    return damaged(draw, data[: len(text) + 8]) + rest if draw(st.integers(0, 3)) == 0 else data


@st.composite
def texts(draw: Callable[..., Any], value: Any) -> bytes:
    """A JSON file changed as JSON or as bytes."""
    text = json.dumps(changed(draw, value)).encode()
    return damaged(draw, text) if draw(st.integers(0, 2)) == 0 else text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder, its transformer in shards."""
    pipe = twins.pipeline("1.5")
    folder = twins.save(pipe, tmp_path_factory.mktemp("saved"))
    shutil.rmtree(folder / "transformer")
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    return folder


def check_reading(source: Path) -> None:
    """The folder is read, or refused in one line."""
    try:
        found = gather([source])
        refuse(str(source), [fault for part in NETWORKS for fault in match(found, part).faults])
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    else:
        return
    assert said.isprintable(), said
    assert said


def replaced(saved: Path, name: str, data: bytes) -> tempfile.TemporaryDirectory:
    """The folder, by links, with one file's bytes in place of its own."""
    folder = tempfile.TemporaryDirectory()
    shutil.copytree(
        saved,
        folder.name,
        dirs_exist_ok=True,
        copy_function=lambda there, here: Path(here).symlink_to(there),
    )
    (Path(folder.name) / name).unlink()
    (Path(folder.name) / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_safetensors_header_is_read_or_refused(saved: Path, part: str) -> None:
    file = weights(saved, part)
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    @CASES
    @seed(0)
    @given(headers(header, rest))
    def check(data: bytes) -> None:
        with replaced(saved, file.relative_to(saved).as_posix(), data) as folder:
            check_reading(Path(folder))

    check()


def test_an_index_is_read_or_refused(saved: Path) -> None:
    index = saved / "transformer" / "diffusion_pytorch_model.safetensors.index.json"

    @CASES
    @seed(0)
    @given(texts(json.loads(index.read_text())))
    def check(data: bytes) -> None:
        with replaced(saved, index.relative_to(saved).as_posix(), data) as folder:
            check_reading(Path(folder))

    check()


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_a_configuration_is_read_or_refused(saved: Path, name: str) -> None:
    @CASES
    @seed(0)
    @given(texts(json.loads((saved / name).read_text())))
    def check(data: bytes) -> None:
        with replaced(saved, name, data) as folder:
            check_reading(Path(folder))

    check()


def test_a_toml_of_ours_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "cogvideox-5b-i2v"
    text = (config.CONFIGS / "checkpoints" / f"{name}.toml").read_bytes()
    shutil.copytree(config.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")

    @CASES
    @seed(0)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (tmp_path / "configs" / "checkpoints" / f"{name}.toml").write_bytes(
            damaged(data.draw, text)
        )
        for cached in (config.toml, config.named, config.names):
            getattr(cached, "cache_clear", lambda: None)()
        try:
            config.named(name)
        except ValueError as error:
            said = str(error)
        else:
            return
        assert said.isprintable(), said

    try:
        check()
    finally:
        for cached in (config.toml, config.named, config.names):
            getattr(cached, "cache_clear", lambda: None)()


def test_nothing_is_made_of_a_damaged_file(saved: Path, tmp_path: Path) -> None:
    """The same through the whole conversion, for a few."""
    file = weights(saved, "vae")
    whole = file.read_bytes()

    @settings(CASES, max_examples=12)
    @seed(1)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with replaced(
            saved, file.relative_to(saved).as_posix(), damaged(data.draw, whole)
        ) as folder:
            try:
                to_flax(Path(folder), tmp_path / "flax")
            except (ValueError, FileNotFoundError) as error:
                said = str(error)
            else:
                shutil.rmtree(tmp_path / "flax")
                return
            assert said.isprintable(), said
            assert list(tmp_path.iterdir()) == []

    check()
    assert open_file(file).entries
