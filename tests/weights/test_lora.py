"""LoRAs in the weights: the result of the reference with merged weights, and what changing LoRAs
costs."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loras
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.sources.matching import targets
from jax import monitoring
from PIL import Image
from recipes import read_recipe
from runs import QUICK, enter, failed, files
from tolerances import TOLERANCE, assert_close, relative_error

import cogi2v_jax
from cogi2v_jax import Models, Request
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.media.recipe import recipe_of
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import main
from cogi2v_jax.sampling import programs
from cogi2v_jax.training.validation import TrainedModels
from cogi2v_jax.weights import checkpoint
from cogi2v_jax.weights.checkpoint import restore
from cogi2v_jax.weights.lora import RANK, Lora
from cogi2v_jax.weights.pieces import PIECES, leaf_names, shard_piece, shardings

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
ALL = (*loras.ATTENTION, "proj", "net.2", "linear", "linear_1", "linear_2", "proj_out")
FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cogi2v_jax.load(twins.save(pipe, tmp_path_factory.mktemp("source")), "float32").folder


@pytest.fixture
def models(folder: Path) -> Models:
    return cogi2v_jax.load(folder, "float32")


@pytest.fixture
def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """An entry for each program that is compiled or found in a cache."""
    seen: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


def settings(family: str) -> dict[str, Any]:
    size = dict(zip(("height", "width", "num_frames"), SIZES[family], strict=True))
    return {**size, "num_inference_steps": 4, "use_dynamic_cfg": True}


def request_of(family: str, image: Image.Image) -> Request:
    ways = {"scheduler": "ddim", "fit": "stretch", "noise": "torch", "seed": 7}
    return Request(image, "the red circle", **ways, **settings(family))


class Stop(Exception):
    """Ends a run before decoding, which no LoRA changes."""


def latents(models: Models, request: Request) -> np.ndarray:
    kept = []

    def keep(latents: np.ndarray, resolved: Request) -> None:
        kept.append(latents)
        raise Stop

    with contextlib.suppress(Stop):
        cogi2v_jax.generate(models, request, on_latents=keep)
    return kept[0]


def reference(
    pipe: Any, network: Any, family: str, image: Image.Image, models: Models
) -> np.ndarray:
    """The reference's latents of that request with another transformer."""
    own, pipe.transformer = pipe.transformer, network
    length = models.config.transformer.max_text_seq_length
    fixed = {"max_sequence_length": length, "output_type": "latent", **settings(family)}
    generator = torch.Generator().manual_seed(7)
    latents = pipe(image, "the red circle", generator=generator, **fixed).frames
    pipe.transformer = own
    return twins.frames_last(latents)[:, 1 if family == "1.5" else 0 :]


def test_latents_are_those_of_the_reference_with_merged_weights(
    folder: Path, pipe: Any, family: str, image: Image.Image, tmp_path: Path
) -> None:
    made = loras.pairs(pipe.transformer, ALL, rank=4)
    file = loras.diffusers(tmp_path, made, 4)
    models = cogi2v_jax.load(folder, "float32", loras=[(file, 0.8)])
    ours = latents(models, request_of(family, image))
    theirs = reference(pipe, loras.merge(pipe.transformer, made, 0.4), family, image, models)
    assert_close(ours, theirs, TOLERANCE["latents"])
    assert relative_error(ours, reference(pipe, pipe.transformer, family, image, models)) > 0.01


def test_several_loras_add_up_and_none_gives_the_base_back(
    models: Models, pipe: Any, family: str, image: Image.Image, tmp_path: Path
) -> None:
    base = latents(models, request_of(family, image))
    network, files = pipe.transformer, []
    for number, (weight, rank) in enumerate([(0.5, 3), (-1.0, RANK + 6)]):
        made = loras.pairs(network, rank=rank, seed=number)
        files.append((loras.save(tmp_path / f"{number}.safetensors", loras.peft(made)), weight))
        network = loras.merge(network, made, weight)
    cogi2v_jax.adapt(models, files)
    theirs = reference(pipe, network, family, image, models)
    assert_close(latents(models, request_of(family, image)), theirs, TOLERANCE["latents"])
    cogi2v_jax.adapt(models)
    np.testing.assert_array_equal(latents(models, request_of(family, image)), base)


def executables() -> int:
    """How many programs the stages hold. Latents are never decoded here."""
    counts = {stage.name: 0 for stage in programs.STAGES.values()}
    for stage in programs.STAGES.values():
        counts[stage.name] += len(stage.program._executables)
    assert all(counts[name] for name in ("text", "image", "denoise"))
    return sum(counts.values())


@pytest.mark.parametrize("family", ["1.5"], indirect=True)
def test_changing_loras_compiles_nothing(
    models: Models, pipe: Any, family: str, image: Image.Image, tmp_path: Path, compilations: list
) -> None:
    files = []
    for rank, modules in ((2, ALL), (5, loras.ATTENTION), (2 * RANK + 1, ALL)):
        made = loras.pairs(pipe.transformer, modules, rank, seed=rank)
        files.append(loras.save(tmp_path / f"{rank}.safetensors", loras.peft(made)))
    results = [latents(models, request_of(family, image))]
    kept = executables()
    cogi2v_jax.adapt(models, [files[0]])
    results.append(latents(models, request_of(family, image)))
    assert executables() == kept
    compilations.clear()
    for chosen in ([files[1]], [(files[2], 0.3)], [files[1], (files[0], -2.0)], []):
        cogi2v_jax.adapt(models, chosen)
        results.append(latents(models, request_of(family, image)))
    assert compilations == []
    assert executables() == kept
    np.testing.assert_array_equal(results[0], results.pop())
    assert len({result.tobytes() for result in results}) == len(results)


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_only_pieces_with_other_loras_than_before_are_read_again(
    models: Models, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def restore_and_keep(folder: Path, config: Any, name: str, *others: Any) -> Any:
        read.append(name)
        return restore(folder, config, name, *others)

    monkeypatch.setattr(checkpoint, "restore", restore_and_keep)
    file = loras.save(tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer)))
    for piece in PIECES:
        models.piece(piece)
    again = ["transformer"]
    sets = ([file], again), ([(file, 1.0)], []), ([(file, 0.9)], again), ([], again)
    for chosen, expected in sets:
        read.clear()
        cogi2v_jax.adapt(models, chosen)
        for piece in PIECES:
            models.piece(piece)
        assert read == expected
    models.loras = cogi2v_jax.load(models.folder, "float32", loras=[file]).loras  # set, not adapted
    models.piece("transformer")
    assert read == ["transformer", "transformer"]


def expected(pipe: Any, models: Models, made: loras.Pairs, scale: float) -> dict[str, np.ndarray]:
    """The transformer's leaves with pairs merged in torch."""
    tensors = loras.merge(pipe.transformer, made, scale).state_dict()
    single, layers = {}, {}
    for name, (rule, layer) in targets(models.config, "transformer").items():
        leaf = rule.to_flax(tensors[name].numpy())
        if layer is None:
            single[rule.flax] = leaf
        else:
            layers.setdefault(rule.flax, []).append(leaf)
    return single | {name: np.stack(rows) for name, rows in layers.items()}


def merged(models: Models, **places: Any) -> dict[str, np.ndarray]:
    """Our leaves of the transformer, by the names of `expected`."""
    found = {}
    for piece in ("modulation", "transformer"):
        shapes = shard_piece(models.config, piece, models.dtype, **places) if places else None
        leaves = leaf_names(models.piece(piece, shapes)).items()
        found |= {PIECES[piece][1] + name: np.asarray(leaf) for name, leaf in leaves}
    return found


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
@pytest.mark.parametrize("mesh", [Sizes(context=8), Sizes(pair=2, context=2, data=2)], ids=str)
def test_loras_are_merged_into_split_weights(
    folder: Path, pipe: Any, mesh: Sizes, tmp_path: Path
) -> None:
    made = loras.pairs(pipe.transformer, ALL, rank=5)
    models = cogi2v_jax.load(folder, "float32", loras=[loras.diffusers(tmp_path, made, 5)])
    devices = make_mesh(mesh, jax.devices())
    ours = merged(models, mesh=devices, memory=1000)  # too little for a whole network
    shapes = shard_piece(models.config, "transformer", FLOAT32, devices, 1000)
    whole = [one.is_fully_replicated for one in shardings(models.piece("transformer", shapes))]
    assert not all(whole)
    for name, leaf in expected(pipe, models, made, 0.5).items():
        assert_close(ours[name], leaf, 1e-6)


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_in_bfloat16_the_sum_is_rounded_once(folder: Path, pipe: Any, tmp_path: Path) -> None:
    made = loras.pairs(pipe.transformer, ALL, rank=RANK + 9)
    file = loras.save(tmp_path / "a.safetensors", loras.peft(made))
    models = cogi2v_jax.load(folder, "bfloat16", loras=[file, (file, -0.25)])
    theirs = expected(pipe, models, made, 0.75)
    ours = merged(models)
    assert {leaf.dtype.name for leaf in ours.values()} == {"bfloat16"}
    total = sum(leaf.size for leaf in ours.values())
    differs = (ours[name] != leaf.astype(jnp.bfloat16) for name, leaf in theirs.items())
    # Float32 sums in another order may be rounded the other way.
    assert sum(map(np.sum, differs)) < 1e-3 * total


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_the_folder_is_not_changed(folder: Path, pipe: Any, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file = loras.save(tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer)))
    cogi2v_jax.load(folder, "float32", loras=[file]).piece("transformer")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# beside int8 weights


@pytest.fixture(scope="module")
def int8_folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = twins.save(pipe, tmp_path_factory.mktemp("source"))
    return Path(to_flax(source, tmp_path_factory.mktemp("converted") / "int8", "int8"))


def two_loras(pipe: Any, folder: Path) -> list[tuple[Path, float]]:
    """One of all kinds of layers, and one of attention alone with a larger rank."""
    files = []
    for weight, rank, modules in ((0.5, 3, ALL), (-1.0, RANK + 6, loras.ATTENTION)):
        made = loras.pairs(pipe.transformer, modules, rank=rank, seed=rank)
        files.append((loras.save(folder / f"{rank}.safetensors", loras.peft(made)), weight))
    return files


def with_merged(models: Models, found: list[Lora]) -> Models:
    """The same checkpoint with the numbers of its int8 kernels in float32, and LoRAs in them."""
    leaves = {name: leaf.astype(np.float32) for name, leaf in merged(models).items()}
    for name in [name for name in leaves if f"{name.removesuffix('kernel')}scale" in leaves]:
        scale = leaves.pop(f"{name.removesuffix('kernel')}scale")
        leaves[name] = leaves[name] * scale[:, None]
    for lora in found:
        for (name, layer), (down, up, scale) in lora.factors.items():
            row = leaves[name] if layer is None else leaves[name][layer]
            row += np.float32(lora.weight * scale) * (down @ up)
    config = dataclasses.replace(models.config, int8=("text_encoder",))
    put = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return TrainedModels(models.folder, config, models.dtype, part="transformer", leaves=put)


def test_loras_beside_int8_weights_give_what_merged_ones_give(
    int8_folder: Path, pipe: Any, family: str, image: Image.Image, tmp_path: Path
) -> None:
    models = cogi2v_jax.load(int8_folder, "float32")
    base = latents(models, request_of(family, image))
    found = cogi2v_jax.load(int8_folder, "float32", loras=two_loras(pipe, tmp_path)).loras
    theirs = latents(with_merged(models, [*found]), request_of(family, image))
    models.loras = found
    blocks = [f"blocks.{name}" for name in ("attn.k", "attn.out", "attn.q", "attn.v")]
    mlp = [(f"blocks.mlp.{name}", RANK) for name in ("down", "up")]
    assert models.ranks == (*((name, 2 * RANK) for name in blocks), *mlp)
    ours = latents(models, request_of(family, image))
    assert_close(ours, theirs, TOLERANCE["latents"])
    assert relative_error(ours, base) > 0.01
    models.mesh = "pair=2"
    assert_close(latents(models, request_of(family, image)), theirs, TOLERANCE["latents"])


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_beside_int8_weights_only_another_rank_compiles(
    int8_folder: Path,
    pipe: Any,
    family: str,
    image: Image.Image,
    tmp_path: Path,
    compilations: list,
) -> None:
    models = cogi2v_jax.load(int8_folder, "bfloat16", loras=two_loras(pipe, tmp_path))
    results = [latents(models, request_of(family, image))]
    first, second = models.loras
    compilations.clear()
    models.loras = [dataclasses.replace(first, weight=2.0), second]
    results.append(latents(models, request_of(family, image)))
    assert compilations == []
    models.loras = [first]
    results.append(latents(models, request_of(family, image)))
    assert compilations != []
    assert len({result.tobytes() for result in results}) == len(results)


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_on_devices_that_split_int8_weights_each_has_the_whole_branches(
    int8_folder: Path, pipe: Any, tmp_path: Path
) -> None:
    models = cogi2v_jax.load(int8_folder, "float32", loras=two_loras(pipe, tmp_path))
    mesh = make_mesh(Sizes(context=8), jax.devices())
    places = models.config, "transformer", FLOAT32, mesh, 1000, models.ranks
    network = models.piece("transformer", shard_piece(*places))
    split = {name: leaf.sharding.is_fully_replicated for name, leaf in leaf_names(network).items()}
    assert not split["blocks.attn.q.kernel"]
    assert split["blocks.attn.q.lora.down"]
    assert split["blocks.attn.q.lora.up"]


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_recipe_has_its_loras(models: Models, pipe: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    request = Request(tmp_path / "a.png", "p").resolve(models.config)
    assert recipe_of(models, "m", request)["loras"] == []
    file = loras.save(tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer)))
    cogi2v_jax.adapt(models, [f"{file}:0.5", file])
    first, second = recipe_of(models, "m", request)["loras"]
    assert (first["file"], first["weight"], second["weight"]) == ("a.safetensors", 0.5, 1.0)
    assert len(first["sha256"]) == 64


# the command line


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA file of the embedded model, in the folder where commands run."""
    enter(tmp_path, monkeypatch)
    shapes = {"A": (4, 192), "B": (192, 4)}
    tensors = {"text_encoder.x.lora_A.weight": torch.zeros(1)}
    for layer in range(6):
        for side, shape in shapes.items():
            name = f"transformer.transformer_blocks.{layer}.attn1.to_v.lora_{side}.weight"
            tensors[name] = 0.2 * torch.randn(shape)
    return loras.save(tmp_path / "a.safetensors", tensors)


def sample(output: str, *flags: str) -> None:
    assert main([*QUICK, "--output", output, *flags]) == 0


def test_the_command_line_takes_several_loras_and_the_video_has_them_in_its_recipe(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    sample("base")
    capsys.readouterr()
    tiny.with_name("pytorch_lora_weights.safetensors").write_bytes(tiny.read_bytes())
    both = "--lora_path", "a.safetensors:0.5", "--lora_path", "."
    sample("twice", *both, "--lora_rank", "128")
    own = f"{tiny.parent.name}/pytorch_lora_weights.safetensors"
    rest = "12 of 13 tensors matched, rank 4, alpha 4 (not stated: as the rank), weight"
    unmatched = "  ! text_encoder.x.lora_A.weight is of a text encoder, which stays as it is"
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"lora a.safetensors: {rest} 0.5", unmatched]
    assert lines[2:4] == [f"lora {own}: {rest} 1", unmatched]
    found = [(lora["file"], lora["weight"]) for lora in read_recipe("twice")["loras"]]
    assert found == [("a.safetensors", 0.5), (own, 1.0)]
    sample("undone", "--lora_path", "a.safetensors:2", "--lora_path", "a.safetensors:-2")
    assert not np.array_equal(read_frames("twice"), read_frames("base"))
    np.testing.assert_allclose(read_frames("undone").astype(int), read_frames("base"), atol=1)


def test_a_lora_of_another_model_is_one_line_and_nothing_is_written(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    shapes = {"A": (2, 3072), "B": (64, 2)}
    name = "transformer.proj_out.lora_{}.weight"
    loras.save(tiny, {name.format(side): torch.zeros(shape) for side, shape in shapes.items()})
    line = failed(capsys, ["--lora_path", "a.safetensors"], 1)
    models = "its shapes are those of CogVideoX-5B or CogVideoX-5B-I2V"
    wrong = f"{name.format('A')} must have the shape [rank, 192]: got [2, 3072]"
    assert line == f"cogi2v: lora a.safetensors must fit cogi2v-tiny: {models}; {wrong}"
    assert files() == {"a.safetensors"}
