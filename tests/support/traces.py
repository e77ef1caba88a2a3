"""Traces of the reference: how they are recorded and damaged."""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import twins
from cogi2v_convert.proof import record, trace
from safetensors.torch import load_file, save_file

from cogi2v_jax import Request

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
STEPS = 4
FAMILY_SCHEDULER = {"1.0": "dpm", "1.5": "ddim"}


def size_of(family: str) -> dict[str, int]:
    return dict(zip(("height", "width", "num_frames"), SIZES[family], strict=True))


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Case:
    """A family's diffusers folder and traces of it."""

    def __init__(self, family: str, folder: Path, picture: Path):
        self.family, self.folder = family, folder
        self.source = twins.save(twins.pipeline(family), folder / "source")
        ways = {"scheduler": FAMILY_SCHEDULER[family], "fit": "stretch", **size_of(family)}
        prompts = "the red circle", "a square"
        self.request = Request(picture, *prompts, num_inference_steps=STEPS, **ways)

    @cached_property
    def single(self) -> Path:
        """A trace in float32."""
        return self.record("float32")

    @cached_property
    def half(self) -> Path:
        """A trace in bfloat16."""
        return self.record("bfloat16")

    def record(self, dtype: str) -> Path:
        target = self.folder / f"{dtype}.safetensors"
        record.record(self.source, target, self.request, dtype=dtype)
        return target


def damaged(
    target: Path,
    source: Path,
    removed: str = "$",
    changed: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    made: dict[str, Any] | None = None,
) -> Path:
    """A copy of a trace without the tensors whose names match, with others changed, or with other
    entries about how it was made."""
    kept, tensors = trace.open_trace(source), load_file(source)
    tensors = {name: x for name, x in tensors.items() if not re.fullmatch(removed, name)}
    for name, change in (changed or {}).items():
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, target, trace.head(kept.settings, kept.made | (made or {})))
    return target
