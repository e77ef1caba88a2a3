"""A trace: what the reference computed at every stage of one request, in a safetensors file. Tensors keep the reference's layouts in the
file, and are ours when read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (tells numpy of bfloat16)
import numpy as np
from einops import EinopsError, rearrange
from safetensors import SafetensorError, safe_open

FORMAT = 1

# Every tensor with its layout there and here.
LAYOUTS = {
    "picture": "h w c -> h w c",  # uint8, before any resampling
    "ids": "pairs p -> pairs p",  # negative prompt first, where guided
    "text": "pairs p d -> pairs p d",
    "pixels": "b c h w -> b 1 h w c",
    "moments": "b c 1 h w -> b 1 h w c",  # mean and log variance of the image's latents, one after the other
    "posterior_noise": "b c 1 h w -> b 1 h w c",
    "posterior": "b c 1 h w -> b 1 h w c",  # drawn from the moments
    "image": "b t c h w -> b t h w c",  # scaled, and zeros in all frames but the first
    "initial": "b t c h w -> b t h w c",
    "timesteps": "i -> i",
    "guidance": "i -> i",
    "video": "b f c h w -> b f h w c",  # in [0, 1]
    # Of every step, with its number behind the name: "latents.7".
    "noise": "b t c h w -> b t h w c",  # the draw that the step uses; dpm alone has any
    "latents": "b t c h w -> b t h w c",  # after the step
    # Of chosen steps.
    "x0_prev": "b t c h w -> b t h w c",  # dpm alone
    "unconditional": "b t c h w -> b t h w c",  # where guided
    "conditional": "b t c h w -> b t h w c",
    "guided": "b t c h w -> b t h w c",
}


class Trace(NamedTuple):
    """A trace on disk. Tensors are read one at a time."""

    path: Path
    names: frozenset[str]
    settings: dict[str, Any]  # prompt, negative_prompt, seed and everything of `recipe.SETTINGS`, resolved
    made: dict[str, Any]  # dtype, device, vae_tiling, kept steps, versions

    @property
    def steps(self) -> int:
        return self.settings["num_inference_steps"]

    def has(self, name: str, step: int | None = None) -> bool:
        return _numbered(name, step) in self.names

    def read(self, name: str, step: int | None = None) -> Any:
        """A tensor in our layout: float32, or integers as they are. Raises ValueError where it is missing or of another layout."""
        full = _numbered(name, step)
        if full not in self.names:
            raise ValueError(f"{self.path} must hold {full}: found none")
        try:
            with safe_open(self.path, framework="numpy") as file:
                value = file.get_tensor(full)
            value = np.ascontiguousarray(rearrange(value, LAYOUTS[name]))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} must hold {full}: {error}") from None
        except EinopsError:
            raise ValueError(f"{full} must be [{LAYOUTS[name].split(' -> ')[0]}] in {self.path}: got {list(value.shape)}") from None
        return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)


def _numbered(name: str, step: int | None) -> str:
    return name if step is None else f"{name}.{step}"


def open_trace(path: Path) -> Trace:
    """Raises FileNotFoundError or ValueError, in one line, for what is no whole trace."""
    if not path.is_file():
        raise FileNotFoundError(f"trace must exist: found no {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            head = json.loads((file.metadata() or {})["trace"])
            names = frozenset(file.keys())
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']}, this program reads {FORMAT}")
        return Trace(path, names, dict(head["settings"]), dict(head["made"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"trace must be a whole file of cogi2v-convert record: {path} is not ({error})") from None


def head(settings: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, str]:
    """A trace's metadata, as safetensors takes it."""
    return {"trace": json.dumps({"format": FORMAT, "settings": settings, "made": made})}
