"""Describes weights for a person, in lines."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from cogi2v_jax.arguments import parse_loras
from cogi2v_jax.config import CheckpointConfig, names
from cogi2v_jax.disk import one_line
from cogi2v_jax.lookalikes import by_tensors
from cogi2v_jax.weights.checkpoint import MANIFEST, int8_errors
from cogi2v_jax.weights.hub import known_config, locate
from cogi2v_jax.weights.hub import report as say
from cogi2v_jax.weights.pieces import NETWORKS, abstract, leaf_names

from . import lora_match
from .conversion import Converted
from .sources import lookalikes
from .sources.gather import MUST, NO_FOLDER, Given, Source, gather, parts_at
from .sources.lora_file import open_lora
from .sources.matching import match
from .sources.parts import DIFFUSERS
from .tables.rules import Target
from .writing import int8

FLOAT32 = jnp.dtype(jnp.float32)


def describe(sources: Sequence[str], keys: bool) -> tuple[list[str], bool]:
    """Describes a converted folder, what `gather` takes, or one file alone, which has no
    configuration to compare it with. Returns the lines, and whether every tensor fits; `keys` lists
    each tensor. Raises as `gather` and `open_folder`."""
    first = locate(sources[0], say, MUST) if len(sources) == 1 else Path()
    if first.is_file():
        files = [_describe_file(part, given) for part, given in parts_at(first).items()]
        way = f"inspect CogVideoX-5b-I2V {first}"
        hint = f"to see whether it fits, give its folder too: {way}"
        return [*(line for line, _ in files), hint], all(ours for _, ours in files)
    if len(sources) == 1 and (first / MANIFEST).is_file():
        return _describe_converted(Converted(first), keys), True
    return _describe_source(gather([first] if len(sources) == 1 else sources), keys)


def _describe_converted(folder: Converted, keys: bool) -> list[str]:
    lines = _headline(folder.folder, "converted folder", folder.config)
    for part in NETWORKS:
        record = folder.recorded(part)
        dtypes = sorted({entry["dtype"] for entry in record.values()})
        if part in folder.config.int8:
            dtypes.append(int8.summary(int8_errors(folder.folder)[part]))
        matched = f"{len(record)} of {len(record)} tensors matched"
        count = _parameters(folder.config, part)
        lines.append(f"{part}: {count:,} parameters, {matched}, {', '.join(dtypes)}")
        if keys:
            lines += _list_keys(record, folder.targets[part])
    return lines


def _describe_source(source: Source, keys: bool) -> tuple[list[str], bool]:
    lines, fits = _headline(source.folder, "diffusers folder", source.config), True
    for part in NETWORKS:
        _, targets, tensors, faults, copies = match(source, part)
        fitting = len(tensors) - sum(fault.split()[0] in tensors for fault in faults)
        matched = f"{fitting} of {len(tensors)} tensors matched"
        dtypes = sorted({kind for weights in source.weights(part) for kind in weights.kinds()})
        origin = ""
        if given := source.replaced.get(part):
            named = {weights.naming for weights in given.opened} - {DIFFUSERS}
            naming = f" ({', '.join(named)})" if named else ""
            origin = f", from {', '.join(map(str, given.files))}{naming}"
        count = _parameters(source.config, part)
        lines.append(f"{part}: {count:,} parameters, {matched}, {', '.join(dtypes)}{origin}")
        lines += [f"  ! {one_line(fault)}" for fault in faults]
        if copies and not faults:
            what = f"fused copies left out: {len(copies)}, the first {copies[0]}"
            lines.append(one_line(f"  {what}"))
        if keys:
            lines += _list_keys(tensors, targets)
        fits = fits and not faults
    return lines, fits


def _parameters(config: CheckpointConfig, part: str) -> int:
    plain = dataclasses.replace(config, int8=())  # scales are not parameters of the network
    return sum(leaf.size for leaf in leaf_names(abstract(plain, part, FLOAT32)).values())


def _list_keys(tensors: Mapping[str, object], targets: Mapping[str, Target]) -> list[str]:
    rules = {name: targets[name].rule for name in sorted(tensors) if name in targets}
    lines = (f"{name} -> {rule.flax} {rule.axes}".rstrip() for name, rule in rules.items())
    return [f"  {one_line(line)}" for line in lines]


def _describe_file(part: str, given: Given) -> tuple[str, bool]:
    """Describes one part that a file holds; and whether it may be a part of ours."""
    tensors = {k: v for weights in given.opened for k, v in weights.tensors().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    relative = by_tensors(shapes)
    found = relative or (lookalikes.facts(shapes) if part == "transformer" else None)
    dtypes = ", ".join(sorted({kind for weights in given.opened for kind in weights.kinds()}))
    naming = f"{given.opened[0].naming} names, {len(tensors)} tensors, {dtypes}"
    return f"{given.files[0]}: {part}, {naming}{f', {found}' if found else ''}", relative is None


def describe_lora(lora: str, model: str, keys: bool) -> tuple[list[str], bool]:
    """Describes a LoRA (a file, a folder or a hub id) for a model (a folder, or a name or hub id of
    `config.names()`), of which only the configuration is read. Returns the lines, and whether it
    can be added; `keys` lists each tensor. Raises as `open_lora`."""
    config = _config_of(model)
    found = lora_match.match(open_lora(parse_loras([lora])[0][0]), config)
    lines = [f"{found.line()} ({found.title})", *found.unmatched(len(found.rows))]
    lines += [f"  ! {one_line(fault)}" for fault in found.general]
    used = [row for row in found.rows.values() if keys and row.place]
    lines += [f"  {one_line(row.key)} -> {row.place}" for row in used]
    return lines, found.lora is not None


def _config_of(model: str) -> CheckpointConfig:
    if found := known_config(model):
        return found
    if Path(os.path.expanduser(model)).exists():
        raise FileNotFoundError(f"{model} {NO_FOLDER}")
    known = ", ".join(names())
    raise FileNotFoundError(f"model must be a folder or one of {known}: found no {model}")


def _headline(folder: Path, kind: str, config: CheckpointConfig) -> list[str]:
    t, vae, scheduler = config.transformer, config.vae, config.scheduler
    positions = ["rotary"] if t.use_rotary_positional_embeddings else []
    if t.use_learned_positional_embeddings:
        positions.append(f"learned table of {t.table_rows} rows")
    inverted = ", inverted for the image" if vae.invert_scale_latents else ""
    zero_snr = "on" if scheduler.rescale_betas_zero_snr else "off"
    defaults = config.defaults.items()
    return [
        f"{folder}: {kind}, {config.name or 'weights of its own'} ({config.family})",
        f"network: {t.num_layers} layers of {t.num_attention_heads} heads x {t.attention_head_dim},"
        f" patches {t.patch}, positions {' + '.join(positions) or 'sine-cosine'}"
        f"{', ofs' if t.ofs_embed_dim else ''}",
        f"latents: {vae.latent_channels} channels, scale {vae.scaling_factor}{inverted}; "
        f"schedule: snr shift {scheduler.snr_shift_scale:g}, zero SNR {zero_snr}; "
        f"text: {t.max_text_seq_length} tokens",
        f"defaults: {', '.join(f'{name} {value}' for name, value in defaults)}",
    ]
