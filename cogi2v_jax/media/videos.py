"""Frames to and from mp4, gif or a folder of png files, written with the recipe of the video
inside."""

import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, PngImagePlugin

from ..disk import check_target, first_line, replace_when_done
from ..settings import RATE
from .images import decoding, read_image

FRAME_NAME = re.compile(r"\d{5,}\.png")
# Pictures one after the other, which state their size. Every frame of the input comes once: with
# "-r" before the input, setpts numbers them anew. (-fps_mode passthrough came with ffmpeg 5.1, and
# -vsync passthrough is gone in 9.)
PPM = "-map 0:v:0 -vf setpts=N -f image2pipe -c:v ppm -pix_fmt rgb24 -"
PPM_HEAD = re.compile(rb"P6\n(\d+) (\d+)\n255\n")
# BT.709, with tags: without them every player guesses the colours from the picture's size.
COLOURS = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
H264 = f"-vf {COLOURS} -c:v libx264 -movflags +faststart -f mp4"
SMALL = 256  # pixels of the shorter side, below which blocks of the codec would be seen
ENLARGED = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}


class FfmpegError(OSError):
    """An ffmpeg that does not start or fails, in one line."""


def check_name(path: Path) -> None:
    """Raises ValueError for an output without a name: nothing, or a suffix alone."""
    if path.name.lower() in WRITERS:
        raise ValueError(f"output must have a name before its suffix: got {path}")


def check_output(path: str | os.PathLike) -> Path:
    """The path, if write_video can write there. Called before any slow work.

    `x.mp4` and `x.gif` are files; `x.png`, `x` and `x/` all mean a folder `x` of png frames. Raises
    ValueError for another suffix, a suffix alone, a parent folder that is missing or read-only,
    and a folder with other files than frames written before; FfmpegError where ffmpeg cannot write
    an mp4.
    """
    path = check_place(path)
    if path.suffix.lower() == ".mp4":
        _try_encoder()
    return path


def check_place(path: str | os.PathLike) -> Path:
    """The path, as `check_output` checks it, without a try of the encoder."""
    path = Path(path)
    check_name(path)
    if path.suffix.lower() not in WRITERS:
        rule = "end in .mp4, .gif, or .png or nothing for a folder of frames"
        raise ValueError(f"output must {rule}: got {path}")
    is_file = path.suffix.lower() in (".mp4", ".gif")
    check_target("output", path, folder=not is_file)
    target = written_path(path)
    if not is_file and target.exists():
        names = set(os.listdir(target)) if target.is_dir() else {"a file"}
        ours = "recipe.json" in names and all(
            FRAME_NAME.fullmatch(name) for name in names - {"recipe.json"}
        )
        # The folder is replaced, which a mount point (a container's /out) can't be.
        if (names and not ours) or os.path.ismount(os.path.realpath(target)):
            rule = "be new, empty or hold only frames written before"
            raise ValueError(f"output folder must {rule}: got {target}; name one inside it")
    return path


def write_video(
    path: str | os.PathLike, frames: np.ndarray, fps: float | int, recipe: dict
) -> Path:
    """Writes uint8 frames [f h w 3] at `fps` frames a second, and the recipe. Returns the path that
    was written.

    `.mp4` is H.264 that browsers play (an odd side is extended by one repeated pixel), `.gif`
    loops, a folder holds 00000.png... and recipe.json. The output appears whole or not at all.
    Raises ValueError for bad arguments, FfmpegError where ffmpeg fails.
    """
    path = check_output(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        got = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"frames must be uint8 [f h w 3] with no side 0: got {got}")
    if not RATE.fits(fps):
        raise ValueError(f"fps must be {RATE.rule}: got {fps!r}")
    try:
        # ASCII on one line, which is the same in every container's encoding.
        text = json.dumps(recipe, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe must hold only what JSON can: got {error}") from error
    target = written_path(path)
    with replace_when_done(target) as part:
        WRITERS[path.suffix.lower()](part, frames, fps, text)
    return target


def read_frames(path: str | os.PathLike, most: int | None = None) -> np.ndarray:
    """The frames of a video file, a gif or a frame folder as uint8 [f h w 3], or the first `most`
    of them. mp4 and gif are lossy, and a gif has one longer frame for equal neighbours. Raises
    FileNotFoundError for a missing path, ValueError for what is no video, FfmpegError where ffmpeg
    can read none."""
    path = _existing(path)
    if path.is_dir():
        return np.stack([np.asarray(read_image(file)) for file in video_files(path)[:most]])
    if path.suffix.lower() in (".gif", ".png"):
        with decoding("video", path), Image.open(path) as image:
            every = itertools.islice(ImageSequence.Iterator(image), most)
            frames = (frame.convert("RGB") for frame in every)
            return np.stack([np.asarray(frame) for frame in frames])
    _try_decoder()
    with decoding("video", path):
        return _decode("-i", f"file:{path}", *(["-frames:v", str(most)] if most else []))


def video_files(path: str | os.PathLike) -> list[Path]:
    """The files that `read_frames` reads. Raises as it does."""
    path = _existing(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if FRAME_NAME.fullmatch(file.name))
    if not files:
        raise ValueError(f"frame folder must hold 00000.png, 00001.png, ...: got {path}")
    return files


def enlarge(frames: np.ndarray, way: str, factor: int) -> np.ndarray:
    """uint8 frames [f h w 3] with sides that are `factor` times as long, one of `ENLARGED`."""
    size = frames.shape[2] * factor, frames.shape[1] * factor
    pictures = (Image.fromarray(frame).resize(size, ENLARGED[way]) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def written_path(path: Path) -> Path:
    """Where `write_video` writes what is to go to this path: a folder of frames has no suffix."""
    return path.with_suffix("") if path.suffix.lower() == ".png" else path


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    path = path if path.is_file() else written_path(path)
    if not path.exists():
        raise FileNotFoundError(f"video must be an existing file or frame folder: got {path}")
    return path


def _write_mp4(part: Path, frames: np.ndarray, fps: float | int, recipe: str) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:  # yuv420p halves both sides
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
        height, width = frames.shape[1:3]
    # The recipe is passed in a file: an argument has a length limit and shows in the process list.
    tags = part.with_name("tags")
    tags.write_text(";FFMETADATA1\ncomment=" + re.sub(r"([=;#\\])", r"\\\1", recipe) + "\n")
    raw = f"-f rawvideo -pix_fmt rgb24 -video_size {width}x{height} -framerate {fps} -i pipe:0"
    meta = ("-f", "ffmetadata", "-i", f"file:{tags}", "-map", "0:v", "-map_metadata", "1")
    quality = ("-crf", "4" if min(height, width) < SMALL else "17")
    arguments = (*raw.split(), *meta, *H264.split(), *quality, f"file:{part}")
    _ffmpeg(*arguments, stdin=np.ascontiguousarray(frames).data.cast("B"))
    if not part.is_file() or part.read_bytes()[4:8] != b"ftyp":
        raise FfmpegError("ffmpeg failed: it ended without an error and wrote no mp4")


def _try_encoder() -> None:
    """Writes a small mp4 as every other one is written: some builds of ffmpeg lack the encoder."""
    with tempfile.TemporaryDirectory(prefix="cogi2v-") as folder:
        try:
            _write_mp4(Path(folder, "x.mp4"), np.zeros((2, 16, 16, 3), np.uint8), 8, "{}")
        except FfmpegError as error:
            way = "unset IMAGEIO_FFMPEG_EXE, or write a .gif or .png"
            raise FfmpegError(f"{error}; an mp4 needs an ffmpeg with libx264: {way}") from None


def _decode(*source: str, stdin: bytes = b"") -> np.ndarray:
    """The frames of ffmpeg's input as uint8 [f h w 3]."""
    stream = _ffmpeg("-r", "25", *source, *PPM.split(), stdin=stdin)
    head = PPM_HEAD.match(stream)
    if not head:
        raise FfmpegError("ffmpeg failed: it ended without an error and wrote no picture")
    width, height = map(int, head.groups())
    pictures = np.frombuffer(stream, np.uint8).reshape(-1, head.end() + height * width * 3)
    return pictures[:, head.end() :].reshape(-1, height, width, 3)


def _try_decoder() -> None:
    """Reads raw pixels as every video is read: what ffmpeg lacks is no fault of a video."""
    raw = "-f rawvideo -pix_fmt rgb24 -video_size 16x16 -i pipe:0"
    try:
        _decode(*raw.split(), stdin=bytes(16 * 16 * 3))
    except FfmpegError as error:
        way = "unset IMAGEIO_FFMPEG_EXE"
        raise FfmpegError(f"{error}; videos are read by an ffmpeg with ppm: {way}") from None


def gif_steps(count: int, fps: float | int) -> list[int]:
    """How long the frames of a gif are shown, in hundredths of a second: its unit. Rounding the
    clock instead of each step keeps the length (8 fps is 12, 13, 12, 13, ...). Browsers show steps
    under 2 as 10."""
    clock = [round(index * 100 / fps) for index in range(count + 1)]
    return [max(2, later - now) for now, later in itertools.pairwise(clock)]


def _write_gif(part: Path, frames: np.ndarray, fps: float | int, recipe: str) -> None:
    steps = [10 * step for step in gif_steps(len(frames), fps)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    many = {"save_all": True, "append_images": rest, "duration": steps, "loop": 0}
    first.save(part, format="GIF", comment=recipe, **many)


def _write_folder(part: Path, frames: np.ndarray, fps: float | int, recipe: str) -> None:
    part.mkdir()
    (part / "recipe.json").write_text(json.dumps(json.loads(recipe), indent=2) + "\n")
    info = PngImagePlugin.PngInfo()
    info.add_text("recipe", recipe)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(part / f"{index:05d}.png", pnginfo=info)


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_folder, "": _write_folder}


def _ffmpeg(*arguments: str, stdin: bytes | memoryview = b"") -> bytes:
    """Runs the bundled ffmpeg, or that of IMAGEIO_FFMPEG_EXE, and returns its stdout. Raises
    FfmpegError with its last line where it fails."""
    import imageio_ffmpeg

    options = ("-hide_banner", "-loglevel", "error")
    try:
        command = (imageio_ffmpeg.get_ffmpeg_exe(), *options, *arguments)
        done = subprocess.run(command, input=stdin, capture_output=True)
    except (RuntimeError, OSError) as error:  # of imageio_ffmpeg, and of the system
        raise FfmpegError(f"ffmpeg does not start: {first_line(error)}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise FfmpegError(f"ffmpeg failed: {said.splitlines()[-1].strip()}")
    return done.stdout
