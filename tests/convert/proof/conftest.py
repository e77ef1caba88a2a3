"""Diffusers folders of both families and traces of them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from traces import Case


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Callable[[str], Case]:
    return cache(lambda family: Case(family, tmp_path_factory.mktemp(f"case-{family}"), picture))


@pytest.fixture(params=["1.0", "1.5"])
def family(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def case(cases: Callable[[str], Case]) -> Case:
    """One family, for what does not depend on the family."""
    return cases("1.0")
