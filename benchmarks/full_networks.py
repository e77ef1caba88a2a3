"""The released networks with random weights, equal for both frameworks: torch draws them on its
device, and ours are converted from that memory by the convert tables. Nothing goes through the
host, where 22 GB of numbers would take minutes."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import dataclasses
import math
import zlib
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import torch
import transformers
from cogi2v_convert.sources.matching import targets  # pyright: ignore[reportMissingImports]
from flax import nnx

from cogi2v_jax import config
from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.sampling.programs import Target
from cogi2v_jax.weights.pieces import NETWORKS, PIECES, is_stacked

BLOCKS = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}
# The settings that differ from a released checkpoint, and the request for that size.
Size = dict[str, dict[str, Any]]
FULL: Size = {"transformer": {}, "vae": {}, "text_encoder": {}, "request": {}}
# Full width, but few layers and a small picture, for machines without a GPU.
WIDE: Size = {
    "transformer": {"num_layers": 2, "sample_height": 12, "sample_width": 18, "sample_frames": 17},
    "vae": {},
    "text_encoder": {"num_layers": 2},
    "request": {"height": 96, "width": 144, "num_frames": 17},
}
SMALL: Size = {
    "transformer": WIDE["transformer"]
    | {"num_attention_heads": 2, "time_embed_dim": 64, "text_embed_dim": 64},
    "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    "text_encoder": {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
    "request": WIDE["request"],
}
SIZES = {"full": FULL, "wide": WIDE, "small": SMALL}


def configure(name: str, size: str) -> tuple[CheckpointConfig, dict[str, Any]]:
    """Returns a released checkpoint's configuration at one of SIZES, and the request's settings."""
    whole = config.named(name)
    parts: dict[str, Any] = {
        part: dataclasses.replace(getattr(whole, part), **changed)
        for part, changed in SIZES[size].items()
        if part in NETWORKS
    }
    if whole.transformer.ofs_embed_dim:  # it is added to the time embedding
        width = parts["transformer"].time_embed_dim
        parts["transformer"] = dataclasses.replace(parts["transformer"], ofs_embed_dim=width)
    parts["name"] = name if size == "full" else None
    return dataclasses.replace(whole, **parts), SIZES[size]["request"]


def build_reference(
    part: str, config: CheckpointConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.nn.Module:
    """Builds the reference's network with seeded weights. They are bfloat16 values in every dtype,
    so that all dtypes compute with the same weights."""
    own = dataclasses.asdict(getattr(config, part))
    with torch.device("meta"):
        if part == "transformer":
            module = diffusers.CogVideoXTransformer3DModel(**own)
        elif part == "vae":
            module = diffusers.AutoencoderKLCogVideoX(**own, **BLOCKS)
        else:
            module = transformers.T5EncoderModel(
                transformers.T5Config(**own, **config.text_encoder.REQUIRED, dropout_rate=0.0)
            )
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    if part == "text_encoder":
        module.tie_weights()
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
        drawn = torch.randn(tensor.shape, generator=generator, device=device)
        mean, deviation = _choose_scale(name, tuple(tensor.shape), config)
        tensor.copy_((mean + deviation * drawn).bfloat16())
    return module


def _choose_scale(
    name: str, shape: tuple[int, ...], config: CheckpointConfig
) -> tuple[float, float]:
    """Returns the mean and standard deviation of a tensor, which keep activations near one at any
    depth: kernels are scaled by their number of inputs, norms are near the identity, and T5's
    queries are small, because T5 does not scale its logits."""
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0), 0.1
    if name.endswith(("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")):
        return 0.0, 1.0
    if name.endswith("pos_embedding"):
        return 0.0, 0.3
    scale = config.text_encoder.d_kv if name.endswith("SelfAttention.q.weight") else 1
    return 0.0, (math.prod(shape[1:]) * scale) ** -0.5


def build_ours(name: str, module: torch.nn.Module, target: Target) -> nnx.Module:
    """Builds one of our networks, a name of PIECES, with the weights of a reference network and on
    its device."""
    part, prefix = PIECES[name]
    tensors = module.state_dict()
    found: dict[str, list[Any]] = {}
    for torch_name, (rule, _) in targets(target.config, part).items():  # in the order of layers
        found.setdefault(rule.flax, []).append((rule, torch_name))
    graph, state = nnx.split(target.network(name))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        leaf_name = prefix + ".".join(map(str, path))
        layers = [
            rule.to_flax(jax.dlpack.from_dlpack(tensors[torch_name].contiguous()))
            for rule, torch_name in found[leaf_name]
        ]
        # A copy, because torch's tensor may be freed.
        value = jnp.stack(layers) if is_stacked(leaf_name) else jnp.array(layers[0])
        filled.append((path, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))
