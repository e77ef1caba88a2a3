"""How far two videos are apart: PSNR and SSIM of the whole and of every frame, as lines for a
person, as a curve and as JSON."""

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from cogi2v_jax.disk import beside, check_target
from cogi2v_jax.media.videos import read_frames

TOP = 255  # the range of a byte
# SSIM's Gaussian of sigma 1.5, cut off at 3.5 sigma: Wang et al. 2004, "Image quality assessment".
WINDOW = 11


class Score(NamedTuple):
    """One measure of two videos; more is nearer."""

    video: float
    frames: Float64[np.ndarray, " f"]

    @property
    def worst(self) -> int:
        """The frame that differs most, counted from 0; the first of equals."""
        return int(np.argmin(self.frames))


class Comparison(NamedTuple):
    psnr: (
        # DB; inf where every byte is equal. The video's is that of its mean squared error, so that
        # one equal frame won't make it inf.
        Score
    )
    ssim: Score  # at most 1; the video's is the mean over frames


def compare(
    a: UInt8[np.ndarray, "f h w 3"],
    b: UInt8[np.ndarray, "_ _ _ 3"],  # of a's shape: refused here, with both shapes
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Comparison:
    """Scores from one pair of frames at a time. ValueError for videos of different shapes and for
    frames below SSIM's window."""
    from skimage.metrics import mean_squared_error, structural_similarity

    if a.shape != b.shape:
        raise ValueError(
            f"videos must have equally many frames of one size: got {_shape(a)} and {_shape(b)}"
        )
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(
            f"videos must be at least {WINDOW}x{WINDOW}, the window of SSIM: got {a.shape[1]}x{a.shape[2]}"
        )
    errors, ssim = np.empty(len(a)), np.empty(len(a))
    wang = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": TOP,
        "channel_axis": -1,
    }
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        errors[index] = mean_squared_error(one, other)
        ssim[index] = structural_similarity(one, other, **wang)
        progress("frames", index + 1, len(a))
    # Not skimage's peak_signal_noise_ratio, which takes pixels alone: the video's error is known
    # without all its pixels at once.
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
    """The lines for two video files, with the curve and the JSON written where they are asked for.

    Raises ValueError or OSError, before a file is read where a library is missing or a target can't
    be written, as `read_frames` and `compare` do otherwise; nothing is written then.
    """
    for module, library in (
        ("skimage", "scikit-image"),
        *([("matplotlib", "matplotlib")] if curve else []),
    ):
        if not find_spec(module):
            raise ValueError(f"compare must have {library}: pip install 'cogi2v-jax[compare]'")
    for what, target, suffix in (("curve", curve, ".png"), ("json", record, ".json")):
        if target:
            check_target(what, target, (a, b), suffix)
    frames = read_frames(a)
    comparison = compare(frames, read_frames(b), progress)
    if curve:
        with beside(curve) as part:
            draw(part, comparison)
    if record:
        with beside(record) as part:
            part.write_text(
                json.dumps(_plain(frames, comparison), allow_nan=False, indent=2) + "\n"
            )
    lines = [f"{'':7} {'video':>8} {'worst':>8} {'frame':>6}"]
    for name, score, form in (
        ("PSNR dB", comparison.psnr, ".2f"),
        ("SSIM", comparison.ssim, ".4f"),
    ):
        lines.append(
            f"{name:7} {score.video:8{form}} {score.frames[score.worst]:8{form}} {score.worst:6}"
        )
    return [
        *lines,
        f"{_shape(frames)}, counted from 0; the video's PSNR is that of its mean squared error, its SSIM the mean over frames",
    ]


def draw(path: Path, comparison: Comparison) -> None:
    """PSNR and SSIM over the frame number as a PNG, whatever the path's suffix."""
    # No pyplot: it would choose a window system and keep the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for axes, score, name, form in (
        (top, comparison.psnr, "PSNR, dB", ".2f"),
        (bottom, comparison.ssim, "SSIM", ".4f"),
    ):
        # Dots too, for a frame alone or between two that are equal.
        axes.plot(score.frames, ".-", label="frame")
        equal = np.flatnonzero(np.isinf(score.frames))
        if len(equal):  # no height of the axis is theirs, so they stand on its edge
            axes.plot(
                equal,
                np.ones(len(equal)),
                "^",
                color="C2",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                label="equal: inf",
            )
        if math.isfinite(score.video):
            axes.axhline(
                score.video, color="C1", linestyle="--", label=f"video: {score.video:{form}}"
            )
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
    """What JSON can hold: it knows no infinity, so that is the string "inf", which float() takes.
    Null would read as not measured."""

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
