"""Runs a notebook in an environment with the libraries that a platform has preinstalled, from its
first cell, and prints what each cell prints. Results are in README.md.

    python notebooks/try_install.py [colab_tpu | kaggle_tpu] [--imported numpy jax]
        [--preinstalled numpy==2.1.3 jax==0.7.2 libtpu==0.0.21.1]

It uses the Python that runs it and its packages nbclient and ipykernel, installs this checkout, and
needs 4 GB of disk. Where the first cell asks for a restart, the notebook starts again in a new
session, as after that click.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
COLAB = ("numpy==2.1.3", "jax==0.7.2", "libtpu==0.0.21.1")
SHOWN = re.compile(r"(?:jax|jaxlib|libtpu|ml_dtypes|numpy)==.*")


def make_environment(folder: Path, preinstalled: list[str], imported: list[str]) -> None:
    """An environment whose kernel imports libraries before the first cell."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    ipykernel = f"ipykernel=={version('ipykernel')}"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", ipykernel, *preinstalled]
    if subprocess.run(pip).returncode:
        sys.exit(f"pip cannot install {' '.join(preinstalled)}")
    kernel = [folder / "bin" / "python", "-m", "ipykernel", "install", "--prefix", folder]
    subprocess.run([*kernel, "--name", "image"], check=True, capture_output=True)
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "first.py").write_text("".join(f"import {name}\n" for name in imported))
    os.environ |= {"JUPYTER_PATH": str(folder / "share" / "jupyter"), "HOME": str(folder)}
    os.environ |= {"IPYTHONDIR": str(folder / "ipython"), "XDG_CACHE_HOME": str(folder / "cache")}


def run(name: str, folder: Path) -> bool:
    """Runs a notebook in a new session. Returns whether its first cell asked for another one."""
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    published, checkout = 'source = \\"cogi2v-jax[tpu]\\"', f'source = \\"{FOLDER.parent}[tpu]\\"'
    assert published in text
    notebook = nbformat.reads(text.replace(published, checkout), as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    shutil.rmtree(FOLDER.parent / "build", ignore_errors=True)  # pip would install what is there
    client = NotebookClient(notebook, timeout=900, kernel_name="image", resources=resources)
    error, begin = "", time.monotonic()
    try:
        client.execute()
    except CellExecutionError as stopped:
        error = str(stopped)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            shown = output.get("text") or "\n".join(output.get("traceback", ["(a display)"]))
            print(f"cell {number}: {shown.strip()}")
    ran = sum(cell.execution_count is not None for cell in cells)
    print(f"{ran} of {len(cells)} cells ran in {time.monotonic() - begin:.0f} s", flush=True)
    if error and "imported before pip" not in error:
        sys.exit("the notebook stopped")
    return bool(error)


def list_versions(folder: Path) -> str:
    freeze = [folder / "bin" / "python", "-m", "pip", "freeze"]
    lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    return ", ".join(SHOWN.findall(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("name", nargs="?", default="colab_tpu", choices=("colab_tpu", "kaggle_tpu"))
    parser.add_argument("--imported", nargs="*", default=["numpy"], metavar="MODULE")
    parser.add_argument("--preinstalled", nargs="*", default=COLAB, metavar="PACKAGE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_environment(folder, args.preinstalled, args.imported)
        print(f"Python {sys.version.split()[0]}, {list_versions(folder)}")
        print(
            f"imported before the first cell: {', '.join(args.imported) or 'nothing'}", flush=True
        )
        restarted = run(args.name, folder)
        if restarted and run(args.name, folder):
            sys.exit("the notebook asked for a second restart")
        print(f"after it: {list_versions(folder)}")
        print(f"{args.name} ran {'after one restart' if restarted else 'without a restart'}")


if __name__ == "__main__":
    main()
