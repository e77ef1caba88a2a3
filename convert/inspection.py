"""What weights are, in lines for a person."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from cogi2v_jax.config import CheckpointConfig, named, names, one_line, toml
from cogi2v_jax.weights.checkpoint import (
    MANIFEST,
    check_loras,
    int8_errors,
    open_folder,
    read_config,
)
from cogi2v_jax.weights.hub import locate
from cogi2v_jax.weights.hub import report as say
from cogi2v_jax.weights.pieces import NETWORKS, abstract, leaf_names

from . import lora_match
from .conversion import homes, match, tensors_recorded
from .sources import lookalikes
from .sources.gather import MUST, Given, Source, gather, parts_at
from .sources.lora_file import open_lora
from .sources.parts import SAT
from .tables import t5
from .writing import int8


def report(sources: Sequence[str], keys: bool) -> tuple[list[str], bool]:
    """The lines, and whether every tensor has its place: of a converted folder, of what `gather`
    takes, or of one file alone, for which there is no configuration to judge it by. Raises as
    `gather` and `open_folder` do."""
    first = locate(sources[0], say, MUST) if len(sources) == 1 else Path()
    if first.is_file():
        alone = [_alone(part, given) for part, given in parts_at(first).items()]
        hint = f"to see whether it fits, give its folder too: inspect CogVideoX-5b-I2V {first}"
        return [*(line for line, _ in alone), hint], all(ours for _, ours in alone)
    converted = len(sources) == 1 and (first / MANIFEST).is_file()
    source = None if converted else gather([first] if len(sources) == 1 else sources)
    folder = source.folder if source else first
    config = source.config if source else open_folder(folder, jnp.dtype(jnp.float32)).config
    kind = "diffusers folder" if source else "converted folder"
    lines = [
        f"{folder}: {kind}, {config.name or 'weights of its own'} ({config.family})",
        *_facts(config),
    ]
    whole = True
    for part in NETWORKS:
        if source:
            matched = match(source, part)
            names, faults, places = matched.tensors, matched.faults, matched.homes
            dtypes = _dtypes(source, part)
        else:
            recorded = tensors_recorded(folder, config, part)
            names, faults, places = recorded, [], homes(config, part)
            places |= {alias: places[name] for alias, name in t5.TIED.items() if alias in names}
            dtypes = sorted({entry["dtype"] for entry in recorded.values()})
            if part in config.int8:
                dtypes.append(int8.summary(int8_errors(folder)[part]))
        plain = dataclasses.replace(config, int8=())  # scales are no parameters of the network
        count = sum(
            leaf.size for leaf in leaf_names(abstract(plain, part, jnp.dtype(jnp.float32))).values()
        )
        placed = len(names) - sum(fault.split()[0] in names for fault in faults)
        lines.append(
            f"{part}: {count:,} parameters, {placed} of {len(names)} tensors matched, {', '.join(dtypes)}{_origin(source, part)}"
        )
        lines += [f"  ! {one_line(fault)}" for fault in faults]
        if keys:
            lines += [
                f"  {name} -> {places[name].rule.flax} {places[name].rule.axes}".rstrip()
                for name in sorted(names)
                if name in places
            ]
        whole = whole and not faults
    return lines, whole


def lora_report(path: Path, model: str, keys: bool) -> tuple[list[str], bool]:
    """A LoRA file against a model, of which the configuration is enough: a folder, or a name or hub
    id of `config.names()`. Raises as `open_lora` and `check_loras` do."""
    config = _config_of(model)
    found = lora_match.match(open_lora(path), config)
    check_loras(config, jnp.dtype(jnp.float32), [found.lora] if found.lora else [])
    lines = [
        f"{found.line()} ({found.title})",
        *found.unmatched(len(found.rows)),
        *(f"  ! {fault}" for fault in found.general),
    ]
    lines += [f"  {row.key} -> {row.place}" for row in found.rows.values() if keys and row.place]
    return lines, found.lora is not None


def _config_of(model: str) -> CheckpointConfig:
    for name in names():
        if model.lower().replace("thudm/", "zai-org/") in (
            name,
            toml(name)["source"].get("hub", "").lower(),
        ):
            return named(name)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model must be a folder or one of {', '.join(names())}: found no {model}"
        )
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
    scale = f"{config.vae.scaling_factor}" + (
        ", inverted for the image" if config.vae.invert_scale_latents else ""
    )
    schedule = f"snr shift {config.scheduler.snr_shift_scale:g}, zero SNR {'on' if config.scheduler.rescale_betas_zero_snr else 'off'}"
    answers = ", ".join(
        f"{name} {value}" for name, value in config.defaults.items()
    )
    return [
        f"network: {t.num_layers} layers of {t.num_attention_heads} heads x {t.attention_head_dim}, patches {t.patch}, "
        f"positions {positions or 'sine-cosine'}{', ofs' if t.ofs_embed_dim else ''}",
        f"latents: {config.vae.latent_channels} channels, scale {scale}; schedule: {schedule}; text: {t.max_text_seq_length} tokens",
        f"defaults: {answers}",
    ]


def _dtypes(source: Source, part: str) -> list[str]:
    return sorted({kind for weights in source.weights(part) for kind in weights.kinds()})


def _origin(source: Source | None, part: str) -> str:
    """Where a part comes from that is not the folder's."""
    given = source.replaced.get(part) if source else None
    if not given:
        return ""
    naming = " (SAT)" if given.opened and given.opened.naming == SAT else ""
    return f", from {', '.join(str(file) for file in given.files)}{naming}"


def _alone(part: str, given: Given) -> tuple[str, bool]:
    """What a file says of itself, and whether that may be a part of ours."""
    assert given.opened
    tensors = given.opened.tensors()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    whose = lookalikes.other(shapes)
    found = whose or (lookalikes.facts(shapes) if part == "transformer" else None)
    dtypes = ", ".join(sorted(given.opened.kinds()))
    naming = f"{given.opened.naming} names, {len(tensors)} tensors, {dtypes}"
    return f"{given.files[0]}: {part}, {naming}{f', {found}' if found else ''}", whose is None
