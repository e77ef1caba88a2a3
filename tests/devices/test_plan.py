"""`--plan`: read off a small table of our own, whose every number is easy to tell; and the shipped
table's own sense."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogi2v_jax import config
from cogi2v_jax.devices import plan
from cogi2v_jax.devices.mesh import sizes_of

MODEL = "cogvideox-5b-i2v"
COMMON = """
model = "cogvideox-5b-i2v"
height = 480
width = 720
num_frames = 49
steps = 50
guided = true
dtype = "bfloat16"
jax = "0.10.2"
libtpu = "0.0.52"
date = "2026-11-24"
"""
MESHES = """
[generations.v5e]
kind = "TPU v5 lite"
hbm_gib = 15.75
peak_tflops = 197
[generations.cpu]
kind = "cpu"
[meshes.v5e-1]
generation = "v5e"
topology = "1x1"
[meshes.v5e-8]
generation = "v5e"
topology = "2x4"
pair = 2
context = 4
[meshes.v5e-16]
generation = "v5e"
topology = "4x4"
pair = 2
context = 8
[generations.tpu7x]
kind = "TPU7x"
hbm_gib = 94.74
[meshes.v7x-8]
generation = "tpu7x"
topology = "2x2x1"
pair = 2
context = 4
[meshes.cpu]
generation = "cpu"
"""


def row(stage: str, mesh: str, gib: float, seconds: float, **changes: object) -> str:
    values = {
        "stage": stage,
        "mesh": mesh,
        "attention": "splash",
        "fits": True,
        "peak_gib": gib,
        "static_seconds": seconds,
        "compile_seconds": 9.0,
    }
    values |= changes
    own = "\n".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in values.items()
    )
    rest = "".join(
        line + "\n" for line in COMMON.splitlines() if line.split(" = ")[0] not in changes
    )
    return f"[[row]]\n{rest}{own}\n"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Gives the tables in use other contents: `tables(row(...), ...)`."""
    configs = Path(shutil.copytree(config.CONFIGS, tmp_path / "configs"))
    monkeypatch.setattr(config, "CONFIGS", configs)

    def write(*rows: str) -> None:
        (configs / "meshes.toml").write_text(MESHES)
        (configs / "plans.toml").write_text("\n".join(rows))
        config.meshes.cache_clear()
        plan.table.cache_clear()

    yield write
    config.meshes.cache_clear()
    plan.table.cache_clear()


@pytest.fixture
def whole(tables):
    """Everything compiled for eight chips, but one stage too large for a single one."""
    numbers = {"text": (5, 0.25), "image": (3, 0.5), "denoise": (9, 40), "decode": (4, 2)}
    eight = [row(stage, "v5e-8", *pair) for stage, pair in numbers.items()]
    tables(*eight, row("text", "v5e-1", 9, 1), row("decode", "v5e-1", 16.5, 11, fits=False))


def columns(line: str) -> list[str]:
    return line.split()[:3]


def test_a_compiled_request_has_its_mesh_its_phases_their_sum_and_a_verdict(whole):
    mesh, request, _, _, *stages, blank, verdict, static, ratio, compiler = plan.lines(
        MODEL, "v5e-8"
    )
    assert mesh == "v5e-8: 8 chips of TPU v5 lite (2x4), split over data 1, pair 2, context 4"
    assert (
        request == f"{MODEL}: one video of 49 frames of 480x720, 50 steps with guidance, bfloat16"
    )
    assert [columns(line) for line in stages] == [
        ["text", "5.00", "0.25"],
        ["image", "3.00", "0.50"],
        ["denoise", "9.00", "40.00"],
        ["decode", "4.00", "2.00"],
        ["together", "9.00", "42.75"],
    ]
    assert stages[2].endswith("splash attention")
    assert blank == ""
    assert (
        verdict
        == "fits: no stage takes more than 9.00 of the 15.75 GiB that a program can use of a device"
    )
    assert static.startswith("seconds are static")
    assert static.endswith("no time of ours was measured on a TPU")
    assert "0.92 - 1.04 times" in ratio
    assert compiler == "compiled with jax 0.10.2 and libtpu 0.0.52 on 2026-11-24"


def test_steps_scale_the_seconds_of_denoising_alone_and_the_plan_says_so(whole):
    lines = plan.lines(MODEL, "v5e-8", num_inference_steps=20)
    by_name = {line.split()[0]: columns(line) for line in lines[4:9]}
    assert by_name["denoise"] == ["denoise", "9.00", "16.00"]
    assert by_name["text"] == ["text", "5.00", "0.25"]
    assert by_name["together"] == ["together", "9.00", "18.75"]
    assert lines[-1] == "denoise was compiled for 50 steps; its seconds are scaled to 20"


def test_every_compiler_that_made_a_row_is_named_once(tables):
    newer = {"jax": "0.12.0.1", "libtpu": "0.0.50.1", "date": "2026-11-29"}
    tables(
        row("text", "v5e-8", 5, 0.25),
        row("image", "v5e-8", 3, 0.5, **newer),
        row("decode", "v5e-8", 4, 2, **newer),
    )
    assert plan.lines(MODEL, "v5e-8")[-1] == (
        "compiled with jax 0.10.2 and libtpu 0.0.52 on 2026-11-24; "
        "jax 0.12.0.1 and libtpu 0.0.50.1 on 2026-11-29"
    )


def test_a_phase_too_large_for_a_chip_is_named(whole):
    lines = plan.lines(MODEL, "v5e-1")
    assert (
        "does not fit: decode would take more than the 15.75 GiB that a program can use of a device"
        in lines
    )
    assert not any(line.startswith("together") for line in lines)


def test_a_program_that_did_not_compile_has_no_numbers(tables):
    fields = row("decode", "v5e-1", 0, 0, fits=False).splitlines()
    tables("\n".join(line for line in fields if not line.startswith(("peak_gib", "static"))))
    assert "decode               -           -" in plan.lines(MODEL, "v5e-1")


def test_what_was_not_compiled_is_not_guessed(tables):
    tables()
    lines = plan.lines(MODEL, "v5e-8")
    assert lines[4:8] == [
        f"{stage:10}not compiled; no similar program was compiled either" for stage in plan.STAGES
    ]
    assert (
        lines[-1]
        == "whether it fits is not known: not compiled for it: text, image, denoise, decode"
    )


def test_the_nearest_is_the_same_machine_at_another_size_before_any_other_machine(tables):
    smaller = [
        row("denoise", "v5e-8", gib, 10, num_frames=frames) for frames, gib in ((9, 6), (17, 8))
    ]
    tables(row("denoise", "v5e-16", 5, 20), *smaller)
    assert plan.lines(MODEL, "v5e-8")[6] == (
        "denoise   not compiled; nearest is v5e-8, 17 frames of 480x720 with guidance, bfloat16, "
        "splash attention: 8.00 GiB a device"
    )


def test_without_the_machine_the_nearest_is_the_one_of_the_most_similar_size(tables):
    tables(row("denoise", "v5e-1", 11, 300), row("denoise", "v5e-8", 9, 40))
    assert "nearest is v5e-8, " in plan.lines(MODEL, "v5e-16")[6]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"guidance_scale": 1}, {"text", "denoise"}),
        ({"num_frames": 41}, {"denoise", "decode"}),
        ({"dtype": "float32"}, {"text", "image", "denoise", "decode"}),
        ({"attention": "xla"}, {"denoise"}),
        (
            {
                "attention": "splash",
                "seed": 7,
                "scheduler": "ddim",
                "fps": 24,
                "fit": "pad",
                "use_dynamic_cfg": False,
            },
            set(),
        ),
    ],
)
def test_a_phase_needs_a_row_for_just_what_its_program_depends_on(whole, settings, missing):
    lines = plan.lines(MODEL, "v5e-8", **settings)
    assert {line.split()[0] for line in lines if "not compiled;" in line} == missing


def test_a_row_of_another_checkpoint_is_never_near(whole):
    assert "text      not compiled; no similar program was compiled either" in plan.lines(
        "cogvideox1.5-5b-i2v", "v5e-8"
    )


@pytest.mark.parametrize(
    "name", ["zai-org/CogVideoX-5b-I2V", "THUDM/CogVideoX-5b-I2V", "zai-org/cogvideox-5b-i2v"]
)
def test_a_hub_id_is_planned_as_its_checkpoint(whole, name):
    assert plan.lines(name, "v5e-8") == plan.lines(MODEL, "v5e-8")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            (MODEL, "v9-8"),
            "mesh must be one of v5e-1, v5e-8, v5e-16, v7x-8, cpu to be planned: got 'v9-8'",
        ),
        (
            ("sora", "v5e-8"),
            "model must be one of cogi2v-tiny, cogvideox-5b-i2v, cogvideox1.5-5b-i2v to be "
            "planned: got 'sora'",
        ),
    ],
)
def test_an_unknown_name_is_one_line_with_the_known_ones(whole, arguments, error):
    with pytest.raises(ValueError, match="to be planned") as caught:
        plan.lines(*arguments)
    assert str(caught.value) == error


@pytest.mark.parametrize("name", ["V5E-8", "v5litepod-8", " V5LitePod-8"])
def test_a_machine_may_have_the_clouds_name_for_it(whole, name: str) -> None:
    assert plan.lines(MODEL, name) == plan.lines(MODEL, "v5e-8")
    assert plan.training_lines(MODEL, name) == plan.training_lines(MODEL, "v5e-8")
    assert sizes_of(name) == sizes_of("v5e-8")


def test_what_the_network_cannot_compute_is_refused_as_for_a_request(whole):
    rule = r"num_frames must be 8k\+1 for cogvideox-5b-i2v .* got 50; nearest is 49 or 56"
    with pytest.raises(ValueError, match=rule):
        plan.lines(MODEL, "v5e-8", num_frames=50)


def test_a_machine_without_a_stated_memory_is_planned_too(whole):
    lines = plan.lines("cogi2v-tiny", "cpu")
    assert lines[0] == "cpu: 1 chip of cpu, split over data 1, pair 1, context 1"
    assert lines[1].endswith("float32")


def test_the_cores_of_a_chip_are_told_from_chips(tables):
    tables()
    assert plan.lines(MODEL, "v7x-8")[0] == (
        "v7x-8: 4 chips of TPU7x (2x2x1), 2 devices each, split over data 1, pair 2, context 4"
    )


STEP = {"method": "lora", "rank": 128, "batch": 1, "int8": False, "kept": "attention"}


def test_a_step_of_training_has_a_line_for_each_way_that_was_compiled(tables):
    on_one = {"rank": 16, "kept": "host", "int8": True, "host_gib": 4.25, "summed_gib": 11.5}
    tables(
        row("train", "v5e-8", 14, 2, useful_flops=1.576e15, **STEP),
        row("train", "v5e-1", 13, 10, useful_flops=9.85e14, **STEP | on_one),
        row("train", "v5e-1", 17, float("nan"), fits=False, **STEP),
        row("denoise", "v5e-8", 9, 40),
    )
    lines = plan.training_lines(MODEL, "v5e-8")
    assert lines[0] == f"{MODEL}: a step of training on v5e-8, 8 x TPU v5 lite"
    assert lines[2].split("  ")[-1].strip() == "MFU"
    way, numbers = lines[3][:42].rstrip(), lines[3][42:].split()
    assert way == "LoRA of rank 128, attention kept"
    assert numbers == ["14.00", "-", "-", "2.00", "50%"]
    assert lines[-1] == "compiled with jax 0.10.2 and libtpu 0.0.52 on 2026-11-24"
    _, _, _, small, large, _, static, copies, _ = plan.training_lines(MODEL, "v5e-1")
    assert small.startswith("LoRA of rank 16 beside int8, host kept ")
    assert small[42:].split() == ["13.00", "11.50", "4.25", "10.00", "50%"]
    assert large.endswith("does not fit")
    assert static.startswith("seconds are static")
    assert copies.startswith("(without copies to the host and back; the peak may count")


def test_a_step_that_was_not_compiled_is_not_guessed(tables):
    tables(row("train", "v5e-8", 14, 2, useful_flops=1.0, **STEP))
    assert plan.training_lines(MODEL, "v5e-16")[2:] == ["not compiled for it; compiled for v5e-8"]
    tables()
    none = ["not compiled for it; compiled for no machine"]
    assert plan.training_lines(MODEL, "v5e-8")[2:] == none
    with pytest.raises(ValueError, match=r"mesh must be one of .* to be planned: got 'v9-8'"):
        plan.training_lines(MODEL, "v9-8")


def test_planning_needs_no_jax(tmp_path):
    script = f"""
import sys
from cogi2v_jax.devices import plan
print(*plan.lines({MODEL!r}, "v5e-8"), sep="\\n")
sys.exit(str(heavy) if (heavy := sys.modules.keys() & {{"jax", "flax", "orbax", "torch"}}) else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v5e-8: 8 chips")


@pytest.mark.parametrize("number", range(len(plan.table())))
def test_a_shipped_row_is_of_a_known_mesh_and_checkpoint_and_fits_as_it_says(number):
    row = plan.table()[number]
    assert row["model"] in config.names()
    assert row["stage"] in (*plan.STAGES, "train")
    assert row["fits"] == (
        min(row.get("peak_gib", float("inf")), row.get("summed_gib", float("inf")))
        <= plan.generation(row["mesh"])["hbm_gib"]
    )
    assert {"jax", "libtpu", "date"} <= row.keys()
    assert not row["fits"] or row["static_seconds"] > 0
