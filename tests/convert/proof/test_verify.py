"""Converted checkpoints against traces of the reference: equal ones pass, and each fault is found
at its own stage."""

import json
import re
import shutil
from collections.abc import Callable
from functools import wraps
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
from traces import FAMILY_SCHEDULER, STEPS, Case, damaged, flags, size_of

from cogi2v_jax import Request, pipeline
from cogi2v_jax.devices.compiling import Program
from cogi2v_jax.sampling import programs, samplers, schedule, stages

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.0", "1.5"])
def test_in_bfloat16_we_are_as_close_to_the_truth_as_the_reference_is(
    name: str, cases: Callable[[str], Case]
) -> None:
    family = cases(name)
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


def test_a_timestep_that_is_off_by_one_is_found_at_the_timesteps(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = samplers.trailing_timesteps
    monkeypatch.setattr(samplers, "trailing_timesteps", lambda *given: right(*given) - 1)
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


@pytest.mark.parametrize(("name", "guidance"), [("1.0", 3.0), ("1.5", 1.0)])
def test_the_commands_record_and_verify_chosen_steps_with_and_without_guidance(
    name: str, guidance: float, cases: Callable[[str], Case], picture: Path, tmp_path: Path
) -> None:
    family = cases(name)
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
