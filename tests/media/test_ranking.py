"""The figures by which takes are ranked, on clips of which the right order is known."""

import numpy as np
import pytest
from scipy import ndimage

from cogi2v_jax.media.ranking import BEST, LEAST, Figures, figures_of, rank

COUNT, SIDE = 9, 64
Frames = np.ndarray


def texture(rng: np.random.Generator, *size: int) -> Frames:
    """Blobs of all colours, values from 0 to 200."""
    smooth = ndimage.gaussian_filter(rng.standard_normal((*size, 3)), (2, 2, 0))
    low, high = smooth.min(), smooth.max()
    return (smooth - low) / (high - low) * 200


def clip(kind: str, speed: float = 0.0, factor: int = 1, noise: float = 20.0) -> Frames:
    """A clip of blobs that move to the right by `speed` pixels a frame, `factor` times as large,
    with what its kind adds."""
    rng = np.random.default_rng(0)
    wide = texture(rng, SIDE, 2 * SIDE)
    frames = []
    for number in range(COUNT):
        frame = ndimage.shift(wide, (0, speed * number, 0), order=1, mode="wrap")[:, :SIDE]
        match kind:
            case "flickers":
                frame = frame * (1 - 0.3 * (number % 2 or number % 4 / 4))
            case "fades":
                frame = frame * (1 - number / COUNT)
            case "noisy":
                frame = frame + rng.normal(0, noise, frame.shape)
            case "noise":
                frame = rng.uniform(0, 255, frame.shape)
            case "one corner flickers":
                frame = frame.copy()
                frame[:32, :32] += 50 * (number // 4 % 2)
        frames.append(frame.repeat(factor, 0).repeat(factor, 1))
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def figures(video: Frames) -> Figures:
    """With its own first frame as the picture."""
    return figures_of(video, (video[0] / 127.5 - 1).astype(np.float32))


@pytest.mark.parametrize("kind", ["still", "flickers", "fades", "noisy", "noise"])
def test_what_does_not_move_has_no_motion(kind: str) -> None:
    assert figures(clip(kind)).motion == 0


def test_the_edge_of_a_part_that_flickers_counts_for_less_than_slow_motion() -> None:
    assert figures(clip("one corner flickers")).motion < 0.5 * figures(clip("still", 0.5)).motion


# Motion below a pixel is found where light and noise change less than it does.
@pytest.mark.parametrize(
    ("kind", "speed"),
    [
        *(("still", speed) for speed in (0.2, 0.5, 1.0, 2.0)),
        *((kind, speed) for kind in ("noisy", "flickers") for speed in (1.0, 2.0)),
    ],
)
def test_the_motion_is_the_speed(kind: str, speed: float) -> None:
    # A little less: blocks at a border leave the frame.
    found = figures(clip(kind, speed, noise=2.0)).motion / 100 * SIDE
    assert 0.6 * speed < found < 1.1 * speed


def test_faster_is_more_and_direction_does_not_matter() -> None:
    still, slow, fast = (figures(clip("still", speed)).motion for speed in (0.0, 0.5, 2.0))
    assert still == 0 < slow < fast
    back = figures(clip("still", 2.0)[:, :, ::-1]).motion
    down = figures(clip("still", 2.0).swapaxes(1, 2)).motion
    assert back == pytest.approx(fast, rel=0.1)
    assert down == pytest.approx(fast, rel=0.1)


def test_the_motion_is_a_share_of_the_side_whatever_the_size() -> None:
    small, large = (figures(clip("still", 1.5, factor)).motion for factor in (1, 4))
    assert large == pytest.approx(small, rel=0.02)


def test_the_first_frame_is_compared_with_the_picture() -> None:
    video = clip("still")
    assert figures(video).first == BEST
    picture = (video[0] + 10.0) / 127.5 - 1
    expected = -20 * np.log10(10 / 255)
    assert figures_of(video, picture.astype(np.float32)).first == pytest.approx(expected, abs=0.01)


def test_a_change_of_light_is_drift_and_motion_is_none() -> None:
    for speed in (0.0, 2.0):
        steady, fading = (figures(clip(kind, speed)).drift for kind in ("still", "fades"))
        assert steady < 0.5
        assert fading > 20


def test_a_moving_clip_is_better_than_a_still_one_and_flicker_and_noise_are_worse() -> None:
    videos = [clip("noise"), clip("flickers"), clip("still"), clip("still", 1.0)]
    found = rank(videos, (videos[2][0] / 127.5 - 1).astype(np.float32))
    order = [number for number, _ in found]
    assert order[:2] == [3, 2]
    assert all(figure.score < LEAST for _, figure in found[2:])


def test_of_two_that_move_alike_the_nearer_to_the_picture_is_better() -> None:
    near = clip("still", 1.0)
    far = np.clip(near.astype(int) + 30, 0, 255).astype(np.uint8)
    picture = (near[0] / 127.5 - 1).astype(np.float32)
    assert [number for number, _ in rank([far, near], picture)] == [1, 0]
    assert [number for number, _ in rank([near, near], picture)] == [0, 1]  # the earlier one


def test_six_decibels_need_twice_the_motion() -> None:
    once, twice = Figures(1.0, 30.0, 0.0), Figures(2 * (1 + LEAST) - LEAST, 23.979, 0.0)
    assert once.score == pytest.approx(twice.score, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (2, 8, 24, 3), (9, 1, 1, 3), (5, 70, 130, 3)])
def test_any_size_and_number_of_frames_has_figures(shape: tuple[int, ...]) -> None:
    video = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found = figures(video)
    assert np.isfinite([*found, found.score]).all()
    assert found.first == BEST


@pytest.mark.filterwarnings("error")
def test_a_black_video_has_figures() -> None:
    black = np.zeros((9, 64, 64, 3), np.uint8)
    assert figures(black) == (0.0, BEST, 0.0)
