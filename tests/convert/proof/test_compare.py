"""The comparison of two videos: its figures, what is printed, drawn and recorded, and refusals."""

import json
import math
import shutil

import numpy as np
import pytest
from cogi2v_convert.__main__ import main
from cogi2v_convert.proof import compare
from folders import left, one_line
from pictures import picture
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from cogi2v_jax.media.videos import read_frames, write_video


def clip(count=4, height=24, width=36) -> np.ndarray:
    """Values far enough from 0 and 255 that an offset is the same everywhere."""
    return np.stack(
        [picture(height, width) // 2 + np.uint8(40 + 4 * index) for index in range(count)]
    )


def wang(a, b) -> float:
    """SSIM of two frames exactly as in Wang et al. 2004: an 11x11 Gaussian window at every place
    where all of it is inside."""
    tap = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(tap, tap) / tap.sum() ** 2
    x, y = (
        np.lib.stride_tricks.sliding_window_view(frame.astype(float), (11, 11), (0, 1))
        for frame in (a, b)
    )

    def mean(values):
        return (values * window).sum((-2, -1))

    mx, my = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mx * my + c1) * (2 * (mean(x * y) - mx * my) + c2)
    return (
        likeness / ((mx**2 + my**2 + c1) * (mean(x * x) - mx**2 + mean(y * y) - my**2 + c2))
    ).mean()


def shifted(frame):
    return np.roll(frame, 3, 1)


def blurred(frame):
    return (
        (frame.astype(float) + np.roll(frame, 1, 0) + np.roll(frame, 1, 1) + np.roll(frame, -1, 0))
        / 4
    ).astype(np.uint8)


@pytest.fixture
def videos(tmp_path):
    """Frame folders a and b; b's frame 2 is 9 too bright, its frame 3 shifted, the first two are
    equal."""
    frames = clip()
    write_video(tmp_path / "a", frames, 8, {})
    write_video(
        tmp_path / "b", np.stack([*frames[:2], frames[2] + np.uint8(9), shifted(frames[3])]), 8, {}
    )
    return tmp_path / "a", tmp_path / "b"


# the measures


@pytest.mark.parametrize("offset", [1, 5, 51])
def test_a_constant_offset_has_its_psnr(offset):
    psnr, _ = compare.compare(clip(), clip() + np.uint8(offset))
    np.testing.assert_allclose(
        [psnr.video, *psnr.frames], 20 * math.log10(255 / offset), rtol=1e-12
    )


def test_a_videos_psnr_is_computed_from_the_error_of_all_its_pixels(rng):
    a = clip()
    # The first frame is equal.
    b = (a + rng.integers(0, 5, a.shape) * np.arange(4)[:, None, None, None]).astype(np.uint8)
    psnr, _ = compare.compare(a, b)
    assert psnr.video == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-12)
    assert psnr.frames[0] == math.inf
    np.testing.assert_allclose(
        psnr.frames[1:],
        [peak_signal_noise_ratio(a[i], b[i], data_range=255) for i in (1, 2, 3)],
        rtol=1e-12,
    )


@pytest.mark.parametrize("change", [shifted, blurred])
def test_ssim_of_a_changed_frame_is_below_one_and_as_the_paper_defines(change, rng):
    a = rng.integers(0, 256, (3, 24, 36, 3), np.uint8)
    b = np.stack([a[0], change(a[1]), change(a[2])])
    _, ssim = compare.compare(a, b)
    assert ssim.frames[0] == 1
    assert max(ssim.frames[1:]) < 0.9
    np.testing.assert_allclose(
        ssim.frames, [wang(x, y) for x, y in zip(a, b, strict=True)], atol=1e-9
    )
    assert ssim.video == pytest.approx(ssim.frames.mean())


@pytest.mark.parametrize("worst", [0, 2, 3])
def test_the_worst_frame_is_found_and_of_equal_ones_the_first(worst):
    a, b = clip(), clip() + np.uint8(3)
    b[worst] += 4
    assert compare.compare(a, b).psnr.worst == worst
    b = clip()
    b[worst:] = [shifted(a[worst])] * (4 - worst)
    a[worst:] = a[worst]
    assert compare.compare(a, b).ssim.worst == worst


def test_progress_reports_each_frame(rng):
    reported = []
    compare.compare(clip(3), clip(3), lambda *step: reported.append(step))
    assert reported == [("frames", 1, 3), ("frames", 2, 3), ("frames", 3, 3)]


# what is printed, recorded and drawn


def test_a_table_names_the_worst_frame_by_each_measure(videos, capsys):
    assert main(["compare", *map(str, videos)]) == 0
    head, psnr, ssim, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["video", "worst", "frame"]
    (want_psnr, want_ssim) = compare.compare(*map(read_frames, videos))
    figures = f"{want_psnr.video:.2f} {min(want_psnr.frames):.2f} {want_psnr.worst}"
    assert psnr.split() == ["PSNR", "dB", *figures.split()]
    assert ssim.split() == ["SSIM", f"{want_ssim.video:.4f}", f"{min(want_ssim.frames):.4f}", "3"]
    assert note.startswith("4 frames of 24x36, counted from 0; ")


def test_equal_videos_have_psnr_inf_and_ssim_1_in_print_and_in_json(videos, tmp_path, capsys):
    a, _ = videos
    assert main(["compare", str(a), str(a), "--json", str(tmp_path / "all.json")]) == 0
    _, psnr, ssim, _ = capsys.readouterr().out.splitlines()
    assert psnr.split() == ["PSNR", "dB", "inf", "inf", "0"]
    assert ssim.split() == ["SSIM", "1.0000", "1.0000", "0"]
    text = (tmp_path / "all.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for name, value in (("psnr", "inf"), ("ssim", 1)):
        worst = {"frame": 0, "value": value}
        assert record[name] == {"video": value, "worst": worst, "frames": [value] * 4}


def test_json_holds_every_figure(videos, tmp_path):
    assert main(["compare", *map(str, videos), "--json", str(tmp_path / "all.json")]) == 0
    record = json.loads((tmp_path / "all.json").read_text())
    assert (record["frames"], record["height"], record["width"]) == (4, 24, 36)
    for name, score in compare.compare(*map(read_frames, videos))._asdict().items():
        assert [float(value) for value in record[name]["frames"]] == list(score.frames)
        assert record[name]["video"] == score.video
        assert record[name]["worst"] == {"frame": score.worst, "value": min(score.frames)}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("changed", ["no frame", "the last frame"])
def test_the_curve_is_a_picture_with_a_line_and_a_mark_for_equal_frames(count, changed, tmp_path):
    a, b = clip(count), clip(count)
    if changed == "the last frame":
        b[-1] += 9
    compare.draw(tmp_path / "part", compare.compare(a, b))
    with Image.open(tmp_path / "part") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # Matplotlib's C0 and C2.
    blue, green = (
        (abs(pixels - colour).max(-1) < 12).sum() for colour in ((31, 119, 180), (44, 160, 44))
    )
    assert blue > 100  # points; the mark of one equal frame has about 70
    assert (green > 20) == bool(np.isinf(compare.compare(a, b).psnr.frames).any())


def test_the_curve_and_the_json_leave_no_other_file(videos, tmp_path):
    targets = ["--curve", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    assert main(["compare", *map(str, [*videos, *targets])]) == 0
    assert left(tmp_path) == {"a", "b", "c.png", "c.json"}
    with Image.open(tmp_path / "c.png") as image:
        image.load()


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_video_files_of_every_kind_are_read(kind, tmp_path, capsys):
    names = [str(tmp_path / f"{name}.{kind}") for name in "ab"]
    for name, offset in zip(names, (0, 30), strict=True):
        write_video(name, clip(3) + np.uint8(offset), 8, {})
    assert main(["compare", *names]) == 0
    _, psnr, *_ = capsys.readouterr().out.splitlines()
    assert float(psnr.split()[2]) == pytest.approx(20 * math.log10(255 / 30), abs=1)


# refusals


@pytest.mark.parametrize("other", [clip(3), clip(4, 24, 40), clip(4, 26, 36)])
def test_videos_of_different_shapes_are_refused_with_both_and_nothing_is_written(
    other, videos, tmp_path, capsys
):
    write_video(tmp_path / "other", other, 8, {})
    before = left(tmp_path)
    targets = ["--curve", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    line = one_line(capsys, ["compare", videos[0], tmp_path / "other", *targets])
    count, height, width, _ = other.shape
    want = "videos must have equally many frames of one size: got 4 frames of 24x36 and"
    assert line.endswith(f"{want} {count} frames of {height}x{width}")
    assert left(tmp_path) == before


@pytest.mark.parametrize(("height", "width"), [(10, 36), (24, 10)])
def test_frames_smaller_than_the_window_of_ssim_are_refused_and_those_of_its_size_are_not(
    height, width, tmp_path, capsys
):
    write_video(tmp_path / "small", clip(2, height, width), 8, {})
    line = one_line(capsys, ["compare", tmp_path / "small", tmp_path / "small"])
    assert line.endswith(f"videos must be at least 11x11, the window of SSIM: got {height}x{width}")
    compare.compare(clip(2, 11, 11), clip(2, 11, 11))


def test_a_missing_or_broken_video_is_one_line_and_nothing_is_written(videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    before = left(tmp_path)
    for name in ("missing.mp4", "broken.mp4", "broken.gif", "empty"):
        for pair in ([videos[0], tmp_path / name], [tmp_path / name, videos[0]]):
            line = one_line(capsys, ["compare", *pair, "--curve", tmp_path / "c.png"])
            assert " must " in line
            assert str(tmp_path / name) in line
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "name", "rule"),
    [
        ("--curve", "c.jpg", "curve must end in .png"),
        ("--curve", f"{'c' * 200}.png", "curve must have a name of 1 to 200 bytes"),
        ("--json", "c.mp4", "json must end in .json"),
        ("--curve", "missing/c.png", "curve must be in an existing, writable folder"),
        ("--json", "missing/c.json", "json must be in an existing, writable folder"),
        ("--curve", "folder.png", "curve must be a file or a new name"),
        ("--curve", "a/00000.png", "curve must be outside of what is read"),
        ("--curve", "b/../a/c.png", "curve must be outside of what is read"),
        ("--json", "b/recipe.json", "json must be outside of what is read"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_a_video_is_read(
    option, name, rule, videos, tmp_path, capsys, monkeypatch
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(
        compare, "read_frames", lambda path: pytest.fail("read before the target was checked")
    )
    line = one_line(capsys, ["compare", *videos, option, tmp_path / name])
    assert line.startswith(f"cogi2v-convert: {rule}: got ")


def test_a_curve_does_not_replace_its_input(videos, tmp_path, capsys):
    picture_file = shutil.copy(videos[0] / "00000.png", tmp_path / "one.png")
    line = one_line(capsys, ["compare", picture_file, picture_file, "--curve", picture_file])
    assert "curve must be outside of what is read" in line


@pytest.mark.parametrize("module", ["skimage", "matplotlib"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    module, videos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == module else name)
    library = {"skimage": "scikit-image"}.get(module, module)
    line = one_line(capsys, ["compare", *videos, "--curve", tmp_path / "c.png"])
    assert line == f"cogi2v-convert: compare must have {library}: pip install 'cogi2v-jax[compare]'"
    assert main(["compare", *map(str, videos)]) == (1 if module == "skimage" else 0)


@pytest.mark.parametrize(
    ("stage", "option", "name"), [("draw", "--curve", "c.png"), ("_plain", "--json", "c.json")]
)
def test_a_failure_while_writing_leaves_the_old_file(
    stage, option, name, videos, tmp_path, capsys, monkeypatch
):
    def fail(path, *_):
        if stage == "draw":
            path.write_bytes(b"half")
        raise OSError("disk must have room: got none")

    (tmp_path / name).write_text("old")
    monkeypatch.setattr(compare, stage, fail)
    one_line(capsys, ["compare", *videos, option, tmp_path / name])
    assert (tmp_path / name).read_text() == "old"
    assert left(tmp_path) == {"a", "b", name}
