"""All it takes to make a video again: its recipe, and the latents before decoding, in a file that
carries the recipe along."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..disk import beside, sha256
from ..request import Request, Video

if TYPE_CHECKING:
    from ..weights.checkpoint import Models

LATENTS = ".latents.safetensors"
SETTINGS = (
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "use_dynamic_cfg",
    "scheduler",
    "fit",
    "image_latent_scale",
    "noise",
)


def recipe_of(
    models: "Models", name: str, request: Request, video: Video | None = None
) -> dict[str, Any]:
    """What JSON can hold of one of a request's videos (None: its only one), made from an image
    file, and of the checkpoint's `name`."""
    import jax

    (video,) = request.videos if video is None else (video,)
    image = Path(video.image)
    return {
        "program": f"cogi2v-jax {__version__}",
        "model": name,
        "checkpoint": models.config.title,
        "image": image.name,
        "image_sha256": sha256(image),
        "prompt": video.prompt,
        "negative_prompt": video.negative_prompt,
        "seed": video.seed,
        **{setting: getattr(request, setting) for setting in SETTINGS},
        "dtype": str(models.dtype),
        "loras": [
            {"file": lora.name, "weight": lora.weight, "sha256": lora.sha256}
            for lora in models.loras
        ],
        "attention": models.attention,
        "mesh": models.mesh,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def write_latents(path: Path, latents: Any, recipe: dict[str, Any]) -> None:
    """Latents [1 t h w c] and their recipe; for before decoding starts, so that running out of
    memory there costs no sampling."""
    from safetensors.numpy import save

    with beside(path) as part:
        # save_file's files are for their owner alone.
        part.write_bytes(save({"latents": latents}, metadata={"recipe": json.dumps(recipe)}))


def read_latents(path: Path) -> tuple[Any, dict[str, Any]]:
    """What `write_latents` wrote. Raises FileNotFoundError, and ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"latents must exist: found no {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            latents, recipe = (
                file.get_tensor("latents"),
                json.loads((file.metadata() or {})["recipe"]),
            )
        if (
            latents.ndim != 5
            or len(latents) != 1
            or not {"model", "dtype", "fps"} <= dict(recipe).keys()
        ):
            raise ValueError(
                f"it holds {list(latents.shape)} and a recipe of {', '.join(recipe) or 'nothing'}"
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"latents must be a *{LATENTS} file of an earlier run: {path} is not ({error})"
        ) from None
    return latents, recipe
