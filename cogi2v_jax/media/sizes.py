"""The size of a video by its picture."""

import dataclasses
import math
from collections.abc import Iterator

from ..config import CheckpointConfig
from ..request import Request
from .images import read_image

ALIKE = 0.01  # by how much the aspects of the pictures of a batch may differ, as logarithms


def fit_size(request: Request, config: CheckpointConfig) -> Request:
    """Where a request has `fit` auto, and height and width are left open: the same with the size,
    of those that the checkpoint does well, whose aspect is nearest to its pictures'. With one side
    given, the other one follows from the aspect. Raises ValueError for pictures of a batch whose
    aspects differ, and as `read_image`."""
    height, width = request.height, request.width
    if request.fit != "auto" or (height is not None and width is not None):
        return request
    request.check()
    images = {id(video.image): video.image for video in request.videos}
    sizes = [read_image(image).size for image in images.values()]
    aspects = [math.log(wide / high) for wide, high in sizes]
    if max(aspects) - min(aspects) > ALIKE:
        got = ", ".join(f"{high}x{wide}" for wide, high in sizes)
        rule = "have one aspect with fit auto"
        raise ValueError(f"the pictures of a batch must {rule}: got {got} (height x width)")
    step = config.vae.spatial_ratio * config.transformer.patch_size
    aspect = aspects[0]
    if height is None and width is None:
        sizes = good_sizes(config, step)
        height, width = min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))
    elif width is not None:
        height = max(step, round(width * math.exp(-aspect) / step) * step)
    elif height is not None:
        width = max(step, round(height * math.exp(aspect) / step) * step)
    return dataclasses.replace(request, height=height, width=width)


def good_sizes(config: CheckpointConfig, step: int) -> Iterator[tuple[int, int]]:
    """(height, width) that the checkpoint was published for, or its own size; and each upright."""
    short, long = config.published.short_side, config.published.long_side
    own = sorted((config.defaults["height"], config.defaults["width"]))
    shorts, longs = (
        range(bounds[0], bounds[1] + 1, step) if bounds else [side]
        for bounds, side in zip((short, long), own, strict=True)
    )
    for high in shorts:
        for wide in longs:
            if high <= wide:
                yield high, wide
                yield wide, high
