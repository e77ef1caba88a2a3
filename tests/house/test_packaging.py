"""What is published: the source distribution is the repository, the wheel the two packages with
their data; and links of the documents, which point to files of the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Names of folders and files that are made in the repository and are not of it.
MADE = (".git", ".venv", "__pycache__", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis")
MADE += ("out*.mp4", "*.latents.safetensors")
WRITTEN = {"PKG-INFO", "setup.cfg"}  # by setuptools, into a source distribution
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since building writes beside the sources."""
    copy = tmp_path_factory.mktemp("repository") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*MADE))
    return copy


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, with the wheel that was built from it in `dist`."""
    here = tmp_path_factory.mktemp("source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(here / "dist")]
    built = subprocess.run([*command, str(repository)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (archive,) = (here / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(here, filter="data")
    (folder,) = here.glob("cogi2v_jax-*")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> dict[str, bytes]:
    (path,) = (source.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def of_metadata(wheel: dict[str, bytes], name: str) -> bytes:
    (content,) = (wheel[path] for path in wheel if path.endswith(f".dist-info/{name}"))
    return content


def description(wheel: dict[str, bytes]) -> Message:
    return BytesParser().parsebytes(of_metadata(wheel, "METADATA"))


def test_the_source_distribution_is_the_repository(source: Path, repository: Path) -> None:
    packed = {name for name in files(source) if ".egg-info/" not in name} - WRITTEN
    made = {name for name in files(repository) if ".egg-info/" in name or "build/" in name}
    assert packed == files(repository) - made


def test_the_wheel_has_the_packages_with_their_data_and_nothing_else(
    wheel: dict[str, bytes], repository: Path
) -> None:
    expected = set()
    for folder, package in (("cogi2v_jax", "cogi2v_jax"), ("convert", "cogi2v_convert")):
        expected |= {f"{package}/{name}" for name in files(repository / folder)}
    expected |= {f"cogi2v_jax/configs/{name}" for name in files(repository / "configs")}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_the_wheel_says_what_it_is(wheel: dict[str, bytes]) -> None:
    commands = of_metadata(wheel, "entry_points.txt").decode()
    assert "cogi2v-sample = cogi2v_jax.sample:main" in commands
    assert "cogi2v-convert = cogi2v_convert.__main__:main" in commands
    assert b"Apache License" in of_metadata(wheel, "licenses/LICENSE")
    said = description(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    required = [line for line in said.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert not [line for line in required if re.match("torch|diffusers|transformers", line)]


def test_the_description_of_the_package_needs_no_file_of_the_repository(
    wheel: dict[str, bytes],
) -> None:
    text = description(wheel).get_payload()
    assert "image-to-video" in text
    assert not LINK.findall(text)


@pytest.mark.parametrize(
    "page",
    sorted(name for name in files(ROOT) if re.fullmatch(r"([A-Z]+|docs/\w+|\w+/README)\.md", name)),
)
def test_every_link_of_a_document_points_to_a_file(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_takes_two_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 900
