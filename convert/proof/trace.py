"""A trace: what the reference computed at every stage of one request, in a safetensors file.
Tensors keep the reference's layouts in the file, and are ours when read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (tells numpy of bfloat16)
import numpy as np
from einops import EinopsError, rearrange
from safetensors import SafetensorError, safe_open

from cogi2v_jax.request import SETTINGS

FORMAT = 1

# Every tensor with its layout there and here.
LAYOUTS = {
    "picture": "h w c -> h w c",  # uint8, before any resampling
    "ids": "pairs p -> pairs p",  # negative prompt first, where guided
    "text": "pairs p d -> pairs p d",
    "pixels": "b c h w -> b 1 h w c",
    # Mean and log variance of the image's latents, one after the other.
    "moments": "b c 1 h w -> b 1 h w c",
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
OF_STEPS = ("noise", "latents", "x0_prev", "unconditional", "conditional", "guided")
# What a trace says of its making.
MADE = {
    "checkpoint": str,
    "dtype": str,
    "vae_tiling": bool,
    "kept_steps": list,
    "device": str,
    "torch": str,
    "diffusers": str,
}


class Trace(NamedTuple):
    """A trace on disk. Tensors are read one at a time."""

    path: Path
    names: frozenset[str]
    # Prompt, negative_prompt, seed and everything of `request.SETTINGS`, resolved.
    settings: dict[str, Any]
    made: dict[str, Any]  # dtype, device, vae_tiling, kept steps, versions

    @property
    def steps(self) -> int:
        return self.settings["num_inference_steps"]

    def has(self, name: str, step: int | None = None) -> bool:
        return _numbered(name, step) in self.names

    def read(self, name: str, step: int | None = None) -> Any:
        """A tensor in our layout: float32, or integers as they are. Raises ValueError where it
        can't be read."""
        full = _numbered(name, step)
        try:
            with safe_open(self.path, framework="numpy") as file:
                value = np.ascontiguousarray(rearrange(file.get_tensor(full), LAYOUTS[name]))
        except (SafetensorError, OSError, EinopsError) as error:
            raise ValueError(
                f"{self.path} must hold {full}: {str(error).splitlines()[0]}"
            ) from None
        return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)


def _numbered(name: str, step: int | None) -> str:
    return name if step is None else f"{name}.{step}"


def open_trace(path: Path) -> Trace:
    """Raises FileNotFoundError or ValueError, in one line, for what is no whole trace."""
    if not path.is_file():
        raise FileNotFoundError(f"trace must be an existing file: got {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            head = json.loads((file.metadata() or {})["trace"])
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']}, this program reads {FORMAT}")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
        found = Trace(path, frozenset(shapes), dict(head["settings"]), dict(head["made"]))
        faults = _faults(found, shapes, kinds)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"trace must be a whole file of cogi2v-convert record: {path} is not ({error})"
        ) from None
    if faults:
        more = f"; and {len(faults) - 1} more like it" if len(faults) > 1 else ""
        raise ValueError(
            f"trace must be as cogi2v-convert record makes it: {path} has {faults[0]}{more}"
        )
    return found


def _faults(
    trace: Trace, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> list[str]:
    """What a trace lacks that its request has, and what is not of its kind."""
    settings, made = trace.settings, trace.made
    asked = {"prompt", "negative_prompt", "seed", *SETTINGS}
    faults = [f"no {name} in its settings" for name in sorted(asked - settings.keys())]
    faults += [f"the unknown {name} in its settings" for name in sorted(settings.keys() - asked)]
    faults += [f"no {name} in its making" for name in sorted(MADE.keys() - made.keys())]
    faults += [
        f"{name} {made[name]!r} in its making"
        for name, kind in MADE.items()
        if name in made and not isinstance(made[name], kind)
    ]
    numbers = ("num_inference_steps", "guidance_scale", "seed")
    faults += [
        f"{name} {settings[name]!r}"
        for name in numbers
        if not isinstance(settings.get(name, 0), int | float)
    ]
    if faults:
        return faults
    pair = ("unconditional", "conditional") if settings["guidance_scale"] > 1 else ("conditional",)
    noisy = settings["scheduler"] == "dpm"
    needed = {name for name in LAYOUTS if name not in OF_STEPS}
    needed |= {
        f"{name}.{step}"
        for step in range(trace.steps)
        for name in ("latents", *(("noise",) if noisy else ()))
    }
    needed |= {f"{name}.{step}" for step in made["kept_steps"] for name in ("guided", *pair)}
    needed |= {f"x0_prev.{step}" for step in made["kept_steps"] if noisy and step}
    faults += [f"no {name}" for name in sorted(needed - shapes.keys())]
    for name in sorted(needed & shapes.keys()):
        whole = name in ("ids", "timesteps", "picture")
        if whole != kinds[name].startswith(("I", "U")):
            faults.append(f"{name} of type {kinds[name]}")
        if len(shapes[name]) != len(
            LAYOUTS[name.partition(".")[0]].partition(" -> ")[0].replace(" 1 ", " _ ").split()
        ):
            faults.append(f"{name} of shape {list(shapes[name])}")
        elif "." in name and shapes[name] != shapes.get("initial"):
            faults.append(
                f"{name} of shape {list(shapes[name])} where initial has {list(shapes.get('initial', ()))}"
            )
    return faults


def head(settings: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, str]:
    """A trace's metadata, as safetensors takes it."""
    return {"trace": json.dumps({"format": FORMAT, "settings": settings, "made": made})}
