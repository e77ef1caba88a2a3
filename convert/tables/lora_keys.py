"""Names in LoRA files: the formats that people have, as tables, and what one key of any of them
means."""

import re
from typing import NamedTuple

from cogi2v_jax.config import TransformerConfig

from .transformer import table

# How a key ends, behind its module. Of A and B, which some call down and up, W += weight * alpha /
# r * B @ A is made.
ENDS = (
    # PEFT and diffusers; it may name its adapter.
    re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.[^.]+)?\.weight"),
    # Diffusers before PEFT; kohya's and CogVideoX-Fun's.
    re.compile(r"(?P<module>.+)\.lora[._](?P<side>down|up)\.weight"),
    # Attention processors.
    re.compile(
        r"(?P<module>.+?)(?:\.processor)?\.(?P<short>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"
    ),
    # SAT: one of the weights that lie in its layer together.
    re.compile(r"(?P<module>.+)\.matrix_(?P<side>A|B)\.(?P<index>\d+)"),
    re.compile(r"(?P<module>.+)\.(?P<side>alpha)"),
)
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
# What programs put before a module's name.
WRAPPERS = re.compile(r"(?:(?:base_model|model|diffusion_model|module|transformer|unet)\.)*")
SAT_LAYERS = re.compile(r"layers\.(\d+)\.(.+)")
SAT = {
    "attention.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.dense": ("attn1.to_out.0",),
    "mlp.dense_h_to_4h": ("ff.net.0.proj",),
    "mlp.dense_4h_to_h": ("ff.net.2",),
}
# Linear weights that a network of these families has, to tell another's LoRA from what is of none
# of them.
KINDS = [
    rule.torch.removesuffix(".weight")
    for rule in table(TransformerConfig(patch_size_t=2, ofs_embed_dim=512))
    if rule.is_linear
]
# Kohya's modules have underscores where others have dots.
FLAT = [
    (re.compile(r"lora_(?:(?:unet|transformer)_+)?" + kind.replace(".", "_").replace("{}", r"(\d+)")), kind)
    for kind in KINDS
]  # fmt: skip
# Why a key has no place, by what is in it.
REASONS = (
    (re.compile(r"text_encoder|lora_te\d*_"), "is of a text encoder, which stays as it is"),
    (
        re.compile(r"lora_magnitude_vector|dora_scale"),
        "is a DoRA's magnitude, which isn't read: the rest is merged as a plain LoRA",
    ),
    (
        re.compile(r"lora_[AB]\..*bias$|lora[._](up|down)\.bias$|\.diff_b$"),
        "is a change of a bias, which isn't read",
    ),
    (re.compile(r"lokr_|hada_|oft_|ia3_|\.diff$"), "is of another kind of adapter than a LoRA"),
)
NO_LORA = "is not a LoRA's tensor"


class Meaning(NamedTuple):
    """What a key stands for: a module under diffusers' name and "A", "B" or "alpha"; or the reason
    why for nothing."""

    module: str = ""
    side: str = ""
    reason: str = ""


def meaning(key: str) -> Meaning:
    for pattern, reason in REASONS:
        if pattern.search(key):
            return Meaning(reason=reason)
    for pattern in ENDS:
        if end := pattern.fullmatch(key):
            parts = end.groupdict()
            return Meaning(
                _module(parts["module"], parts.get("short"), parts.get("index")),
                SIDES[parts["side"]],
            )
    return Meaning(reason=NO_LORA)


def kind(module: str) -> str:
    """A module's name with "{}" for its layer."""
    return re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.{}.", module)


def _module(name: str, short: str | None, index: str | None) -> str:
    for pattern, kind in FLAT:
        if flat := pattern.fullmatch(name):
            return kind.format(*flat.groups())
    name = WRAPPERS.sub("", name, count=1)
    if short:
        return f"{name}.{short}" + (".0" if short == "to_out" else "")
    if index and (layer := SAT_LAYERS.fullmatch(name)):
        number, sat = layer.groups()
        weights = SAT.get(sat, ())
        return (
            f"transformer_blocks.{number}.{weights[int(index)]}"
            if int(index) < len(weights)
            else name
        )
    return name
