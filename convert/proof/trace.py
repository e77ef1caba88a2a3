"""A trace: what the reference computed at every stage of one request, in a safetensors file.
Tensors have the reference's layouts in the file, and ours after reading."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy)
import numpy as np
from einops import EinopsError, rearrange
from safetensors import SafetensorError, safe_open

from cogi2v_jax.disk import first_line, one_line, parse_json, refuse_pointer
from cogi2v_jax.settings import SETTINGS

FORMAT = 1

# Every tensor with its layout in the file and in ours.
LAYOUTS = {
    "picture": "h w c -> h w c",  # uint8, before any resampling
    "ids": "pairs p -> pairs p",  # negative prompt first, where guided
    "text": "pairs p d -> pairs p d",
    "pixels": "b c h w -> b 1 h w c",
    # Mean and log-variance of the image's latents, concatenated.
    "moments": "b c 1 h w -> b 1 h w c",
    "posterior_noise": "b c 1 h w -> b 1 h w c",
    "posterior": "b c 1 h w -> b 1 h w c",  # drawn from the moments
    "image": "b t c h w -> b t h w c",  # scaled, and zeros in all frames but the first
    "initial": "b t c h w -> b t h w c",
    "timesteps": "i -> i",
    "guidance": "i -> i",
    "video": "b f c h w -> b f h w c",  # in [0, 1]
    # One for every step, numbered: "latents.7".
    "noise": "b t c h w -> b t h w c",  # the draw that the step uses; dpm only
    "latents": "b t c h w -> b t h w c",  # after the step
    # One for every chosen step.
    "x0_prev": "b t c h w -> b t h w c",  # dpm only
    "unconditional": "b t c h w -> b t h w c",  # where guided
    "conditional": "b t c h w -> b t h w c",
    "guided": "b t c h w -> b t h w c",
}
PER_STEP = ("noise", "latents", "x0_prev", "unconditional", "conditional", "guided")
# The metadata of a trace about how it was made.
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
    # Prompt, negative_prompt, seed and everything of `settings.SETTINGS`, resolved.
    settings: dict[str, Any]
    made: dict[str, Any]  # dtype, device, vae_tiling, kept steps, versions

    @property
    def steps(self) -> int:
        return self.settings["num_inference_steps"]

    def has(self, name: str, step: int | None = None) -> bool:
        return _numbered(name, step) in self.names

    def read(self, name: str, step: int | None = None) -> Any:
        """A tensor in our layout, as float32 or as its integer dtype. Raises ValueError if it
        cannot be read."""
        full = _numbered(name, step)
        try:
            with safe_open(self.path, framework="numpy") as file:
                value = np.ascontiguousarray(rearrange(file.get_tensor(full), LAYOUTS[name]))
        except (SafetensorError, OSError, EinopsError) as error:
            raise ValueError(f"{self.path} must hold {full}: {first_line(error)}") from None
        return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)


def _numbered(name: str, step: int | None) -> str:
    return name if step is None else f"{name}.{step}"


def open_trace(path: Path) -> Trace:
    """Opens and checks a trace. Raises FileNotFoundError or ValueError, with one line, if it is
    missing or incomplete."""
    if not path.is_file():
        raise FileNotFoundError(f"trace must be an existing file: got {path}")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="numpy") as file:
            head = parse_json((file.metadata() or {})["trace"])
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']}, this program reads {FORMAT}")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
        found = Trace(path, frozenset(shapes), dict(head["settings"]), dict(head["made"]))
        faults = _faults(found, shapes, kinds)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        rule = "trace must be a whole file of cogi2v-convert record"
        raise ValueError(f"{rule}: {path} is not ({first_line(error)})") from None
    if faults:
        more = f"; and {len(faults) - 1} more like it" if len(faults) > 1 else ""
        rule = "trace must be as cogi2v-convert record makes it"
        raise ValueError(f"{rule}: {path} has {one_line(faults[0])}{more}")
    return found


def _faults(
    trace: Trace, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> list[str]:
    """What the trace of such a request should hold and lacks, and what has a wrong type or
    shape."""
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
    numbers = {"num_inference_steps": int, "guidance_scale": int | float, "seed": int}
    for name, kind in numbers.items():
        if not isinstance(settings.get(name, 0), kind):
            faults.append(f"{name} {settings[name]!r}")
    if not faults and trace.steps > len(shapes):  # every step has latents
        faults.append(f"{len(shapes)} tensors for {trace.steps} steps")
    if faults:
        return faults
    pair = ("unconditional", "conditional") if settings["guidance_scale"] > 1 else ("conditional",)
    noisy = settings["scheduler"] == "dpm"
    needed = {name for name in LAYOUTS if name not in PER_STEP}
    every = ("latents", "noise") if noisy else ("latents",)
    needed |= {f"{name}.{step}" for step in range(trace.steps) for name in every}
    needed |= {f"{name}.{step}" for step in made["kept_steps"] for name in ("guided", *pair)}
    needed |= {f"x0_prev.{step}" for step in made["kept_steps"] if noisy and step}
    faults += [f"no {name}" for name in sorted(needed - shapes.keys())]
    for name in sorted(needed & shapes.keys()):
        integer, shape = name in ("ids", "timesteps", "picture"), list(shapes[name])
        if integer != kinds[name].startswith(("I", "U")):
            faults.append(f"{name} of type {kinds[name]}")
        if len(shape) != len(LAYOUTS[name.partition(".")[0]].partition(" -> ")[0].split()):
            faults.append(f"{name} of shape {shape}")
        elif "." in name and shapes[name] != shapes.get("initial"):
            initial = list(shapes.get("initial", ()))
            faults.append(f"{name} of shape {shape} where initial has {initial}")
    return faults


def head(settings: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, str]:
    """A trace's metadata in the form that safetensors takes."""
    return {"trace": json.dumps({"format": FORMAT, "settings": settings, "made": made})}
