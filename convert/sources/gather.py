"""What to convert: a diffusers folder, parts of which other folders and single files may replace.
Contents decide what each source is, not names."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax.config import PARTS, CheckpointConfig
from cogi2v_jax.disk import one_line, read_json
from cogi2v_jax.models import tokenizer
from cogi2v_jax.weights.checkpoint import CONFIG_FILES, MANIFEST
from cogi2v_jax.weights.hub import locate, report
from cogi2v_jax.weights.needed_files import BESIDE
from cogi2v_jax.weights.pieces import NETWORKS

from .diffusers import STEMS, find_weights, list_weights
from .parts import WIDE, Tensor, Weights, of_files, parts_of
from .tensor_files import open_file, plain_names

MUST = "SRC must be a folder, a file"
# What has to be put together first, by the end of a file's path; and by what.
SPLIT = (
    (
        re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt$"),
        "DeepSpeed's ZeRO stage 3",
        "merge them with its zero_to_fp32.py and give the file that it makes",
    ),
    (
        re.compile(r"/zero/[^/]+/(fp32|exp_avg|exp_avg_sq|step)\.pt$"),
        "DeepSpeed's universal checkpoint",
        "give the checkpoint that it was made of",
    ),
    (
        re.compile(r"\.distcp$"),
        "torch's distributed checkpoint",
        "merge them with torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    ),
)
NO_FOLDER = "must be a diffusers or converted folder: found no transformer/ in it"


@dataclasses.dataclass(frozen=True)
class Given:
    """The weights of one part: files, with the names in their index, and their tensors where they
    are known already."""

    files: list[Path]
    promised: frozenset[str] = frozenset()
    opened: Sequence[Weights] = ()
    config: Path | None = None  # of the part's own folder

    @staticmethod
    def of(folder: Path) -> "Given":
        files, promised = find_weights(folder)
        config = folder / "config.json"
        return Given(files, frozenset(promised), config=config if config.is_file() else None)

    @property
    def where(self) -> Path:
        """For messages: the file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


class Source:
    """A diffusers folder, with some of its parts replaced. float8 and GGUF's blocks are read as
    `wide`. Every file but the weights is parsed here. Raises FileNotFoundError or ValueError, in
    one line, for what is no diffusers folder."""

    def __init__(
        self, folder: Path, replaced: Mapping[str, Given] | None = None, wide: np.dtype[Any] = WIDE
    ):
        self.folder, self.wide = folder, wide
        self.replaced = dict(replaced or {})
        if not (folder / "transformer").is_dir() and not (folder / "vae").is_dir():
            raise FileNotFoundError(f"{folder} {NO_FOLDER}")
        own = {part: given.config for part, given in self.replaced.items()}
        self.settings = {
            part: own.get(part) or folder / part / name for part, name in CONFIG_FILES.items()
        }
        self.config = CheckpointConfig.from_parts(
            {part: read_json(self.settings[part]) for part in PARTS},
            {part: str(path.parent if (path := own.get(part)) else folder) for part in PARTS},
        )
        if (index := folder / "model_index.json").is_file():
            read_json(index)
        self._given = {
            part: self.replaced.get(part) or Given.of(folder / part) for part in NETWORKS
        }
        self._weights: dict[str, list[Weights]] = {}
        self._owners: dict[str, dict[str, Weights]] = {}  # by part and tensor
        tokenizer.check_files(folder / "tokenizer")
        self.tokenizer_files = tokenizer.list_files(folder / "tokenizer")

    def place(self, part: str) -> Path:
        """Where a part is from, for messages."""
        return self.replaced[part].where if part in self.replaced else self.folder

    @property
    def parts(self) -> dict[str, list[Path]]:
        """The weight files of every part."""
        return {part: given.files for part, given in self._given.items()}

    @cached_property
    def files(self) -> list[Path]:
        """All files that the conversion depends on: configurations, tokenizer and weights."""
        weights = [file for files in self.parts.values() for file in files]
        return [*self.settings.values(), *self.tokenizer_files, *weights]

    def weights(self, part: str) -> list[Weights]:
        """A part's files, opened."""
        if part not in self._weights:
            given = self._given[part]
            opened = given.opened or of_files([*map(open_file, given.files)], part)
            self._weights[part] = [dataclasses.replace(each, wide=self.wide) for each in opened]
        return self._weights[part]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part, under diffusers' name, from the headers alone."""
        found: dict[str, Tensor] = {}
        owners: dict[str, Weights] = {}
        for weights in self.weights(part):
            for name, tensor in weights.tensors().items():
                if name in found:
                    files = f"{found[name].file.name} and {tensor.file.name}"
                    where = tensor.file.parent
                    fault = one_line(f"{name} must be in one file: got it in {files}")
                    raise ValueError(f"{where}: {fault}")
                found[name], owners[name] = tensor, weights
        self._owners[part] = owners
        return found

    def read(self, part: str, name: str) -> np.ndarray:
        """One tensor."""
        if part not in self._owners:
            self.tensors(part)
        return self._owners[part][name].read(name)

    def absent(self, part: str) -> set[str]:
        """Tensors that an index names and no file holds."""
        weights, promised = self.weights(part), self._given[part].promised
        held = {name for each in weights for name in each.file.entries}
        return plain_names(promised, self._given[part].where).keys() - held

    def shard(self, part: str, tensor: Tensor) -> str:
        """The name of the safetensors file for a tensor in a diffusers folder."""
        if tensor.file.suffix == ".safetensors" and self._given[part].config:
            return tensor.file.name
        number = re.search(r"-\d+-of-\d+(?=\.bin$)", tensor.file.name)
        return f"{STEMS[part]}{number[0] if number else ''}.safetensors"


def gather(
    sources: Sequence[str | os.PathLike[str]],
    wide: np.dtype[Any] = WIDE,
    say: Callable[[str], None] = report,
) -> Source:
    """One checkpoint from a diffusers folder (here, on the hub, or at gs://) and what replaces
    parts of it: other diffusers folders, folders of one part, single files, a SAT folder; the last
    one for a part counts. Raises ValueError or FileNotFoundError, in one line."""
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
            must = "SRC must begin with the whole folder, of which the others replace parts"
            raise ValueError(f"{must}: got {given} behind another")
    if base is None:
        missing = [part for part in (*PARTS, "tokenizer") if part not in replaced]
        raise ValueError(
            "SRC must begin with a diffusers folder, for the configuration and for "
            f"{', '.join(missing)}: got {' and '.join(replaced)} alone; "
            f"for example CogVideoX-5b-I2V {' '.join(map(str, sources))}"
        )
    return Source(base, replaced, wide)


def _stated(path: Path) -> list[str]:
    """The parts of a diffusers folder, complete or not, with configurations or (as some trainers
    save them) without. Empty for the folder of one part, for a SAT folder and for files."""
    if (path / MANIFEST).is_file():
        raise ValueError(
            f"SRC must be weights of PyTorch: got {path}, a converted folder; "
            "cogi2v-convert to-torch makes some of it"
        )
    if stated := [part for part in NETWORKS if (path / part / CONFIG_FILES[part]).is_file()]:
        return stated
    if (path / "model_index.json").is_file():
        return list(NETWORKS)
    return [] if sat_files(path) else [part for part in NETWORKS if list_weights(path / part)]


def parts_at(path: Path) -> dict[str, Given]:
    """The parts in a file, in the folder of one part with or without its configuration, or in a
    SAT folder."""
    if path.is_file():
        return _recognise(Given([path]), path)
    if (path / "config.json").is_file():
        given = Given.of(path)
        if len(found := _recognise(given, path)) > 1:
            raise ValueError(f"{path} must be the folder of one part: got {', '.join(found)}")
        return found
    found = {}
    for file in sat_files(path):
        for part, given in _recognise(Given([file]), file).items():
            if part in found:
                both = f"{found[part].files[0]} and {file}"
                raise ValueError(f"{path} must hold one {part}: got {both}; give the file itself")
            found[part] = given
    if found:
        return found
    if not list_weights(path):
        raise FileNotFoundError(f"{path} {NO_FOLDER}")
    files, promised = find_weights(path)
    return _recognise(Given(files, frozenset(promised)), path)


def _recognise(given: Given, path: Path) -> dict[str, Given]:
    """Every part in the files of `given`, which `path` names in messages."""
    found = parts_of([*map(open_file, given.files)], path)
    return {part: dataclasses.replace(given, opened=weights) for part, weights in found.items()}


def sat_files(folder: Path) -> list[Path]:
    """SAT's or DeepSpeed's checkpoints at most two folders deep, without optimizer states; where a
    file `latest` names one of several steps, only that step. Raises ValueError for a step that is
    not there, and for what several processes saved, each its own part."""
    ends = [f"{level}*.{end}" for end in ("pt", "distcp") for level in ("", "*/", "*/*/")]
    found = [file for end in ends for file in sorted(folder.glob(end))]
    for pattern, what, way in SPLIT:
        if split := [file for file in found if pattern.search(file.as_posix())]:
            must = "must hold whole tensors"
            raise ValueError(f"{folder} {must}: got {what}, as {split[0]}; {way}")
    files = [file for file in found if not BESIDE.fullmatch(file.stem)]
    if split := [file for file in files if file.name.startswith("mp_rank_01_")]:
        must = "must hold the checkpoint of one process, not split over several"
        raise ValueError(f"{folder} {must}: got {split[0]}; merge it with SAT first")
    steps: dict[Path, set[str]] = {}  # of each run; the folder that was given is its own choice
    for file in files:
        if file.parent != folder:
            steps.setdefault(file.parent.parent, set()).add(file.parent.name)
    latest = {run: _latest(run, names) for run, names in steps.items()}
    return [
        file
        for file in files
        if file.parent == folder or file.parent.name in latest[file.parent.parent]
    ]


def _latest(run: Path, steps: Set[str]) -> Set[str]:
    """The one of a run's steps that its file `latest` names, or all where there is no such file.
    Raises ValueError where it names none of them."""
    path = run / "latest"
    if not path.is_file():
        return steps
    text = path.read_text(errors="replace").strip()
    if (name := Path(text).name) not in steps:
        there = ", ".join(sorted(steps))
        way = "give the folder of a step"
        raise ValueError(f"{path} must name a step beside it, {there}: got {text!r}; {way}")
    return {name}
