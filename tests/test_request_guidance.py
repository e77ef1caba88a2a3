"""What a request says of motion and guidance, and what of it is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import enter, without_sampling

from cogi2v_jax import Request
from cogi2v_jax.config import named
from cogi2v_jax.sample import main

pytestmark = pytest.mark.usefixtures("without_type_hooks")

FIRST = named("cogvideox-5b-i2v")
GUIDANCE = "a finite number and not negative, or one for each step"
INTERVAL = "A:B with 0 <= A < B <= 1, shares of the steps"


def request(**given: Any) -> Request:
    return Request("photo.jpg", "a circle moves", **given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        *(
            ({name: value}, f"{name} must be a finite number and not negative: got {value!r}")
            for name in ("guidance_skip", "image_guidance", "noise_aug")
            for value in (-1, math.nan, math.inf, True, "6")
        ),
        ({"guidance_method": "pag"}, "guidance_method must be cfg, apg or cfg_zero: got 'pag'"),
        *(
            ({"motion": value}, f"motion must be a number from 0 to 1: got {value!r}")
            for value in (-0.1, 1.5, math.nan, True, "1")
        ),
        *(
            ({"guidance_interval": value}, f"guidance_interval must be {INTERVAL}: got {value!r}")
            for value in ((0.5, 0.5), (0, 1.1), (-0.1, 1), (0, 1, 1), (0, math.nan), 0.5, "0:1")
        ),
        *(
            ({"guidance_scale": value}, f"guidance_scale must be {GUIDANCE}: got {value!r}")
            for value in ([], [6.0, -1.0], [6.0, None], [[6.0]], "6", -1, math.inf)
        ),
        (
            {"guidance_scale": [6.0, 5.0], "num_inference_steps": 3},
            "guidance_scale must be one number or 3, one for each step: got 2",
        ),
        (
            {"guidance_scale": [6.0], "num_inference_steps": 1, "use_dynamic_cfg": True},
            "guidance_scale must be one number with use_dynamic_cfg: got a list",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_the_rule(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        request(**given).resolve(FIRST)
    assert str(caught.value) == line


def test_a_list_of_guidance_is_plain_numbers_and_takes_the_place_of_the_dynamic_one() -> None:
    for scales in ([7, np.float32(0.5)], np.array([7.0, 0.5]), (7, 0.5)):
        resolved = request(guidance_scale=scales, num_inference_steps=2).resolve(FIRST)
        assert resolved.guidance_scale == (7.0, 0.5)
        assert resolved.guided
        assert not resolved.use_dynamic_cfg
    assert not request(guidance_scale=[1, 0], num_inference_steps=2).resolve(FIRST).guided


@pytest.mark.parametrize("given", [{"motion": 0.1}, {"image_guidance": 1.1}], ids=str)
def test_what_needs_the_prediction_without_prompt_guides(given: dict[str, Any]) -> None:
    assert not request(guidance_scale=1).resolve(FIRST).guided
    assert request(guidance_scale=1, **given).resolve(FIRST).guided


def test_flags_reach_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)
    asked = without_sampling(monkeypatch)
    flags = "--num_inference_steps 2 --guidance_scale 3,2.5 --guidance_interval 0.1:0.5 "
    flags += "--guidance_method apg --guidance_skip 0.1 --image_guidance 1.5 --motion 0.5 "
    flags += "--noise_aug 0.05 --output o.gif"
    assert main(flags.split()) == 0
    (found,) = asked
    assert (found.guidance_scale, found.guidance_interval) == ((3.0, 2.5), (0.1, 0.5))
    assert (found.guidance_method, found.guidance_skip, found.image_guidance) == ("apg", 0.1, 1.5)
    assert (found.motion, found.noise_aug) == (0.5, 0.05)
