"""What a file says about itself, checked before any of it is used."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cogi2v_convert.proof import trace
from safetensors.numpy import save_file

from cogi2v_jax.settings import SETTINGS

MADE = {"checkpoint": "a", "dtype": "float32", "vae_tiling": False, "kept_steps": [], "device": "a"}
MADE |= dict.fromkeys(("torch", "diffusers"), "1")


def save(path: Path, text: str | None = None, **settings: Any) -> Path:
    whole = dict.fromkeys(("prompt", "negative_prompt", *SETTINGS), "a") | {
        "seed": 1,
        "guidance_scale": 1.0,
        "num_inference_steps": 1,
    }
    head = trace.head(whole | settings, MADE) if text is None else {"trace": text}
    save_file({"latents": np.zeros(1, np.float32)}, path, head)
    return path


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_inference_steps": 10**12}, "has 1 tensors for 1000000000000 steps"),
        ({"num_inference_steps": 1e18}, "has num_inference_steps 1e+18"),
        ({"num_inference_steps": 10**400}, "at most 300 digits: got 401)"),
        ({"a\x1b[2J\n": 1}, r"has the unknown a\x1b[2J\n in its settings"),
        ({"text": "[" * 9999}, "nested at most 64 deep: got more)"),
        ({"text": "[]"}, "is not ("),
        ({"text": '{"format": "\\u001b[2J"}'}, r"is not (its format is \x1b[2J, this"),
    ],
)
def test_what_no_program_records_is_refused_in_one_line(
    settings: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.trace", **settings)
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        trace.open_trace(path)
    assert str(caught.value).isprintable()
