"""CogVideoX image-to-video in JAX/Flax.

    models = cogi2v_jax.load("cogi2v-tiny")
    request = cogi2v_jax.Request(image="photo.jpg", prompt="the red circle moves left")
    result = cogi2v_jax.generate(models, request)

Shape letters, the same everywhere: `b` batch, `t` latent frames, `f` pixel frames, `h w` grid, `c`
channels, `s` joint sequence (text, then video), `p` prompt tokens, `d` width, `n` heads, `k` head
width, `m` mlp width, `e` time-embedding width, `l` layers, `i` diffusion steps.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apps.choosing import Take, best_of
    from .loading import adapt, load
    from .pipeline import Result, decode, generate
    from .request import Noise, Request
    from .weights.checkpoint import Models

__version__ = version("cogi2v-jax")

__all__ = [
    "Models",
    "Noise",
    "Request",
    "Result",
    "Take",
    "__version__",
    "adapt",
    "best_of",
    "decode",
    "generate",
    "load",
]

_HOMES = {
    "Models": "weights.checkpoint",
    "Noise": "request",
    "Request": "request",
    "Result": "pipeline",
    "Take": "apps.choosing",
    "adapt": "loading",
    "best_of": "apps.choosing",
    "decode": "pipeline",
    "generate": "pipeline",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Names resolve on first use, so that `import cogi2v_jax` and every argument error come without
    waiting for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
