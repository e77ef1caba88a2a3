"""Reference networks with random weights, our twins of them, converted by the convert tables, and
diffusers folders of these networks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from cogi2v_convert.sources.matching import TABLES
from cogi2v_convert.tables.rules import expand, misfits
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)
from flax import nnx
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import cogi2v_jax
from cogi2v_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.devices.sharding import Layout
from cogi2v_jax.models.attention import BACKENDS
from cogi2v_jax.weights.pieces import NETWORKS, is_stacked, leaf_names

TINY = Path(cogi2v_jax.__file__).parent / "assets" / "cogi2v-tiny"
FILES = sorted(  # of its folder, that a conversion needs
    path.relative_to(TINY).as_posix()
    for path in TINY.rglob("*")
    if path.is_file() and path.name not in ("README.md", "loss.png")
)
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "1.0": {"sample_height": 6, "sample_width": 10, "sample_frames": 17}
    | {"use_learned_positional_embeddings": True},
    "1.5": {"sample_height": 300, "sample_width": 300, "sample_frames": 81}
    | {"patch_size_t": 2, "ofs_embed_dim": 24, "patch_bias": False},
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights at scales that keep activations near one, with norms near the identity. The
    learned table, a buffer, is random too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim > 1:
                tensor.copy_(normal(tensor) * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * normal(tensor))
        for name, tensor in module.named_buffers():
            if name.endswith("pos_embedding"):
                tensor.copy_(0.3 * normal(tensor))
    return module.eval()


def transformer(seed: int = 0, **settings: Any) -> CogVideoXTransformer3DModel:
    sizes = {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3}
    sizes |= {"in_channels": 8, "out_channels": 4, "time_embed_dim": 24, "text_embed_dim": 20}
    sizes |= {"max_text_seq_length": 12, "use_rotary_positional_embeddings": True}
    return randomise(CogVideoXTransformer3DModel(**{**sizes, **settings}), seed)


def vae(seed: int = 0, **settings: Any) -> AutoencoderKLCogVideoX:
    sizes = {"block_out_channels": (8, 8, 16, 24), "latent_channels": 4, "layers_per_block": 1}
    sizes |= {"norm_num_groups": 4, "scaling_factor": 0.7}
    return randomise(new_vae(**(sizes | settings)), seed)


def new_vae(**settings: Any) -> AutoencoderKLCogVideoX:
    """The reference's VAE, which must be told a type for each of its levels."""
    levels = len(settings["block_out_channels"])
    kinds: Any = {
        f"{way.lower()}_block_types": (f"CogVideoX{way}Block3D",) * levels for way in ("Down", "Up")
    }
    return AutoencoderKLCogVideoX(**kinds, **settings)


def t5(seed: int = 0, **settings: Any) -> T5EncoderModel:
    sizes = {"vocab_size": 48, "d_model": 20, "d_kv": 8, "d_ff": 36, "num_layers": 3}
    sizes |= {"num_heads": 4, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    return randomise(T5EncoderModel(T5Config(**{**sizes, **settings})), seed)


CONFIGS = {"transformer": TransformerConfig, "vae": VAEConfig, "text_encoder": TextEncoderConfig}


def filled(network: nnx.Module, value: Callable[[str, Any], Any]) -> Any:
    """The network with `value(name, shape)` for each of its leaves."""
    graph, state = nnx.split(network)
    leaves = [
        (path, leaf.replace(jnp.asarray(value(".".join(map(str, path)), leaf), leaf.dtype)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def random_leaf(name: str, leaf: Any) -> np.ndarray:
    """For `filled`: weights as `randomise` makes them, each by its name."""
    random = np.random.default_rng([*name.encode()])
    if leaf.ndim > 1:
        return random.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
    return 0.1 * random.normal(size=leaf.shape) + name.endswith("scale")


def twin(part: str, module: torch.nn.Module, dtype: Any = jnp.float32) -> tuple[nnx.Module, Any]:
    """(our network with `module`'s weights, its config)."""
    settings = module.config if isinstance(module.config, dict) else module.config.to_dict()
    config = CONFIGS[part].from_json(dict(settings), part)
    tensors = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    tensors.pop("encoder.embed_tokens.weight", None)
    dtype = jnp.dtype(dtype)
    network = NETWORKS[part](config, dtype=dtype)
    homes = expand(TABLES[part](config), getattr(config, "num_layers", 0))
    shapes = {name: leaf.shape for name, leaf in leaf_names(network).items()}
    assert not misfits(homes, shapes, {name: tensor.shape for name, tensor in tensors.items()})
    leaves: dict[str, list[np.ndarray]] = {}
    for name, home in homes.items():
        leaves.setdefault(home.rule.flax, []).append(home.rule.to_flax(tensors[name]))

    def value(name: str, _: Any) -> np.ndarray:
        return np.stack(leaves[name]) if is_stacked(name) else leaves[name][0]

    return filled(network, value), config


def channels_last(video: torch.Tensor) -> np.ndarray:
    """[b c f h w] as our [b f h w c]."""
    return np.ascontiguousarray(video.detach().float().permute(0, 2, 3, 4, 1).numpy())


def frames_last(latents: torch.Tensor) -> np.ndarray:
    """[b t c h w], the reference's latents, as our [b t h w c] in float32."""
    return frames_last_exactly(latents.float())


def frames_last_exactly(latents: torch.Tensor) -> np.ndarray:
    """The same in their own dtype."""
    return np.ascontiguousarray(latents.detach().permute(0, 1, 3, 4, 2).numpy())


def pipeline(family: str, seed: int = 0, **of_vae: Any) -> CogVideoXImageToVideoPipeline:
    """A whole reference pipeline with random weights and the embedded model's tokenizer."""
    return CogVideoXImageToVideoPipeline(
        tokenizer=T5Tokenizer.from_pretrained(TINY / "tokenizer"),
        text_encoder=t5(seed + 1),
        vae=vae(seed + 2, invert_scale_latents=family == "1.5", **of_vae),
        transformer=transformer(seed, **FAMILIES[family]),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    )


def save(pipe: CogVideoXImageToVideoPipeline, folder: Path, spiece: bool = True) -> Path:
    """Saves a diffusers folder; `spiece` adds the sentencepiece file that newer transformers do not
    save."""
    pipe.save_pretrained(folder)
    if spiece:
        shutil.copyfile(TINY / "tokenizer" / "spiece.model", folder / "tokenizer" / "spiece.model")
    return folder


def positions_of(config: TransformerConfig, latents: tuple[int, int, int]) -> Any:
    from cogi2v_jax.models.positions import positions

    return jax.tree.map(jnp.asarray, positions(config, latents))


def one_device(tokens: int, attention: Any = BACKENDS["xla"]) -> Layout:
    """The layout of a transformer on one device."""
    return Layout(make_mesh(Sizes(), jax.devices()[:1]), attention, tokens)
