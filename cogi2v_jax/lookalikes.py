"""Networks that look like this family and take more or less than a prompt and a first image,
recognised by what their files contain, never by their name."""

from collections.abc import Iterable
from typing import NamedTuple


class Relative(NamedTuple):
    """A network of this family's kind, and the names in its files that no network of ours has."""

    name: str
    takes: str  # beside a prompt and an image
    keys: tuple[str, ...]  # of its configuration; also its class there
    tensors: tuple[str, ...]  # parts of the names of its weights, in lower case

    def __str__(self) -> str:
        return f"{self.name}, which takes {self.takes} beside the image"


RELATIVES = (
    Relative("CogVideoX-Fun", "a mask or a control video", ("add_noise_in_inpaint_model",), ()),
    Relative(
        "ConsisID",
        "a face",
        ("is_train_face", "is_kps", "LFE_num_tokens", "ConsisIDTransformer3DModel"),
        ("local_facial_extractor", "perceiver_cross_attention"),
    ),
    Relative(
        "Diffusion as Shader",
        "a tracking video",
        ("num_tracking_blocks", "CogVideoXTransformer3DModelTracking"),
        ("blocks_copy", "combine_linears"),
    ),
    Relative("a ControlNet", "a control video", (), ("controlnet",)),
    Relative("Tora", "a trajectory", (), ("traj_extractor", "flow_gamma")),
)
LORA = (
    "a LoRA, which is no network but a change of one: inspect it with --model NAME, "
    "sample with --lora_path"
)


def by_keys(keys: Iterable[str]) -> str | None:
    """The relative that a configuration with one of these keys or classes is of."""
    found = set(keys)
    return next((str(relative) for relative in RELATIVES if found & {*relative.keys}), None)


def by_tensors(names: Iterable[str]) -> str | None:
    """The relative, or LoRA, that weights with one of these names are of."""
    marks = {"lora": LORA, ".matrix_a.": LORA} | {
        mark: str(one) for one in RELATIVES for mark in one.tensors
    }
    return next(
        (what for name in names for mark, what in marks.items() if mark in name.lower()), None
    )


def by_channels(in_channels: int, latent_channels: int) -> str:
    """The kind of checkpoint whose transformer takes `in_channels`, other than the two times
    `latent_channels` of image-to-video."""
    kinds = {
        latent_channels: "a text-to-video checkpoint",
        2 * latent_channels
        + 1: "an inpainting checkpoint (as CogVideoX-Fun's), which takes a mask beside the image",
        3 * latent_channels: "a checkpoint that takes a further video beside the image",
    }
    return kinds.get(in_channels, "no checkpoint of this family")
