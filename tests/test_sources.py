"""Where weights may come from, and that each gives the very leaves that the diffusers folder gives."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strange
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.sources import gather
from diffusers import CogVideoXImageToVideoPipeline
from folders import PARTS, left, one_line, raw, rewrite, weights
from safetensors.torch import load_file, save_file

from cogi2v_jax.checkpoint import read_unit
from cogi2v_jax.hub import load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One diffusers folder a family; to be copied, not changed."""
    return {family: twins.save(twins.pipeline(family), tmp_path_factory.mktemp(family)) for family in twins.FAMILIES}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Another checkpoint of each family, whose weights differ everywhere: what is not replaced shows."""
    return {family: twins.save(twins.pipeline(family, seed=9), tmp_path_factory.mktemp(f"base{family}")) for family in twins.FAMILIES}


@pytest.fixture(scope="module")
def expected(saved, base, tmp_path_factory):
    """The leaves of both by the direct way."""
    folders = {(which, family): folder for which, all in (("saved", saved), ("base", base)) for family, folder in all.items()}
    return {key: leaves(to_flax(folder, tmp_path_factory.mktemp("direct") / "flax")) for key, folder in folders.items()}


def leaves(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for part in PARTS:
        for unit in sorted((folder / part / "weights").iterdir()):
            for name, leaf in read_unit(folder, part, None if unit.name == "rest" else int(unit.name)).items():
                found[f"{part}/{unit.name}/{name}"] = np.asarray(leaf)
    return found


def assert_same(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, and of the same dtypes."""
    found = leaves(folder)
    assert found.keys() == expected.keys()
    differ = [name for name in found if found[name].dtype != expected[name].dtype or found[name].tobytes() != expected[name].tobytes()]
    assert differ == []


def merged(expected, family, *parts) -> dict[str, np.ndarray]:
    """The base's leaves, with those of some parts replaced."""
    ours, theirs = expected["saved", family], expected["base", family]
    return {name: (ours if name.split("/")[0] in parts else theirs)[name] for name in theirs}


def assert_reads(source, part: str, tensors: dict[str, torch.Tensor]) -> None:
    """The source's tensors of a part are these, bit for bit."""
    found = source.tensors(part)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        value = source.read(part, name)
        assert (value.shape, str(value.dtype)) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert value.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def convert(tmp_path: Path, *sources, options=()) -> Path:
    assert main(["to-flax", *map(str, sources), str(tmp_path / "flax"), *options]) == 0
    return tmp_path / "flax"


# SAT


@pytest.mark.parametrize("parts", [("transformer",), ("vae",), ("transformer", "vae")])
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_a_sat_folder_is_the_diffusers_one_it_was_made_into(family, parts, saved, base, expected, tmp_path):
    sat = strange.save_sat(saved[family], tmp_path / "sat", *parts)
    assert_same(convert(tmp_path, base[family], sat), merged(expected, family, *parts))


def test_a_sat_file_is_known_by_its_names_whatever_it_is_called(saved, base, expected, tmp_path):
    sat = strange.save_sat(saved["1.5"], tmp_path / "sat", "transformer", "vae")
    transformer = (sat / "transformer/1/mp_rank_00_model_states.pt").rename(tmp_path / "vae.safetensors")
    vae = (sat / "vae/3d-vae.pt").rename(tmp_path / "no suffix")
    assert_same(convert(tmp_path, base["1.5"], vae, transformer), merged(expected, "1.5", "transformer", "vae"))


def test_fused_tensors_are_cut_in_safetensors_too(saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    save_file(strange.sat_transformer(tensors), tmp_path / "sat.safetensors")
    assert_reads(gather([base["1.0"], tmp_path / "sat.safetensors"]), "transformer", tensors)


def test_what_came_from_sat_goes_back_to_diffusers(saved, base, tmp_path):
    sat = strange.save_sat(saved["1.0"], tmp_path / "sat", "transformer", "vae")
    back = to_torch(to_flax([base["1.0"], sat], tmp_path / "flax"), tmp_path / "back")
    for part in PARTS:
        assert raw(back, part) == raw((base if part == "text_encoder" else saved)["1.0"], part)
    CogVideoXImageToVideoPipeline.from_pretrained(back)


@pytest.mark.parametrize("old", [False, True])
def test_half_precision_of_a_torch_file_is_kept_and_its_old_format_read(old, saved, base, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights(saved["1.5"], "vae")).items()}
    torch.save(tensors, tmp_path / "vae.pt", _use_new_zipfile_serialization=not old)
    found = leaves(convert(tmp_path, base["1.5"], tmp_path / "vae.pt"))
    assert found["vae/rest/decoder.conv_out.bias"].tobytes() == tensors["decoder.conv_out.conv.bias"].view(torch.int16).numpy().tobytes()


# ComfyUI

PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    "vae": ("", "vae.", "first_stage_model."),
    "text_encoder": ("", "text_encoders.t5xxl.transformer.", "text_encoder."),
}


@pytest.mark.parametrize(("part", "prefix"), [(part, prefix) for part, all in PREFIXES.items() for prefix in all])
def test_a_single_file_replaces_the_part_that_its_names_say_it_is(part, prefix, saved, base, tmp_path):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "model.safetensors", {part: prefix})
    source = gather([base["1.0"], file])
    for each in PARTS:
        assert_reads(source, each, load_file(weights((saved if each == part else base)["1.0"], each)))


def test_one_file_may_hold_every_part(saved, base, expected, tmp_path):
    prefixes = {part: PREFIXES[part][1] for part in PARTS}
    file = strange.save_prefixed(saved["1.5"], tmp_path / "all.safetensors", prefixes)
    assert_same(convert(tmp_path, base["1.5"], file), expected["saved", "1.5"])


def test_a_base_of_settings_alone_does_where_files_bring_every_weight(saved, base, expected, tmp_path):
    settings = Path(shutil.copytree(base["1.0"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))
    files = [strange.save_prefixed(saved["1.0"], tmp_path / f"{number}.safetensors", {part: ""}) for number, part in enumerate(PARTS)]
    assert_same(convert(tmp_path, settings, *files), expected["saved", "1.0"])


def test_a_t5_file_leaves_out_its_tokenizer_and_its_decoder(saved, base, tmp_path):
    extra = {
        "spiece_model": torch.zeros(99, dtype=torch.uint8),
        "logit_scale": torch.zeros(()),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
        "lm_head.weight": torch.zeros(2, 2),
    }
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t5xxl_fp16.safetensors", {"text_encoder": ""}, **extra)
    assert_reads(gather([base["1.0"], file]), "text_encoder", load_file(weights(saved["1.0"], "text_encoder")))


FLOAT8 = {
    "no scales": (torch.float8_e4m3fn, None, False),
    "e5m2, no scales": (torch.float8_e5m2, None, False),
    "one scale": (torch.float8_e4m3fn, "{}.scale_weight", False),
    "one scale by its other name": (torch.float8_e4m3fn, "{}.weight_scale", False),
    "a scale a row": (torch.float8_e4m3fn, "{}.weight_scale", True),
    "e5m2, a scale a row": (torch.float8_e5m2, "{}.scale_weight", True),
}


def save_float8(saved, file: Path, kind: str) -> dict[str, torch.Tensor]:
    """A file as ComfyUI's, with all that stands beside the weights; and what those are worth."""
    fp8, scaled, rows = FLOAT8[kind]
    tensors, worth = strange.to_float8(load_file(weights(saved["1.5"], "transformer")), fp8, scaled, rows)
    note = json.dumps({"format": str(fp8).removeprefix("torch."), "full_precision_matrix_mult": True})
    tensors |= {"scaled_fp8": torch.zeros(2).to(fp8), "proj_out.scale_input": torch.ones(()), "proj_out.input_scale": torch.ones(())}
    tensors["proj_out.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, file)
    return worth


@pytest.mark.parametrize("kind", FLOAT8)
def test_float8_is_multiplied_with_its_scales_in_float32_and_rounded_once(kind, saved, base, tmp_path):
    worth = save_float8(saved, tmp_path / "fp8.safetensors", kind)
    assert_reads(gather([base["1.5"], tmp_path / "fp8.safetensors"]), "transformer", worth)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_float8_becomes_bfloat16_unless_float32_is_asked_for(dtype, saved, base, tmp_path):
    worth = save_float8(saved, tmp_path / "fp8.safetensors", "a scale a row")
    if dtype:
        file = load_file(tmp_path / "fp8.safetensors")
        for name in [name for name in worth if worth[name].dtype == torch.bfloat16]:
            there = f"model.diffusion_model.{name}"
            worth[name] = file[there].float() * file[f"{there}_scale"]
    direct = Path(shutil.copytree(base["1.5"], tmp_path / "direct"))
    save_file(worth, weights(direct, "transformer"))
    options = ["--dtype", dtype] if dtype else []
    found = convert(tmp_path, base["1.5"], tmp_path / "fp8.safetensors", options=options)
    assert main(["to-flax", str(direct), str(tmp_path / "expected"), *options]) == 0
    assert_same(found, leaves(tmp_path / "expected"))


def test_float8_in_a_diffusers_folder_is_read_too_and_goes_back_as_bfloat16(saved, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    rewrite(source, "vae", lambda tensors: tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}))
    back = to_torch(to_flax(source, tmp_path / "flax"), tmp_path / "back")
    for name, tensor in load_file(weights(source, "vae")).items():
        assert torch.equal(load_file(weights(back, "vae"))[name], tensor.bfloat16())


# folders


def test_a_part_s_own_folder_brings_its_configuration(saved, tmp_path):
    other = twins.transformer(seed=3, **{**twins.FAMILIES["1.0"], "num_layers": 2})
    other.save_pretrained(tmp_path / "finetune", max_shard_size="500KB")
    flax = convert(tmp_path, saved["1.0"], tmp_path / "finetune")
    assert json.loads((flax / "transformer/config.json").read_text())["num_layers"] == 2
    back = to_torch(flax, tmp_path / "back")
    assert raw(back, "transformer") == raw_of(tmp_path / "finetune")
    assert len(raw(back, "vae")) == len(raw(saved["1.0"], "vae"))


def raw_of(folder: Path) -> dict:
    return raw(folder.parent, folder.name)


def test_a_folder_with_some_parts_replaces_those(saved, base, expected, tmp_path):
    partial = tmp_path / "partial"
    for part in ("transformer", "vae"):
        shutil.copytree(saved["1.5"] / part, partial / part)
    assert_same(convert(tmp_path, base["1.5"], partial), merged(expected, "1.5", "transformer", "vae"))


def test_the_last_of_several_wins(saved, base, expected, tmp_path):
    files = [
        strange.save_prefixed(which["1.0"], tmp_path / f"{name}.safetensors", {"vae": ""}) for name, which in (("a", base), ("b", saved))
    ]
    assert_same(convert(tmp_path, base["1.0"], *files), merged(expected, "1.0", "vae"))


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_in_a_diffusers_folder_are_read_where_there_are_no_others(sharded, saved, expected, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        tensors = load_file(weights(source, part))
        weights(source, part).unlink()
        if sharded:
            weight_map = {name: f"{stem}-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
            (source / part / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            weight_map = dict.fromkeys(tensors, f"{stem}.bin")
        for file in set(weight_map.values()):
            torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, source / part / file)
    flax = convert(tmp_path, source)
    assert_same(flax, expected["saved", "1.0"])
    to_torch(flax, tmp_path / "back")
    loaded = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "back").transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(weights(saved["1.0"], "transformer")).items())


def test_a_sharded_variant_is_taken_where_it_is_all_there_is(saved, expected, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    tensors = load_file(weights(source, "vae"))
    weights(source, "vae").unlink()
    weight_map = {name: f"diffusion_pytorch_model.fp16-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    (source / "vae/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, source / "vae" / file)
    assert_same(convert(tmp_path, source), expected["saved", "1.0"])


# what is refused


class Runs:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def runs(tmp_path, saved):
    torch.save(
        {"module": strange.sat_transformer(load_file(weights(saved["1.0"], "transformer"))), "x": Runs(tmp_path / "ran")}, tmp_path / "x.pt"
    )


def runs_in_the_old_format(tmp_path, saved):
    torch.save({"x": Runs(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)


def holds_arguments(tmp_path, saved):
    torch.save({"module": {"a": torch.zeros(1)}, "args": argparse.Namespace(a=1)}, tmp_path / "x.pt")


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
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.pt")

    return make


def of(part, family="1.0", **settings):
    """A single-file transformer or VAE of other settings."""

    def make(tmp_path, saved):
        module = getattr(twins, part)(**{**(twins.FAMILIES[family] if part == "transformer" else {}), **settings})
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "x.pt")

    return make


def in_blocks(tensors):
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)
    tensors["proj_out.weight_scale"] = torch.ones(tensors["proj_out.weight"].shape[0], 3)


def noted(note):
    return one_file(lambda tensors: tensors.update({"proj_out.comfy_quant": torch.tensor(list(note), dtype=torch.uint8)}))


def twice(tensors):
    tensors.update({f"model.diffusion_model.{name}": tensor.clone() for name, tensor in dict(tensors).items()})


def beside(tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)
    tensors["text_model.x"] = torch.zeros(1)


REFUSED = {
    "code": (
        runs,
        r"x\.pt must hold tensors and nothing that runs: got a pickle that asks for getattr, and loading it could run anything",
    ),
    "code in the old format": (runs_in_the_old_format, r"must hold tensors and nothing that runs"),
    "arguments": (holds_arguments, r"nothing that runs: got a pickle that asks for argparse\.Namespace"),
    "a cut file": (is_cut, r"x\.pt must be a whole "),
    "no tensors": (holds_no_tensors, r"must hold tensors by name, or under module, state_dict, model: found none"),
    "GGUF": (is_gguf, r"must be safetensors or a torch file: got GGUF"),
    "scales of blocks": (
        one_file(in_blocks),
        r"proj_out.weight must have one scale, or one an output row: got proj_out.weight_scale \[16, 3\]",
    ),
    "another quantisation": (noted(b'{"format": "nvfp4"}'), r"proj_out must be float8 times a scale: got format 'nvfp4'"),
    "a rotated quantisation": (noted(b'{"format": "float8_e4m3fn", "convrot": true}'), r"must be float8 times a scale: got convrot True"),
    "a note that is none": (noted(b"\xff"), r"must note its quantisation in JSON"),
    "two transformers": (one_file(twice), r"must hold one transformer: got more, under '' and 'model.diffusion_model.'"),
    "a further network": (one_file(beside), r"must hold nothing but transformer: got text_model.x"),
    "a tensor more": (one_file(lambda tensors: tensors.update(new=torch.zeros(3))), r"transformer: new has no rule$"),
    "a tensor less": (one_file(lambda tensors: tensors.pop("proj_out.bias")), r"transformer: proj_out.bias is missing$"),
    "something else": (
        lambda tmp_path, saved: save_file({"conv.weight": torch.zeros(1)}, tmp_path / "x.pt"),
        r"must hold a transformer, a VAE or a T5 encoder of this family: got 1 tensors, the first conv.weight",
    ),
    "a LoRA": (
        lambda tmp_path, saved: save_file({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "x.pt"),
        r"got a LoRA, which is no network",
    ),
    "the other family": (
        of("transformer", "1.5"),
        r"the weights must be of the configuration's family cogvideox-i2v: got cogvideox1.5-i2v; give a folder of .*has no rule",
    ),
    "text to video": (of("transformer", in_channels=4), r"channels: got 4, which is a text-to-video checkpoint; .*must have the shape"),
    "CogVideoX-Fun": (
        of("transformer", in_channels=9),
        r"got 9, which is an inpainting checkpoint \(as CogVideoX-Fun's\), which takes a mask",
    ),
    "a control video": (of("transformer", in_channels=12), r"got 12, which is a checkpoint that takes a further video beside the image"),
    "another size": (of("transformer", num_layers=2), r"must have the configuration's 3 layers of width 96: got 2 of 96"),
    "AniSora": (
        of("transformer", use_learned_positional_embeddings=False),
        r"must have the configuration's positions: got no learned table \(AniSora-5B has none\); in a copy of the folder set .* to false",
    ),
    "ConsisID": (
        one_file(lambda tensors: tensors.update({"perceiver_cross_attention.0.to_q.weight": torch.zeros(3, 3)})),
        r"image-to-video from a prompt and a first image alone: got ConsisID, which takes a face beside the image$",
    ),
    "Tora": (one_file(lambda tensors: tensors.update({"mixins.mgf.0.flow_gamma_spatial.weight": torch.zeros(3)})), r"alone: got Tora,"),
    "another VAE": (of("vae", block_out_channels=(8, 8, 8, 8)), r"vae: .* must have the shape "),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_can_not_be_is_refused_in_one_line_and_nothing_is_made(fault, saved, tmp_path, capsys):
    make, expected = REFUSED[fault]
    make(tmp_path, saved)
    line = one_line(capsys, ["to-flax", saved["1.0"], tmp_path / "x.pt", tmp_path / "flax"])
    assert re.search(expected, line), line
    assert left(tmp_path) == {"x.pt"}


def split(folder, saved):
    torch.save({}, strange.save_sat(saved, folder, "transformer") / "transformer/1/mp_rank_01_model_states.pt")


def two_steps(folder, saved):
    (strange.save_sat(saved, folder, "transformer") / "transformer/latest").unlink()


FOLDERS = {
    "split over processes": (split, r"must hold the checkpoint of one process, not split over several"),
    "two steps": (two_steps, r"must hold one transformer: got .*/0/mp_rank_00_model_states.pt and .*/1/mp_rank_00_model_states.pt"),
    "photos": (lambda folder, saved: folder.mkdir(), r"must be a diffusers or converted folder"),
    "a whole one": (lambda folder, saved: shutil.copytree(saved, folder), r"SRC must begin with the whole folder, .* behind another"),
    "a converted one": (lambda folder, saved: to_flax(saved, folder), r"SRC must be weights of PyTorch: got .*, a converted folder"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_can_not_replace_a_part_is_refused_in_one_line(fault, saved, tmp_path, capsys):
    make, expected = FOLDERS[fault]
    make(tmp_path / "second", saved["1.0"])
    line = one_line(capsys, ["to-flax", saved["1.0"], tmp_path / "second", tmp_path / "flax"])
    assert re.search(expected, line), line
    assert left(tmp_path) == {"second"}


def test_a_file_alone_is_refused_with_what_is_missing_and_how_to_give_it(saved, tmp_path, capsys):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t.safetensors", {"transformer": ""})
    line = one_line(capsys, ["to-flax", file, tmp_path / "flax"])
    missing = "for the configuration and for vae, text_encoder, scheduler, tokenizer: got transformer alone"
    assert f"SRC must begin with a diffusers folder, {missing}; for example CogVideoX-5b-I2V {file}" in line


def test_a_file_is_not_what_sample_takes_and_the_line_says_what_to_do(saved, tmp_path):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "t.safetensors", {"transformer": ""})
    with pytest.raises(
        ValueError, match=r"model must be a folder, .*: got the file .*; cogi2v-convert to-flax FOLDER t.safetensors DST puts"
    ):
        load(file, say=lambda line: None)


def test_a_relative_is_refused_by_sample_too(saved, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    rewrite(source, "transformer", lambda tensors: tensors.update({"local_facial_extractor.x": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"transformer: the weights must be of image-to-video .* alone: got ConsisID"):
        load(source, say=lambda line: None)


def test_safetensors_need_no_torch(saved, base, tmp_path):
    save_float8(saved, tmp_path / "fp8.safetensors", "one scale")
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
        command = [sys.executable, "-c", script, "to-flax", base["1.5"], tmp_path / file, tmp_path / "flax"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "x.pt must be safetensors where torch is missing: got a torch file; pip install torch" in done.stderr


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


def test_inspect_tells_what_a_file_alone_is(saved, tmp_path, capsys):
    tensors, _ = strange.to_float8(load_file(weights(saved["1.5"], "transformer")), torch.float8_e4m3fn, "{}.scale_weight")
    save_file(tensors, tmp_path / "x.safetensors")
    code, out = inspect(capsys, tmp_path / "x.safetensors")
    assert code == 0
    assert "transformer, diffusers names, " in out
    assert "float32, float8_e4m3fn with scales, cogvideox1.5-i2v, 3 layers of width 96, 8 channels\n" in out


def test_inspect_fails_where_a_file_does_not_fit(saved, tmp_path, capsys):
    file = strange.save_prefixed(saved["1.5"], tmp_path / "x.safetensors", {"transformer": ""})
    code, out = inspect(capsys, saved["1.0"], file)
    assert code == 1
    assert "  ! the weights must be of the configuration's family cogvideox-i2v: got cogvideox1.5-i2v" in out


def test_anisora_s_architecture_is_weights_of_its_own(tmp_path, saved, capsys):
    """The first generation with rotary positions alone, made for another size."""
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    settings = {"sample_height": 10, "sample_width": 18, "sample_frames": 25, "use_learned_positional_embeddings": False}
    weights(source, "transformer").unlink()
    twins.transformer(**settings).save_pretrained(source / "transformer")
    code, out = inspect(capsys, source)
    assert code == 0
    assert "weights of its own (cogvideox-i2v)" in out
    assert "positions rotary\n" in out
    assert "defaults: height 80, width 144, num_frames 25, fps 8" in out
