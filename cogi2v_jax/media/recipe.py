"""What makes a video again: its recipe, and a file of its recipe and its latents before
decoding."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..disk import parse_json, refuse_pointer, replace_when_done, sha256
from ..request import Resolved, Video
from ..settings import RATE, SETTINGS
from .images import padded_box, read_image
from .videos import video_files

if TYPE_CHECKING:
    from ..weights.checkpoint import Models

LATENTS = ".latents.safetensors"


def recipe_of(
    models: "Models", name: str, request: Resolved, video: Video | None = None
) -> dict[str, Any]:
    """All that one of a request's videos (None: its only one) was made of, as JSON can hold it. Its
    images must be files; `name` is what the user called the checkpoint."""
    import jax

    (video,) = request.videos if video is None else (video,)
    image = Path(video.image)
    pictures = [
        {"latent_frame": frame, "image": Path(file).name, "sha256": sha256(Path(file))}
        for frame, file in request.pictures(models.config).items()
    ]
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
        "weights_sha256": models.digest,
        "vae_tiling": models.vae_tiling,
        "attention": models.attention,
        "mesh": models.mesh,
        **({"keyframes": pictures} if pictures else {}),
        **({} if request.video is None else _clip(Path(request.video))),
        **({"visible": visible} if (visible := _visible(image, request)) else {}),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _clip(path: Path) -> dict[str, str]:
    """Of a file or a folder of frames."""
    digests = [sha256(file) for file in video_files(path)]
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"video": path.name, "video_sha256": digests[0] if len(digests) == 1 else whole}


def _visible(image: Path, request: Resolved) -> list[int] | None:
    """With `fit` pad: the pixels (left, top, right, bottom) that are not padding, if there is
    any."""
    if request.fit != "pad":
        return None
    box = padded_box(read_image(image).size, request.height, request.width)
    return None if box == (0, 0, request.width, request.height) else [*box]


def without_padding(frames: Any, recipe: dict[str, Any]) -> Any:
    """Frames [f h w 3] cut to what the recipe says is not padding."""
    if "visible" not in recipe:
        return frames
    left, top, right, bottom = recipe["visible"]
    return frames[:, top:bottom, left:right]


def write_latents(path: Path, latents: Any, recipe: dict[str, Any]) -> None:
    """Writes latents [1 t h w c] and their recipe. Called before decoding, so that running out of
    memory there costs no sampling."""
    from safetensors.numpy import save

    with replace_when_done(path) as part:
        # Not save_file, whose files only their owner may read.
        part.write_bytes(save({"latents": latents}, metadata={"recipe": json.dumps(recipe)}))


def read_latents(path: Path) -> tuple[Any, dict[str, Any]]:
    """Latents [1 t h w c] and recipe, as `write_latents` wrote them. Raises FileNotFoundError, and
    ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"latents must exist: found no {path}")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="numpy") as file:
            latents = file.get_tensor("latents")
            recipe = parse_json((file.metadata() or {})["recipe"])
        model, dtype, fps = (dict(recipe).get(key) for key in ("model", "dtype", "fps"))
        known = isinstance(model, str) and isinstance(dtype, str) and RATE.fits(fps)
        if latents.ndim != 5 or len(latents) != 1 or 0 in latents.shape or not known:
            made = f"model {model!r}, dtype {dtype!r} and fps {fps!r}"
            raise ValueError(f"it holds {list(latents.shape)} and a recipe of {made}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"latents must be a *{LATENTS} file of an earlier run: got {path} ({error})"
        ) from None
    return latents, recipe
