"""What weights say of themselves, by names and shapes alone: whose they are, and of which
family."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cogi2v_jax import lookalikes
from cogi2v_jax.config import CheckpointConfig

# Marks in names of tensors that no image-to-video network of this family has, and whose they are.
_BRANCH = "a network with a control branch (as Diffusion as Shader), which takes a tracking video"
OTHERS = {
    "lora": "a LoRA, which is no network but a change of one: inspect it with --model NAME, sample with --lora_path",
    "local_facial_extractor": "ConsisID, which takes a face beside the image",
    "perceiver_cross_attention": "ConsisID, which takes a face beside the image",
    "transformer_blocks_copy": _BRANCH,
    "combine_linears": _BRANCH,
    "controlnet": "a ControlNet, which takes a control video",
    "traj_extractor": "Tora, which takes a trajectory",
    "flow_gamma": "Tora, which takes a trajectory",
}
TABLE = "patch_embed.pos_embedding"


class Facts(NamedTuple):
    """A transformer's, from its tensors' shapes."""

    family: str
    channels: int
    layers: int
    width: int
    learned: bool

    def __str__(self) -> str:
        positions = ", a learned position table" if self.learned else ""
        return f"{self.family}, {self.layers} layers of width {self.width}, {self.channels} channels{positions}"


def facts(shapes: Mapping[str, tuple[int, ...]]) -> Facts | None:
    proj = shapes.get("patch_embed.proj.weight", ())
    if len(proj) not in (2, 4):
        return None
    layers = {
        match[1] for name in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.", name))
    }
    # The second generation's patches are 2x2x2 and flat.
    family, channels = (
        ("cogvideox1.5-i2v", proj[1] // 8) if len(proj) == 2 else ("cogvideox-i2v", proj[1])
    )
    return Facts(family, channels, len(layers), proj[0], TABLE in shapes)


def other(names: Iterable[str]) -> str | None:
    """Whose tensors these are, where some can't be this family's."""
    return next(
        (whose for name in names for mark, whose in OTHERS.items() if mark in name.lower()), None
    )


def described(names: Iterable[str]) -> str:
    """What is none of our networks, in some words."""
    names = list(names)
    return other(names) or f"{len(names)} tensors, the first {names[0] if names else 'none'}"


def unlike(config: CheckpointConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """In sentences, how a transformer's weights are another network than its configuration
    describes; empty where they are not."""
    found, t = facts(shapes), config.transformer
    if not found:
        return []
    faults = []
    if found.family != config.family:
        faults.append(
            f"the weights must be of the configuration's family {config.family}: got {found.family}; give a folder of that family"
        )
    elif found.channels != t.in_channels:
        latent = config.vae.latent_channels
        what = (
            "image-to-video"
            if found.channels == 2 * latent
            else lookalikes.kind(found.channels, latent)
        )
        faults.append(
            f"the weights must take the configuration's {t.in_channels} channels: got {found.channels}, which is {what}"
        )
    if (found.layers, found.width) != (t.num_layers, t.width):
        stated = f"{t.num_layers} layers of width {t.width}"
        faults.append(
            f"the weights must have the configuration's {stated}: got {found.layers} of {found.width}"
        )
    if not faults and found.learned != t.use_learned_positional_embeddings:
        have, value = ("a", "true") if found.learned else ("no", "false")
        faults.append(
            f"the weights must have the configuration's positions: got {have} learned table (AniSora-5B has none); in a copy of the folder "
            f"set use_learned_positional_embeddings to {value} in transformer/config.json, and the sample sizes that they were trained for"
        )
    return faults
