"""What a folder holds, in lines for a person."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from cogi2v_jax.checkpoint import MANIFEST, NETWORKS, abstract, check_loras, int8_errors, leaf_names, open_folder, read_config
from cogi2v_jax.config import CheckpointConfig, named, names, toml

from . import int8, lora, t5
from .conversion import homes, match, tensors_recorded
from .diffusers import Source
from .lora_file import open_lora


def report(folder: Path, keys: bool) -> tuple[list[str], bool]:
    """The lines, and whether every tensor has its place. Raises as `Source` and `open_folder` do."""
    converted = (folder / MANIFEST).is_file()
    source = None if converted else Source(folder)
    config = source.config if source else open_folder(folder, jnp.dtype(jnp.float32)).config
    kind = "converted folder" if converted else "diffusers folder"
    lines = [f"{folder}: {kind}, {config.name or 'weights of its own'} ({config.family})", *_facts(config)]
    whole = True
    for part in NETWORKS:
        if source:
            matched = match(source, part)
            names, faults, places = matched.tensors, matched.faults, matched.homes
            dtypes = sorted({str(tensor.dtype) for tensor in matched.tensors.values()})
        else:
            recorded = tensors_recorded(folder, config, part)
            names, faults, places = recorded, [], homes(config, part)
            places |= {alias: places[name] for alias, name in t5.SAME.items() if alias in names}
            dtypes = sorted({entry["dtype"] for entry in recorded.values()})
            if part in config.int8:
                dtypes.append(int8.summary(int8_errors(folder)[part]))
        plain = dataclasses.replace(config, int8=())  # scales are no parameters of the network
        count = sum(leaf.size for leaf in leaf_names(abstract(plain, part, jnp.dtype(jnp.float32))).values())
        placed = len(names) - sum(fault.split()[0] in names for fault in faults)
        lines.append(f"{part}: {count:,} parameters, {placed} of {len(names)} tensors matched, {', '.join(dtypes)}")
        lines += [f"  ! {fault}" for fault in faults]
        if keys:
            lines += [f"  {name} -> {places[name].rule.flax} {places[name].rule.axes}".rstrip() for name in sorted(names) if name in places]
        whole = whole and not faults
    return lines, whole


def lora_report(path: Path, model: str, keys: bool) -> tuple[list[str], bool]:
    """A LoRA file against a model, of which the configuration is enough: a folder, or a name or hub id of `config.names()`. Raises as
    `open_lora` and `check_loras` do."""
    config = _config_of(model)
    found = lora.match(open_lora(path), config)
    check_loras(config, jnp.dtype(jnp.float32), [found.lora] if found.lora else [])
    lines = [f"{found.line()} ({found.title})", *found.unmatched(len(found.rows)), *(f"  ! {fault}" for fault in found.general)]
    lines += [f"  {row.key} -> {row.place}" for row in found.rows.values() if keys and row.place]
    return lines, found.lora is not None


def _config_of(model: str) -> CheckpointConfig:
    for name in names():
        if model.lower().replace("thudm/", "zai-org/") in (name, toml(name)["source"].get("hub", "").lower()):
            return named(name)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"model must be a folder or one of {', '.join(names())}: found no {model}")
    return read_config(folder)


def _facts(config: CheckpointConfig) -> list[str]:
    t = config.transformer
    positions = " + ".join(
        name
        for name, used in (
            ("rotary", t.use_rotary_positional_embeddings),
            (f"learned table of {t.table_rows} rows", t.use_learned_positional_embeddings),
        )
        if used
    )
    scale = f"{config.vae.scaling_factor}" + (", inverted for the image" if config.vae.invert_scale_latents else "")
    schedule = f"snr shift {config.scheduler.snr_shift_scale:g}, zero SNR {'on' if config.scheduler.rescale_betas_zero_snr else 'off'}"
    answers = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config.defaults).items())
    return [
        f"network: {t.num_layers} layers of {t.num_attention_heads} heads x {t.attention_head_dim}, patches {t.patch}, "
        f"positions {positions or 'sine-cosine'}{', ofs' if t.ofs_embed_dim else ''}",
        f"latents: {config.vae.latent_channels} channels, scale {scale}; schedule: {schedule}; text: {t.max_text_seq_length} tokens",
        f"defaults: {answers}",
    ]
