"""Converted checkpoints against traces of the reference: equal ones pass, and each fault is found
at its own stage."""

import json
import re
import shutil
import sys
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
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def size_of(family: str) -> dict[str, int]:
    return dict(zip(("height", "width", "num_frames"), SIZES[family], strict=True))


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Case:
    """A family's diffusers folder and traces of it."""

    def __init__(self, family: str, folder: Path, picture: Path):
        self.family, self.folder = family, folder
        self.source = twins.save(twins.pipeline(family), folder / "source")
        ways = {"scheduler": FAMILY_SCHEDULER[family], "fit": "stretch", **size_of(family)}
        prompts = "the red circle", "a square"
        self.request = Request(picture, *prompts, num_inference_steps=STEPS, **ways)
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
    """One family, for what does not depend on the family."""
    return cases("1.0")


STAGES = {"ids", "pixels", "text", "moments", "posterior", "image", "timesteps", "guidance"}
STAGES |= {"unconditional", "conditional", "guided", "latents", "video"}
STAGES |= {"posterior_noise", "initial"}


def test_every_stage_of_a_conversion_is_the_references_in_float32(family: Case) -> None:
    report = verify.verify(str(family.source), family.single)
    assert not report.faults, "\n".join(report.lines())
    noise = {"noise"} if FAMILY_SCHEDULER[family.family] == "dpm" else set()
    assert {row.stage for row in report.rows} == STAGES | noise
    ends = {"ids", "pixels", "timesteps", "guidance", "posterior_noise", "initial"}
    assert {row.stage for row in report.rows if row.mode == verify.FREE} == STAGES - ends
    assert all(row.error <= (1e-5 if row.mode == verify.FED else 1e-4) for row in report.rows)
    assert min(row.psnr for row in report.rows if row.psnr is not None) >= 100
    latents = [row for row in report.rows if (row.stage, row.mode) == ("latents", verify.FREE)]
    assert [row.step for row in latents] == list(range(STEPS))


def test_in_bfloat16_we_are_as_close_to_the_truth_as_the_reference_is(family: Case) -> None:
    report = verify.verify(str(family.source), family.half, family.single)
    assert not report.faults, "\n".join(report.lines())
    assert {row.stage for row in report.rows} >= STAGES
    # The stages did run in bfloat16.
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
    """The first stage with a fault."""
    assert report.verdict().startswith("FAIL")
    return report.faults[0].stage


def run_instead(
    stage: Callable[..., Any], other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaces the function of a stage by another."""
    row = programs.STAGES[stage]._replace(program=Program(other))
    monkeypatch.setitem(programs.STAGES, stage, row)


def fed(report: verify.Report) -> set[str]:
    """The stages with a fault on the reference's own input."""
    return {row.stage for row in report.faults if row.mode == verify.FED}


WEIGHTS = {
    "text_encoder": ("encoder.block.1.layer.0.SelfAttention.q.weight", {"text"}),
    "transformer": ("transformer_blocks.1.attn1.to_q.weight", {"unconditional", "conditional"}),
    "vae/encoder": ("encoder.mid_block.resnets.0.conv1.conv.weight", {"moments"}),
    "vae/decoder": ("decoder.up_blocks.2.resnets.1.conv2.conv.weight", {"video"}),
}


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_wrong_weight_is_found_at_the_stage_of_its_network(
    part: str, case: Case, tmp_path: Path
) -> None:
    name, stages = WEIGHTS[part]
    source = shutil.copytree(case.source, tmp_path / "source")
    (file,) = (source / part.split("/")[0]).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 0.3  # a single value
    save_file(tensors, file, {"format": "pt"})
    assert fed(verify.verify(str(source), case.single)) == stages


def test_a_wrong_latent_scale_is_found_at_the_images_latents(family: Case, tmp_path: Path) -> None:
    source = shutil.copytree(family.source, tmp_path / "source")
    config = json.loads((source / "vae" / "config.json").read_text())
    config["invert_scale_latents"] = not config["invert_scale_latents"]
    (source / "vae" / "config.json").write_text(json.dumps(config))
    assert fed(verify.verify(str(source), family.single)) == {"image"}


def test_swapped_prompts_are_found_at_the_ids(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = pipeline.tokenize_prompts
    monkeypatch.setattr(pipeline, "tokenize_prompts", lambda *given: tokenize(*given)[::-1])
    report = verify.verify(str(case.source), case.single)
    assert fed(report) == {"ids"}
    free = {row.stage for row in report.faults if row.mode == verify.FREE}
    assert free >= {"text", "unconditional", "conditional", "latents", "video"}


def test_swapped_predictions_are_found_at_the_predictions(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.denoise)
    def swapped(*args: Any, **static: Any) -> Any:
        *others, text, positions = args
        return stages.denoise(*others, jnp.roll(text, 1, axis=0), positions, **static)

    run_instead(stages.denoise, swapped, monkeypatch)
    assert fed(verify.verify(str(case.source), case.single)) == {"unconditional", "conditional"}


def test_a_shifted_frame_is_found_at_the_images_latents(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.draw_image)
    def shifted(*args: Any, **static: Any) -> Any:
        return jnp.roll(stages.draw_image(*args, **static), 1, axis=1)

    run_instead(stages.draw_image, shifted, monkeypatch)
    report = verify.verify(str(case.source), case.single)
    assert first(report) == "posterior"  # it is compared with the first frame
    assert fed(report) == {"posterior", "image"}


def test_a_shifted_frame_of_the_video_is_found_at_the_video(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.decode)
    def shifted(*args: Any, **static: Any) -> Any:
        return jnp.roll(stages.decode(*args, **static), 1, axis=1)

    run_instead(stages.decode, shifted, monkeypatch)
    assert {row.stage for row in verify.verify(str(case.source), case.single).faults} == {"video"}


def test_a_timestep_that_is_off_by_one_is_found_at_the_timesteps(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = schedule.trailing_timesteps
    monkeypatch.setattr(schedule, "trailing_timesteps", lambda *given: right(*given) - 1)
    report = verify.verify(str(case.source), case.single)
    assert first(report) == "timesteps"
    assert fed(report) >= {"timesteps", "unconditional", "conditional", "latents"}
    assert not fed(report) & {"ids", "pixels", "text", "moments", "posterior", "image", "video"}


def test_a_value_that_is_not_a_number_fails_and_its_index_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    @wraps(stages.decode)
    def broken(*args: Any, **static: Any) -> Any:
        return stages.decode(*args, **static).at[0, 2, 3, 4, 1].set(jnp.nan)

    run_instead(stages.decode, broken, monkeypatch)
    report = verify.verify(str(case.source), case.single)
    assert [(row.stage, row.where) for row in report.faults] == [("video", (0, 2, 3, 4, 1))] * 2
    assert json.loads(report.json())["rows"][-1]["error"] is None


def test_recording_does_not_change_the_reference(family: Case) -> None:
    """Compares with the reference's own run for the same seed, without recording."""
    pipe = twins.pipeline(family.family)
    schedulers = {"dpm": diffusers.CogVideoXDPMScheduler, "ddim": diffusers.CogVideoXDDIMScheduler}
    pipe.scheduler = schedulers[FAMILY_SCHEDULER[family.family]].from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    kept = trace.open_trace(family.single)
    names = "height", "width", "num_frames", "num_inference_steps", "guidance_scale"
    settings = {name: kept.settings[name] for name in (*names, "use_dynamic_cfg")}
    image, generator = Image.fromarray(kept.read("picture")), torch.Generator().manual_seed(42)
    fixed = {"generator": generator, "max_sequence_length": 12, "output_type": "pt"}
    video = pipe(image, "the red circle", "a square", **fixed, **settings).frames
    np.testing.assert_array_equal(kept.read("video"), twins.frames_last(video))


def test_a_trace_has_the_request_and_the_versions_that_made_it(family: Case) -> None:
    kept = trace.open_trace(family.single)
    prompts = {"prompt": "the red circle", "negative_prompt": "a square"}
    settings = prompts | {"seed": 42, "fit": "stretch", "num_inference_steps": STEPS}
    assert settings.items() <= kept.settings.items()
    libraries = {"torch", "diffusers", "transformers"}
    assert kept.made.keys() >= libraries | {"dtype", "device", "vae_tiling", "kept_steps"}
    is_dpm = FAMILY_SCHEDULER[family.family] == "dpm"
    assert is_dpm == kept.has("noise", 0) == kept.has("x0_prev", 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_commands_record_and_verify_chosen_steps_with_and_without_guidance(
    guidance: float, family: Case, picture: Path, tmp_path: Path
) -> None:
    what = {"image": picture, "prompt": "the red circle", "guidance_scale": guidance, "seed": 7}
    how = {"num_inference_steps": 3, "keep_steps": "0,2", **size_of(family.family)}
    target, figures = tmp_path / "trace.safetensors", tmp_path / "figures.json"
    command = ["record", str(family.source), str(target), "--no-use_dynamic_cfg"]
    assert __main__.main([*command, *flags(what | how)]) == 0
    kept = trace.open_trace(target)
    assert [kept.has("conditional", step) for step in range(3)] == [True, False, True]
    assert kept.has("unconditional", 0) == (guidance > 1)
    assert all(kept.has("latents", step) for step in range(3))
    assert __main__.main(["verify", str(family.source), str(target), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["verdict"] == "pass"
    rows = [row for row in found["rows"] if (row["stage"], row["mode"]) == ("conditional", "fed")]
    assert [row["step"] for row in rows] == [0, 2]


@pytest.mark.slow
def test_tiles_of_the_reference_are_verified_as_tiles(picture: Path, tmp_path: Path) -> None:
    pipe = twins.pipeline("1.5")
    tiled = twins.vae(2, invert_scale_latents=True, sample_height=96, sample_width=80)
    pipe.register_modules(vae=tiled)
    source, target = twins.save(pipe, tmp_path / "source"), tmp_path / "trace"
    size = size_of("1.5") | {"num_frames": 9, "num_inference_steps": 1}
    request = Request(picture, "a circle", scheduler="ddim", fit="stretch", **size)
    record.record(source, target, request, vae_tiling=True)
    assert not verify.verify(str(source), target).faults
    untiled = damaged(tmp_path / "untiled", target, made={"vae_tiling": False})
    assert fed(verify.verify(str(source), untiled)) == {"moments", "video"}


def test_the_command_line_exits_1_on_a_fault_and_shows_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(verify, "MOST", {verify.FED: 1e-5, verify.FREE: 1e-12})
    assert __main__.main(["verify", str(case.source), str(case.single)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert " in float32: jax " in lines[0]
    assert " against diffusers " in lines[0]
    assert any(re.match(r"latents.*free.*FAIL$", line) for line in lines)
    assert lines[-1].startswith("FAIL: ")
    assert __main__.main(["verify", str(case.source), str(case.single), "--markdown"]) == 1
    assert "| stage | input | step |" in capsys.readouterr().out


def damaged(
    target: Path,
    source: Path,
    removed: str = "$",
    changed: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    made: dict[str, Any] | None = None,
) -> Path:
    """A copy of a trace without the tensors whose names match, with others changed, or with other
    entries about how it was made."""
    kept, tensors = trace.open_trace(source), load_file(source)
    tensors = {name: x for name, x in tensors.items() if not re.fullmatch(removed, name)}
    for name, change in (changed or {}).items():
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, target, trace.head(kept.settings, kept.made | (made or {})))
    return target


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ({"removed": "text"}, "has no text"),
        ({"removed": r"guided\.\d"}, "has no guided.0; and 3 more like it"),
        ({"removed": "noise.2"}, "has no noise.2"),
        ({"removed": "x0_prev.1"}, "has no x0_prev.1"),
        ({"changed": {"ids": torch.Tensor.float}}, "has ids of type F32"),
        ({"changed": {"x0_prev.1": lambda x: x[:, 1:]}}, "has x0_prev.1 of shape [1, 4, "),
        ({"changed": {"guided.0": lambda x: x[0]}}, "has guided.0 of shape ["),
        ({"changed": {"moments": lambda x: x[..., 1:]}}, "moments must have the shape"),
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(
    damage: dict[str, Any], line: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = damaged(tmp_path / "damaged.safetensors", case.single, **damage)
    assert __main__.main(["verify", str(case.source), str(target)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = (one for one in lines if not one.startswith("converting"))
    assert line in error
    assert error.startswith("cogi2v-convert: ")


@pytest.mark.parametrize(
    ("settings", "made", "line"),
    [
        ({"prompt": None}, {}, "no prompt in its settings"),
        ({"image": "a"}, {}, "the unknown image in its settings"),
        ({"num_inference_steps": "4"}, {}, "num_inference_steps '4'"),
        ({}, {"torch": None}, "no torch in its making"),
        ({}, {"vae_tiling": "no"}, "vae_tiling 'no' in its making"),
    ],
)
def test_a_trace_with_wrong_entries_about_itself_is_refused(
    settings: dict, made: dict, line: str, case: Case, tmp_path: Path
) -> None:
    kept = trace.open_trace(case.single)
    both = (kept.settings | settings, kept.made | made)
    entries = [{name: value for name, value in one.items() if value is not None} for one in both]
    save_file(load_file(case.single), target := tmp_path / "trace", trace.head(*entries))
    with pytest.raises(ValueError, match=re.escape(line)):
        trace.open_trace(target)


def test_input_files_are_not_overwritten(
    case: Case, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, content in (("image.png", picture.read_bytes()), ("trace", case.single.read_bytes())):
        (tmp_path / name).write_bytes(content)
    image, target = str(tmp_path / "image.png"), str(tmp_path / "trace")
    what = flags({"image": image, "prompt": "a", "height": 48, "width": 80})
    assert __main__.main(["record", str(case.source), image, *what]) == 1
    assert "trace must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", target]) == 1
    assert "json must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", str(tmp_path)]) == 1
    assert "json must be a file or a new name" in capsys.readouterr().err
    assert (tmp_path / "image.png").read_bytes() == picture.read_bytes()
    assert (tmp_path / "trace").read_bytes() == case.single.read_bytes()


def test_a_file_that_is_not_a_trace_is_refused_in_one_line(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = {"cut": case.single.read_bytes()[:-100], "empty": b"", "text": b"not a trace"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    save_file({"latents": torch.zeros(3)}, tmp_path / "weights")
    for name in (*contents, "weights"):
        path = tmp_path / name
        assert __main__.main(["verify", str(case.source), str(path)]) == 1
        error = capsys.readouterr().err
        assert "trace must be a whole file of cogi2v-convert record" in error
        assert error.count("\n") == 1
    assert __main__.main(["verify", str(case.source), str(tmp_path / "none")]) == 1
    assert "trace must be an existing file" in capsys.readouterr().err


def test_a_truth_must_be_a_float32_trace_of_the_same_request(case: Case, tmp_path: Path) -> None:
    for checked in (case.half, case.single):
        with pytest.raises(ValueError, match="truth must be a float32 trace beside a bfloat16 one"):
            verify.verify(str(case.source), checked, checked)
    inverted = {"picture": lambda picture: 255 - picture}
    other = damaged(tmp_path / "other", case.single, changed=inverted)
    line = r"truth must be a trace of the same request: got .* with another picture"
    with pytest.raises(ValueError, match=line):
        verify.verify(str(case.source), case.half, other)


@pytest.mark.parametrize(
    ("arguments", "line"),
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
def test_a_request_that_cannot_be_recorded_is_refused_first_and_leaves_nothing(
    arguments: list[str],
    line: str,
    case: Case,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    usual = flags({"image": picture, "prompt": "a", **size_of(case.family)})
    command = ["record", str(case.source), str(tmp_path / "trace"), *usual, *arguments]
    assert __main__.main(command) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_record_without_the_reference_names_the_extra_that_it_needs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = r"record must have the reference: .*; pip install 'cogi2v-jax\[reference\]'"
    with pytest.raises(ValueError, match=line):
        record.record(case.source, tmp_path / "trace", case.request)
