"""The distance of two videos: PSNR and SSIM of the whole and of every frame, as a table, as a curve
and as JSON."""

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from cogi2v_jax.disk import check_target, replace_when_done
from cogi2v_jax.media.videos import read_frames

TOP = 255  # the largest value of a byte
# SSIM's Gaussian window: sigma 1.5, truncated at 3.5 sigma (Wang et al. 2004, "Image quality
# assessment").
WINDOW = 11


class Score(NamedTuple):
    """One measure of two videos; higher is closer."""

    video: float
    frames: Float64[np.ndarray, " f"]

    @property
    def worst(self) -> int:
        """The frame that differs most, counted from 0; the first of equals."""
        return int(np.argmin(self.frames))


class Comparison(NamedTuple):
    # In dB; inf if every byte is equal. The video's is computed from its mean squared error, so
    # that one equal frame does not make it inf.
    psnr: Score
    ssim: Score  # at most 1; the video's is the mean over frames


def compare(
    a: UInt8[np.ndarray, "f h w 3"],
    b: UInt8[np.ndarray, "_ _ _ 3"],  # of a's shape, which is checked here
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Comparison:
    """PSNR and SSIM, computed for one pair of frames at a time. Raises ValueError for videos of
    different shapes and for frames smaller than SSIM's window."""
    from skimage.metrics import mean_squared_error, structural_similarity

    if a.shape != b.shape:
        raise ValueError(
            f"videos must have equally many frames of one size: got {_shape(a)} and {_shape(b)}"
        )
    if min(a.shape[1:3]) < WINDOW:
        rule = f"videos must be at least {WINDOW}x{WINDOW}, the window of SSIM"
        raise ValueError(f"{rule}: got {a.shape[1]}x{a.shape[2]}")
    errors, ssim = np.empty(len(a)), np.empty(len(a))
    wang: Any = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        errors[index] = mean_squared_error(one, other)
        ssim[index] = structural_similarity(one, other, data_range=TOP, channel_axis=-1, **wang)
        progress("frames", index + 1, len(a))
    # skimage's peak_signal_noise_ratio needs all pixels of the video at once; its error does not.
    with np.errstate(divide="ignore"):
        psnr = 10 * np.log10(TOP**2 / np.array([errors.mean(), *errors]))
    return Comparison(Score(float(psnr[0]), psnr[1:]), Score(float(ssim.mean()), ssim))


def report(
    a: Path,
    b: Path,
    curve: Path | None,
    record: Path | None,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """The lines of the table for two video files. Writes the curve to `curve` and the JSON to
    `record` if they are given.

    Raises ValueError or OSError and then writes nothing. Missing libraries and unwritable targets
    are found before a video is read.
    """
    libraries = {"skimage": "scikit-image"} | ({"matplotlib": "matplotlib"} if curve else {})
    for module, library in libraries.items():
        if not find_spec(module):
            raise ValueError(f"compare must have {library}: pip install 'cogi2v-jax[compare]'")
    for what, target, suffix in (("curve", curve, ".png"), ("json", record, ".json")):
        if target:
            check_target(what, target, (a, b), suffix)
    frames = read_frames(a)
    comparison = compare(frames, read_frames(b), progress)
    if curve:
        with replace_when_done(curve) as part:
            draw(part, comparison)
    if record:
        with replace_when_done(record) as part:
            figures = _plain(frames, comparison)
            part.write_text(json.dumps(figures, allow_nan=False, indent=2) + "\n")
    lines = [f"{'':7} {'video':>8} {'worst':>8} {'frame':>6}"]
    named = (("PSNR dB", comparison.psnr, ".2f"), ("SSIM", comparison.ssim, ".4f"))
    for name, score, form in named:
        worst = score.frames[score.worst]
        lines.append(f"{name:7} {score.video:8{form}} {worst:8{form}} {score.worst:6}")
    note = "the video's PSNR is that of its mean squared error, its SSIM the mean over frames"
    return [*lines, f"{_shape(frames)}, counted from 0; {note}"]


def draw(path: Path, comparison: Comparison) -> None:
    """PSNR and SSIM over the frame number as a PNG, whatever the path's suffix."""
    # Not pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    psnr, ssim = comparison
    for axes, score, name, form in ((top, psnr, "PSNR, dB", ".2f"), (bottom, ssim, "SSIM", ".4f")):
        # With dots, to show a single frame and one between two equal frames.
        axes.plot(score.frames, ".-", label="frame")
        equal = np.flatnonzero(np.isinf(score.frames))
        if len(equal):  # infinity has no height on the axis: mark it at the upper edge
            edge: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": "C2"}
            axes.plot(equal, np.ones(len(equal)), "^", label="equal: inf", **edge)
        if math.isfinite(score.video):
            line: Any = {"color": "C1", "linestyle": "--", "label": f"video: {score.video:{form}}"}
            axes.axhline(score.video, **line)
        if len(equal) == len(score.frames):
            axes.set_yticks([])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
    bottom.set_xlabel("frame")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png", dpi=100)


def _shape(frames: UInt8[np.ndarray, "f h w 3"]) -> str:
    count, height, width, _ = frames.shape
    return f"{count} frame{'s' * (count > 1)} of {height}x{width}"


def _plain(frames: UInt8[np.ndarray, "f h w 3"], comparison: Comparison) -> dict:
    """All figures as JSON values. JSON has no infinity: it becomes the string "inf", which float()
    takes; null would read as not measured."""

    def number(value: float) -> float | str:
        return float(value) if math.isfinite(value) else "inf"

    count, height, width, _ = frames.shape
    scores = {
        name: {
            "video": number(score.video),
            "worst": {"frame": score.worst, "value": number(score.frames[score.worst])},
            "frames": [number(value) for value in score.frames],
        }
        for name, score in comparison._asdict().items()
    }
    return {"frames": count, "height": height, "width": width, **scores}
