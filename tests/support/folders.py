"""Changes and compares diffusers folders, byte by byte; reads converted ones."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.sources.gather import Source
from safetensors.torch import load_file, save_file

from cogi2v_jax.weights.checkpoint import open_folder, read_unit
from cogi2v_jax.weights.pieces import layer_count

PARTS = ("transformer", "vae", "text_encoder")
FILES = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
SHARED, ALIAS = "shared.weight", "encoder.embed_tokens.weight"


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{FILES[part]}.safetensors"


def rewrite(folder: Path, part: str, change) -> None:
    """`change` edits a part's tensors by name, in place."""
    tensors = load_file(weights(folder, part))
    change(tensors)
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        weights(folder, part),
    )


def raw(folder: Path, part: str) -> dict[str, tuple]:
    """(file, dtype, shape, bytes) of every tensor by name, read without a library, which might
    change NaN or bfloat16."""
    found = {}
    for path in sorted((folder / part).glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (path.name, entry["dtype"], entry["shape"], data[start:end])
    return found


def settings(folder: Path) -> dict[str, bytes]:
    """Every file but weights and their indexes."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and ".safetensors" not in path.name
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def one_line(capsys, arguments: list, code: int = 1) -> str:
    assert main([str(argument) for argument in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cogi2v-convert: ")
    return line


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def units(folder: Path, part: str) -> Iterator[tuple[int | None, dict[str, np.ndarray]]]:
    """(layer, leaves) of each unit of a converted folder; first what is in no layer."""
    layers = layer_count(open_folder(folder, jnp.dtype("float32")).config, part)
    for layer in (None, *range(layers)):
        yield layer, read_unit(folder, part, layer)


def scale_of(kernel: str) -> str:
    """The name of the scale that belongs to an int8 kernel."""
    return kernel.replace(".kernel", ".scale")


# changes after which a folder does not fit


def several(folder: Path) -> None:
    """Four misfits, in all parts."""

    def rename(tensors: dict) -> None:
        tensors["extra"] = tensors.pop("proj_out.bias")

    def reshape(tensors: dict) -> None:
        tensors["encoder.conv_out.conv.bias"] = torch.zeros(3)

    rewrite(folder, "transformer", rename)
    rewrite(folder, "vae", reshape)
    rewrite(folder, "text_encoder", lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))


def other_width(folder: Path) -> None:
    """A VAE of another width."""
    twins.vae(block_out_channels=(8, 8, 8, 8)).save_pretrained(folder / "other")
    (folder / "other" / weights(folder, "vae").name).replace(weights(folder, "vae"))


# Kinds of weights, each a function that changes a folder.


def keep(folder):
    pass


def to_dtype(dtype):
    def change(folder):
        for part in PARTS:
            rewrite(
                folder,
                part,
                lambda tensors: tensors.update(
                    {name: tensor.to(dtype) for name, tensor in tensors.items()}
                ),
            )

    return change


def mix_dtypes(folder):
    """Different dtypes within each layer."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for part in PARTS:

        def change(tensors):
            for number, name in enumerate(sorted(tensors)):
                tensors[name] = tensors[name].to(dtypes[number % 3])

        rewrite(folder, part, change)


def double_table(folder):
    """As trainers save it: the position table in float64, with digits that float32 loses."""

    def change(tensors):
        table = tensors["patch_embed.pos_embedding"]
        tensors["patch_embed.pos_embedding"] = (
            table.double()
            + torch.randn(table.shape, generator=torch.manual_seed(0)).double() * 1e-12
        )

    rewrite(folder, "transformer", change)


def random_bits(folder):
    """Random bit patterns of finite numbers, and whole tensors of -0.0 and of 0.0."""
    generator = torch.Generator().manual_seed(0)

    def change(tensors):
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            kind, bits = (
                (torch.float32, torch.int32),
                (torch.bfloat16, torch.int16),
                (torch.float16, torch.int16),
            )[number % 3]
            drawn = torch.randint(
                torch.iinfo(bits).min,
                torch.iinfo(bits).max,
                tensor.shape,
                dtype=bits,
                generator=generator,
            )
            drawn = drawn.view(kind)
            tensors[name] = torch.where(drawn.isfinite(), drawn, torch.finfo(kind).max)
            if number % 7 == 0:
                tensors[name] = torch.full(tensor.shape, -0.0, dtype=kind)
            if number % 11 == 0:
                tensors[name] = torch.zeros(tensor.shape, dtype=kind)

    for part in PARTS:
        rewrite(folder, part, change)


def rename(folder):
    rewrite(folder, "text_encoder", lambda tensors: tensors.update({ALIAS: tensors.pop(SHARED)}))


def double(folder):
    rewrite(folder, "text_encoder", lambda tensors: tensors.update({ALIAS: tensors[SHARED]}))


KINDS = {
    "float32": keep,
    "bfloat16": to_dtype(torch.bfloat16),
    "float16": to_dtype(torch.float16),
    "mixed": mix_dtypes,
    "float64 table": double_table,
    "any bits": random_bits,
    "embedding by its other name": rename,
    "embedding twice": double,
}


def assert_reads(source: Source, part: str, tensors: dict[str, torch.Tensor]) -> None:
    """The source's tensors of a part are these, bit for bit."""
    found = source.tensors(part)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        value = source.read(part, name)
        assert (value.shape, str(value.dtype)) == (
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
        )
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert (
            value.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
