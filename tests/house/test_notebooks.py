"""The notebooks, as a stranger runs them: from top to bottom, in a kernel of their own, in another folder, on this machine's CPU."""

import asyncio
import base64
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # whatever Jupyter's packages say of each other while they are imported
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

from cogi2v_jax.media.recipe import LATENTS
from cogi2v_jax.media.videos import read_frames, read_recipe

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("colab_tpu", "kaggle_tpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook's cells with the home and the working directory in `tmp_path`, as they are or with some text replaced."""
    home = tmp_path / "home"
    elsewhere = tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))

    def execute(name: str, *changes: tuple[str, str]) -> nbformat.NotebookNode:
        text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        client = NotebookClient(
            notebook,
            timeout=400,
            kernel_name="python3",
            resources={"metadata": {"path": str(elsewhere)}},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                asyncio.run(client.async_execute())
            except CellExecutionError as error:
                notebook.metadata["error"] = str(error)
        assert list(elsewhere.iterdir()) == []  # nothing depends on where it runs
        return notebook

    return execute


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )


def shown(notebook: nbformat.NotebookNode) -> bytes:
    """The video inside the last cell's output."""
    html = notebook.cells[-1].outputs[-1]["data"]["text/html"]
    found = re.search(r'src="data:video/mp4;base64,([^"]+)"', html)
    assert found, html[:200]
    return base64.b64decode(found[1])


def results(tmp_path: Path) -> set[str]:
    return {path.suffix for path in (tmp_path / "home" / "cogi2v").iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_makes(name):
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert set(build.NOTEBOOKS) == set(NAMES)
    made = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made == build.notebook(name), "run `python notebooks/build.py`"


@pytest.mark.parametrize("name", NAMES)
def test_run_all_ends_with_a_video_in_the_page_and_a_second_run_resumes(name, run, tmp_path):
    first = run(name)
    assert "error" not in first.metadata
    said = printed(first)
    assert "there is no accelerator, so this takes cogi2v-tiny" in said
    assert "9 frames of 64x64, 50 steps" in said
    assert re.search(r"seconds: (\w+ \d+\.\d  ){5}\w+ \d+\.\d", said)
    (video,) = (tmp_path / "home" / "cogi2v").glob("*.mp4")
    assert shown(first) == video.read_bytes()
    assert read_frames(video).shape == (9, 64, 64, 3)
    assert read_recipe(video)["prompt"] == "the cyan triangle grows"

    # What a machine that is lost while decoding leaves behind: latents, and no video.
    video.unlink()
    assert results(tmp_path) == {".safetensors"}
    second = run(name)
    assert "error" not in second.metadata
    assert f"sampled before: {video.with_suffix('')}{LATENTS}" in printed(second)
    assert "seconds:" not in printed(second)
    assert shown(second) == shown(first)


@pytest.mark.parametrize("name", NAMES)
def test_a_released_checkpoint_that_cannot_run_here_stops_the_notebook_with_one_sentence(
    name, run, tmp_path
):
    notebook = run(name, ('wanted = \\"auto\\"', 'wanted = \\"cogvideox-5b-i2v\\"'))
    (error,) = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert error["ename"] == "Unfit"
    assert error["traceback"] == [error["evalue"]]
    assert error["evalue"].startswith("cogvideox-5b-i2v must run on an accelerator: got a CPU")
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [
        1,
        2,
        None,
        None,
        None,
        None,
    ]
    assert not (tmp_path / "home" / "cogi2v").exists()


def test_a_setting_that_the_model_cannot_compute_is_refused_before_the_weights(run):
    notebook = run("kaggle_tpu", ("num_frames = None", "num_frames = 10"))
    assert "num_frames must be 8k+1 and at most 9 for cogi2v-tiny" in notebook.metadata["error"]
    assert "the weights are in" not in printed(notebook)


PLATFORMS = {
    "colab_tpu": {
        "google/colab/files.py": "def upload_file(path): open(path, 'wb').write(open({picture!r}, 'rb').read())",
        "google/colab/userdata.py": "def get(key): return 'the token of ' + key",
    },
    "kaggle_tpu": {
        "kaggle_secrets.py": "class UserSecretsClient:\n    def get_secret(self, key): return 'the token of ' + key"
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_platform_gives_the_users_picture_and_token(name, run, tmp_path, monkeypatch):
    """With stand-ins for the platform's modules, of the same signatures."""
    from PIL import Image

    picture = str(tmp_path / "red.png")
    Image.new("RGB", (80, 60), (200, 30, 30)).save(picture)
    for path, text in PLATFORMS[name].items():
        (tmp_path / "platform" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "platform" / path).write_text(text.format(picture=picture))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "platform"), *sys.path]))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    chosen = {
        "colab_tpu": ('picture = \\"example\\"', 'picture = \\"upload\\"'),
        "kaggle_tpu": ("picture = None", f'picture = \\"{picture}\\"'),
    }
    notebook = run(
        name,
        chosen[name],
        ("num_inference_steps = None", "num_inference_steps = 2"),
        ("models = cog", "print(os.environ['HF_TOKEN'])\\nmodels = cog"),
    )
    assert "error" not in notebook.metadata
    assert "the token of HF_TOKEN\n" in printed(notebook)
    (video,) = (tmp_path / "home" / "cogi2v").glob("*.mp4")
    red, green, _ = read_frames(video)[0].mean(axis=(0, 1))
    assert red > 2 * green
