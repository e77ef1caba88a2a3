"""What trainers and torch's wrappers leave behind: read where the meaning is clear, else refused by
its name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import loras
import pytest
import strange
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.lora_match import match
from cogi2v_convert.sources.gather import gather
from cogi2v_convert.sources.lora_file import open_lora
from folders import PARTS, assert_reads, left, one_line, raw, rewrite, weights
from safetensors.torch import load_file, save_file

from cogi2v_jax.weights.checkpoint import read_config

Tensors = dict[str, torch.Tensor]
WRAPPERS = ("_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.")
BLOCK = "transformer_blocks.1."


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor.contiguous() for name, tensor in tensors.items()}


def inside(wrapper: str) -> Callable[[str], str]:
    """One block is wrapped, not the network."""
    return lambda name: name.replace(BLOCK, f"{BLOCK}{wrapper}")


# Names


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "_checkpoint_wrapped_module."])
def test_a_wrapper_s_name_is_no_part_of_a_tensor_s(wrapper, saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    for number, change in enumerate((lambda name: wrapper + name, inside(wrapper))):
        file = tmp_path / f"{number}.safetensors"
        save_file(renamed(tensors, change), file)
        assert_reads(gather([base["1.0"], file]), "transformer", tensors)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.diffusion_model."])
@pytest.mark.parametrize("config", [True, False])
def test_a_part_s_folder_may_have_prefixed_names(prefix, config, saved, base, tmp_path):
    twins.transformer(**twins.FAMILIES["1.0"]).save_pretrained(
        tmp_path / "part", max_shard_size="500KB"
    )
    files = sorted((tmp_path / "part").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in files:
        save_file(renamed(load_file(file), lambda name: prefix + name), file)
    (index,) = (tmp_path / "part").glob("*.index.json")
    found = json.loads(index.read_text())
    found["weight_map"] = {prefix + name: file for name, file in found["weight_map"].items()}
    index.write_text(json.dumps(found))
    if not config:
        (tmp_path / "part" / "config.json").unlink()
    flax = to_flax([base["1.0"], tmp_path / "part"], tmp_path / "flax")
    assert main(["inspect", str(base["1.0"]), str(tmp_path / "part")]) == 0
    assert main(["to-torch", str(flax), str(tmp_path / "back")]) == 0
    back = {name: value[1:] for name, value in raw(tmp_path / "back", "transformer").items()}
    (tmp_path / "whole" / "transformer").mkdir(parents=True)
    save_file(tensors, weights(tmp_path / "whole", "transformer"))
    whole = raw(tmp_path / "whole", "transformer")
    assert back == {name: value[1:] for name, value in whole.items()}


def test_two_names_of_one_tensor_are_refused(saved, tmp_path, capsys):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    save_file(tensors | {"module.proj_out.bias": torch.zeros(16)}, tmp_path / "x.safetensors")
    line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / "x.safetensors"])
    assert "must hold each tensor once: got " in line
    assert "module.proj_out.bias" in line


@pytest.mark.parametrize("before", WRAPPERS)
@pytest.mark.parametrize("after", ["transformer.", ""])
def test_a_wrapper_s_name_is_no_part_of_a_lora_s(before, after, saved, tmp_path):
    config = read_config(saved["1.0"])
    pairs = loras.pairs(twins.transformer(**twins.FAMILIES["1.0"]))
    for prefix in (before + after, after + before):
        file = loras.save(tmp_path / "a.safetensors", loras.peft(pairs, prefix))
        found = match(open_lora(file), config)
        assert found.faults == []
        assert all(row.place for row in found.rows.values())


# Fused projections


def fuse(tensors: Tensors) -> Tensors:
    """The fused projections of every block."""
    names = [re.fullmatch(r"(.*attn1\.to)_q\.(weight|bias)", name) for name in tensors]
    return {
        f"{name[1]}_qkv.{name[2]}": torch.cat(
            [tensors[f"{name[1]}_{each}.{name[2]}"] for each in "qkv"]
        )
        for name in names
        if name
    }


def test_fused_copies_are_left_out(saved, base, tmp_path, capsys):
    network = twins.transformer(**twins.FAMILIES["1.0"])
    network.fuse_qkv_projections()
    network.save_pretrained(tmp_path / "fused")
    assert main(["inspect", str(base["1.0"]), str(tmp_path / "fused")]) == 0
    assert "fused copies left out: 6, the first transformer_blocks.0" in capsys.readouterr().out
    back = to_torch(to_flax([base["1.0"], tmp_path / "fused"], tmp_path / "flax"), tmp_path / "b")
    assert raw(back, "transformer") == raw(saved["1.0"], "transformer")


def test_fused_projections_alone_are_split(saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    kept = {k: v for k, v in tensors.items() if not re.search(r"attn1\.to_[qkv]\.", k)}
    save_file(kept | fuse(tensors), tmp_path / "x.safetensors")
    assert_reads(gather([base["1.0"], tmp_path / "x.safetensors"]), "transformer", tensors)


def test_fused_projections_that_were_trained_are_no_copies(saved, tmp_path, capsys):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    rewrite(source, "transformer", lambda tensors: tensors.update(fuse(tensors)))
    rewrite(source, "transformer", lambda t: t[f"{BLOCK}attn1.to_v.bias"].add_(1e-3))
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"{BLOCK}attn1.to_qkv.bias must be a copy of {BLOCK}attn1.to_q.bias and " in line
    assert left(tmp_path) == {"source"}


def test_a_lora_of_fused_projections_is_refused(saved, tmp_path):
    tensors = {
        f"transformer_blocks.0.attn1.to_qkv.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (4, 96)), ("B", (288, 4)))
    }
    file = loras.save(tmp_path / "a.safetensors", tensors)
    found = match(open_lora(file), read_config(saved["1.0"]))
    assert "must be of a weight that this network has" in found.faults[0]


# Folders and files of trainers


def test_a_trainer_s_checkpoint_has_no_configuration(saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    for name, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        folder = tmp_path / name
        folder.mkdir()
        save(tensors, folder / name)
        for beside in ("optimizer.bin", "optimizer_1.bin", "sampler.bin", "random_states_0.pkl"):
            torch.save({"state": {}}, folder / beside)
        for beside in ("optimizer.pt", "scheduler.pt", "scaler.pt"):
            torch.save({"state": {}}, folder / beside)
        assert_reads(gather([base["1.0"], folder]), "transformer", tensors)


def test_the_parts_of_a_trainer_s_folder_have_no_configurations(saved, base, tmp_path):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        shutil.copy(weights(saved["1.0"], part), tmp_path / part)
    source = gather([base["1.0"], tmp_path])
    for part in PARTS:
        folder = (base if part == "text_encoder" else saved)["1.0"]
        assert_reads(source, part, load_file(weights(folder, part)))


def test_a_checkpoint_of_deepspeed_holds_the_module(saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    folder = tmp_path / "checkpoint-5" / "pytorch_model"
    folder.mkdir(parents=True)
    saved_state = {"module": renamed(tensors, lambda name: f"module.{name}"), "ds_version": "0.1"}
    torch.save(saved_state, folder / "mp_rank_00_model_states.pt")
    torch.save({}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_reads(gather([base["1.0"], folder.parent]), "transformer", tensors)


def test_a_missing_shard_of_a_folder_without_configuration_is_named(saved, tmp_path, capsys):
    twins.vae().save_pretrained(tmp_path / "part", max_shard_size="50KB")
    (tmp_path / "part" / "config.json").unlink()
    lost = sorted((tmp_path / "part").glob("*.safetensors"))[1]
    lost.unlink()
    line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / "part"])
    assert line.endswith(f"must hold every shard its index names: missing {lost.name}")


def test_counters_beside_the_tensors_are_no_tensors(saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "vae"))
    values = {"step": torch.tensor(3), "state_dict": tensors, "ema": {"decay": torch.tensor(0.9)}}
    torch.save(values, tmp_path / "x.pt")
    assert_reads(gather([base["1.0"], tmp_path / "x.pt"]), "vae", tensors)


BESIDE = {
    "global_step": torch.tensor(3),
    "loss": torch.tensor(0.5),
    "loss.logvar": torch.zeros(()),
    "denoiser.sigmas": torch.zeros(1000),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", ["diffusers", "SAT"])
def test_what_a_trainer_counts_beside_the_weights_is_left_out(
    naming, prefix, saved, base, tmp_path
):
    tensors = load_file(weights(saved["1.0"], "transformer"))
    of_sat = renamed(strange.sat_transformer(tensors), lambda n: n.removeprefix(strange.SAT_PREFIX))
    named = renamed(of_sat if naming == "SAT" else tensors, lambda name: prefix + name)
    save_file(named | BESIDE, tmp_path / "x.safetensors")
    assert_reads(gather([base["1.0"], tmp_path / "x.safetensors"]), "transformer", tensors)


@pytest.mark.parametrize("step", [1, 2])
def test_two_sets_in_a_part_s_folder_are_refused(step, saved, tmp_path, capsys):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    whole = load_file(weights(source, "transformer"))
    both = {name: whole[name] for name in sorted(whole)[::step]}
    both |= {f"ema.{name}": tensor + 1 for name, tensor in whole.items()}
    save_file(both, weights(source, "transformer"))
    assert "must hold " in one_line(capsys, ["inspect", source])


@pytest.mark.parametrize("name", ["to_qkv", "to_q"])
def test_a_number_in_place_of_a_projection_is_refused(name, saved, tmp_path, capsys):
    source = Path(shutil.copytree(saved["1.0"], tmp_path / "source"))
    rewrite(source, "transformer", lambda tensors: tensors.update(fuse(tensors)))
    number = {f"{BLOCK}attn1.{name}.weight": torch.zeros(())}
    rewrite(source, "transformer", lambda tensors: tensors.update(number))
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"{BLOCK}attn1.to_qkv.weight must be a copy of " in line


@pytest.mark.parametrize("key", ["ema", "model_ema", "params", "model_state_dict"])
def test_tensors_are_found_under_the_keys_that_trainers_use(key, saved, base, tmp_path):
    tensors = load_file(weights(saved["1.0"], "vae"))
    torch.save({key: tensors, "step": 3}, tmp_path / "x.pt")
    assert_reads(gather([base["1.0"], tmp_path / "x.pt"]), "vae", tensors)


def pickled(values: Callable[[Tensors], dict]) -> Callable[[Path, Tensors], Path]:
    def make(folder: Path, tensors: Tensors) -> Path:
        torch.save(values(tensors), folder / "x.pt")
        return folder / "x.pt"

    return make


def beside(**more: torch.Tensor) -> Callable[[Path, Tensors], Path]:
    def make(folder: Path, tensors: Tensors) -> Path:
        extra = {f"proj_out.{name.replace('__', '.', 1)}": value for name, value in more.items()}
        save_file(tensors | extra, folder / "x.safetensors")
        return folder / "x.safetensors"

    return make


def stage_3(folder: Path, tensors: Tensors) -> Path:
    (folder / "x").mkdir()
    torch.save({}, folder / "x" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return folder / "x"


def distributed(folder: Path, tensors: Tensors) -> Path:
    (folder / "x").mkdir()
    (folder / "x" / "__0_0.distcp").touch()
    return folder / "x"


def quantised(folder: Path, tensors: Tensors) -> Path:
    (folder / "x").mkdir()
    settings = dict(twins.transformer(**twins.FAMILIES["1.0"]).config)
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "x" / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "x" / "diffusion_pytorch_model.safetensors")
    return folder / "x"


def averaged(folder: Path, tensors: Tensors) -> Path:
    """With the average that LitEma keeps, whose names have no dots."""
    names = {f"model_ema.{name.replace('.', '')}": name for name in tensors}
    average = {name: tensors[of].clone() for name, of in names.items()}
    counted = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    named = renamed(tensors, lambda name: f"model.diffusion_model.{name}")
    save_file(named | average | counted, folder / "x.safetensors")
    return folder / "x.safetensors"


BYTES = torch.zeros(4, 1, dtype=torch.uint8)
REFUSED = {
    "two sets": (
        pickled(lambda tensors: {"model": tensors, "ema": tensors}),
        r"x\.pt must hold one set of tensors: got model, ema; save the one to convert",
    ),
    "an average without names": (
        pickled(lambda tensors: {"decay": 0.9, "shadow_params": list(tensors.values())}),
        r"must hold tensors by name, .*: got decay, shadow_params",
    ),
    "ZeRO stage 3 in a file": (
        pickled(lambda tensors: {"module": {name: torch.zeros(0) for name in tensors}}),
        r"x\.pt must hold whole tensors: got \d+ empty ones, .*ZeRO stage 3.*zero_to_fp32\.py",
    ),
    "ZeRO stage 3": (stage_3, r"/x must hold whole tensors: got DeepSpeed's ZeRO stage 3, as "),
    "a distributed checkpoint": (distributed, r"got torch's distributed checkpoint, as .*distcp"),
    "NF4": (
        beside(weight__quant_state__bitsandbytes__nf4=BYTES, weight__quant_map=torch.zeros(16)),
        r"not quantised.*: got those of bitsandbytes \(proj_out\.weight\.quant_",
    ),
    "int8 of bitsandbytes": (beside(SCB=torch.zeros(4)), r"got those of bitsandbytes"),
    "GPTQ": (beside(qzeros=BYTES), r"got those of GPTQ or AWQ"),
    "SVDQuant": (beside(wscales=BYTES.float()), r"got those of SVDQuant"),
    "quanto": (beside(weight___data=BYTES), r"got those of quanto"),
    "another kind of GGUF": (beside(IQ4_NL_qweight=BYTES), r"got those of GGUF of another kind"),
    "NF4 alone": (beside(weight__absmax=torch.zeros(4)), r"got those of bitsandbytes"),
    "HQQ": (beside(W_q=BYTES), r"got those of HQQ"),
    "torchao": (beside(weight__qdata=BYTES), r"got those of torchao"),
    "float8 in blocks": (beside(weight_scale_inv=BYTES.float()), r"got those of float8 in blocks"),
    "int8": (
        beside(weight=torch.zeros(16, 96, dtype=torch.int8)),
        r"proj_out\.weight must be one of .*: got I8; take the bf16 file instead",
    ),
    "an average beside the weights": (
        averaged,
        r"must hold nothing but transformer: got model_ema\.decay; save the transformer alone in a",
    ),
    "tensors without values": (
        pickled(lambda tensors: {k: v.to("meta") for k, v in tensors.items()}),
        r"x\.pt must hold whole tensors: got \S+ on the device meta, without values$",
    ),
    "a sparse tensor": (
        pickled(lambda t: t | {"proj_out.weight": t["proj_out.weight"].to_sparse()}),
        r"x\.pt must hold whole tensors: got proj_out\.weight torch\.sparse_coo$",
    ),
    "a quantised folder": (
        quantised,
        r"/x: transformer must not be quantised: got .*'bitsandbytes'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named(case, saved, tmp_path, capsys):
    make, expected = REFUSED[case]
    source = make(tmp_path, load_file(weights(saved["1.0"], "transformer")))
    line = one_line(capsys, ["to-flax", saved["1.0"], source, tmp_path / "flax"])
    assert re.search(expected, line), line
    assert left(tmp_path) == {source.name}


# Whose fault it is


@pytest.mark.parametrize("part", PARTS)
def test_a_fault_names_the_folder_that_it_is_in(part, saved, base, tmp_path, capsys):
    other = Path(shutil.copytree(saved["1.0"] / part, tmp_path / "other"))
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": -1, "act_fn": "x"}))
    line = one_line(capsys, ["inspect", base["1.0"], other])
    assert line.startswith(f"cogi2v-convert: {other}: {part}: "), line
    assert str(base["1.0"]) not in line


def test_weights_that_do_not_fit_name_their_file(saved, base, tmp_path, capsys):
    tensors = load_file(weights(saved["1.0"], "vae"))
    tensors["decoder.conv_out.conv.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "x.safetensors")
    line = one_line(capsys, ["to-flax", base["1.0"], tmp_path / "x.safetensors", tmp_path / "f"])
    assert f"{tmp_path / 'x.safetensors'} must fit the network: vae: decoder.conv_out" in line
    assert str(base["1.0"]) not in line
