"""Every kind of source gives the same leaves as the diffusers folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import strange
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.sources.gather import gather
from diffusers import CogVideoXImageToVideoPipeline
from folders import PARTS, assert_reads, raw, rewrite, weights
from safetensors.torch import load_file, save_file

from cogi2v_jax.weights.checkpoint import read_unit


@pytest.fixture(scope="module")
def expected(saved, base, tmp_path_factory):
    """The leaves of both folders, converted as they are."""
    folders = {
        (which, family): folder
        for which, all in (("saved", saved), ("base", base))
        for family, folder in all.items()
    }
    return {
        key: leaves(to_flax(folder, tmp_path_factory.mktemp("direct") / "flax"))
        for key, folder in folders.items()
    }


def leaves(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for part in PARTS:
        for unit in sorted((folder / part / "weights").iterdir()):
            for name, leaf in read_unit(
                folder, part, None if unit.name == "rest" else int(unit.name)
            ).items():
                found[f"{part}/{unit.name}/{name}"] = np.asarray(leaf)
    return found


def assert_same(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """The same bits and dtypes."""
    found = leaves(folder)
    assert found.keys() == expected.keys()
    differ = [
        name
        for name in found
        if found[name].dtype != expected[name].dtype
        or found[name].tobytes() != expected[name].tobytes()
    ]
    assert differ == []


def merged(expected, family, *parts) -> dict[str, np.ndarray]:
    """The base's leaves, with those of some parts replaced."""
    ours, theirs = expected["saved", family], expected["base", family]
    return {name: (ours if name.split("/")[0] in parts else theirs)[name] for name in theirs}


def convert(tmp_path: Path, *sources, options=()) -> Path:
    assert main(["to-flax", *map(str, sources), str(tmp_path / "flax"), *options]) == 0
    return tmp_path / "flax"


# SAT


@pytest.mark.parametrize("parts", [("transformer",), ("vae",), ("transformer", "vae")])
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_a_sat_folder_gives_the_leaves_of_the_same_diffusers_folder(
    family, parts, saved, base, expected, tmp_path
):
    sat = strange.save_sat(saved[family], tmp_path / "sat", *parts)
    assert_same(convert(tmp_path, base[family], sat), merged(expected, family, *parts))


def of_steps(saved, made: Path, latest: str) -> Path:
    """SAT's folder of the steps 0 and 1."""
    steps = strange.save_sat(saved["1.0"], made, "transformer") / "transformer"
    (steps / "latest").write_text(latest)
    return steps


@pytest.mark.parametrize(("given", "latest"), [("", "./1"), ("1", "0"), ("1", "gone")])
def test_a_step_is_the_one_that_latest_names_or_that_is_given(given, latest, saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    source = gather([base["1.0"], of_steps(saved, tmp_path, latest) / given])
    assert_reads(source, "transformer", tensors)


@pytest.mark.parametrize("latest", ["9", ""])
def test_a_latest_step_that_is_not_there_is_refused_with_those_that_are(
    latest, saved, base, tmp_path
):
    steps = of_steps(saved, tmp_path, f"{latest}\n")
    must = f"{steps}/latest must name a step beside it, 0, 1: got '{latest}'; give the folder of"
    with pytest.raises(ValueError, match=must):
        gather([base["1.0"], steps])


def test_a_sat_file_is_recognised_by_the_names_in_it(saved, base, expected, tmp_path):
    sat = strange.save_sat(saved["1.5"], tmp_path / "sat", "transformer", "vae")
    transformer = (sat / "transformer/1/mp_rank_00_model_states.pt").rename(
        tmp_path / "vae.safetensors"
    )
    vae = (sat / "vae/3d-vae.pt").rename(tmp_path / "no suffix")
    assert_same(
        convert(tmp_path, base["1.5"], vae, transformer),
        merged(expected, "1.5", "transformer", "vae"),
    )


def test_fused_tensors_are_split_in_safetensors_too(saved, base, tmp_path):
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
def test_a_torch_file_of_either_format_keeps_half_precision(old, saved, base, tmp_path):
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(weights(saved["1.5"], "vae")).items()
    }
    torch.save(tensors, tmp_path / "vae.pt", _use_new_zipfile_serialization=not old)
    found = leaves(convert(tmp_path, base["1.5"], tmp_path / "vae.pt"))
    assert (
        found["vae/rest/decoder.conv_out.bias"].tobytes()
        == tensors["decoder.conv_out.conv.bias"].view(torch.int16).numpy().tobytes()
    )


# ComfyUI

PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    "vae": ("", "vae.", "first_stage_model."),
    "text_encoder": ("", "text_encoders.t5xxl.transformer.", "text_encoder."),
}


@pytest.mark.parametrize(
    ("part", "prefix"), [(part, prefix) for part, all in PREFIXES.items() for prefix in all]
)
def test_a_single_file_replaces_the_part_that_its_names_say_it_is(
    part, prefix, saved, base, tmp_path
):
    file = strange.save_prefixed(saved["1.0"], tmp_path / "model.safetensors", {part: prefix})
    source = gather([base["1.0"], file])
    for each in PARTS:
        assert_reads(
            source, each, load_file(weights((saved if each == part else base)["1.0"], each))
        )


def test_one_file_may_hold_every_part(saved, base, expected, tmp_path):
    prefixes = {part: PREFIXES[part][1] for part in PARTS}
    file = strange.save_prefixed(saved["1.5"], tmp_path / "all.safetensors", prefixes)
    assert_same(convert(tmp_path, base["1.5"], file), expected["saved", "1.5"])


def test_a_folder_without_weights_is_enough_where_files_replace_them_all(
    saved, base, expected, tmp_path
):
    settings = Path(
        shutil.copytree(
            base["1.0"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )
    files = [
        strange.save_prefixed(saved["1.0"], tmp_path / f"{number}.safetensors", {part: ""})
        for number, part in enumerate(PARTS)
    ]
    assert_same(convert(tmp_path, settings, *files), expected["saved", "1.0"])


def test_a_t5_file_leaves_out_its_tokenizer_and_its_decoder(saved, base, tmp_path):
    extra = {
        "spiece_model": torch.zeros(99, dtype=torch.uint8),
        "logit_scale": torch.zeros(()),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
        "lm_head.weight": torch.zeros(2, 2),
    }
    file = strange.save_prefixed(
        saved["1.0"], tmp_path / "t5xxl_fp16.safetensors", {"text_encoder": ""}, **extra
    )
    assert_reads(
        gather([base["1.0"], file]),
        "text_encoder",
        load_file(weights(saved["1.0"], "text_encoder")),
    )


@pytest.mark.parametrize("kind", strange.FLOAT8)
def test_float8_is_multiplied_with_its_scales_in_float32_and_rounded_once(
    kind, saved, base, tmp_path
):
    worth = strange.save_float8(saved, tmp_path / "fp8.safetensors", kind)
    assert_reads(gather([base["1.5"], tmp_path / "fp8.safetensors"]), "transformer", worth)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_float8_becomes_bfloat16_unless_float32_is_asked_for(dtype, saved, base, tmp_path):
    worth = strange.save_float8(saved, tmp_path / "fp8.safetensors", "a scale a row")
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
    rewrite(
        source,
        "vae",
        lambda tensors: tensors.update(
            {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
        ),
    )
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
    assert_same(
        convert(tmp_path, base["1.5"], partial), merged(expected, "1.5", "transformer", "vae")
    )


def test_the_last_of_several_sources_of_a_part_counts(saved, base, expected, tmp_path):
    files = [
        strange.save_prefixed(which["1.0"], tmp_path / f"{name}.safetensors", {"vae": ""})
        for name, which in (("a", base), ("b", saved))
    ]
    assert_same(convert(tmp_path, base["1.0"], *files), merged(expected, "1.0", "vae"))


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_in_a_diffusers_folder_are_read_where_there_are_no_others(
    sharded, saved, expected, tmp_path
):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    for part, stem in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        tensors = load_file(weights(source, part))
        weights(source, part).unlink()
        if sharded:
            weight_map = {
                name: f"{stem}-0000{1 + number % 2}-of-00002.bin"
                for number, name in enumerate(tensors)
            }
            (source / part / f"{stem}.bin.index.json").write_text(
                json.dumps({"weight_map": weight_map})
            )
        else:
            weight_map = dict.fromkeys(tensors, f"{stem}.bin")
        for file in set(weight_map.values()):
            torch.save(
                {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
                source / part / file,
            )
    flax = convert(tmp_path, source)
    assert_same(flax, expected["saved", "1.0"])
    to_torch(flax, tmp_path / "back")
    loaded = CogVideoXImageToVideoPipeline.from_pretrained(
        tmp_path / "back"
    ).transformer.state_dict()
    assert all(
        torch.equal(loaded[name], tensor)
        for name, tensor in load_file(weights(saved["1.0"], "transformer")).items()
    )


def test_a_sharded_variant_is_taken_where_it_is_all_there_is(saved, expected, tmp_path):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    tensors = load_file(weights(source, "vae"))
    weights(source, "vae").unlink()
    weight_map = {
        name: f"diffusion_pytorch_model.fp16-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(tensors)
    }
    (source / "vae/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    for file in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
            source / "vae" / file,
        )
    assert_same(convert(tmp_path, source), expected["saved", "1.0"])
