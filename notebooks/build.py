"""`python notebooks/build.py` writes the .ipynb beside each source in percent format: "# %%" begins
a cell of code, "# %% [markdown]" a cell of prose in comments."""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MARK = re.compile(r"^# %%(?P<prose> \[markdown\])?\n", re.MULTILINE)
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
COLAB: dict[str, Any] = {
    "accelerator": "TPU",
    "colab": {"gpuType": "V5E1", "provenance": []},
}
# Metadata that each platform reads when it opens the notebook.
NOTEBOOKS: dict[str, dict[str, Any]] = {
    "colab_tpu": COLAB,
    "lora": COLAB,
    "kaggle_tpu": {
        "kaggle": {"isInternetEnabled": True, "language": "python", "sourceType": "notebook"}
    },
}


def notebook(name: str) -> str:
    """The text of a notebook's .ipynb, which depends on its source alone."""
    _, *parts = MARK.split((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    cells = [_cell(n, bool(prose), text.strip()) for n, (prose, text) in enumerate(pairs)]
    whole = {"cells": cells, "metadata": NOTEBOOKS[name] | KERNEL}
    whole |= {"nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, prose: bool, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": "markdown" if prose else "code"}
    if not prose:
        cell["execution_count"] = None
    # Colab shows a cell with a title as a form and hides its code.
    form = {"cellView": "form"} if text.startswith("# @title") else {}
    cell |= {"id": f"cell-{number}", "metadata": form}
    if not prose:
        cell["outputs"] = []
    source = re.sub("^# ?", "", text, flags=re.MULTILINE) if prose else text
    return cell | {"source": source.splitlines(keepends=True)}


if __name__ == "__main__":
    for name in NOTEBOOKS:
        (FOLDER / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
