"""The TPU compiler's figures: they are read correctly for programs with costs that can be counted
by hand, and are within bounds for the released checkpoints at full size."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
import tpu_compile
import tpu_hlo
import tpu_kernel
import tpu_stage

from cogi2v_jax import config
from cogi2v_jax.devices import plan

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu (Linux on x86-64) is not installed"
)
MIB = 2**20


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each of `tpu_programs.PROGRAMS`."""
    folder, schedules = tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("schedules")
    command = [sys.executable, ROOT / "tests" / "support" / "tpu_programs.py", folder, schedules]
    subprocess.run(
        command, env=tpu_compile.make_environment(schedules), check=True, stderr=subprocess.DEVNULL
    )
    return folder


def cost(program: Path) -> tpu_hlo.Cost:
    return tpu_hlo.read((program / "program.txt").read_text())


def kernel_cost(program: Path) -> tuple[tpu_kernel.Kernel, float]:
    """The kernel of a program that calls exactly one, once, and its cycles."""
    found = cost(program)
    ((name, times),) = found.kernels.items()
    assert times == 1
    kernel = tpu_kernel.read(found.bodies[name])
    return kernel, tpu_kernel.count_cycles(tpu_stage.find_schedule([name], program), kernel)


@pytest.mark.slow
def test_a_product_in_nested_loops_counts_once_for_every_trip(programs: Path) -> None:
    costs = {outer: cost(programs / f"nested-{outer}") for outer in (3, 6, 12)}
    assert {outer: found.flops for outer, found in costs.items()} == {
        outer: outer * 5 * 2 * 256 * 512 * 512 for outer in costs
    }
    assert costs[12].cycles - costs[6].cycles == 2 * (costs[6].cycles - costs[3].cycles) > 0


def test_a_convolutions_taps_on_its_padding_do_not_count(programs: Path) -> None:
    assert cost(programs / "convolution").flops == 2 * 4 * 32 * 64 * (3 * 12 - 2) * (3 * 8 - 2)


@pytest.mark.parametrize(
    ("collective", "sent"),  # MiB sent by each of four chips, for one MiB on each
    [
        ("all-to-all", 3 / 4),
        ("all-gather", 3),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 2 * 3 / 4),
        ("collective-permute", 1),
    ],
)
def test_a_collectives_bytes_are_those_that_leave_one_chip(
    programs: Path, collective: str, sent: float
) -> None:
    found = cost(programs / collective)
    assert found.sent == 7 * sent * MIB
    assert found.flops == 0


def test_an_exchange_that_runs_beside_products_counts_like_any_other(programs: Path) -> None:
    program = programs / "all-to-all-beside-products"
    assert "all-to-all-start(" in (program / "program.txt").read_text()
    assert cost(program).sent == 7 * 2 * 3 / 4 * MIB


def test_a_kernels_products_are_read_from_its_own_program(programs: Path) -> None:
    for rows, keys in ((1024, 1024), (2048, 1024), (1024, 2048)):
        kernel, _ = kernel_cost(programs / f"attention-{rows}-{keys}")
        assert kernel.grid == (4, rows // 512, keys // 512)
        assert kernel.flops == 4 * (2 * rows * keys * 64) * 2


def test_a_kernels_cycles_grow_with_its_grid_except_those_that_run_once_a_row(
    programs: Path,
) -> None:
    cycles = {
        size: kernel_cost(programs / f"attention-{size[0]}-{size[1]}")[1]
        for size in ((1024, 1024), (2048, 1024), (1024, 2048))
    }
    # Except for what comes before the first step.
    assert cycles[2048, 1024] == pytest.approx(2 * cycles[1024, 1024], rel=0.005)
    # Beginning and finishing a row of the grid takes the same time for any number of keys.
    assert 1.6 < cycles[1024, 2048] / cycles[1024, 1024] < 1.95
    # 512 x 512 logits of 64 + 64 multiplications each, in four units of 128 x 128 that the narrow
    # heads fill by half.
    assert cycles[1024, 1024] > 16 * 512 * 512 / (4 * 128) * 2


def write_schedule(jumps: dict[int, tuple[str, int, int]]) -> str:
    """130 bundles, with jumps to a bundle if a register compares as said with a constant."""
    lines = {address: f"  {address:#x}  :  {{ nop }}" for address in range(130)}
    for address, (predicate, constant, target) in jumps.items():
        compare = f"%p{address} = scmp.{predicate}.s32.totalorder %s1, {constant}"
        jump = f"%1 = sbr.rel (%p{address}) target bundleno = {target}"
        lines[address] = f"  {address:#x}  : > {{ {compare} ;; {jump} }}"
    return "\n".join(lines.values())


def test_a_jump_around_the_whole_body_is_not_taken_for_one_of_its_branches() -> None:
    """The compiler compares a spilled predicate with 0, and so do kernels with a counter."""
    first, last = (
        tpu_kernel.Branch(("ne", step), share=0.25, number=number, last=number)
        for number, step in enumerate((0, 3))
    )
    body, loop = {5: ("ne", 0, 110)}, {120: ("lt", 6, 2)}  # a loop over 4 points
    branches = {10: ("ne", 0, 25), 85: ("ne", 3, 110)}
    schedule = write_schedule(body | branches | loop)
    # A jump takes effect after 5 bundles: the branches are bundles 15 - 24 and 90 - 109.
    assert tpu_kernel.count_cycles(schedule, tpu_kernel.Kernel((4,), 0.0, (first, last))) == (
        7 + 4 * (123 - 10 - 20) + 10 + 20
    )
    # One branch that has the other inside it.
    nest = {10: ("ne", 0, 110), 85: ("ne", 3, 110)}
    whole = first._replace(last=1)
    schedule = write_schedule(nest | loop)
    assert tpu_kernel.count_cycles(schedule, tpu_kernel.Kernel((4,), 0.0, (whole, last))) == (
        7 + 4 * (123 - 95) + 75 + 20 / 4
    )


def test_a_program_that_does_not_fit_says_how_much_it_needs(programs: Path) -> None:
    error = (programs / "too-large" / "program.txt").read_text()
    assert 32 <= tpu_stage.read_needed_gib(jax.errors.JaxRuntimeError(error)) < 33
    used = "Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. "
    used += "Exceeded hbm capacity by 768.00M."
    assert tpu_stage.read_needed_gib(jax.errors.JaxRuntimeError(used)) == 16.5
    with pytest.raises(jax.errors.JaxRuntimeError, match="another fault"):
        tpu_stage.read_needed_gib(jax.errors.JaxRuntimeError("another fault"))


def test_a_kernels_schedule_is_the_last_of_its_name(tmp_path: Path) -> None:
    names = "9-splash.1-01 10-splash.1-01 11-splash.11-01 12-splash.1-00-schedule-analysis_"
    for name in names.split():
        (tmp_path / f"{name}-packed-bundles-post-ra.txt".replace("_-", "_")).write_text(name)
    assert tpu_stage.find_schedule(["splash.1"], tmp_path) == "10-splash.1-01"
    # Of equal kernels libtpu may write one alone.
    assert tpu_stage.find_schedule(["splash.2", "splash.11"], tmp_path) == "11-splash.11-01"
    with pytest.raises(ValueError, match=r"a schedule of splash\.2: got none"):
        tpu_stage.find_schedule(["splash.2"], tmp_path)


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_the_size_of_a_group_is_read_from_every_notation(groups: str, chips: int) -> None:
    assert tpu_hlo.read_group_size(f", channel_id=1, {groups}") == chips


def test_a_machine_has_as_many_devices_of_its_kind_as_libtpu_describes() -> None:
    meshes = [name for name, mesh in config.meshes()["meshes"].items() if "topology" in mesh]
    script = "import json, sys, tpu_stage as t; "
    script += "found = {mesh: t.describe_devices(mesh) for mesh in sys.argv[1:]}; "
    script += "print(json.dumps({mesh: [len(d), d[0].device_kind] for mesh, d in found.items()}))"
    done = subprocess.run(
        [sys.executable, "-c", script, *meshes],
        env=tpu_compile.make_environment(None),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout) == {
        mesh: [plan.count_devices(mesh), plan.generation(mesh)["kind"]] for mesh in meshes
    }


LOOP = """HloModule m

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %by = s32[] constant(2)
  %next = s32[] add(%i, %by)
  %x = f32[8] get-tuple-element(%state), index=1
  ROOT %out = (s32[], f32[8]) tuple(%next, %x)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %most = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %most), direction=LT
}

ENTRY %main (x.1: f32[8], n: s32[]) -> (s32[], f32[8]) {
  %x.1 = f32[8] parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant(1)
  %start = (s32[], f32[8]) tuple(%first, %x.1)
  ROOT %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_runs_as_often_as_its_counter_says() -> None:
    computations, entry = tpu_hlo.parse(LOOP)
    start = tpu_hlo.Reader(computations).evaluate(computations[entry], "start", None)
    # 1, 3, 5, 7.
    assert (
        tpu_hlo.Reader(computations).count_trips(computations[entry].instructions["loop"], start)
        == 4
    )


def test_a_loop_that_counts_to_an_unknown_number_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="a loop must count to a constant of at most 100000: got loop"
    ):
        tpu_hlo.read(LOOP.replace("tuple(%first", "tuple(%n"))


MADE = {"jax": "1", "libtpu": "2", "date": "2030-01-01"}
MODEL = "cogvideox-5b-i2v"
ROW = {"model": MODEL, "mesh": "v5e-8", "stage": "denoise", "height": 480, "guided": True}
ROW |= {"fits": True, "peak_gib": 9.5, "flops": 4.25e15, "collective_mib_per_layer": 79.0}
ROW |= {"static_seconds": 44.5, "compile_seconds": 61.0} | MADE
REFUSED = {"model": MODEL, "mesh": "v5e-1", "stage": "denoise", "height": 768, "guided": True}
REFUSED |= {"fits": False, "peak_gib": 16.5} | MADE


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "plans.toml"
    monkeypatch.setattr(tpu_compile, "PLANS", path)
    return path


def test_rows_are_read_as_written(plans: Path) -> None:
    assert tpu_compile.read_rows() == {}
    tpu_compile.write([ROW, REFUSED])
    assert list(tpu_compile.read_rows().values()) == [ROW, REFUSED]


@pytest.mark.parametrize(
    ("options", "compiled"),
    [([], ["v6e-1"]), (["--again"], ["v5e-1", "v6e-1"])],
)
def test_a_row_that_is_there_is_compiled_only_again(
    plans: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], compiled: list[str]
) -> None:
    """Whatever compiler made it; and the file has the order of configs/meshes.toml."""
    newer = {**MADE, "jax": "3"}

    def compile_row(name: tuple[str, ...], *_: object) -> dict[str, object]:
        model, mesh, stage, _ = name
        return {**ROW, "model": model, "mesh": mesh, "stage": stage, **newer}

    monkeypatch.setattr(tpu_compile, "compile_row", compile_row)
    tpu_compile.write([ROW, REFUSED])
    for mesh in ("v6e-1", "v5e-1"):
        command = ["tpu_compile.py", "--model", MODEL, "--mesh", mesh, "--stage", "denoise"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            tpu_compile.main()
        assert ended.value.code == 0
    rows = tpu_compile.read_rows()
    assert [mesh for _, mesh, *_ in rows] == ["v5e-1", "v5e-8", "v6e-1"]
    assert [mesh for (_, mesh, *_), row in rows.items() if row["jax"] == "3"] == compiled


def test_the_table_has_a_dash_for_figures_that_the_compiler_did_not_reach() -> None:
    _, _, row, refused = tpu_compile.format_markdown([ROW, REFUSED]).splitlines()
    assert row == f"| {MODEL} | v5e-8 | denoise | yes | 9.50 | 4250.0 | 79.0 | 44.50 | 61 | 1, 2 |"
    assert refused == f"| {MODEL} | v5e-1 | denoise | no | 16.50 | - | - | - | - | 1, 2 |"


@pytest.mark.slow
def test_a_step_of_training_has_a_row() -> None:
    changes = "int8 rank=8 kept=host optimizer=adamw"
    row = tpu_compile.compile_row(("cogi2v-tiny", "v5e-1", "train", changes), "xla")
    assert row["fits"]
    assert 0 < row["peak_gib"] < 1
    assert row["static_seconds"] > 0
    assert row["flops"] > 0
    assert row["changes"] == changes
    assert 0 < row["useful_flops"] < row["flops"]
    assert row["host_gib"] > 0
    assert 0 < row["summed_gib"] < 1


@pytest.mark.release
@pytest.mark.parametrize(
    ("model", "mesh", "stage", "most_gib", "most_mib", "most_seconds"),
    [
        ("cogvideox-5b-i2v", "v5e-1", "denoise", 15.75, 0, 330),
        ("cogvideox-5b-i2v", "v5e-8", "denoise", 12.5, 90, 48),
        ("cogvideox-5b-i2v", "v6e-8", "denoise", 12.5, 90, 20),
        ("cogvideox-5b-i2v", "v5e-1", "decode", 15.75, 0, 15),
        ("cogvideox-5b-i2v", "v5e-8", "decode", 12.5, math.inf, 3),
        ("cogvideox1.5-5b-i2v", "v5e-1", "denoise", 15.75, 0, 1700),
        ("cogvideox1.5-5b-i2v", "v5e-1", "decode", 15.75, 0, 60),
    ],
)
def test_a_released_checkpoint_keeps_within_its_bounds(
    model: str,
    mesh: str,
    stage: str,
    most_gib: float,
    most_mib: float,
    most_seconds: float,
    tmp_path: Path,
) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "tpu_compile.py", "--model", model]
    command += ["--mesh", mesh, "--stage", stage, "--json", tmp_path / "row.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["fits"], row
    assert row["peak_gib"] <= most_gib
    assert row["collective_mib_per_layer"] <= most_mib
    assert 0 < row["static_seconds"] <= most_seconds
