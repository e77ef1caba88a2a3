"""Networks that look like this family and take more or less than a prompt and a first image: told
by what they are, never by their name."""

from collections.abc import Iterable

# Keys and classes of configuration files, and whose they are.
_FUN = "CogVideoX-Fun, which takes a mask or a control video beside the image"
_CONSISID = "ConsisID, which takes a face beside the image"
_SHADER = "Diffusion as Shader, which takes a tracking video beside the image"
MARKS = {
    "add_noise_in_inpaint_model": _FUN,
    "is_train_face": _CONSISID,
    "is_kps": _CONSISID,
    "LFE_num_tokens": _CONSISID,
    "ConsisIDTransformer3DModel": _CONSISID,
    "num_tracking_blocks": _SHADER,
    "CogVideoXTransformer3DModelTracking": _SHADER,
}


def whose(words: Iterable[str]) -> str | None:
    """Whose network a configuration with these keys, or of these classes, describes, where it is
    known and none of ours."""
    return next((MARKS[word] for word in words if word in MARKS), None)


def kind(in_channels: int, latent_channels: int) -> str:
    """What a transformer is that takes so many channels, and not the latents' own and the
    image's."""
    kinds = {
        latent_channels: "a text-to-video checkpoint",
        2 * latent_channels
        + 1: "an inpainting checkpoint (as CogVideoX-Fun's), which takes a mask beside the image",
        3 * latent_channels: "a checkpoint that takes a further video beside the image",
    }
    return kinds.get(in_channels, "no checkpoint of this family")
