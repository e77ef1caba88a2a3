"""Keys in LoRA files: the formats in use, as tables, and the meaning of one key in any of them."""

import re
from typing import NamedTuple

from cogi2v_jax.config import TransformerConfig

from .transformer import table

# How a key ends, after its module. A LoRA adds alpha / r * B @ A to a weight; A is also called
# down, B up.
ENDS = (
    # PEFT and diffusers; the name of the adapter may come before "weight".
    re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:(?:\..+)?\.weight)?"),
    # Diffusers before PEFT; kohya; CogVideoX-Fun.
    re.compile(r"(?P<module>.+)\.lora[._](?P<side>down|up)\.weight"),
    # Attention processors.
    re.compile(
        r"(?P<module>.+?)(?:\.processor)?\.(?P<short>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"
    ),
    # SAT, where one tensor of a layer holds several weights; "index" is which.
    re.compile(r"(?P<module>.+)\.matrix_(?P<side>A|B)\.(?P<index>\d+)"),
    re.compile(r"(?P<module>.+)\.(?:lora_|network_)?(?P<side>alpha)"),
)
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
# What programs write before the name of a module.
WRAPPERS = re.compile(
    r"(?:(?:base_model|model|diffusion_model|module|pipe|dit|transformer|transformer3d|unet)\.)*"
)
SAT_LAYERS = re.compile(r"layers\.(\d+)\.(.+)")
SAT = {
    "attention.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.dense": ("attn1.to_out.0",),
    "mlp.dense_h_to_4h": ("ff.net.0.proj",),
    "mlp.dense_4h_to_h": ("ff.net.2",),
}
# The linear weights of both families: a LoRA for one that a network does not have is for another
# network, and any other key is for something else.
KINDS = [
    rule.torch.removesuffix(".weight")
    for rule in table(TransformerConfig(patch_size_t=2, ofs_embed_dim=512))
    if rule.is_linear
]
KINDS.append("transformer_blocks.{}.attn1.to_qkv")  # of a network whose projections were fused


def _flat(kind: str) -> re.Pattern[str]:
    """Kohya's name of a module, with underscores in place of dots."""
    name = kind.replace(".", "_").replace("{}", r"(\d+)")
    return re.compile(r"(?:lora|lycoris)_(?:(?:unet|transformer)_+)?" + name)


FLAT = [(_flat(kind), kind) for kind in KINDS]
# Why a key is not used, by what is in it.
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
    (
        re.compile(r"(^|\.)(lora_scale|scaling)$"),
        "is a scale, which isn't read: give it as the LoRA's weight",
    ),
    (re.compile(r"lokr_|hada_|oft_|ia3_|\.diff$"), "is of another kind of adapter than a LoRA"),
)
NO_LORA = "is not a LoRA's tensor"


class Meaning(NamedTuple):
    """A module under diffusers' name and "A", "B" or "alpha"; or the reason why a key is not
    used."""

    module: str = ""
    side: str = ""
    reason: str = ""


def meaning(key: str) -> Meaning:
    for pattern, reason in REASONS:
        if pattern.search(key):
            return Meaning(reason=reason)
    for pattern in ENDS:
        if end := pattern.fullmatch(key):
            found = end.groupdict()
            module = _module(found["module"], found.get("short"), found.get("index"))
            return Meaning(module, SIDES[found["side"]])
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
        weights = SAT.get(layer[2], ())
        if int(index) < len(weights):
            return f"transformer_blocks.{layer[1]}.{weights[int(index)]}"
    return name
