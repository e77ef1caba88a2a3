"""The notebooks, as a new user runs them: from top to bottom, in their own kernel, in another
folder, on this machine's CPU."""

import asyncio
import base64
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import read_recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Jupyter's packages warn about each other
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

from cogi2v_jax.media.recipe import LATENTS
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.weights.needed_files import LORA_FILE

FOLDER = Path(__file__).parents[2] / "notebooks"
SAMPLING = ("colab_tpu", "kaggle_tpu")
NAMES = (*SAMPLING, "lora")
Run = Callable[..., nbformat.NotebookNode]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the cells of a notebook, with some text replaced if given, with home and working
    directory in `tmp_path`."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
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
        where = {"metadata": {"path": str(work)}}
        client = NotebookClient(notebook, timeout=400, kernel_name="python3", resources=where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                asyncio.run(client.async_execute())
            except CellExecutionError as error:
                notebook.metadata["error"] = str(error)
        assert list(work.iterdir()) == []  # a notebook writes nothing where it runs
        return notebook

    return execute


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def shown(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The videos in the output of the last cell."""
    html = notebook.cells[-1].outputs[-1]["data"]["text/html"]
    found = re.findall(r'src="data:video/mp4;base64,([^"]+)"', html)
    return [base64.b64decode(video) for video in found]


def results(tmp_path: Path) -> set[str]:
    return {path.suffix for path in (tmp_path / "home" / "cogi2v").iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_makes(name: str) -> None:
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert set(build.NOTEBOOKS) == set(NAMES)
    made = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made == build.notebook(name), "run `python notebooks/build.py`"


@pytest.mark.parametrize("name", ["colab_tpu", pytest.param("kaggle_tpu", marks=pytest.mark.slow)])
def test_run_all_ends_with_a_video_in_the_page_and_a_second_run_only_decodes(
    name: str, run: Run, tmp_path: Path
) -> None:
    first = run(name)
    assert "error" not in first.metadata
    said = printed(first)
    assert "there is no accelerator, so this takes cogi2v-tiny" in said
    assert "9 frames of 64x64, 50 steps" in said
    assert re.search(r"seconds: (\w+ \d+\.\d  ){5}\w+ \d+\.\d", said)
    (video,) = (tmp_path / "home" / "cogi2v").glob("*.mp4")
    assert shown(first) == [video.read_bytes()]
    assert read_frames(video).shape == (9, 64, 64, 3)
    assert read_recipe(video)["prompt"] == "the cyan triangle grows"

    # A machine that is lost while it decodes leaves latents and no video.
    video.unlink()
    assert results(tmp_path) == {".safetensors"}
    second = run(name)
    assert "error" not in second.metadata
    assert f"sampled before: {video.with_suffix('')}{LATENTS}" in printed(second)
    assert "seconds:" not in printed(second)
    assert shown(second) == shown(first)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_released_checkpoint_that_cannot_run_here_stops_the_notebook_with_one_sentence(
    name: str, run: Run, tmp_path: Path
) -> None:
    notebook = run(name, ('wanted = \\"auto\\"', 'wanted = \\"cogvideox-5b-i2v\\"'))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    assert error["ename"] == "Unfit"
    assert error["traceback"] == [error["evalue"]]
    assert error["evalue"].startswith("cogvideox-5b-i2v must run on an accelerator: got a CPU")
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [1, 2, None, None, None, None]
    assert not (tmp_path / "home" / "cogi2v").exists()


def test_a_setting_that_the_model_cannot_compute_is_refused_before_weights_load(run: Run) -> None:
    notebook = run("kaggle_tpu", ("num_frames = None", "num_frames = 10"))
    assert "num_frames must be 8k+1 for cogi2v-tiny" in notebook.metadata["error"]
    assert "the weights are in" not in printed(notebook)


FEW = ("number = 1600", "number = 16"), ("steps = None", "steps = 22")


def test_clips_become_a_lora_and_videos(run: Run, tmp_path: Path) -> None:
    notebook = run("lora", *FEW)
    assert "error" not in notebook.metadata
    folder = tmp_path / "home" / "cogi2v" / "circles"
    videos = [folder / f"{name}.mp4" for name in ("without", "with")]
    assert shown(notebook) == [video.read_bytes() for video in videos]
    assert (read_frames(videos[0]) != read_frames(videos[1])).any()
    assert f"the LoRA is {folder / 'lora' / LORA_FILE}" in printed(notebook)


@pytest.mark.slow
def test_a_second_run_of_the_training_only_samples(run: Run, tmp_path: Path) -> None:
    first = run("lora", *FEW)
    lora = tmp_path / "home" / "cogi2v" / "circles" / "lora"
    kept = (lora / "metrics.jsonl").read_bytes()
    second = run("lora", *FEW)
    assert "error" not in second.metadata
    assert (lora / "metrics.jsonl").read_bytes() == kept
    assert shown(second) == shown(first)


def test_clips_that_are_not_there_stop_the_notebook_before_training(run: Run) -> None:
    notebook = run("lora", ('clips = \\"example\\"', 'clips = \\"./missing\\"'))
    assert "stopped: the reason is above" in notebook.metadata["error"]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert "found no missing" in "".join(said)
    assert notebook.cells[-1].execution_count is None


def start_with(tmp_path: Path, code: str) -> None:
    """Makes kernels run some code before the first cell."""
    folder = tmp_path / "home" / "ipython" / "profile_default" / "startup"
    folder.mkdir(parents=True)
    (folder / "first.py").write_text(code)


@pytest.mark.parametrize(
    ("name", "menu"),
    [
        ("colab_tpu", "Runtime → Restart session and run all"),
        ("kaggle_tpu", "Run → Restart"),
        ("lora", "Runtime → Restart session and run all"),
    ],
)
def test_a_library_that_was_imported_before_pip_replaced_it_stops_the_first_cell_with_one_line(
    name: str, menu: str, run: Run, tmp_path: Path
) -> None:
    start_with(tmp_path, "import numpy; numpy.__version__ = '2.1.3'")
    notebook = run(name)
    first, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (error,) = first.outputs
    (line,) = error["traceback"]
    assert re.match(r"numpy must be [\d.]+ in this session: got 2\.1\.3, which was imported", line)
    assert f"; choose {menu}" in line
    assert {cell.execution_count for cell in others} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_pip_cannot_install_stops_the_first_cell_without_a_traceback(
    name: str, run: Run, tmp_path: Path
) -> None:
    start_with(tmp_path, "import sys; sys.modules['cogi2v_jax'] = None")
    notebook = run(name, ('\\"cogi2v-jax[tpu]\\"', '\\"./missing\\"'))
    first, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (output,) = first.outputs
    assert output["text"].startswith("UsageError: pip cannot install ./missing: ")
    assert "ERROR: Invalid requirement: './missing'" in output["text"]  # between pip's colours
    assert "Traceback" not in output["text"]
    assert {cell.execution_count for cell in others} == {None}


# Stand-ins for the modules of the platforms, with the same signatures.
UPLOAD = """
def upload_file(path):
    open(path, "wb").write(open({picture!r}, "rb").read())
"""
USER_DATA = """
def get(key):
    return "the token of " + key
"""
SECRETS = """
class UserSecretsClient:
    def get_secret(self, key):
        return "the token of " + key
"""
PLATFORMS = {
    "colab_tpu": {"google/colab/files.py": UPLOAD, "google/colab/userdata.py": USER_DATA},
    "kaggle_tpu": {"kaggle_secrets.py": SECRETS},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_a_platform_gives_the_users_picture_and_token(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    steps = "num_inference_steps = None", "num_inference_steps = 2"
    token = "models = cog", "print(os.environ['HF_TOKEN'])\\nmodels = cog"
    notebook = run(name, chosen[name], steps, token)
    assert "error" not in notebook.metadata
    assert "the token of HF_TOKEN\n" in printed(notebook)
    (video,) = (tmp_path / "home" / "cogi2v").glob("*.mp4")
    red, green, _ = read_frames(video)[0].mean(axis=(0, 1))
    assert red > 2 * green
