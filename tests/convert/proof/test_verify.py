"""Traces of the reference, and converted checkpoints against them: what is equal passes, and each
fault is found at its own stage."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert import __main__
from cogi2v_convert.proof import record, replay, trace, verify
from PIL import Image
from safetensors.torch import load_file, save_file

from cogi2v_jax import Request, pipeline
from cogi2v_jax.devices.compiling import Program
from cogi2v_jax.sampling import programs, schedule, stages

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
STEPS = 4
FAMILY_SCHEDULER = {"1.0": "dpm", "1.5": "ddim"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(
        path
    )
    return path


class Case:
    """A family's diffusers folder and traces of it."""

    def __init__(self, family: str, folder: Path, picture: Path):
        self.family, self.folder = family, folder
        self.source = twins.save(twins.pipeline(family), folder / "source")
        height, width, frames = SIZES[family]
        self.request = Request(
            picture,
            "the red circle",
            "a square",
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=STEPS,
            scheduler=FAMILY_SCHEDULER[family],
            fit="stretch",
        )
        self.single, self.half = (self.record(dtype) for dtype in ("float32", "bfloat16"))

    def record(self, dtype: str) -> Path:
        target = self.folder / f"{dtype}.safetensors"
        record.record(self.source, target, self.request, dtype=dtype)
        return target


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Callable[[str], Case]:
    return cache(lambda family: Case(family, tmp_path_factory.mktemp(f"case-{family}"), picture))


@pytest.fixture(params=["1.0", "1.5"])
def family(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def case(cases: Callable[[str], Case]) -> Case:
    """What the families share is tested on one."""
    return cases("1.0")


STAGES = {
    "ids",
    "pixels",
    "text",
    "moments",
    "posterior",
    "image",
    "timesteps",
    "guidance",
    "unconditional",
    "conditional",
    "guided",
}
STAGES |= {"latents", "video", "posterior_noise", "initial"}


def test_every_stage_of_a_conversion_is_the_references_in_float32(family: Case) -> None:
    report = verify.verify(str(family.source), family.single)
    assert not report.faults, "\n".join(report.lines())
    noise = {"noise"} if FAMILY_SCHEDULER[family.family] == "dpm" else set()
    assert {row.stage for row in report.rows} == STAGES | noise
    ends = {"ids", "pixels", "timesteps", "guidance", "posterior_noise", "initial"}
    assert {row.stage for row in report.rows if row.mode == verify.FREE} == STAGES - ends
    assert all(row.error <= (1e-5 if row.mode == verify.FED else 1e-4) for row in report.rows)
    assert min(row.psnr for row in report.rows if row.psnr is not None) >= 100
    assert [
        row.step for row in report.rows if (row.stage, row.mode) == ("latents", verify.FREE)
    ] == list(range(STEPS))


def test_in_bfloat16_we_are_as_close_to_the_truth_as_the_reference(family: Case) -> None:
    report = verify.verify(str(family.source), family.half, family.single)
    assert not report.faults, "\n".join(report.lines())
    assert {row.stage for row in report.rows} >= STAGES
    # It did run in bfloat16.
    assert max(row.error for row in report.rows if row.stage == "video") > 1e-3


def test_a_bfloat16_trace_alone_still_shows_large_faults(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify.verify(str(case.source), case.half)
    assert not report.faults
    assert {row.limit for row in report.rows if row.mode == verify.FREE} == {None}
    monkeypatch.setattr(schedule, "guide", lambda row, unconditional, conditional: conditional)
    monkeypatch.setattr(replay, "guide", schedule.guide)
    assert {row.stage for row in verify.verify(str(case.source), case.half).faults} == {"guided"}


def first(report: verify.Report) -> str:
    """The stage that a fault is placed at."""
    assert report.verdict().startswith("FAIL")
    return report.faults[0].stage


def run_instead(
    stage: Callable[..., Any], other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = programs.STAGES[stage]._replace(program=Program(other))
    monkeypatch.setitem(programs.STAGES, stage, row)


def fed(report: verify.Report) -> set[str]:
    return {row.stage for row in report.faults if row.mode == verify.FED}


WEIGHTS = {
    "text_encoder": ("encoder.block.1.layer.0.SelfAttention.q.weight", {"text"}),
    "transformer": ("transformer_blocks.1.attn1.to_q.weight", {"unconditional", "conditional"}),
    "vae/encoder": ("encoder.mid_block.resnets.0.conv1.conv.weight", {"moments"}),
    "vae/decoder": ("decoder.up_blocks.2.resnets.1.conv2.conv.weight", {"video"}),
}


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_wrong_weight_is_placed_at_its_networks_stage(
    part: str, case: Case, tmp_path: Path
) -> None:
    name, stages = WEIGHTS[part]
    source = shutil.copytree(case.source, tmp_path / "source")
    (file,) = (source / part.split("/")[0]).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 0.3  # one of its many
    save_file(tensors, file, {"format": "pt"})
    assert fed(verify.verify(str(source), case.single)) == stages


def test_a_wrong_latent_scale_is_placed_at_the_images_latents(family: Case, tmp_path: Path) -> None:
    source = shutil.copytree(family.source, tmp_path / "source")
    config = json.loads((source / "vae" / "config.json").read_text())
    config["invert_scale_latents"] = not config["invert_scale_latents"]
    (source / "vae" / "config.json").write_text(json.dumps(config))
    assert fed(verify.verify(str(source), family.single)) == {"image"}


def test_a_swapped_pair_is_placed_at_the_prompts(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = pipeline.tokens
    monkeypatch.setattr(pipeline, "tokens", lambda *given: tokens(*given)[::-1])
    report = verify.verify(str(case.source), case.single)
    assert fed(report) == {"ids"}
    assert {row.stage for row in report.faults if row.mode == verify.FREE} >= {
        "text",
        "unconditional",
        "conditional",
        "latents",
        "video",
    }


def test_swapped_predictions_are_placed_at_the_predictions(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.denoise)
    def swapped(*args: Any, **static: Any) -> Any:
        *others, text, positions = args
        return stages.denoise(*others, jnp.roll(text, 1, axis=0), positions, **static)

    run_instead(stages.denoise, swapped, monkeypatch)
    assert fed(verify.verify(str(case.source), case.single)) == {"unconditional", "conditional"}


def test_a_shifted_frame_is_placed_at_the_images_latents(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.draw_image)
    def shifted(*args: Any, **static: Any) -> Any:
        return jnp.roll(stages.draw_image(*args, **static), 1, axis=1)

    run_instead(stages.draw_image, shifted, monkeypatch)
    report = verify.verify(str(case.source), case.single)
    assert first(report) == "posterior"  # of which it shows the first frame
    assert fed(report) == {"posterior", "image"}


def test_a_shifted_frame_of_the_video_is_placed_there(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.decode)
    def shifted(*args: Any, **static: Any) -> Any:
        return jnp.roll(stages.decode(*args, **static), 1, axis=1)

    run_instead(stages.decode, shifted, monkeypatch)
    assert {row.stage for row in verify.verify(str(case.source), case.single).faults} == {"video"}


def test_a_timestep_off_by_one_is_placed_at_the_schedule(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = schedule.trailing_timesteps
    monkeypatch.setattr(
        schedule, "trailing_timesteps", lambda config, steps: walk(config, steps) - 1
    )
    report = verify.verify(str(case.source), case.single)
    assert first(report) == "timesteps"
    assert fed(report) >= {"timesteps", "unconditional", "conditional", "latents"}
    assert not fed(report) & {"ids", "pixels", "text", "moments", "posterior", "image", "video"}


def test_what_is_not_a_number_fails_and_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.decode)
    def broken(*args: Any, **static: Any) -> Any:
        return stages.decode(*args, **static).at[0, 2, 3, 4, 1].set(jnp.nan)

    run_instead(stages.decode, broken, monkeypatch)
    report = verify.verify(str(case.source), case.single)
    assert [(row.stage, row.where) for row in report.faults] == [("video", (0, 2, 3, 4, 1))] * 2
    assert json.loads(report.json())["rows"][-1]["error"] is None


def test_recording_changes_nothing(family: Case) -> None:
    """The reference's own run with the same seed, with no one listening."""
    pipe = twins.pipeline(family.family)
    schedulers = {"dpm": diffusers.CogVideoXDPMScheduler, "ddim": diffusers.CogVideoXDDIMScheduler}
    pipe.scheduler = schedulers[FAMILY_SCHEDULER[family.family]].from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    kept = trace.open_trace(family.single)
    settings = {
        name: kept.settings[name]
        for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    }
    video = pipe(
        image=Image.fromarray(kept.read("picture")),
        prompt="the red circle",
        negative_prompt="a square",
        use_dynamic_cfg=kept.settings["use_dynamic_cfg"],
        generator=torch.Generator().manual_seed(42),
        max_sequence_length=12,
        output_type="pt",
        **settings,
    ).frames
    np.testing.assert_array_equal(kept.read("video"), twins.frames_last(video))


def test_a_trace_says_what_was_asked_and_what_answered(family: Case) -> None:
    kept = trace.open_trace(family.single)
    asked = {
        "prompt": "the red circle",
        "negative_prompt": "a square",
        "seed": 42,
        "fit": "stretch",
        "num_inference_steps": STEPS,
    }
    assert asked.items() <= kept.settings.items()
    assert kept.made.keys() >= {
        "dtype",
        "device",
        "torch",
        "diffusers",
        "transformers",
        "vae_tiling",
        "kept_steps",
    }
    assert (
        (FAMILY_SCHEDULER[family.family] == "dpm") == kept.has("noise", 0) == kept.has("x0_prev", 1)
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_chosen_steps_and_no_guidance_are_recorded_and_verified(
    guidance: float, family: Case, picture: Path, tmp_path: Path
) -> None:
    """By the command line, from start to end."""
    height, width, frames = SIZES[family.family]
    size = [
        "--height",
        str(height),
        "--width",
        str(width),
        "--num_frames",
        str(frames),
        "--num_inference_steps",
        "3",
    ]
    what = [
        "--image",
        str(picture),
        "--prompt",
        "the red circle",
        "--guidance_scale",
        str(guidance),
        "--no-use_dynamic_cfg",
        "--seed",
        "7",
    ]
    target, figures = tmp_path / "trace.safetensors", tmp_path / "figures.json"
    assert (
        __main__.main(
            ["record", str(family.source), str(target), *what, *size, "--keep_steps", "0,2"]
        )
        == 0
    )
    kept = trace.open_trace(target)
    assert [kept.has("conditional", step) for step in range(3)] == [True, False, True]
    assert kept.has("unconditional", 0) == (guidance > 1)
    assert all(kept.has("latents", step) for step in range(3))
    assert __main__.main(["verify", str(family.source), str(target), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["verdict"] == "pass"
    assert [
        row["step"]
        for row in found["rows"]
        if row["stage"] == "conditional" and row["mode"] == "fed"
    ] == [0, 2]


@pytest.mark.slow
def test_tiles_of_the_reference_are_verified_as_tiles(picture: Path, tmp_path: Path) -> None:
    pipe = twins.pipeline("1.5")
    pipe.register_modules(
        vae=twins.vae(2, invert_scale_latents=True, sample_height=96, sample_width=80)
    )
    source, target = twins.save(pipe, tmp_path / "source"), tmp_path / "trace"
    request = Request(
        picture,
        "a circle",
        height=64,
        width=48,
        num_frames=9,
        num_inference_steps=1,
        scheduler="ddim",
        fit="stretch",
    )
    record.record(source, target, request, vae_tiling=True)
    assert not verify.verify(str(source), target).faults
    untiled = damaged(
        lambda tensors: None, target, tmp_path / "untiled", made={"vae_tiling": False}
    )
    assert fed(verify.verify(str(source), untiled)) == {"moments", "video"}


def test_the_command_line_exits_1_on_a_fault_and_shows_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(verify, "MOST", {verify.FED: 1e-5, verify.FREE: 1e-12})
    assert __main__.main(["verify", str(case.source), str(case.single)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert " in float32: jax " in lines[0]
    assert " against diffusers " in lines[0]
    assert any(
        line.startswith("latents") and "free" in line and line.endswith("FAIL") for line in lines
    )
    assert lines[-1].startswith("FAIL: ")
    assert __main__.main(["verify", str(case.source), str(case.single), "--markdown"]) == 1
    assert "| stage | input | step |" in capsys.readouterr().out


def damaged(
    change: Callable[[dict], Any], source: Path, target: Path, made: dict[str, Any] | None = None
) -> Path:
    """A trace after a change of its tensors, or of how it says that it was made."""
    kept, tensors = trace.open_trace(source), load_file(source)
    change(tensors)
    save_file(tensors, target, trace.head(kept.settings, {**kept.made, **(made or {})}))
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("text"), "has no text"),
        (
            lambda tensors: [tensors.pop(f"guided.{step}") for step in range(STEPS)],
            "has no guided.0; and 3 more like it",
        ),
        (lambda tensors: tensors.pop("noise.2"), "has no noise.2"),
        (lambda tensors: tensors.pop("x0_prev.1"), "has no x0_prev.1"),
        (lambda tensors: tensors.update(ids=tensors["ids"].float()), "has ids of type F32"),
        (
            lambda tensors: tensors.update({"x0_prev.1": tensors["x0_prev.1"][:, 1:].contiguous()}),
            "has x0_prev.1 of shape [1, 4, ",
        ),
        (
            lambda tensors: tensors.update({"guided.0": tensors["guided.0"][0]}),
            "has guided.0 of shape [",
        ),
        (
            lambda tensors: tensors.update(moments=tensors["moments"][..., 1:].contiguous()),
            "moments must have the shape",
        ),
    ],
)
def test_a_damaged_trace_is_one_clear_line(
    change: Callable, said: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = damaged(change, case.single, tmp_path / "damaged.safetensors")
    assert __main__.main(["verify", str(case.source), str(target)]) == 1
    (error,) = (
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("converting")
    )
    assert said in error
    assert error.startswith("cogi2v-convert: ")


@pytest.mark.parametrize(
    ("settings", "made", "said"),
    [
        ({"prompt": None}, {}, "no prompt in its settings"),
        ({"image": "a"}, {}, "the unknown image in its settings"),
        ({"num_inference_steps": "4"}, {}, "num_inference_steps '4'"),
        ({}, {"torch": None}, "no torch in its making"),
        ({}, {"vae_tiling": "no"}, "vae_tiling 'no' in its making"),
    ],
)
def test_a_trace_that_says_something_else_of_itself_is_one_clear_line(
    settings: dict, made: dict, said: str, case: Case, tmp_path: Path
) -> None:
    kept = trace.open_trace(case.single)
    both = ({**kept.settings, **settings}, {**kept.made, **made})
    told = [{name: value for name, value in given.items() if value is not None} for given in both]
    save_file(load_file(case.single), target := tmp_path / "trace", trace.head(*told))
    with pytest.raises(ValueError, match=re.escape(said)):
        trace.open_trace(target)


def test_nothing_that_is_read_is_written_over(
    case: Case, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, content in (("image.png", picture.read_bytes()), ("trace", case.single.read_bytes())):
        (tmp_path / name).write_bytes(content)
    image, target = str(tmp_path / "image.png"), str(tmp_path / "trace")
    assert (
        __main__.main(
            [
                "record",
                str(case.source),
                image,
                "--image",
                image,
                "--prompt",
                "a",
                "--height",
                "48",
                "--width",
                "80",
            ]
        )
        == 1
    )
    assert "trace must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", target]) == 1
    assert "json must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", str(tmp_path)]) == 1
    assert "json must be a file or a new name" in capsys.readouterr().err
    assert (tmp_path / "image.png").read_bytes() == picture.read_bytes()
    assert (tmp_path / "trace").read_bytes() == case.single.read_bytes()


def test_what_is_no_trace_is_one_clear_line(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = case.single.read_bytes()
    for name, content in {
        "cut": whole[:-100],
        "empty": b"",
        "text": b"not a trace",
        "weights": None,
    }.items():
        path = tmp_path / f"{name}.safetensors"
        if content is None:
            save_file({"latents": torch.zeros(3)}, path)
        else:
            path.write_bytes(content)
        assert __main__.main(["verify", str(case.source), str(path)]) == 1
        error = capsys.readouterr().err
        assert "trace must be a whole file of cogi2v-convert record" in error
        assert error.count("\n") == 1
    assert __main__.main(["verify", str(case.source), str(tmp_path / "none")]) == 1
    assert "trace must be an existing file" in capsys.readouterr().err


def test_a_truth_is_of_the_same_request_in_float32(case: Case, tmp_path: Path) -> None:
    for checked in (case.half, case.single):
        with pytest.raises(ValueError, match="truth must be a float32 trace beside a bfloat16 one"):
            verify.verify(str(case.source), checked, checked)
    other = damaged(
        lambda tensors: tensors.update(picture=255 - tensors["picture"]),
        case.single,
        tmp_path / "other",
    )
    with pytest.raises(
        ValueError, match=r"truth must be a trace of the same request: got .* with another picture"
    ):
        verify.verify(str(case.source), case.half, other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep_steps", "0,50"], "keep_steps must be from 0 to 49: got 0, 50"),
        (["--image", "no such picture.png"], "image must be an existing file"),
        (["--num_frames", "11"], "num_frames must be"),
        (["--num_inference_steps", "61"], "num_inference_steps must be"),
        (["--num_frames", "9"], "num_frames must be 17 for a trace of"),
        (["--prompt", "the red circle " * 9], "prompt must be at most 12 tokens"),
        (["--device", "cuda"], "device must be cpu where PyTorch finds no CUDA: got cuda"),
    ],
)
def test_what_cannot_be_recorded_is_said_first_and_leaves_nothing(
    arguments: list[str],
    said: str,
    case: Case,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    height, width, frames = SIZES[case.family]
    size = ["--height", str(height), "--width", str(width), "--num_frames", str(frames)]
    given = ["--image", str(picture), "--prompt", "a", *size, *arguments]
    assert __main__.main(["record", str(case.source), str(tmp_path / "trace"), *given]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_record_says_which_extra_it_needs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(
        ValueError,
        match=r"record must have the reference: .*; pip install 'cogi2v-jax\[reference\]'",
    ):
        record.record(case.source, tmp_path / "trace", case.request)
