"""What weights are, by names and shapes alone: their family and size, and where they are not the
network of their configuration."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.disk import one_line
from cogi2v_jax.lookalikes import by_channels, by_tensors

TABLE = "patch_embed.pos_embedding"
LAYER = re.compile(r"transformer_blocks\.(\d+)\.")


class Facts(NamedTuple):
    """What the shapes of a transformer's tensors say of it."""

    family: str
    channels: int
    layers: int
    width: int
    learned: bool

    def __str__(self) -> str:
        positions = ", a learned position table" if self.learned else ""
        size = f"{self.layers} layers of width {self.width}, {self.channels} channels"
        return f"{self.family}, {size}{positions}"


def facts(shapes: Mapping[str, tuple[int, ...]]) -> Facts | None:
    """None where there is no transformer's patch embedding."""
    proj = shapes.get("patch_embed.proj.weight", ())
    if len(proj) not in (2, 4):
        return None
    layers = {match[1] for name in shapes if (match := LAYER.match(name))}
    # The second generation's patches are 2x2x2 and flat.
    flat = len(proj) == 2
    family, channels = ("cogvideox1.5-i2v", proj[1] // 8) if flat else ("cogvideox-i2v", proj[1])
    return Facts(family, channels, len(layers), proj[0], TABLE in shapes)


def describe_names(names: Iterable[str]) -> str:
    """What the weights of none of our networks are: a relative, or their number and first name."""
    names = list(names)
    first = one_line(names[0]) if names else "none"
    return by_tensors(names) or f"{len(names)} tensors, the first {first}"


def find_differences(config: CheckpointConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A sentence for each way in which a transformer's weights are another network than its
    configuration describes."""
    found, t = facts(shapes), config.transformer
    if not found:
        return []
    faults = []
    if found.family != config.family:
        faults.append(
            f"the weights must be of the configuration's family {config.family}: "
            f"got {found.family}; give a folder of that family"
        )
    elif found.channels != t.in_channels:
        latent = config.vae.latent_channels
        ours = found.channels == 2 * latent
        what = "image-to-video" if ours else by_channels(found.channels, latent)
        faults.append(
            f"the weights must take the configuration's {t.in_channels} channels: "
            f"got {found.channels}, which is {what}"
        )
    if (found.layers, found.width) != (t.num_layers, t.width):
        faults.append(
            f"the weights must have the configuration's {t.num_layers} layers of width {t.width}: "
            f"got {found.layers} of {found.width}"
        )
    if not faults and found.learned != t.use_learned_positional_embeddings:
        have, value = ("a", "true") if found.learned else ("no", "false")
        faults.append(
            f"the weights must have the configuration's positions: got {have} learned table "
            "(AniSora-5B has none); in a copy of the folder set use_learned_positional_embeddings "
            f"to {value} in transformer/config.json, and the sample sizes they were trained for"
        )
    return faults
