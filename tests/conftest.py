"""What all tests run with: eight CPU devices, full float32 products, no network, a cache folder of
their own, and warnings as errors."""

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = os.environ.get("COGI2V_TEST_PLATFORM", "cpu")
# Compiling takes most of the tests' time. LLVM's first level of optimisation compiles the loop of
# the embedded model in 0.7 s of CPU time instead of 4.9 s, its decoder in 2.3 s instead of 4.0 s.
# (Without any, programs run so slowly that this costs more than it saves.)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=1"
)
# More threads of PyTorch wait for each other in a loop: with two, decoding the smallest video takes
# 1.9 s of CPU time instead of 0.1 s while another worker computes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A cache for each worker: what one test converted or compiled must not change what another one
# sees.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cogi2v-tests-")

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # Most tests that need any picture give noise.
    config.addinivalue_line("filterwarnings", "ignore:cogi2v-tiny.* knows pictures:UserWarning")
    # Raised inside other libraries while they are imported or used; we can't avoid them.
    libraries = "(torch|diffusers|transformers|huggingface_hub|orbax|flax|sentencepiece).*"
    config.addinivalue_line("filterwarnings", f"ignore::DeprecationWarning:{libraries}")
    config.addinivalue_line("filterwarnings", "ignore:builtin type [sS]wig:DeprecationWarning")
    future = "ignore::FutureWarning:(torch|diffusers|transformers).*"
    config.addinivalue_line("filterwarnings", future)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of later garbage collections, which take 5% of the tests'
    time with it."""
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def without_type_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: without the type checks of the tests, which would refuse a value first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# Small random models of the reference, of both families. (Imported inside fixtures: importing torch
# takes seconds.)


@pytest.fixture(scope="module", params=["1.0", "1.5"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str) -> Any:
    """A reference pipeline."""
    import twins

    pipe = twins.pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of each family; to be copied, not changed."""
    import twins

    return {
        family: twins.save(twins.pipeline(family), tmp_path_factory.mktemp(family))
        for family in twins.FAMILIES
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Another checkpoint of each family, all of its weights different: a test sees what was not
    replaced."""
    import twins

    return {
        family: twins.save(twins.pipeline(family, seed=9), tmp_path_factory.mktemp(f"base{family}"))
        for family in twins.FAMILIES
    }
