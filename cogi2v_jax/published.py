"""What a checkpoint was published for. A request outside of it is computed, with one warning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

PLAIN = "pictures of flat shapes on a dark vertical gradient"
SOFT = 0.1  # how far, of 1, the edges of a plain picture may be from a gradient


@dataclass(frozen=True)
class Published:
    """The table `published` of a checkpoint's TOML; what it does not state is not limited."""

    short_side: tuple[int, int] | None = None  # lowest and highest, pixels
    long_side: tuple[int, int] | None = None
    frames: tuple[int, ...] = ()
    portrait: bool = True
    words: tuple[str, ...] = ()  # of prompts
    # Pictures are things on a plain vertical gradient; how bright it is at most, from 0 to 1.
    background: float | None = None

    def outside(
        self, height: int, width: int, frames: int, prompts: Sequence[str]
    ) -> Iterator[str]:
        """What of a request is outside: the published range, then the request's value."""
        short, long = sorted((height, width))
        for name, side, bounds in (
            ("short", short, self.short_side),
            ("long", long, self.long_side),
        ):
            if bounds and not bounds[0] <= side <= bounds[1]:
                yield f"a {name} side of {_span(bounds)} pixels (this is {side})"
        if not self.portrait and height > width:
            yield "landscape (this is portrait)"
        if self.frames and frames not in self.frames:
            yield f"{', '.join(map(str, self.frames))} frames (this is {frames})"
        said = dict.fromkeys(word for prompt in prompts for word in _words(prompt))
        if self.words and (strange := [word for word in said if word not in self.words]):
            yield f"prompts of {len(self.words)} words (not {', '.join(strange)})"

    def is_strange(self, pixels: Float[np.ndarray, "h w 3"]) -> bool:
        """Whether a picture, in [-1, 1], has another background, by its edges."""
        if self.background is None:
            return False
        picture = (pixels + 1) / 2
        left, right = picture[:, 0], picture[:, -1]
        steps = [left - right, np.ptp(picture[0], axis=0), np.ptp(picture[-1], axis=0)]
        bent = left - np.linspace(left[0], left[-1], len(left))
        brightest = max(left.max(), right.max())
        uneven = max(float(np.abs(each).max()) for each in [*steps, bent])
        return bool(brightest > self.background + SOFT or uneven > SOFT)


def _words(prompt: str) -> list[str]:
    """In lower case, without marks around them."""
    words: Any = (word.strip(".,;:!?\"'()") for word in prompt.lower().split())
    return [*filter(None, words)]


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"
