"""What there is to convert: a diffusers folder, parts of which may come from other folders and from
single files. Everything is found by looking inside."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax.config import PARTS, CheckpointConfig
from cogi2v_jax.disk import read_json
from cogi2v_jax.weights.checkpoint import CONFIG_FILES, MANIFEST
from cogi2v_jax.weights.hub import locate, report
from cogi2v_jax.weights.pieces import NETWORKS

from . import lookalikes
from .diffusers import STEMS, weight_files
from .parts import DIFFUSERS, MARKS, WIDE, Tensor, Weights, of_part, parts_of
from .tensor_files import open_file

MUST = "SRC must be a folder, a file"


@dataclasses.dataclass(frozen=True)
class Given:
    """A part from elsewhere than the folder: in its files, which an index may promise tensors of,
    or already opened from a single file."""

    files: list[Path]
    promised: frozenset[str] = frozenset()
    opened: Weights | None = None
    config: Path | None = None  # of its own

    @staticmethod
    def of(folder: Path) -> "Given":
        files, promised = weight_files(folder)
        return Given(files, frozenset(promised), config=folder / "config.json")


class Source:
    """A diffusers folder, with some of its parts replaced. Raises FileNotFoundError or ValueError,
    in one line, for what is no such folder. `wide` is what float8 weights are read as."""

    def __init__(
        self, folder: Path, replaced: Mapping[str, Given] | None = None, wide: np.dtype[Any] = WIDE
    ):
        self.folder, self.wide = folder, wide
        self.replaced = dict(replaced or {})
        if not (folder / "transformer").is_dir() and not (folder / "vae").is_dir():
            raise FileNotFoundError(
                f"{folder} must be a diffusers or converted folder: found no transformer/ in it"
            )
        own = {part: given.config for part, given in self.replaced.items()}
        self.settings = {
            part: own.get(part) or folder / part / name for part, name in CONFIG_FILES.items()
        }
        self.config = CheckpointConfig.from_parts(
            {part: read_json(self.settings[part]) for part in PARTS}, str(folder)
        )
        self._given = {
            part: self.replaced.get(part) or Given.of(folder / part) for part in NETWORKS
        }
        self._weights: dict[str, list[Weights]] = {}
        self._homes: dict[str, dict[str, Weights]] = {}
        self.tokenizer_files = sorted(
            path for path in (folder / "tokenizer").glob("*") if path.is_file()
        )
        if not any(
            path.name in ("spiece.model", "tokenizer.json") for path in self.tokenizer_files
        ):
            raise FileNotFoundError(
                f"{folder / 'tokenizer'} must hold spiece.model or tokenizer.json: found neither"
            )

    @property
    def parts(self) -> dict[str, list[Path]]:
        """The weight files of every part."""
        return {part: given.files for part, given in self._given.items()}

    @cached_property
    def files(self) -> list[Path]:
        """All that decides what the checkpoint is: configurations, tokenizer and weights."""
        return [
            *self.settings.values(),
            *self.tokenizer_files,
            *(file for files in self.parts.values() for file in files),
        ]

    def weights(self, part: str) -> list[Weights]:
        """A part's files, opened."""
        if part not in self._weights:
            given = self._given[part]
            opened = (
                [given.opened]
                if given.opened
                else [of_part(open_file(file), part) for file in given.files]
            )
            self._weights[part] = [
                dataclasses.replace(weights, wide=self.wide) for weights in opened
            ]
        return self._weights[part]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part, under diffusers' name, from the headers alone."""
        found: dict[str, Tensor] = {}
        homes: dict[str, Weights] = {}
        for weights in self.weights(part):
            for name, tensor in weights.tensors().items():
                if name in found:
                    file = tensor.file
                    raise ValueError(
                        f"{file.parent}: {name} must be in one file: got it in {found[name].file.name} and {file.name}"
                    )
                found[name], homes[name] = tensor, weights
        self._homes[part] = homes
        return found

    def read(self, part: str, name: str) -> np.ndarray:
        """One tensor."""
        if part not in self._homes:
            self.tensors(part)
        return self._homes[part][name].read(name)

    def absent(self, part: str) -> set[str]:
        """Tensors that an index promises and no file holds."""
        return set(self._given[part].promised) - {
            name for weights in self.weights(part) for name in weights.file.entries
        }

    def shard(self, part: str, tensor: Tensor) -> str:
        """The name of the safetensors file that a tensor would have in a diffusers folder."""
        if tensor.file.suffix == ".safetensors" and not self._given[part].opened:
            return tensor.file.name
        number = re.search(r"-\d+-of-\d+(?=\.bin$)", tensor.file.name)
        return f"{STEMS[part]}{number[0] if number else ''}.safetensors"


def gather(
    sources: Sequence[str | os.PathLike[str]],
    wide: np.dtype[Any] = WIDE,
    say: Callable[[str], None] = report,
) -> Source:
    """One checkpoint of a diffusers folder (here, on the hub, or at gs://) and what is to replace
    parts of it: further such folders, a part's folder, single files, a folder of SAT's. Raises
    ValueError or FileNotFoundError, in one line."""
    base: Path | None = None
    replaced: dict[str, Given] = {}
    for given in sources:
        path = locate(given, say, MUST)
        stated = _stated(path)
        if not stated:
            replaced |= parts_at(path)
        elif base is None and not replaced:
            base = path
        elif len(stated) < len(NETWORKS):
            replaced |= {part: Given.of(path / part) for part in stated}
        else:
            raise ValueError(
                f"SRC must begin with the whole folder, of which the others replace parts: got {given} behind another"
            )
    if base is None:
        missing = [part for part in (*PARTS, "tokenizer") if part not in replaced]
        raise ValueError(
            f"SRC must begin with a diffusers folder, for the configuration and for {', '.join(missing)}: "
            f"got {' and '.join(replaced)} alone; for example CogVideoX-5b-I2V {' '.join(map(str, sources))}"
        )
    return Source(base, replaced, wide)


def _stated(path: Path) -> list[str]:
    """The parts of a folder laid out as a diffusers one, complete or not. Empty for a part's
    folder, for SAT's and for files."""
    if (path / MANIFEST).is_file():
        raise ValueError(
            f"SRC must be weights of PyTorch: got {path}, a converted folder; cogi2v-convert to-torch makes some of it"
        )
    stated = [part for part in NETWORKS if (path / part / CONFIG_FILES[part]).is_file()]
    whole = (path / "model_index.json").is_file() or (
        (path / "transformer").is_dir() and not sat_files(path)
    )
    return stated or (list(NETWORKS) if whole else [])


def parts_at(path: Path) -> dict[str, Given]:
    """The parts that a file, a part's folder or a folder of SAT's holds."""
    if path.is_file():
        return {part: Given([path], opened=weights) for part, weights in parts_of(path).items()}
    if (path / "config.json").is_file():
        given = Given.of(path)
        names = {name for file in given.files for name in open_file(file).entries}
        for part, naming, mark in MARKS:
            if mark in names and naming == DIFFUSERS:
                return {part: given}
        raise ValueError(
            f"{path} must hold a transformer, a VAE or a T5 encoder of this family: got {lookalikes.described(names)}"
        )
    found: dict[str, Given] = {}
    for file in sat_files(path):
        for part, weights in parts_of(file).items():
            if part in found:
                raise ValueError(
                    f"{path} must hold one {part}: got {found[part].files[0]} and {file}; give the file itself"
                )
            found[part] = Given([file], opened=weights)
    if not found:
        raise FileNotFoundError(
            f"{path} must be a diffusers or converted folder: found no transformer/ in it"
        )
    return found


def sat_files(folder: Path) -> list[Path]:
    """Checkpoints of SAT at most two folders down: of several steps the one that a file `latest`
    names, and no optimiser's state."""
    files = [
        file for pattern in ("*.pt", "*/*.pt", "*/*/*.pt") for file in sorted(folder.glob(pattern))
    ]
    split = [file for file in files if file.name.startswith("mp_rank_01_")]
    if split:
        raise ValueError(
            f"{folder} must hold the checkpoint of one process, not split over several: got {split[0]}; merge it with SAT first"
        )

    def current(file: Path) -> bool:
        latest = file.parent.parent / "latest"
        return (
            not latest.is_file() or latest.read_text(errors="replace").strip() == file.parent.name
        )

    return [file for file in files if current(file) and "optim_states" not in file.name]
