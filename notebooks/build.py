"""`python notebooks/build.py` writes an .ipynb beside every percent-format source, in which "# %%" begins a cell of code and
"# %% [markdown]" one of prose, in comments."""

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
# What each platform reads when the notebook is opened there.
NOTEBOOKS: dict[str, dict[str, Any]] = {
    "colab_tpu": {"accelerator": "TPU", "colab": {"gpuType": "V5E1", "provenance": []}},
    "kaggle_tpu": {
        "kaggle": {"isInternetEnabled": True, "language": "python", "sourceType": "notebook"}
    },
}


def notebook(name: str) -> str:
    """The .ipynb of a source: the same text for the same source."""
    _, *parts = MARK.split((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    cells = [
        _cell(f"cell-{number}", bool(prose), text.strip())
        for number, (prose, text) in enumerate(pairs)
    ]
    whole = {
        "cells": cells,
        "metadata": NOTEBOOKS[name] | KERNEL,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(identity: str, prose: bool, text: str) -> dict[str, Any]:
    if prose:
        text = re.sub("^# ?", "", text, flags=re.MULTILINE)
        return {
            "cell_type": "markdown",
            "id": identity,
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
    # Colab shows a titled cell as a form, with the code folded away behind it.
    metadata = {"cellView": "form"} if text.startswith("# @title") else {}
    code = {
        "cell_type": "code",
        "execution_count": None,
        "id": identity,
        "metadata": metadata,
        "outputs": [],
    }
    return code | {"source": text.splitlines(keepends=True)}


if __name__ == "__main__":
    for name in NOTEBOOKS:
        (FOLDER / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
