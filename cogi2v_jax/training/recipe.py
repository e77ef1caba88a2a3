"""What a training run does: a TOML file of flat keys, read strictly, with key=value in its place on
the command line."""

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import CONFIGS
from ..disk import first_line, is_text, one_line, read_toml
from ..settings import COUNT, LATENT_SCALE, SCALE, SWITCH, Kind, is_real, is_whole, one_of

RECIPES = CONFIGS / "training"
METHODS = ("lora", "full", "vae")
OPTIMIZERS = ("adamw", "prodigy", "muon")
SCHEDULES = ("constant", "linear", "cosine")
KEPT = ("all", "attention", "layers", "host")
AUTO = "auto"
LARGEST_RANK = 4096
RANDOM = "random"


def _is_name(value: Any) -> bool:
    return is_text(value) and value != ""


TEXT = Kind("text in UTF-8", is_text, str)
NAMES = Kind(
    "a list of names",
    lambda value: isinstance(value, tuple) and value != () and all(map(_is_name, value)),
    lambda value: tuple(value.split(",")) if isinstance(value, str) else value,
)
WHOLE = Kind("a whole number from 0 to 2**31 - 1", lambda v: is_whole(v) and 0 <= v < 2**31, int)
RANK = Kind(
    f"a whole number from 1 to {LARGEST_RANK}",
    lambda v: is_whole(v) and 0 < v <= LARGEST_RANK,
    int,
)
POSITIVE = Kind("a positive number", lambda v: is_real(v) and v > 0, float)
SHARE = Kind("a number from 0 to 1", lambda v: is_real(v) and 0 <= v <= 1, float)
DECAY = Kind("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1, float)
TRUTH = SWITCH._replace(convert=lambda value: {"true": True, "false": False}.get(value, value))


def _key(kind: Kind, default: Any = dataclasses.MISSING, free: bool = False) -> Any:
    """A key of the recipe; `free` ones may change when a run goes on."""
    return field(default=default, metadata={"kind": kind, "free": free})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every key of a recipe, with its default."""

    method: str = _key(one_of(*METHODS))
    data: str = _key(TEXT, free=True)  # a folder of `python -m cogi2v_jax.prepare`
    output: str = _key(TEXT, free=True)
    model: str = _key(TEXT, "cogi2v-tiny")  # as --model of sampling
    # Weights to start from: a LoRA, or a model's folder; "random" for new ones.
    init: str = _key(TEXT, "")
    steps: int = _key(COUNT, free=True)
    seed: int = _key(WHOLE, 42)
    batch: int = _key(COUNT, 1)  # clips whose gradient is computed at once, of all devices
    accumulate: int = _key(COUNT, 1)  # such batches in a step
    # What is trained.
    rank: int = _key(RANK, 128)
    alpha: float = _key(POSITIVE, 128.0)
    targets: tuple[str, ...] = _key(NAMES, ("attention",))
    # Optimisation.
    optimizer: str = _key(one_of(*OPTIMIZERS), "adamw")
    learning_rate: float = _key(POSITIVE, 1e-4)
    schedule: str = _key(one_of(*SCHEDULES), "constant")
    final_rate: float = _key(SHARE, 0.0)  # share of the learning rate at the end of a schedule
    warmup: int = _key(WHOLE, 100)  # steps
    beta1: float = _key(DECAY, 0.9)
    beta2: float = _key(DECAY, 0.95)
    weight_decay: float = _key(SCALE, 1e-4)
    clip: float = _key(SCALE, 1.0)  # of the norm of all gradients; 0 clips none
    ema: float = _key(DECAY, 0.0)  # of the weights that are written; 0 writes the last ones
    # The objective.
    text_dropout: float = _key(SHARE, 0.1)
    image_dropout: float = _key(SHARE, 0.05)
    image_noise: bool = _key(TRUTH, True)  # exp(N(-3, 0.5)) on the pixels of the image
    image_latent_scale: str | float = _key(LATENT_SCALE, "reference")
    decoder_only: bool = _key(TRUTH, False)  # of the VAE: its latents stay what they are
    kl: float = _key(SCALE, 1e-6)  # the weight of the VAE's KL divergence
    crop: int = _key(WHOLE, 0)  # pixels of the VAE's square crops; 0 trains on whole clips
    stills: int = _key(WHOLE, 0)  # every so many steps the VAE trains on single frames; 0: never
    # The machine.
    dtype: str = _key(one_of(AUTO, "bfloat16", "float32"), AUTO)
    mesh: str = _key(TEXT, AUTO, free=True)
    attention: str = _key(TEXT, AUTO, free=True)
    kept: str = _key(one_of(AUTO, *KEPT), AUTO, free=True)  # for the backward pass
    # What is written.
    output_dtype: str = _key(one_of("float32", "bfloat16"), "float32", free=True)  # of the result
    checkpoint_every: int = _key(COUNT, 500, free=True)  # steps
    checkpoints: int = _key(COUNT, 2, free=True)  # that are kept
    validation: str = _key(TEXT, "", free=True)  # a batch file of images and prompts
    validate_every: int = _key(WHOLE, 0, free=True)  # steps; 0: never
    tensorboard: bool = _key(TRUTH, False, free=True)

    def __post_init__(self) -> None:
        if faults := [*self._faults()]:
            raise ValueError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        if self.warmup >= self.steps:
            yield f"warmup must be below steps {self.steps}: got {self.warmup}"
        if self.optimizer == "prodigy" and self.learning_rate == DEFAULTS["learning_rate"]:
            yield "learning_rate must be given where optimizer is prodigy, which scales it: try 1"
        if bool(self.validation) != bool(self.validate_every):
            yield "validation and validate_every must be given together"
        if self.decoder_only and self.kl != DEFAULTS["kl"]:
            yield "kl must be left out where decoder_only is true: the encoder stays as it is"
        if self.method == "lora" and self.init == RANDOM:
            yield f"init must be a LoRA or nothing where method is lora: got {RANDOM}"
        inert = [key for key, methods in OF_METHODS.items() if self.method not in methods]
        if self.schedule == "constant":
            inert.append("final_rate")
        if given := [key for key in inert if getattr(self, key) != DEFAULTS[key]]:
            do = "do" if len(given) > 1 else "does"
            how = f"method is {self.method} and schedule is {self.schedule}"
            yield f"{', '.join(given)} must be left out: {do} nothing where {how}"

    @property
    def clips(self) -> int:
        """Clips of one step."""
        return self.batch * self.accumulate

    @property
    def part(self) -> str:
        """The part of the checkpoint that is trained."""
        return "vae" if self.method == "vae" else "transformer"

    def trains(self, name: str) -> bool:
        """Whether the leaf of this dotted name is trained, of the part with its LoRA."""
        if self.method == "lora":
            return ".lora." in f".{name}"
        if self.decoder_only:
            return name.startswith("decoder.")
        return name != "table"  # learned positions, which the reference does not train either

    def to_toml(self) -> str:
        """The recipe with every key, as a file."""
        values = ((key, getattr(self, key)) for key in KINDS)
        return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values)


KINDS: dict[str, Kind] = {one.name: one.metadata["kind"] for one in dataclasses.fields(Recipe)}
DEFAULTS: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(Recipe)}
FREE = [one.name for one in dataclasses.fields(Recipe) if one.metadata["free"]]
# Keys that not all methods read.
OF_METHODS = {
    **dict.fromkeys(("rank", "alpha", "targets"), ("lora",)),
    **dict.fromkeys(("decoder_only", "kl", "crop", "stills"), ("vae",)),
    **dict.fromkeys(("text_dropout", "image_dropout", "image_noise"), ("lora", "full")),
    **dict.fromkeys(("image_latent_scale", "kept", "attention"), ("lora", "full")),
}


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    # TOML writes these values as JSON does, but for characters that JSON may escape in two halves,
    # and for one that it need not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_recipe(path: str, changes: Iterable[str] = ()) -> Recipe:
    """A recipe from a TOML file, or by the name of one in configs/training/, with `key=value` in
    place of its own. Raises ValueError, in one line, with all that is wrong."""
    file = Path(path)
    shipped = RECIPES / f"{path}.toml"
    if not file.is_file() and shipped.is_file():
        file = shipped
    elif not file.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ValueError(f"recipe must be a TOML file or one of {names}: found no {path}")
    values, faults = read_toml(file), []
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            faults.append(f"changes must be key=value: got {change!r}")
        values[key] = text
    required = (
        one.name for one in dataclasses.fields(Recipe) if one.default is dataclasses.MISSING
    )
    faults += [f"{key} must be given" for key in required if key not in values]
    read = {}
    for key, value in values.items():
        try:
            read[key] = _read(key, value)
        except ValueError as error:
            faults.append(str(error))
    if not faults:
        try:
            return Recipe(**read)
        except ValueError as error:
            faults = [str(error)]
    raise ValueError(one_line(f"{path}: {'; '.join(faults)}"))


def _read(key: str, value: Any) -> Any:
    """The value of a key: TOML's, or the text of key=value."""
    if key not in KINDS:
        raise ValueError(f"{key} is no key of a recipe")
    kind, read = KINDS[key], _plain(value)
    try:
        if isinstance(read, str):
            read = kind.convert(read)
        if kind.fits(read):
            return kind.convert(read)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{key} must be {kind.rule}: got {value!r}")


def changed_keys(recipe: Recipe, text: str) -> list[str]:
    """What a recipe changes of one that `to_toml` wrote, a line for each key that may not change
    when a run goes on. Raises ValueError for any other text."""
    try:
        earlier = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"a recipe must be TOML: {first_line(error)}") from None
    return [
        f"{key} was {_toml_value(_plain(earlier.get(key)))} and is {_toml_value(value)}"
        for key in KINDS
        if key not in FREE and _plain(earlier.get(key)) != (value := getattr(recipe, key))
    ]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
