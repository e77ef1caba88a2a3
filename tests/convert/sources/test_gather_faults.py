"""Sources that are refused, each in one line, and what `inspect` prints."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import strange
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax
from folders import left, one_line, rewrite, weights
from safetensors.torch import load_file, save_file

from cogi2v_jax.loading import load


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def runs(tmp_path, saved):
    torch.save(
        {
            "module": strange.sat_transformer(load_file(weights(saved["1.0"], "transformer"))),
            "x": Runs(tmp_path / "ran"),
        },
        tmp_path / "x.pt",
    )


def runs_in_the_old_format(tmp_path, saved):
    torch.save(
        {"x": Runs(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=False
    )


def holds_arguments(tmp_path, saved):
    torch.save(
        {"module": {"a": torch.zeros(1)}, "args": argparse.Namespace(a=1)}, tmp_path / "x.pt"
    )


def is_cut(tmp_path, saved):
    torch.save({"module": {"a": torch.zeros(999)}}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-300])


def holds_no_tensors(tmp_path, saved):
    torch.save({"module": {"a": 1}, "iteration": 3}, tmp_path / "x.pt")


def is_gguf(tmp_path, saved):
    (tmp_path / "x.pt").write_bytes(b"GGUF" + bytes(99))


def one_file(change):
    """A single-file transformer of the same family, changed."""

    def make(tmp_path, saved):
        tensors = load_file(weights(saved["1.0"], "transformer"))
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.pt"
        )

    return make


def of(part, family="1.0", **settings):
    """A single-file transformer or VAE of other settings."""

    def make(tmp_path, saved):
        module = getattr(twins, part)(
            **{**(twins.FAMILIES[family] if part == "transformer" else {}), **settings}
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in module.state_dict().items()},
            tmp_path / "x.pt",
        )

    return make


def in_blocks(tensors):
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)
    tensors["proj_out.weight_scale"] = torch.ones(tensors["proj_out.weight"].shape[0], 3)


def noted(note):
    return one_file(
        lambda tensors: tensors.update(
            {"proj_out.comfy_quant": torch.tensor(list(note), dtype=torch.uint8)}
        )
    )


def twice(tensors):
    tensors.update(
        {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in dict(tensors).items()}
    )


def beside(tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)
    tensors["text_model.x"] = torch.zeros(1)


REFUSED = {
    "code": (
        runs,
        r"x\.pt must hold tensors and nothing that runs: got a pickle that asks for getattr, and "
        r"loading it could run anything",
    ),
    "code in the old format": (runs_in_the_old_format, r"must hold tensors and nothing that runs"),
    "arguments": (
        holds_arguments,
        r"nothing that runs: got a pickle that asks for argparse\.Namespace",
    ),
    "a cut file": (is_cut, r"x\.pt must be a whole "),
    "no tensors": (
        holds_no_tensors,
        r"must hold tensors by name, or under module, .* or the like: got module, iteration",
    ),
    "half of GGUF": (is_gguf, r"must be a whole GGUF file: "),
    "scales of blocks": (
        one_file(in_blocks),
        r"proj_out.weight must have one scale, or one an output row: got proj_out.weight_scale "
        r"\[16, 3\]",
    ),
    "another quantisation": (
        noted(b'{"format": "nvfp4"}'),
        r"proj_out must be float8 times a scale: got format 'nvfp4'",
    ),
    "a rotated quantisation": (
        noted(b'{"format": "float8_e4m3fn", "convrot": true}'),
        r"must be float8 times a scale: got convrot True",
    ),
    "a note that is none": (noted(b"\xff"), r"must note its quantisation in JSON"),
    "two transformers": (
        one_file(twice),
        r"must hold one transformer: got more, under '' and 'model.diffusion_model.'",
    ),
    "a further network": (
        one_file(beside),
        r"must hold nothing but transformer: got text_model.x; save the transformer alone",
    ),
    "a tensor more": (
        one_file(lambda tensors: tensors.update(new=torch.zeros(3))),
        r"transformer: new has no rule$",
    ),
    "a tensor less": (
        one_file(lambda tensors: tensors.pop("proj_out.bias")),
        r"transformer: proj_out.bias is missing$",
    ),
    "something else": (
        lambda tmp_path, saved: save_file({"conv.weight": torch.zeros(1)}, tmp_path / "x.pt"),
        r"must hold a transformer, a VAE or a T5 encoder of this family: got 1 tensors, the first "
        r"conv.weight",
    ),
    "a LoRA": (
        lambda tmp_path, saved: save_file(
            {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)},
            tmp_path / "x.pt",
        ),
        r"got a LoRA, which is no network",
    ),
    "the other family": (
        of("transformer", "1.5"),
        r"the weights must be of the configuration's family cogvideox-i2v: got cogvideox1.5-i2v; "
        r"give a folder of .*has no rule",
    ),
    "text to video": (
        of("transformer", in_channels=4),
        r"channels: got 4, which is a text-to-video checkpoint; .*must have the shape",
    ),
    "CogVideoX-Fun": (
        of("transformer", in_channels=9),
        r"got 9, which is an inpainting checkpoint \(as CogVideoX-Fun's\), which takes a mask",
    ),
    "a control video": (
        of("transformer", in_channels=12),
        r"got 12, which is a checkpoint that takes a further video beside the image",
    ),
    "another size": (
        of("transformer", num_layers=2),
        r"must have the configuration's 3 layers of width 96: got 2 of 96",
    ),
    "AniSora": (
        of("transformer", use_learned_positional_embeddings=False),
        r"must have the configuration's positions: got no learned table \(AniSora-5B has none\); "
        r"in a copy of the folder set .* to false",
    ),
    "ConsisID": (
        one_file(
            lambda tensors: tensors.update(
                {"perceiver_cross_attention.0.to_q.weight": torch.zeros(3, 3)}
            )
        ),
        r"image-to-video from a prompt and a first image alone: got ConsisID, which takes a face "
        r"beside the image$",
    ),
    "Tora": (
        one_file(
            lambda tensors: tensors.update(
                {"mixins.mgf.0.flow_gamma_spatial.weight": torch.zeros(3)}
            )
        ),
        r"alone: got Tora,",
    ),
    "another VAE": (of("vae", block_out_channels=(8, 8, 8, 8)), r"vae: .* must have the shape "),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_nothing_is_made(
    fault, saved, tmp_path, capsys
):
    make, expected = REFUSED[fault]
    make(tmp_path, saved)
    line = one_line(capsys, ["to-flax", saved["1.0"], tmp_path / "x.pt", tmp_path / "flax"])
    assert re.search(expected, line), line
    assert left(tmp_path) == {"x.pt"}


def split(folder, saved):
    torch.save(
        {},
        strange.save_sat(saved, folder, "transformer") / "transformer/1/mp_rank_01_model_states.pt",
    )


def two_steps(folder, saved):
    (strange.save_sat(saved, folder, "transformer") / "transformer/latest").unlink()


def universal(folder, saved):
    (folder / "zero" / "proj_out.bias").mkdir(parents=True)
    torch.save(torch.zeros(1), folder / "zero" / "proj_out.bias" / "fp32.pt")


FOLDERS = {
    "a universal checkpoint": (universal, r"got DeepSpeed's universal checkpoint, as .*fp32\.pt; "),
    "split over processes": (
        split,
        r"must hold the checkpoint of one process, not split over several",
    ),
    "two steps": (
        two_steps,
        r"must hold one transformer: got .*/0/mp_rank_00_model_states.pt and "
        r".*/1/mp_rank_00_model_states.pt",
    ),
    "photos": (lambda folder, saved: folder.mkdir(), r"must be a diffusers or converted folder"),
    "a whole one": (
        lambda folder, saved: shutil.copytree(saved, folder),
        r"SRC must begin with the whole folder, .* behind another",
    ),
    "a converted one": (
        lambda folder, saved: to_flax(saved, folder),
        r"SRC must be weights of PyTorch: got .*, a converted folder",
    ),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_can_not_replace_a_part_is_refused_in_one_line(
    fault, saved, tmp_path, capsys
):
    make, expected = FOLDERS[fault]
    make(tmp_path / "second", saved["1.0"])
    line = one_line(capsys, ["to-flax", saved["1.0"], tmp_path / "second", tmp_path / "flax"])
    assert re.search(expected, line), line
    assert left(tmp_path) == {"second"}


def test_a_file_alone_is_refused_with_what_is_missing_and_how_to_give_it(saved, tmp_path, capsys):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t.safetensors", {"transformer": ""})
    line = one_line(capsys, ["to-flax", file, tmp_path / "flax"])
    missing = (
        "for the configuration and for vae, text_encoder, scheduler, tokenizer: got "
        "transformer alone"
    )
    assert (
        f"SRC must begin with a diffusers folder, {missing}; for example CogVideoX-5b-I2V {file}"
        in line
    )


def test_sample_refuses_a_file_and_says_what_to_do(saved, tmp_path):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t.safetensors", {"transformer": ""})
    with pytest.raises(
        ValueError,
        match=(
            r"model must be a folder, .*: got the file .*; cogi2v-convert to-flax FOLDER "
            r"t.safetensors DST replaces a part"
        ),
    ):
        load(file, say=lambda line: None)


def test_a_relative_is_refused_by_sample_too(saved, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    rewrite(
        source,
        "transformer",
        lambda tensors: tensors.update({"local_facial_extractor.x": torch.zeros(3)}),
    )
    with pytest.raises(
        ValueError,
        match=r"transformer: the weights must be of image-to-video .* alone: got ConsisID",
    ):
        load(source, say=lambda line: None)


def test_safetensors_need_no_torch(saved, base, tmp_path):
    strange.save_float8(saved, tmp_path / "fp8.safetensors", "one scale")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    script = """
import sys
class Without:
    def find_spec(name, *_):
        if name == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, Without)
from cogi2v_convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    for file, code in (("fp8.safetensors", 0), ("x.pt", 1)):
        command = [
            sys.executable,
            "-c",
            script,
            "to-flax",
            base["1.5"],
            tmp_path / file,
            tmp_path / "flax",
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == code  # no warning beside the error
    assert (
        "x.pt must be safetensors where torch is missing: got a torch file; pip install torch"
        in done.stderr
    )


# inspect


def inspect(capsys, *arguments) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_inspect_says_where_each_part_comes_from(saved, base, tmp_path, capsys):
    sat = strange.save_sat(saved["1.0"], tmp_path / "sat", "vae")
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t5.safetensors", {"text_encoder": ""})
    code, out = inspect(capsys, base["1.0"], sat, file)
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert code == 0
    assert lines["vae"].endswith(f"tensors matched, float32, from {sat / 'vae/3d-vae.pt'} (SAT)")
    assert lines["text_encoder"].endswith(f"tensors matched, float32, from {file}")
    assert lines["transformer"].endswith("tensors matched, float32, float64")


def test_inspect_describes_a_single_file(saved, tmp_path, capsys):
    tensors, _ = strange.to_float8(
        load_file(weights(saved["1.5"], "transformer")), torch.float8_e4m3fn, "{}.scale_weight"
    )
    save_file(tensors, tmp_path / "x.safetensors")
    code, out = inspect(capsys, tmp_path / "x.safetensors")
    assert code == 0
    assert "transformer, diffusers names, " in out
    assert (
        "float32, float8_e4m3fn with scales, cogvideox1.5-i2v, 3 layers of width 96, 8 channels\n"
        in out
    )


def test_inspect_fails_where_a_file_does_not_fit(saved, tmp_path, capsys):
    file = strange.save_prefixed(saved["1.5"], tmp_path / "x.safetensors", {"transformer": ""})
    code, out = inspect(capsys, saved["1.0"], file)
    assert code == 1
    assert (
        "  ! the weights must be of the configuration's family cogvideox-i2v: got cogvideox1.5-i2v"
        in out
    )


def test_anisora_s_architecture_is_weights_of_its_own(tmp_path, saved, capsys):
    """The first generation with rotary positions alone, trained for another size."""
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    settings = {
        "sample_height": 10,
        "sample_width": 18,
        "sample_frames": 25,
        "use_learned_positional_embeddings": False,
    }
    weights(source, "transformer").unlink()
    twins.transformer(**settings).save_pretrained(source / "transformer")
    code, out = inspect(capsys, source)
    assert code == 0
    assert "weights of its own (cogvideox-i2v)" in out
    assert "positions rotary\n" in out
    assert "defaults: height 80, width 144, num_frames 25, fps 8" in out
