"""LoRAs in the weights: the reference's result with them merged by hand, and what swapping them
costs."""

import contextlib
import re
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
from cogi2v_convert.conversion import homes
from jax import monitoring
from PIL import Image
from runs import QUICK, enter, failed, files
from tolerances import TOLERANCE, assert_close, relative_error

import cogi2v_jax
from cogi2v_jax import Models, Request
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.media.recipe import recipe_of
from cogi2v_jax.media.videos import read_frames, read_recipe
from cogi2v_jax.sample import main
from cogi2v_jax.sampling import programs
from cogi2v_jax.weights import checkpoint
from cogi2v_jax.weights.checkpoint import check_loras, restore
from cogi2v_jax.weights.lora import RANK, Factors, Lora, check_leaves
from cogi2v_jax.weights.pieces import PIECES, leaf_names, placed

SIZES = {"1.0": (48, 80, 17), "1.5": (64, 48, 17)}
ALL = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "linear",
    "linear_1",
    "linear_2",
    "proj_out",
)
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
    """One entry for each program that is compiled, or found in a cache, by anyone."""
    seen: list[str] = []

    def hear(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(hear)
    yield seen
    monitoring.unregister_event_duration_listener(hear)


def settings(family: str) -> dict[str, Any]:
    height, width, frames = SIZES[family]
    return {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": 4,
        "use_dynamic_cfg": True,
    }


def ask(family: str, image: Image.Image, seed: int = 7) -> Request:
    return Request(
        image,
        "the red circle",
        scheduler="ddim",
        fit="stretch",
        noise="torch",
        seed=seed,
        **settings(family),
    )


class Enough(Exception):
    """Ends a run before its latents are decoded, which no LoRA changes."""


def latents(models: Models, request: Request) -> np.ndarray:
    kept = []

    def keep(latents: np.ndarray, resolved: Request) -> None:
        kept.append(latents)
        raise Enough

    with contextlib.suppress(Enough):
        cogi2v_jax.generate(models, request, on_latents=keep)
    return kept[0]


def reference(
    pipe: Any, network: Any, family: str, image: Image.Image, models: Models
) -> np.ndarray:
    """The reference's latents of that request with another transformer."""
    own, pipe.transformer = pipe.transformer, network
    length, generator = (
        models.config.transformer.max_text_seq_length,
        torch.Generator().manual_seed(7),
    )
    latents = pipe(
        image, "the red circle", generator=generator, max_sequence_length=length, output_type="latent", **settings(family)
    ).frames  # fmt: skip
    pipe.transformer = own
    return twins.frames_last(latents)[:, 1 if family == "1.5" else 0 :]


def test_latents_are_the_references_with_the_lora_merged_by_hand(
    folder: Path, pipe: Any, family: str, image: Image.Image, tmp_path: Path
) -> None:
    made = loras.pairs(pipe.transformer, ALL, rank=4)
    file = loras.diffusers(tmp_path, made, 4)
    models = cogi2v_jax.load(folder, "float32", loras=[(file, 0.8)])
    ours = latents(models, ask(family, image))
    theirs = reference(pipe, loras.merge(pipe.transformer, made, 0.4), family, image, models)
    assert_close(ours, theirs, TOLERANCE["latents"])
    assert relative_error(ours, reference(pipe, pipe.transformer, family, image, models)) > 0.01


def test_several_add_up_and_none_gives_the_base_back(
    models: Models, pipe: Any, family: str, image: Image.Image, tmp_path: Path
) -> None:
    base = latents(models, ask(family, image))
    network, files = pipe.transformer, []
    for number, (weight, rank) in enumerate([(0.5, 3), (-1.0, RANK + 6)]):
        made = loras.pairs(network, rank=rank, seed=number)
        files.append((loras.save(tmp_path / f"{number}.safetensors", loras.peft(made)), weight))
        network = loras.merge(network, made, weight)
    cogi2v_jax.adapt(models, files)
    assert_close(
        latents(models, ask(family, image)),
        reference(pipe, network, family, image, models),
        TOLERANCE["latents"],
    )
    cogi2v_jax.adapt(models)
    np.testing.assert_array_equal(latents(models, ask(family, image)), base)


def executables() -> int:
    return sum(
        len(value._executables)
        for value in vars(programs).values()
        if isinstance(value, programs.Program)
    )


@pytest.mark.parametrize("family", ["1.5"], indirect=True)
def test_swapping_compiles_nothing(
    models: Models, pipe: Any, family: str, image: Image.Image, tmp_path: Path, compilations: list
) -> None:
    files = [
        loras.save(
            tmp_path / f"{rank}.safetensors",
            loras.peft(loras.pairs(pipe.transformer, targets, rank, seed=rank)),
        )
        for rank, targets in ((2, ALL), (5, loras.ATTENTION), (2 * RANK + 1, ALL))
    ]
    results = [latents(models, ask(family, image))]
    kept = executables()
    cogi2v_jax.adapt(models, [files[0]])
    results.append(latents(models, ask(family, image)))
    assert executables() == kept
    compilations.clear()
    for chosen in ([files[1]], [(files[2], 0.3)], [files[1], (files[0], -2.0)], []):
        cogi2v_jax.adapt(models, chosen)
        results.append(latents(models, ask(family, image)))
    assert compilations == []
    assert executables() == kept
    np.testing.assert_array_equal(results[0], results.pop())
    assert len({result.tobytes() for result in results}) == len(results)


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_the_same_set_stays_loaded_and_a_piece_that_it_leaves_alone_too(
    models: Models, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        checkpoint, "restore", lambda *arguments: read.append(arguments[2]) or restore(*arguments)
    )
    file = loras.save(tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer)))
    for piece in PIECES:
        models.piece(piece)
    for chosen, expected in (
        ([file], ["transformer"]),
        ([(file, 1.0)], []),
        ([(file, 0.9)], ["transformer"]),
        ([], ["transformer"]),
    ):
        read.clear()
        cogi2v_jax.adapt(models, chosen)
        for piece in PIECES:
            models.piece(piece)
        assert read == expected
    models.loras = cogi2v_jax.load(models.folder, "float32", loras=[file]).loras  # set, not adapted
    models.piece("transformer")
    assert read == ["transformer", "transformer"]


def expected(pipe: Any, models: Models, made: loras.Pairs, scale: float) -> dict[str, np.ndarray]:
    """The transformer's leaves with pairs merged in torch, stacked."""
    tensors = loras.merge(pipe.transformer, made, scale).state_dict()
    leaves: dict[str, list[np.ndarray]] = {}
    for name, (rule, layer) in homes(models.config, "transformer").items():
        leaves.setdefault(rule.flax + ("" if layer is None else "[]"), []).append(
            rule.to_flax(tensors[name].numpy())
        )
    return {
        name.removesuffix("[]"): np.stack(found) if "[]" in name else found[0]
        for name, found in leaves.items()
    }


def merged(models: Models, **places: Any) -> dict[str, np.ndarray]:
    found = {}
    for piece in ("modulation", "transformer"):
        shapes = placed(models.config, piece, models.dtype, **places) if places else None
        found |= {
            PIECES[piece][1] + name: np.asarray(leaf)
            for name, leaf in leaf_names(models.piece(piece, shapes)).items()
        }
    return found


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
@pytest.mark.parametrize("mesh", [Sizes(context=8), Sizes(pair=2, context=2, data=2)], ids=str)
def test_split_weights_are_merged_where_they_lie(
    folder: Path, pipe: Any, mesh: Sizes, tmp_path: Path
) -> None:
    made = loras.pairs(pipe.transformer, ALL, rank=5)
    models = cogi2v_jax.load(folder, "float32", loras=[loras.diffusers(tmp_path, made, 5)])
    devices = make_mesh(mesh, jax.devices())
    ours = merged(models, mesh=devices, memory=1000)  # too little for a whole network
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaf_names(models.piece("transformer", placed(
        models.config, "transformer", FLOAT32, devices, 1000))).values())  # fmt: skip
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
    apart = sum(
        int((ours[name] != leaf.astype(jnp.bfloat16)).sum()) for name, leaf in theirs.items()
    )
    # Float32 sums in another order fall on the other side of a rounding.
    assert apart < 1e-3 * total


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_the_folder_is_only_read(folder: Path, pipe: Any, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file = loras.save(tmp_path / "a.safetensors", loras.peft(loras.pairs(pipe.transformer)))
    cogi2v_jax.load(folder, "float32", loras=[file]).piece("transformer")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_numbers_of_a_quantised_weight_take_no_lora(models: Models) -> None:
    factors = Factors(np.zeros((4, 1), np.float32), np.zeros((1, 4), np.float32), 1.0)
    lora = Lora("a.safetensors", "0", 1.0, {("blocks.attn.q.kernel", 0): factors})
    check_loras(models.config, FLOAT32, [lora])
    leaves = {
        "blocks.attn.q.kernel": jax.ShapeDtypeStruct((3, 4, 4), jnp.int8),
        "blocks.attn.k.kernel": np.zeros(3, np.int8),
    }
    with pytest.raises(
        ValueError,
        match=r"lora a.safetensors must meet floating-point weights: got blocks.attn.q.kernel of int8; load",
    ):
        check_leaves([lora], leaves)
    check_leaves([lora], {"blocks.attn.k.kernel": leaves["blocks.attn.k.kernel"]})


@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_recipe_tells_its_loras(models: Models, pipe: Any, tmp_path: Path) -> None:
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
    """A LoRA of the embedded model, in the folder where runs begin."""
    enter(tmp_path, monkeypatch)
    shapes = {"A": (4, 160), "B": (160, 4)}
    stems = [f"transformer.transformer_blocks.{layer}.attn1.to_v" for layer in range(5)]
    tensors = {
        f"{stem}.lora_{side}.weight": 0.2 * torch.randn(shape)
        for stem in stems
        for side, shape in shapes.items()
    }
    return loras.save(
        tmp_path / "a.safetensors", tensors | {"text_encoder.x.lora_A.weight": torch.zeros(1)}
    )


def test_the_command_line_takes_several_and_the_video_tells_them(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*QUICK, "--output", "base"]) == 0
    capsys.readouterr()
    tiny.with_name("pytorch_lora_weights.safetensors").write_bytes(tiny.read_bytes())
    assert (
        main(
            [
                *QUICK,
                "--output",
                "twice",
                "--lora_path",
                "a.safetensors:0.5",
                "--lora_path",
                ".",
                "--lora_rank",
                "128",
            ]
        )
        == 0
    )
    own = f"{tiny.parent.name}/pytorch_lora_weights.safetensors"
    rest = "10 of 11 tensors matched, rank 4, alpha 4 (not stated: as the rank), weight"
    unmatched = "  ! text_encoder.x.lora_A.weight is of a text encoder, which stays as it is"
    said = capsys.readouterr().err.splitlines()
    assert said[:4] == [
        f"lora a.safetensors: {rest} 0.5",
        unmatched,
        f"lora {own}: {rest} 1",
        unmatched,
    ]
    told = [(lora["file"], lora["weight"]) for lora in read_recipe("twice")["loras"]]
    assert told == [("a.safetensors", 0.5), (own, 1.0)]
    assert (
        main(
            [
                *QUICK,
                "--output",
                "undone",
                "--lora_path",
                "a.safetensors:2",
                "--lora_path",
                "a.safetensors:-2",
            ]
        )
        == 0
    )
    assert not np.array_equal(read_frames("twice"), read_frames("base"))
    np.testing.assert_allclose(read_frames("undone").astype(int), read_frames("base"), atol=1)


def test_a_lora_of_another_model_is_one_line_and_nothing_is_written(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    loras.save(
        tiny,
        {
            "transformer.proj_out.lora_A.weight": torch.zeros(2, 3072),
            "transformer.proj_out.lora_B.weight": torch.zeros(64, 2),
        },
    )
    line = failed(capsys, ["--lora_path", "a.safetensors"], 1)
    assert re.fullmatch(
        r"cogi2v: lora a.safetensors must fit cogi2v-tiny: its shapes are those of CogVideoX-5B or CogVideoX-5B-I2V; "
        r"transformer.proj_out.lora_A.weight must have the shape \[rank, 160\]: got \[2, 3072\]",
        line,
    )
    assert files() == {"a.safetensors"}
