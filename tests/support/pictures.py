"""Pictures and videos for tests, and how they are compared."""

import numpy as np

# One output of each kind: a video, an animation, and a folder of frames by both of its names.
KINDS = ("out.mp4", "out.gif", "out.png", "out")


def picture(height=24, width=36) -> np.ndarray:
    """Smooth, so that lossy codecs come close, and different in every corner and channel, so that a
    rotation or a flip shows."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    return np.stack([255 * x, 255 * y, 255 * (1 - x * y)], -1).round().astype(np.uint8)


def clip(count=9, height=64, width=96) -> np.ndarray:
    """A video that brightens by 4 levels a frame."""
    frame = picture(height, width) // 2 + 60
    return np.stack([frame + np.uint8(4 * index) for index in range(count)])


def close(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a.astype(float) - b.astype(float)).mean()


def one_line(caught) -> str:
    """The message of an error about a value."""
    text = str(caught.value)
    assert "\n" not in text
    assert " must " in text
    assert ": got " in text
    return text
