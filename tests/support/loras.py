"""Random LoRAs for the reference networks: their pairs, the network with them merged, and files in
the formats in use."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # (A, B) by module
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def modules(
    network: torch.nn.Module, wanted: tuple[str, ...] = ATTENTION
) -> dict[str, torch.nn.Module]:
    """The linear modules with names that end in one of `wanted`."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, layers) and name.endswith(wanted)
    }


def pairs(
    network: torch.nn.Module, wanted: tuple[str, ...] = ATTENTION, rank: int = 4, seed: int = 0
) -> Pairs:
    """Random pairs; their product is about half as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in modules(network, wanted).items():
        outputs, *inputs = module.weight.shape
        a = torch.randn(rank, *inputs, generator=generator) * (0.5 / np.prod(inputs)) ** 0.5
        b = (
            torch.randn(outputs, rank, *[1] * (len(inputs) - 1), generator=generator)
            * (0.5 / rank) ** 0.5
        )
        made[name] = (a, b)
    return made


def delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product B @ A in the shape of the weight."""
    return (b.flatten(1).double() @ a.flatten(1).double()).float().reshape(len(b), *a.shape[1:])


def merge(network: Any, made: Pairs, scale: float = 1.0) -> Any:
    """The network with W += scale * B @ A."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, (a, b) in made.items():
            network.get_submodule(name).weight += scale * delta(a, b)
    return network


def save(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata
    )
    return path


def peft(made: Pairs, prefix: str = "transformer.", adapter: str = "") -> dict[str, torch.Tensor]:
    named = {
        f"{prefix}{name}.lora_{side}{adapter}.weight": pair["AB".index(side)]
        for name, pair in made.items()
        for side in "AB"
    }
    return dict(sorted(named.items()))


def header(**settings: Any) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps(
            {f"transformer.{name}": value for name, value in settings.items()}
        )
    }


# Files of the same LoRA, alpha half of its rank where the format has one; each is a function of
# (folder, pairs, rank).


def diffusers(folder: Path, made: Pairs, rank: int) -> Path:
    return save(folder / "a.safetensors", peft(made), header(r=rank, lora_alpha=rank / 2))


def without_prefix(folder: Path, made: Pairs, rank: int) -> Path:
    return save(folder / "a.safetensors", peft(made, ""), header(r=rank, lora_alpha=rank / 2))


def patterns(folder: Path, made: Pairs, rank: int) -> Path:
    stated = {
        "r": 99,
        "lora_alpha": 1,
        "rank_pattern": {"to_.+|proj": rank},
        "alpha_pattern": {"to_.+|proj": rank / 2},
    }
    rest = {name: rank for name in made if not name.endswith((".to_q", ".to_k", ".to_v", ".proj"))}
    stated["rank_pattern"] |= {name.replace(".", r"\."): rank for name in rest}
    stated["alpha_pattern"] |= {f"^{name}": rank / 2 for name in rest}
    return save(folder / "a.safetensors", peft(made), header(**stated))


def peft_folder(folder: Path, made: Pairs, rank: int) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2, "bias": "none"})
    )
    save(folder / "adapter_model.safetensors", peft(made, "base_model.model."))
    return folder


def stabilised(folder: Path, made: Pairs, rank: int) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": rank, "lora_alpha": rank**0.5 / 2, "use_rslora": True})
    )
    return save(folder / "adapter_model.safetensors", peft(made, "base_model.model.", ".default"))


def alphas(folder: Path, made: Pairs, rank: int) -> Path:
    tensors = {f"transformer.{name}.alpha": torch.tensor(rank / 2) for name in made}
    return save(folder / "a.safetensors", peft(made) | tensors)


def old(folder: Path, made: Pairs, rank: int) -> Path:
    tensors = {f"transformer.{name}.lora.down.weight": a for name, (a, _) in made.items()}
    # It has no alpha.
    tensors |= {f"transformer.{name}.lora.up.weight": b / 2 for name, (_, b) in made.items()}
    return save(folder / "a.safetensors", tensors)


def pickled(folder: Path, made: Pairs, rank: int) -> Path:
    path = folder / "pytorch_lora_weights.bin"
    torch.save(
        {name: (tensor / 2 if "lora_B" in name else tensor) for name, tensor in peft(made).items()},
        path,
    )
    return path


def kohya_pairs(made: Pairs, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}_{name.replace('.', '_')}.lora_{side}.weight": pair[side == "up"]
        for name, pair in made.items()
        for side in ("down", "up")
    }


def kohya(folder: Path, made: Pairs, rank: int) -> Path:
    tensors = kohya_pairs(made, "lora_unet_")
    stems = {name.partition(".")[0] for name in tensors}
    tensors |= {f"{stem}.alpha": torch.tensor(rank / 2) for stem in stems}
    return save(folder / "a.safetensors", tensors)


def halves(folder: Path, made: Pairs, rank: int) -> Path:
    """Trained and saved in bfloat16, which must represent the values of the pairs."""
    tensors = {name: tensor.bfloat16() for name, tensor in peft(made).items()}
    return save(folder / "a.safetensors", tensors, header(r=rank, lora_alpha=rank / 2))


def finetrainers(folder: Path, made: Pairs, rank: int) -> Path:
    note = {"lora_config": json.dumps({"r": rank, "lora_alpha": rank / 2})}
    return save(folder / "a.safetensors", peft(made), note)


def by_part(folder: Path, made: Pairs, rank: int) -> Path:
    stated = {"transformer": {"r": rank, "lora_alpha": rank / 2}, "text_encoder": {"r": 99}}
    return save(folder / "a.safetensors", peft(made), {"lora_adapter_metadata": json.dumps(stated)})


def kohya_header(folder: Path, made: Pairs, rank: int) -> Path:
    note = {"ss_network_alpha": str(rank / 2)}
    return save(folder / "a.safetensors", kohya_pairs(made, "lycoris"), note)


def integer_alphas(folder: Path, made: Pairs, rank: int) -> Path:
    dtypes = (torch.int64, torch.int32, torch.int16)
    tensors = {
        f"dit.{name}.alpha": torch.tensor(rank // 2, dtype=dtypes[number % 3])
        for number, name in enumerate(made)
    }
    return save(folder / "a.sft", peft(made, "pipe.transformer.", ".my.adapter") | tensors)


def pickled_alpha(folder: Path, made: Pairs, rank: int) -> Path:
    named = peft(made, "transformer3d.").items()
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in named}
    torch.save({"state_dict": tensors, "alpha": rank // 2}, folder / "a.pt")
    return folder / "a.pt"


def other_alphas(folder: Path, made: Pairs, rank: int) -> Path:
    names = (".lora_alpha", ".network_alpha")
    tensors = {name + names[len(name) % 2]: torch.tensor(rank / 2) for name in made}
    torch.save(peft(made, "") | tensors, folder / "a.bin")
    return folder / "a.bin"


FORMATS = (
    diffusers,
    without_prefix,
    patterns,
    peft_folder,
    stabilised,
    alphas,
    old,
    pickled,
    kohya,
    halves,
    finetrainers,
    by_part,
    kohya_header,
    integer_alphas,
    pickled_alpha,
    other_alphas,
)

# Of the attention's weights alone.
PARTS = {
    "to_q": "query_key_value.matrix_{}.0",
    "to_k": "query_key_value.matrix_{}.1",
    "to_v": "query_key_value.matrix_{}.2",
}


def sat_tensors(made: Pairs, rank: int, prefix: str) -> dict[str, torch.Tensor]:
    """SAT's alpha is 1."""
    tensors = {}
    for name, (a, b) in made.items():
        layer, kind = name.removeprefix("transformer_blocks.").split(".attn1.")
        end = PARTS.get(kind, "dense.matrix_{}.0")
        tensors[f"{prefix}transformer.layers.{layer}.attention.{end.format('A')}"] = a
        tensors[f"{prefix}transformer.layers.{layer}.attention.{end.format('B')}"] = b * rank / 2
    return tensors


def sat(folder: Path, made: Pairs, rank: int) -> Path:
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": sat_tensors(made, rank, "model.diffusion_model."), "iteration": 3}, path)
    return path


def sat_bare(folder: Path, made: Pairs, rank: int) -> Path:
    return save(folder / "a.safetensors", sat_tensors(made, rank, ""))


def processors(folder: Path, made: Pairs, rank: int) -> Path:
    tensors = {}
    for name, (a, b) in made.items():
        block, kind = name.split(".attn1.")
        stem = f"transformer.{block}.attn1.processor.{kind.removesuffix('.0')}_lora"
        tensors |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b / 2}
    return save(folder / "a.safetensors", tensors)


ATTENTION_FORMATS = (sat, sat_bare, processors)
