"""The full-size benchmark at its small size: both sides are the same model, and a difference fails
the comparison."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import full_size
import full_stages
import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def measured(tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = tmp_path / "result.json"
    assert full_size.main([*arguments, "--size=small", "--json", str(result)]) == code
    return json.loads(result.read_text())


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        pytest.param(full_size.MODELS[1], ("text", "denoise, one step"), marks=pytest.mark.slow),
        *(
            pytest.param(model, full_size.STAGES, marks=pytest.mark.release)
            for model in full_size.MODELS
        ),
    ],
)
def test_every_stage_is_the_references_in_both_dtypes(
    tmp_path: Path, model: str, stages: tuple[str, ...]
) -> None:
    found = measured(tmp_path, "parity", "--model", model, "--stages", *stages)
    assert [row["stage"] for row in found["rows"]] == list(stages)
    assert found["faults"] == []
    for row in found["rows"]:
        assert 0 < row["float32"] < 1e-5
        assert 1e-5 < row["bfloat16"] <= full_size.RATIO * row["reference_bfloat16"]
        assert 0.3 < row["rms"] < 3  # activations neither vanished nor exploded


def test_a_network_that_differs_fails_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    ours = full_stages.build_ours

    def nudged(*given: Any) -> Any:
        network = ours(*given)
        network.norm.scale[...] = network.norm.scale[...] * 1.001
        return network

    monkeypatch.setattr(full_stages, "build_ours", nudged)
    found = measured(tmp_path, "parity", "--stages", "text", "--dtypes", "float32", code=1)
    (fault,) = found["faults"]
    assert fault.startswith("text must be within 1e-05 of the reference in float32: got ")
    assert fault in capsys.readouterr().out


def test_both_sides_are_timed_and_a_missing_kernel_is_reported(tmp_path: Path) -> None:
    variants = ("eager", "eager, cuDNN attention")
    settings = ("--stages", "denoise, one step", "--variants", *variants, "--repeats", "2")
    found = measured(tmp_path, "speed", *settings)
    rows = {row["variant"]: row for row in found["rows"]}
    assert rows.keys() == {full_size.OURS, *variants}
    assert "refused" in rows["eager, cuDNN attention"]
    for name in (full_size.OURS, "eager"):
        assert len(rows[name]["seconds"]) == 2
        assert rows[name]["rate"] > 0
    assert rows["eager"]["error"] == 0 < rows[full_size.OURS]["error"] < 0.1
    assert rows[full_size.OURS]["peak"] > 2**20
    assert len(found["table"]) == 4


def test_tuning_tries_every_backend_and_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = (("auto", None), ("cudnn", None), ("auto", {"xla_cpu_enable_fast_math": "true"}))
    monkeypatch.setattr(full_size.full_tuning, "TRIALS", trials)
    rows = measured(tmp_path, "tune", "--repeats", "1")["rows"]
    assert ["refused" in row for row in rows] == [False, True, False]


@pytest.mark.slow
def test_a_profile_names_the_kernels_of_both_sides(tmp_path: Path) -> None:
    """In its own process, because two profilers can crash a process that has done much else."""
    command = [sys.executable, full_size.__file__, "profile", "--size=small", "--variants=eager"]
    command += ["--json", tmp_path / "result.json"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found = json.loads((tmp_path / "result.json").read_text())["rows"]
    for side in ("cogi2v-jax", "reference, eager"):
        of_side = [row for row in found if row["side"] == side]
        assert sum(row["share"] for row in of_side) == pytest.approx(1)
        assert len(of_side) > 3


@pytest.mark.release
def test_the_whole_path_runs_by_its_commands_and_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    found = measured(tmp_path, "path", "--folder", str(folder))
    steps = ["weights written", "to-flax", "sample", "record", "verify"]
    assert [row["step"] for row in found["rows"]] == steps
    assert found["rows"][-1]["said"][-1].startswith("pass: ")
    assert all(2**27 < row["peak"] < 2**31 for row in found["rows"][1:])
    assert (folder / "out.mp4").stat().st_size > 1000
    assert measured(tmp_path, "path", "--folder", str(folder))["rows"] == []


def test_results_become_tables_between_the_marks_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = full_size.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "performance.md"
    page.write_text(marked, encoding="utf-8")
    monkeypatch.setattr(full_size, "PAGE", page)
    result = {"title": "parity", "table": [["stage", "error"], ["text", "1e-6"]]}
    result |= {"machine": ["a machine"]}
    (tmp_path / "one.json").write_text(json.dumps(result))
    full_size.main(["publish", str(tmp_path / "one.json")])
    begin, end = "<!-- benchmarks/full_size.py -->\n", "<!-- end -->\n"
    before, after = marked.partition(begin)[0], marked.rpartition(end)[2]
    table = "| stage | error |\n| ----- | ----- |\n| text  | 1e-6  |"
    block = f"\nparity\n\n{table}\n\na machine\n\n"
    assert page.read_text(encoding="utf-8") == f"{before}{begin}{block}{end}{after}"
    page.write_text("no marks\n")
    with pytest.raises(
        ValueError, match=r"must have the marks of benchmarks/full_size\.py: got none"
    ):
        full_size.main(["publish", str(tmp_path / "one.json")])
    assert page.read_text() == "no marks\n"


def test_full_size_requires_a_gpu(capsys) -> None:
    assert jax.default_backend() != "gpu"
    with pytest.raises(SystemExit, match="full size must have a GPU"):
        full_size.main(["parity"])
    assert np.isclose(full_size.measure_error(np.ones(4), np.full(4, 2.0)), 0.5)
