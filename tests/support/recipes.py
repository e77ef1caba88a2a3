"""The recipe that a video carries, read with what any other program has."""

import json
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
from PIL import Image


def read_recipe(path: str | Path) -> dict:
    """The recipe inside an mp4, a gif, a frame folder (also as x.png) or one of its frames."""
    path = Path(path)
    path = path if path.exists() else path.with_suffix("")
    if path.is_dir():
        return json.loads((path / "recipe.json").read_text())
    if path.suffix.lower() in (".gif", ".png"):
        with Image.open(path) as image:
            return json.loads(image.info["recipe" if image.format == "PNG" else "comment"])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    tags = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (comment,) = re.findall(r"^comment=(.*)$", tags, re.MULTILINE)
    return json.loads(re.sub(r"\\(.)", r"\1", comment))
