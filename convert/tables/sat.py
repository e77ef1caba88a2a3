"""Names in SAT (the code that CogVideoX was trained with) and the diffusers names for the same
tensors. Some SAT tensors are several of diffusers' tensors, concatenated."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from .rules import FileTensor


class Alias(NamedTuple):
    """A SAT module and a diffusers module; "{}" is an index. Weight and bias of the latter are the
    chunks `indices` of `chunks` equal ones of the former."""

    sat: str
    torch: str
    chunks: int = 1
    indices: tuple[int, ...] = (0,)


LAYER, BLOCK = "transformer.layers.{}", "transformer_blocks.{}"
MODULATION = "mixins.adaln_layer.adaLN_modulations.{}.1"
TRANSFORMER = (
    Alias("mixins.patch_embed.proj", "patch_embed.proj"),
    Alias("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
    Alias("time_embed.0", "time_embedding.linear_1"),
    Alias("time_embed.2", "time_embedding.linear_2"),
    Alias("ofs_embed.0", "ofs_embedding.linear_1"),
    Alias("ofs_embed.2", "ofs_embedding.linear_2"),
    # Twelve chunks of modulation a layer. For the video: shift, scale and gate of attention, then
    # of the MLP; then the same six for the text.
    Alias(MODULATION, f"{BLOCK}.norm1.linear", 12, (0, 1, 2, 6, 7, 8)),
    Alias(MODULATION, f"{BLOCK}.norm2.linear", 12, (3, 4, 5, 9, 10, 11)),
    Alias("mixins.adaln_layer.query_layernorm_list.{}", f"{BLOCK}.attn1.norm_q"),
    Alias("mixins.adaln_layer.key_layernorm_list.{}", f"{BLOCK}.attn1.norm_k"),
    Alias(f"{LAYER}.input_layernorm", f"{BLOCK}.norm1.norm"),
    Alias(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.norm2.norm"),
    Alias(f"{LAYER}.attention.query_key_value", f"{BLOCK}.attn1.to_q", 3, (0,)),
    Alias(f"{LAYER}.attention.query_key_value", f"{BLOCK}.attn1.to_k", 3, (1,)),
    Alias(f"{LAYER}.attention.query_key_value", f"{BLOCK}.attn1.to_v", 3, (2,)),
    Alias(f"{LAYER}.attention.dense", f"{BLOCK}.attn1.to_out.0"),
    Alias(f"{LAYER}.mlp.dense_h_to_4h", f"{BLOCK}.ff.net.0.proj"),
    Alias(f"{LAYER}.mlp.dense_4h_to_h", f"{BLOCK}.ff.net.2"),
    Alias("transformer.final_layernorm", "norm_final"),
    Alias("mixins.final_layer.norm_final", "norm_out.norm"),
    Alias("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
    Alias("mixins.final_layer.linear", "proj_out"),
)
# Tensors that are not the weight or bias of a module.
WHOLE = {"mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding"}
# Tables that are computed, and embeddings of tokens and positions that a SAT model has and this
# network does not use.
UNUSED = re.compile(r"freqs_(sin|cos)$|position_embeddings?\b|embed_tokens\b|word_embeddings\b")

LEVELS = 4  # of the VAE; SAT counts the levels of the decoder from the other end


def transformer(names: Iterable[str]) -> dict[str, FileTensor]:
    """The tensors in a SAT file under diffusers' names. An unknown tensor keeps its name, so that
    the error for it shows that name."""
    aliases: dict[str, list[Alias]] = {}
    for alias in TRANSFORMER:
        aliases.setdefault(alias.sat, []).append(alias)
    found: dict[str, FileTensor] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        index = re.search(r"\.(\d+)(?=\.|$)", module)
        # The first number in a name is its layer, unless the table has the name as it is.
        template, layer = module, ""
        if index:
            layer = index[1]
            if module not in aliases:
                template = f"{module[: index.start(1)]}{{}}{module[index.end(1) :]}"
        if name in WHOLE:
            found[WHOLE[name]] = FileTensor(name)
        elif template in aliases:
            for alias in aliases[template]:
                torch = f"{alias.torch.format(layer)}.{kind}"
                found[torch] = FileTensor(name, alias.chunks, alias.indices)
        elif not UNUSED.search(name):
            found[name] = FileTensor(name)
    return found


def vae(names: Iterable[str]) -> dict[str, FileTensor]:
    """The same for the VAE, where each SAT tensor is one of diffusers' tensors."""
    return {_vae_name(name): FileTensor(name) for name in names if not name.startswith("loss.")}


def _vae_name(name: str) -> str:
    def up_block(level: re.Match[str]) -> str:
        return f"decoder.up_blocks.{LEVELS - 1 - int(level[1])}."

    def resnet(block: re.Match[str]) -> str:
        return f".mid_block.resnets.{int(block[1]) - 1}."

    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", up_block, name)
    name = re.sub(r"\.mid\.block_(\d)\.", resnet, name)
    name = re.sub(r"(_blocks\.\d+)\.block\.(\d+)\.", r"\1.resnets.\2.", name)
    name = re.sub(r"(_blocks\.\d+)\.(down|up)sample\.", r"\1.\2samplers.0.", name)
    return name.replace(".nin_shortcut.", ".conv_shortcut.")
