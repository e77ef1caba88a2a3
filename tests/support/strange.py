"""Diffusers' tensors in the formats of other programs: SAT's names and fused tensors, ComfyUI's
prefixes and float8."""

import json
import re
from pathlib import Path

import torch
from folders import weights
from safetensors.torch import load_file, save_file

SAT_PREFIX = "model.diffusion_model."


def sat_transformer(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers transformer in SAT's format, with the unused tensors that SAT saves too."""
    theirs, made = dict(theirs), {}
    layers = 1 + max(
        int(match[1]) for name in theirs if (match := re.match(r"transformer_blocks\.(\d+)", name))
    )
    for layer in range(layers):
        block, sat = f"transformer_blocks.{layer}", f"transformer.layers.{layer}"
        for kind in ("weight", "bias"):
            made[f"{sat}.attention.query_key_value.{kind}"] = torch.cat(
                [theirs.pop(f"{block}.attn1.to_{name}.{kind}") for name in "qkv"]
            )
            video, text = [], []
            for norm in ("norm1", "norm2"):
                six = theirs.pop(f"{block}.{norm}.linear.{kind}").chunk(6)
                video += six[:3]
                text += six[3:]
            made[f"mixins.adaln_layer.adaLN_modulations.{layer}.1.{kind}"] = torch.cat(video + text)
            for here, there in (
                ("attn1.to_out.0", f"{sat}.attention.dense"),
                ("ff.net.0.proj", f"{sat}.mlp.dense_h_to_4h"),
                ("ff.net.2", f"{sat}.mlp.dense_4h_to_h"),
                ("norm1.norm", f"{sat}.input_layernorm"),
                ("norm2.norm", f"{sat}.post_attention_layernorm"),
                ("attn1.norm_q", f"mixins.adaln_layer.query_layernorm_list.{layer}"),
                ("attn1.norm_k", f"mixins.adaln_layer.key_layernorm_list.{layer}"),
            ):
                made[f"{there}.{kind}"] = theirs.pop(f"{block}.{here}.{kind}")
    for here, there in (
        ("patch_embed.proj", "mixins.patch_embed.proj"),
        ("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
        ("patch_embed.pos_embedding", "mixins.pos_embed.pos_embedding"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("ofs_embedding.linear_1", "ofs_embed.0"),
        ("ofs_embedding.linear_2", "ofs_embed.2"),
        ("norm_final", "transformer.final_layernorm"),
        ("norm_out.norm", "mixins.final_layer.norm_final"),
        ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1"),
        ("proj_out", "mixins.final_layer.linear"),
    ):
        for name in [name for name in theirs if name.startswith(here)]:
            made[there + name.removeprefix(here)] = theirs.pop(name)
    assert not theirs
    made |= {f"mixins.pos_embed.freqs_{wave}": torch.zeros(3, 4) for wave in ("sin", "cos")}
    made |= {
        "transformer.word_embeddings.weight": torch.zeros(1, 4),
        "transformer.position_embeddings.weight": torch.zeros(64, 4),
    }
    return {SAT_PREFIX + name: tensor.contiguous() for name, tensor in made.items()}


def sat_vae(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {"loss.logvar": torch.zeros(()), "loss.discriminator.blocks.0.weight": torch.zeros(3)}
    for name, tensor in theirs.items():
        parts = name.split(".")
        side, rest = parts[0], parts[1:]
        if rest[0] == "mid_block":
            rest = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
        elif rest[0] in ("down_blocks", "up_blocks"):
            level = int(rest[1]) if rest[0] == "down_blocks" else 3 - int(rest[1])
            inner = {
                "resnets": ["block", rest[3]],
                "downsamplers": ["downsample"],
                "upsamplers": ["upsample"],
            }[rest[2]]
            rest = [rest[0].removesuffix("_blocks"), str(level), *inner, *rest[4:]]
        made[
            ".".join(
                [side, *("nin_shortcut" if part == "conv_shortcut" else part for part in rest)]
            )
        ] = tensor
    return made


def save_sat(folder: Path, made: Path, *parts: str) -> Path:
    """A folder as SAT saves it, of a diffusers folder's parts, with an older step beside the
    latest."""
    if "transformer" in parts:
        tensors = sat_transformer(load_file(weights(folder, "transformer")))
        for step, values in (
            ("1", tensors),
            ("0", {name: 0 * tensor for name, tensor in tensors.items()}),
        ):
            (made / "transformer" / step).mkdir(parents=True)
            torch.save(
                {"module": values, "iteration": 7},
                made / "transformer" / step / "mp_rank_00_model_states.pt",
            )
            (made / "transformer" / step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(
                b"what no one reads"
            )
        (made / "transformer" / "latest").write_text("1\n")
    if "vae" in parts:
        (made / "vae").mkdir(parents=True)
        torch.save(
            {"state_dict": sat_vae(load_file(weights(folder, "vae"))), "epoch": 1},
            made / "vae" / "3d-vae.pt",
        )
    return made


def save_prefixed(
    folder: Path, file: Path, prefixes: dict[str, str], **extra: torch.Tensor
) -> Path:
    """Parts of a diffusers folder in one file, each under its prefix."""
    tensors = {
        prefix + name: tensor
        for part, prefix in prefixes.items()
        for name, tensor in load_file(weights(folder, part)).items()
    }
    save_file({**tensors, **extra}, file)
    return file


def to_float8(
    tensors: dict[str, torch.Tensor], kind: torch.dtype, scaled: str | None, rows: bool = False
) -> tuple[dict, dict]:
    """Matrices as float8, with scales under `scaled` ({} is the module's name); and their values:
    the products in bfloat16."""
    file, values = {}, {}
    for name, tensor in tensors.items():
        file[name] = values[name] = tensor
        if tensor.ndim != 2 or not name.endswith(".weight"):
            continue
        scale = torch.ones(())
        if scaled:
            scale = (
                tensor.abs().amax(dim=1, keepdim=True) / 448
                if rows
                else (tensor.abs().max() / 448).reshape(())
            )
            file[scaled.format(name.removesuffix(".weight"))] = scale.float()
        file[name] = (tensor / scale).to(kind)
        values[name] = (file[name].float() * scale.float()).bfloat16()
    return file, values


FLOAT8 = {
    "no scales": (torch.float8_e4m3fn, None, False),
    "e5m2, no scales": (torch.float8_e5m2, None, False),
    "one scale": (torch.float8_e4m3fn, "{}.scale_weight", False),
    "one scale by its other name": (torch.float8_e4m3fn, "{}.weight_scale", False),
    "a scale a row": (torch.float8_e4m3fn, "{}.weight_scale", True),
    "e5m2, a scale a row": (torch.float8_e5m2, "{}.scale_weight", True),
}


def save_float8(saved, file: Path, kind: str) -> dict[str, torch.Tensor]:
    """A file in ComfyUI's format, with all that it has beside the weights; and the weights'
    values."""
    fp8, scaled, rows = FLOAT8[kind]
    tensors, values = to_float8(load_file(weights(saved["1.5"], "transformer")), fp8, scaled, rows)
    note = json.dumps(
        {"format": str(fp8).removeprefix("torch."), "full_precision_matrix_mult": True}
    )
    tensors |= {
        "scaled_fp8": torch.zeros(2).to(fp8),
        "proj_out.scale_input": torch.ones(()),
        "proj_out.input_scale": torch.ones(()),
    }
    tensors["proj_out.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    save_file(
        {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        file,
    )
    return values
