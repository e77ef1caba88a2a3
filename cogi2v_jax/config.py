"""What a checkpoint is: its four parts as frozen dataclasses, read strictly from the JSON files of
a diffusers folder, and the TOML files of `configs/`, which add what those files don't say
(defaults, published ranges, where the weights are)."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from . import lookalikes
from .disk import one_line, read_toml
from .published import Published

PARTS = ("transformer", "vae", "text_encoder", "scheduler")
BLOCKS = ("transformer", "text_encoder")  # parts that are stacks of equal blocks

# Either beside the package (an installed wheel) or one folder up (a checkout, an editable install).
_PLACES = [folder / "configs" for folder in Path(__file__).parents[:2]]
CONFIGS = next(filter(Path.is_dir, _PLACES), _PLACES[0])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max  # JSON's integers may be larger


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


# What the value of a field must be, by the field's type. JSON's numbers may be any of ours; its
# strings and booleans are no numbers.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer below 2**31", _is_count),
    int | None: ("a positive integer below 2**31, or null", lambda v: v is None or _is_count(v)),
    float: ("a positive number", _is_positive),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    tuple[int, ...]: ("a list of positive integers below 2**31", _are_counts),
}

_INERT = read_toml(CONFIGS / "inert_keys.toml")
Part = TypeVar("Part", bound="_Part")  # not Self, which beartype can't check


@dataclass(frozen=True)
class _Part:
    """One part's configuration file, read strictly: a key is a field, required to have the only
    value that is implemented, inert, or refused by name."""

    # Mathematics that has one implementation here: any other value is refused.
    REQUIRED: ClassVar[Mapping[str, Any]] = {}
    # Those of them that a file must state, because the reference's default is another value.
    STATED: ClassVar[frozenset[str]] = frozenset()
    INERT: ClassVar[frozenset[str]] = frozenset()  # keys that change nothing at inference
    # The reference's class. A file that names another one is of another network.
    CLASS: ClassVar[str | None] = None

    @classmethod
    def from_json(cls: type[Part], values: Mapping[str, Any], where: str) -> Part:
        """Raises ValueError, which begins with `where`, naming every key that does not fit."""
        # The keys of another network are refused whatever their values.
        if relative := lookalikes.by_keys((*values, str(values.get("_class_name")))):
            what = "image-to-video from a prompt and a first image alone"
            raise ValueError(f"{where} must be of {what}: got {relative}")
        if quantised := values.get("quantization_config"):
            raise ValueError(one_line(f"{where} must not be quantised: got {quantised}"))
        faults = [
            f"{key} must be stated: the reference takes another value for its absence"
            for key in sorted(cls.STATED - values.keys())
        ]
        if cls.CLASS and values.get("_class_name", cls.CLASS) != cls.CLASS:
            faults.append(f"_class_name must be {cls.CLASS}: got {values['_class_name']!r}")
        fields = {f.name for f in dataclasses.fields(cls)}
        known = {}
        for key, value in _tuples(values).items():
            if key.startswith("_") or key in cls.INERT:
                continue
            if key in cls.REQUIRED:
                if value != cls.REQUIRED[key]:
                    faults.append(f"{key} must be {cls.REQUIRED[key]!r}: got {value!r}")
            elif key in fields:
                known[key] = value
            elif value:  # a key newer than this program is ignored where it is off or empty
                faults.append(f"{key} is not known here: got {value!r}")
        faults += cls._misfits(known)
        try:
            if not faults:
                return cls(**known)
        except ValueError as error:
            faults = [str(error)]
        raise ValueError(one_line(f"{where}: " + "; ".join(faults)))

    def __post_init__(self) -> None:
        if faults := self._misfits(vars(self)) or [*self._faults()]:
            raise ValueError("; ".join(faults))

    @classmethod
    def _misfits(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with the types of fields."""
        kinds = [(f.name, *_KINDS[f.type]) for f in dataclasses.fields(cls) if f.name in values]
        return [
            f"{name} must be {rule}: got {values[name]!r}"
            for name, rule, fits in kinds
            if not fits(values[name])
        ]

    def _faults(self) -> Iterator[str]:
        """What is wrong with fields that are all of their types."""
        yield from ()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


@dataclass(frozen=True)
class TransformerConfig(_Part):
    """transformer/config.json. Fields have the file's names and the reference class's defaults."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    sample_width: int = 90  # latent pixels, as are all sample sizes here
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    REQUIRED = {  # noqa: RUF012
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_elementwise_affine": True,
        "timestep_activation_fn": "silu",
    }
    INERT = frozenset(_INERT["transformer"])
    CLASS = "CogVideoXTransformer3DModel"

    def _faults(self) -> Iterator[str]:
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            yield f"attention_head_dim must be a multiple of 16: got {self.attention_head_dim}"
        if self.use_learned_positional_embeddings and self.patch_size_t:
            rule = "must be false where patch_size_t is set: the reference has no such network"
            yield f"use_learned_positional_embeddings {rule}"

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def table_grid(self) -> tuple[int, int, int]:
        """Tokens (frames, rows, columns) that the learned position table was made for."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def table_rows(self) -> int:
        frames, rows, columns = self.table_grid
        return self.max_text_seq_length + frames * rows * columns


@dataclass(frozen=True)
class VAEConfig(_Part):
    """vae/config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426
    invert_scale_latents: bool = False
    # Pixels. A tile is half of each side, and nothing else depends on them.
    sample_height: int = 480
    sample_width: int = 720

    REQUIRED = {  # noqa: RUF012
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
    }
    INERT = frozenset(_INERT["vae"])
    CLASS = "AutoencoderKLCogVideoX"

    def _faults(self) -> Iterator[str]:
        ratio, blocks = self.temporal_compression_ratio, self.block_out_channels
        if ratio != 4:
            yield f"temporal_compression_ratio must be 4: got {ratio}"
        if len(blocks) not in (3, 4):
            rule = "must have three or four entries (4x or 8x over space)"
            yield f"block_out_channels {rule}: got {blocks}"
        if any(channels % self.norm_num_groups for channels in blocks):
            rule = f"must be divisible by norm_num_groups {self.norm_num_groups}"
            yield f"block_out_channels {rule}: got {blocks}"

    def decoded_frames(self, latent_frames: int) -> int:
        """Frames of the video that `latent_frames` decode to. With an odd number the first latent
        frame is one frame; with an even one every latent frame is four."""
        ratio = self.temporal_compression_ratio
        return ratio * (latent_frames - 1) + 1 if latent_frames % 2 else ratio * latent_frames

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextEncoderConfig(_Part):
    """text_encoder/config.json: a T5 v1.1 encoder."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    layer_norm_epsilon: float = 1e-6

    REQUIRED = {  # noqa: RUF012
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "model_type": "t5",
        "relative_attention_max_distance": 128,
    }
    STATED = frozenset({"feed_forward_proj"})
    INERT = frozenset(_INERT["text_encoder"])

    def _faults(self) -> Iterator[str]:
        if (buckets := self.relative_attention_num_buckets) != 32:
            yield f"relative_attention_num_buckets must be 32: got {buckets}"


@dataclass(frozen=True)
class SchedulerConfig(_Part):
    """scheduler/scheduler_config.json: the noise levels. The request chooses the sampler."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    snr_shift_scale: float = 3.0

    REQUIRED = {  # noqa: RUF012
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }
    STATED = frozenset({"prediction_type", "timestep_spacing"})
    INERT = frozenset(_INERT["scheduler"])


@dataclass(frozen=True)
class CheckpointConfig:
    """One checkpoint: its parts, the name of the TOML that fits it (None for other weights), the
    range it was published for, and the parts in which the kernels of the blocks are int8."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    scheduler: SchedulerConfig
    name: str | None = None
    published: Published = field(default_factory=Published)
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if faults := [*self._faults()]:
            raise ValueError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        t, latent, width = self.transformer, self.vae.latent_channels, self.text_encoder.d_model
        for part in sorted({*self.int8} - {*BLOCKS}):
            yield f"int8 must be of {' and '.join(BLOCKS)}: got {part!r}"
        if t.in_channels != 2 * latent:
            got = f"{t.in_channels}, which is {lookalikes.by_channels(t.in_channels, latent)}"
            rule = f"must be twice the VAE's latent_channels {latent}"
            yield f"transformer in_channels {rule}: got {got}"
        if t.out_channels != latent:
            rule = f"must be the VAE's latent_channels {latent}"
            yield f"transformer out_channels {rule}: got {t.out_channels}"
        if t.text_embed_dim != width:
            rule = f"must be the text encoder's d_model {width}"
            yield f"transformer text_embed_dim {rule}: got {t.text_embed_dim}"
        positions = t.use_rotary_positional_embeddings or t.use_learned_positional_embeddings
        if t.patch_size_t and not positions:
            rule = "must have rotary positions where patch_size_t is set"
            yield f"transformer {rule}: got neither rotary nor learned ones"

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Mapping[str, Any]], where: str | Mapping[str, str]
    ) -> "CheckpointConfig":
        """From the four JSON files' contents, keyed as in `PARTS`. The fitting TOML is looked up by
        architecture, not by name. Raises ValueError, which begins with `where`, of the part."""
        types = (TransformerConfig, VAEConfig, TextEncoderConfig, SchedulerConfig)
        places = dict.fromkeys(PARTS, where) if isinstance(where, str) else where
        kinds = zip(PARTS, types, strict=True)
        read: list[Any] = [kind.from_json(parts[p], f"{places[p]}: {p}") for p, kind in kinds]
        try:
            config = cls(*read)
        except ValueError as error:
            raise ValueError(f"{' with '.join(dict.fromkeys(places.values()))}: {error}") from None
        for name in filter(config.agrees_with, names()):
            published = Published(**_tuples(toml(name).get("published", {})))
            return dataclasses.replace(config, name=name, published=published)
        return config

    def agrees_with(self, name: str) -> bool:
        """Whether the networks are those of a named checkpoint. Sample sizes that no number in them
        depends on may differ: the VAE's, which are its tiles', and the 1.5 transformer's, of which
        the released files have stated several."""
        sizes = ("sample_height", "sample_width", "sample_frames")
        second = self.family == "cogvideox1.5-i2v"
        ignored = {"transformer": sizes if second else (), "vae": sizes[:2], "text_encoder": ()}
        for part, keys in ignored.items():
            mine = getattr(self, part)
            its = type(mine).from_json(toml(name)[part], name)
            if its != dataclasses.replace(mine, **{key: getattr(its, key) for key in keys}):
                return False
        return True

    @property
    def family(self) -> str:
        """`cogvideox1.5-i2v` where the network patches over time or takes `ofs`, else
        `cogvideox-i2v`."""
        second = self.transformer.patch_size_t or self.transformer.ofs_embed_dim
        return "cogvideox1.5-i2v" if second else "cogvideox-i2v"

    @property
    def title(self) -> str:
        return (self.name or f"this {self.family} checkpoint") + (" in int8" if self.int8 else "")

    @functools.cached_property
    def defaults(self) -> Mapping[str, Any]:
        """A value for every one of `settings.SETTINGS` but the `settings.NEUTRAL`: of the
        checkpoint's TOML, else of its family's, else of the folder's own config."""
        t = self.transformer
        folder = {
            "height": t.sample_height * self.vae.spatial_ratio,
            "width": t.sample_width * self.vae.spatial_ratio,
            "num_frames": self.vae.decoded_frames(t.table_grid[0]),
        }
        family = read_toml(CONFIGS / "families" / f"{self.family}.toml")["defaults"]
        own = toml(self.name).get("defaults", {}) if self.name else {}
        return folder | family | own


def names() -> list[str]:
    """Checkpoints known by name: the stems of the TOML files in `configs/checkpoints/`."""
    return sorted(path.stem for path in (CONFIGS / "checkpoints").glob("*.toml"))


@functools.cache
def toml(name: str) -> dict[str, Any]:
    """The TOML of a named checkpoint: tables `transformer`, `vae`, `text_encoder`, `scheduler`,
    `defaults`, `published`, `source`."""
    if name not in names():
        raise ValueError(f"checkpoint name must be one of {', '.join(names())}: got {name!r}")
    return read_toml(CONFIGS / "checkpoints" / f"{name}.toml")


@functools.cache
def meshes() -> dict[str, dict[str, Any]]:
    """`configs/meshes.toml`: tables `generations` and `meshes`, by name."""
    return read_toml(CONFIGS / "meshes.toml")


def named(name: str) -> CheckpointConfig:
    """The architecture of a named checkpoint, from its TOML alone. Checks at full size without
    weights build on it."""
    stated = toml(name)
    missing = [part for part in PARTS if not isinstance(stated.get(part), dict)]
    if missing:
        tables = ", ".join(PARTS)
        raise ValueError(f"{name}.toml must have the tables {tables}: got no {missing[0]}")
    return CheckpointConfig.from_parts({part: stated[part] for part in PARTS}, name)
