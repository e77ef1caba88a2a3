"""What a checkpoint is: its four networks' settings as frozen dataclasses, read strictly from the
JSON files of a diffusers folder, and the TOML files of `configs/`, which add what those files don't
say (defaults, published ranges, where the weights live)."""

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from . import lookalikes

PARTS = ("transformer", "vae", "text_encoder", "scheduler")
BLOCKS = ("transformer", "text_encoder")  # parts that are stacks of equal blocks

# Either beside the package (an installed wheel) or one folder up (a checkout, an editable install).
_HERE = Path(__file__).parent
CONFIGS = next(
    (folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()),
    _HERE / "configs",
)


Part = TypeVar("Part", bound="_Part")


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _measures(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


# What the value of a field must be, by the field's type. Files are JSON: its numbers are ours, but
# so are its strings and booleans.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", _counts),
    int | None: ("a positive integer or null", lambda value: value is None or _counts(value)),
    float: ("a positive number", _measures),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    tuple[int, ...]: (
        "a list of positive integers",
        lambda value: isinstance(value, tuple) and all(map(_counts, value)),
    ),
}


class _Part:
    """Strict reading of one config.json: a key is a field, a value that only one setting computes,
    inert, or an error by name."""

    # Mathematics that has one implementation here: any other value is refused.
    REQUIRED: ClassVar[Mapping[str, Any]] = {}
    # Those of them that a file may not leave to the reference's default.
    STATED: ClassVar[frozenset[str]] = frozenset()
    INERT: ClassVar[frozenset[str]] = frozenset()  # keys that change nothing at inference
    # Of the reference, where a file names another than which it is another network's.
    CLASS: ClassVar[str | None] = None

    @classmethod
    def from_json(cls: type[Part], values: Mapping[str, Any], where: str) -> Part:
        fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        known = {}
        faults = [
            f"{key} must be stated: the reference takes another value for its absence"
            for key in sorted(cls.STATED - values.keys())
        ]
        if cls.CLASS and values.get("_class_name", cls.CLASS) != cls.CLASS:
            faults.append(f"_class_name must be {cls.CLASS}: got {values['_class_name']!r}")
        # Whatever their values: these keys are known for another network.
        if whose := lookalikes.whose((*values, str(values.get("_class_name")))):
            raise ValueError(
                f"{where} must be of image-to-video from a prompt and a first image alone: got {whose}"
            )
        for key, value in values.items():
            if key.startswith("_") or key in cls.INERT:
                continue
            value = tuple(value) if isinstance(value, list) else value
            if key in cls.REQUIRED:
                if value != cls.REQUIRED[key]:
                    faults.append(f"{key} must be {cls.REQUIRED[key]!r}: got {value!r}")
            elif key in fields:
                known[key] = value
            elif value:  # a key newer than this program may only pass switched off or empty
                faults.append(f"{key} is not known here: got {value!r}")
        faults += _misfits(cls, known)
        if not faults:
            try:
                return cls(**known)
            except (TypeError, ValueError) as error:
                faults = [str(error)]
        raise ValueError(one_line(f"{where}: " + "; ".join(faults)))

    def __post_init__(self) -> None:
        if faults := _misfits(type(self), vars(self)):
            raise ValueError("; ".join(faults))


def _misfits(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Fields whose values are not of their kind."""
    kinds = [(f.name, *_KINDS[f.type]) for f in dataclasses.fields(cls) if f.name in values]
    return [
        f"{name} must be {what}: got {values[name]!r}"
        for name, what, fits in kinds
        if not fits(values[name])
    ]


@dataclass(frozen=True)
class TransformerConfig(_Part):
    """transformer/config.json. Field names are the file's; what a file leaves out has the reference
    class's default."""

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
    INERT = frozenset({"dropout"})
    CLASS = "CogVideoXTransformer3DModel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError(
                f"attention_head_dim must be a multiple of 16: got {self.attention_head_dim}"
            )
        if self.use_learned_positional_embeddings and self.patch_size_t:
            raise ValueError(
                "use_learned_positional_embeddings must be false where patch_size_t is set: the reference has no such network"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def table_grid(self) -> tuple[int, int, int]:
        """Tokens over frames, rows and columns that the learned position table was made for."""
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
    # Pixels, as is the width: a tile is half of each, and nothing else depends on them.
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
    # The reference's pipelines never read force_upcast.
    INERT = frozenset({"force_upcast", "down_block_types", "up_block_types"})
    CLASS = "AutoencoderKLCogVideoX"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temporal_compression_ratio != 4 or len(self.block_out_channels) != 4:
            raise ValueError(
                "temporal_compression_ratio must be 4 and block_out_channels have four entries (8x over space): "
                f"got {self.temporal_compression_ratio} and {self.block_out_channels}"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must divide by norm_num_groups {self.norm_num_groups}: got {self.block_out_channels}"
            )

    def decoded_frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent ones: only an odd number has a first frame that
        stands for itself."""
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
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    REQUIRED = {  # noqa: RUF012
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "model_type": "t5",
    }
    STATED = frozenset({"feed_forward_proj"})
    # What transformers writes of any model, about decoding, training, labels and itself; and of
    # T5's about its decoder.
    INERT = frozenset(
        """architectures attn_implementation begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
        cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout_rate dtype early_stopping
        encoder_no_repeat_ngram_size eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
        initializer_factor is_encoder_decoder label2id length_penalty max_length min_length n_positions no_repeat_ngram_size num_beam_groups
        num_beams num_decoder_layers num_return_sequences output_past pad_token_id prefix problem_type repetition_penalty return_dict
        scale_decoder_outputs sep_token_id suppress_tokens task_specific_params temperature tie_encoder_decoder tie_word_embeddings
        tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_cache""".split()  # noqa: SIM905
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.relative_attention_num_buckets, self.relative_attention_max_distance) != (32, 128):
            raise ValueError(
                "relative_attention_num_buckets and relative_attention_max_distance must be 32 and 128: "
                f"got {self.relative_attention_num_buckets} and {self.relative_attention_max_distance}"
            )


@dataclass(frozen=True)
class SchedulerConfig(_Part):
    """scheduler/scheduler_config.json: the noise levels. Which sampler walks them is the request's
    choice."""

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
    # Never read by the reference's step.
    INERT = frozenset({"clip_sample", "clip_sample_range", "sample_max_value", "steps_offset"})


@dataclass(frozen=True)
class Defaults:
    """What a request leaves open, once a checkpoint, its family or its folder has answered."""

    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    use_dynamic_cfg: bool = True
    scheduler: str = "dpm"
    fit: str = "crop"
    image_latent_scale: str = "reference"
    noise: str = "jax"


@dataclass(frozen=True)
class Published:
    """The range a checkpoint was published for; outside it a request computes, with one warning."""

    short_side: tuple[int, int] | None = None  # lowest and highest, pixels
    long_side: tuple[int, int] | None = None
    frames: tuple[int, ...] = ()
    portrait: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    """One checkpoint: its parts, the name of the TOML that fits it (None for weights of its own),
    its defaults, and in which parts the kernels of the blocks are int8."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    scheduler: SchedulerConfig
    name: str | None = None
    published: Published = field(default_factory=Published)
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        t, v, e = self.transformer, self.vae, self.text_encoder
        faults = [
            f"int8 must be of {' and '.join(BLOCKS)}: got {part!r}"
            for part in self.int8
            if part not in BLOCKS
        ]
        if t.in_channels != 2 * v.latent_channels:
            what = f"{t.in_channels}, which is {lookalikes.kind(t.in_channels, v.latent_channels)}"
            faults.append(
                f"transformer in_channels must be twice the VAE's latent_channels {v.latent_channels}: got {what}"
            )
        if t.out_channels != v.latent_channels:
            faults.append(
                f"transformer out_channels must be the VAE's latent_channels {v.latent_channels}: got {t.out_channels}"
            )
        if t.text_embed_dim != e.d_model:
            faults.append(
                f"transformer text_embed_dim must be the text encoder's d_model {e.d_model}: got {t.text_embed_dim}"
            )
        if (
            not t.use_rotary_positional_embeddings
            and not t.use_learned_positional_embeddings
            and t.patch_size_t
        ):
            faults.append(
                "transformer must have rotary positions where patch_size_t is set: got neither rotary nor learned ones"
            )
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Mapping[str, Any]], where: str) -> "CheckpointConfig":
        """From the four JSON files' contents, keyed as in `PARTS`; the fitting TOML is looked up by
        architecture, never by name."""
        types = (TransformerConfig, VAEConfig, TextEncoderConfig, SchedulerConfig)
        read: dict[str, Any] = {
            part: kind.from_json(parts[part], f"{where}: {part}")
            for part, kind in zip(PARTS, types, strict=True)
        }
        try:
            config = cls(**read)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for name in names():
            if config.agrees_with(name):
                return dataclasses.replace(
                    config,
                    name=name,
                    published=Published(**_tuples(toml(name).get("published", {}))),
                )
        return config

    def agrees_with(self, name: str) -> bool:
        """Whether the networks are those of a named checkpoint."""
        mine, its = self.transformer, TransformerConfig.from_json(toml(name)["transformer"], name)
        if self.family == "cogvideox1.5-i2v":
            # The 1.5 files have stated several sample sizes over time, and no number there depends
            # on them.
            mine = dataclasses.replace(
                mine,
                **{
                    size: getattr(its, size)
                    for size in ("sample_height", "sample_width", "sample_frames")
                },
            )
        vae, text_encoder = (
            VAEConfig.from_json(toml(name)["vae"], name),
            TextEncoderConfig.from_json(toml(name)["text_encoder"], name),
        )
        # Tiles are no network.
        vae = dataclasses.replace(
            vae, sample_height=self.vae.sample_height, sample_width=self.vae.sample_width
        )
        return (mine, self.vae, self.text_encoder) == (its, vae, text_encoder)

    @property
    def family(self) -> str:
        """`cogvideox1.5-i2v` where the network patches over time or takes `ofs`, else
        `cogvideox-i2v`."""
        return (
            "cogvideox1.5-i2v"
            if self.transformer.patch_size_t or self.transformer.ofs_embed_dim
            else "cogvideox-i2v"
        )

    @property
    def title(self) -> str:
        return (self.name or f"this {self.family} checkpoint") + (" in int8" if self.int8 else "")

    @functools.cached_property
    def defaults(self) -> Defaults:
        """The checkpoint's TOML, else its family's, else the folder's own config."""
        t = self.transformer
        folder = {
            "height": t.sample_height * self.vae.spatial_ratio,
            "width": t.sample_width * self.vae.spatial_ratio,
            "num_frames": self.vae.decoded_frames(t.table_grid[0]),
        }
        family = _read(CONFIGS / "families" / f"{self.family}.toml").get("defaults", {})
        own = toml(self.name).get("defaults", {}) if self.name else {}
        return Defaults(**{**folder, **family, **own})


def names() -> list[str]:
    """Checkpoints known by name: the stems of the TOML files in `configs/checkpoints/`."""
    return sorted(path.stem for path in (CONFIGS / "checkpoints").glob("*.toml"))


@functools.cache
def toml(name: str) -> dict[str, Any]:
    """The TOML of a named checkpoint: tables `transformer`, `vae`, `text_encoder`, `defaults`,
    `published`, `source`."""
    if name not in names():
        raise ValueError(f"checkpoint name must be one of {', '.join(names())}: got {name!r}")
    return _read(CONFIGS / "checkpoints" / f"{name}.toml")


@functools.cache
def meshes() -> dict[str, dict[str, Any]]:
    """`configs/meshes.toml`: tables `generations` and `meshes`, by name."""
    return _read(CONFIGS / "meshes.toml")


def named(name: str) -> CheckpointConfig:
    """The architecture of a named checkpoint, from its TOML alone: what full-size checks without
    weights build on."""
    stated = toml(name)
    missing = [part for part in PARTS if not isinstance(stated.get(part), dict)]
    if missing:
        raise ValueError(
            f"{CONFIGS / 'checkpoints' / name}.toml must have a table for {', '.join(PARTS)}: got none for {missing[0]}"
        )
    return CheckpointConfig.from_parts({part: stated[part] for part in PARTS}, name)


def one_line(text: str) -> str:
    """With whatever could end the line, or move a terminal's cursor, spelled out: names in a file
    are anyone's."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} must hold {path.name}: found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be a TOML file: {error}") from None


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
