"""LoRA files that are refused, each in one line, and the model that they are for."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.lora_match import MODELS, match
from cogi2v_convert.sources.lora_file import LoraFile, open_lora

from cogi2v_jax import loading
from cogi2v_jax.config import CheckpointConfig, named

RANK = 4
EVERY = ("to_q", "proj", "linear_1", "proj_out")


@pytest.fixture(scope="module")
def config(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> CheckpointConfig:
    return loading.read_config(twins.save(pipe, tmp_path_factory.mktemp("source"), spiece=False))


@pytest.fixture(scope="module")
def attention(pipe: Any) -> loras.Pairs:
    return loras.pairs(pipe.transformer, rank=RANK)


Q = "transformer.transformer_blocks.1.attn1.to_q"


def changed(change: Any) -> Any:
    def write(folder: Path, made: loras.Pairs) -> Path:
        tensors = loras.peft(made)
        change(tensors)
        return loras.save(folder / "a.safetensors", tensors)

    return write


def stating(**settings: Any) -> Any:
    return lambda folder, made: loras.save(
        folder / "a.safetensors", loras.peft(made), loras.header(**settings)
    )


def spoilt(value: float, side: str) -> Any:
    return changed(lambda tensors: tensors[f"{Q}.lora_{side}.weight"].__setitem__((1, 1), value))


FAULTS = {
    "A alone": (
        changed(lambda t: t.pop(f"{Q}.lora_B.weight")),
        rf"{Q}.lora_A.weight must come with the B of its weight: got none$",
    ),
    "B alone": (
        changed(lambda t: t.pop(f"{Q}.lora_A.weight")),
        rf"{Q}.lora_B.weight must come with the A of its weight: got none$",
    ),
    "alpha alone": (
        changed(lambda t: t.update({"transformer.proj_out.alpha": torch.ones(())})),
        r"transformer.proj_out.alpha must come with the A of its weight: got none$",
    ),
    "NaN": (spoilt(math.nan, "A"), rf"{Q}.lora_A.weight must be finite: got nan$"),
    "infinity": (spoilt(-math.inf, "B"), rf"{Q}.lora_B.weight must be finite: got -inf$"),
    "NaN alpha": (
        changed(lambda t: t.update({f"{Q}.alpha": torch.tensor(math.nan)})),
        rf"{Q}.alpha must be finite: got nan$",
    ),
    "alphas": (
        changed(lambda t: t.update({f"{Q}.alpha": torch.ones(2)})),
        rf"{Q}.alpha must be one number: got the shape \[2\]$",
    ),
    "inputs": (
        changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(RANK, 97)})),
        rf"{Q}.lora_A.weight must have the shape \[rank, 96\]: got \[4, 97\]$",
    ),
    "outputs": (
        changed(lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(97, RANK)})),
        rf"{Q}.lora_B.weight must have the shape \[96, 4\]: got \[97, 4\]$",
    ),
    "ranks": (
        changed(lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(96, RANK + 1)})),
        rf"{Q}.lora_B.weight must have the shape \[96, 4\]: got \[96, 5\]$",
    ),
    "transposed": (
        changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(96, RANK)})),
        rf"{Q}.lora_A.weight must have the shape \[rank, 96\]: got \[96, 4\]; and 1 more$",
    ),
    "no rank": (
        changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 96)})),
        r"must have the shape \[rank, 96\]: got \[0, 96\]$",
    ),
    "a number": (
        changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(())})),
        r"must have the shape \[rank, 96\]: got \[\]$",
    ),
    "twice": (
        changed(lambda t: t.update({f"{Q}.lora_A.other.weight": torch.zeros(RANK, 96)})),
        rf"{Q}.lora_A.weight must be the only A of its weight: got {Q}.lora_A.other.weight too$",
    ),
    "layers": (
        changed(
            lambda t: t.update({Q.replace(".1.", ".3.") + ".lora_A.weight": torch.zeros(RANK, 96)})
        ),
        r"blocks.3.attn1.to_q.lora_A.weight must be of a weight that this network has: it has "
        r"none of this name$",
    ),
    "another rank stated": (
        stating(r=8, lora_alpha=4),
        r"to_k.lora_A.weight must have the rank that the file states, 8: got 4; and 11 more$",
    ),
    "no alpha": (
        stating(r=RANK, lora_alpha="much"),
        r"must have a number as lora_alpha, alpha_pattern a number for each module: could not",
    ),
    "no pattern": (
        stating(r=RANK, alpha_pattern={"(": 1}),
        r"must have a number as lora_alpha, alpha_pattern a number for each module: ",
    ),
    "a pattern that can't be compiled": (
        stating(r=RANK, alpha_pattern={"a{99999999999}": 1}),
        r"must have a number as lora_alpha, .*: the repetition number is too large; and 11 more$",
    ),
    "a rank of 401 digits": (
        stating(r=10**400),
        r"must have a JSON object as lora_adapter_metadata in its header: .* 300 digits: got 401$",
    ),
    "an alpha beyond float32": (
        stating(lora_alpha=1e300),
        r"to_k.lora_A.weight must have a scale that float32 holds: got 2.5e\+299; and 11 more$",
    ),
    "endless alpha": (
        stating(lora_alpha=math.inf),
        r"must have a finite number as lora_alpha: got inf; and 11 more$",
    ),
    "header": (
        lambda folder, made: loras.save(
            folder / "a.safetensors", loras.peft(made), {"lora_adapter_metadata": "[1]"}
        ),
        r"must have a JSON object as lora_adapter_metadata in its header: ",
    ),
    "nothing": (
        lambda folder, made: loras.save(folder / "a.safetensors", {}),
        r"none of its 0 tensors changes a weight of it: .* is empty$",
    ),
    "a model": (
        lambda folder, made: loras.save(
            folder / "a.safetensors",
            {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(96, 96)},
        ),
        r"none of its 1 tensors changes a weight of it: transformer_blocks.0.attn1.to_q.weight is "
        r"not a LoRA's tensor$",
    ),
    "another family's": (
        lambda folder, made: loras.save(
            folder / "a.safetensors",
            {"transformer.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 96)},
        ),
        r"none of its 1 tensors changes a weight of it: "
        r"transformer.blocks.0.self_attn.q.lora_A.weight is of no linear weight of this",
    ),
    "numbers for first and last weights": (
        changed(
            lambda t: t.update(
                {
                    "transformer.patch_embed.proj.lora_A.weight": torch.zeros(()),
                    "proj_out.lora_B.weight": torch.zeros(()),
                }
            )
        ),
        r"proj_out.lora_B.weight must come with the A of its weight: got none; and 1 more$",
    ),
    "a layer without a number": (
        changed(
            lambda t: t.update(
                {
                    "transformer_blocks.x.attn1.to_q.lora_A.weight": torch.zeros(2),
                    f"{Q}.lora_A.weight": torch.zeros(2),
                }
            )
        ),
        rf"{Q}.lora_A.weight must have the shape \[rank, 96\]: got \[2\]; and 1 more$",
    ),
    "integers": (
        lambda folder, made: loras.save(
            folder / "a.safetensors", {f"{Q}.lora_A.weight": torch.zeros(4, 96, dtype=torch.int8)}
        ),
        r"must hold tensors of F64, F32, F16, BF16: got .* of I8$",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["1.0"], indirect=True)
def test_a_fault_is_one_line_before_anything_slow(
    fault: str,
    attention: loras.Pairs,
    config: CheckpointConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, expected = FAULTS[fault]
    pairs = {name: (a.clone(), b.clone()) for name, (a, b) in attention.items()}
    file = write(tmp_path, pairs)
    monkeypatch.setattr(loading, "locate", lambda name, say: tmp_path)
    monkeypatch.setattr(loading, "read_config", lambda folder: config)
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("the model was converted"))
    with pytest.raises(ValueError, match=expected) as caught:
        loading.load("a model", "float32", loras=[file])
    assert "\n" not in str(caught.value)


class Thing:
    """A class that no safe loader makes."""


UNSAFE = {
    "pickle": "a.pt must hold tensors and nothing that runs: got a pickle that asks for "
    "tests.convert.test_lora_match.Thing",
    "list": "a.pt must hold tensors by name, or under module, .* or the like: got list",
    "garbage": "a.pt must be a whole safetensors file: ",
    "empty": "a.pt must be a whole safetensors file: ",
}


@pytest.mark.parametrize("content", UNSAFE)
def test_what_torch_saved_is_tensors_or_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    if content in ("pickle", "list"):
        torch.save(
            {"module": {}, "args": Thing()} if content == "pickle" else [torch.zeros(2)], path
        )
    else:
        path.write_bytes(b"garbage" if content == "garbage" else b"")
    with pytest.raises(ValueError, match=UNSAFE[content]) as caught:
        open_lora(path)
    assert "\n" not in str(caught.value)


def test_without_torch_a_pickled_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "a.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ValueError,
        match=(
            r"a.bin must be safetensors where torch is missing: got a torch file; pip install "
            r"torch"
        ),
    ):
        open_lora(tmp_path / "a.bin")


def test_half_a_safetensors_file_is_one_line(attention: loras.Pairs, tmp_path: Path) -> None:
    path = loras.save(tmp_path / "a.safetensors", loras.peft(attention))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.safetensors must be a whole safetensors file: "):
        open_lora(path)


# the model that it is for


def file_of(
    shapes: dict[str, tuple[int, ...]], base: str = "", settings: dict[str, Any] | None = None
) -> LoraFile:
    """A file of these shapes, which takes no memory at any size."""

    def read(name: str) -> np.ndarray:
        return np.broadcast_to(np.float32(0.5), shapes[name])

    path, bases = Path("a.safetensors"), (base,) if base else ()
    return LoraFile(path, path.name, "0", shapes, read, settings or {}, bases)


def official(model: str, rank: int = 128, patch: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes that trainers make for a published model: its attention and, with `patch`, its
    first and last weight."""
    width, layers, inputs, outputs, _ = MODELS[model]
    stems = [
        f"transformer.transformer_blocks.{layer}.attn1.{name}"
        for layer in range(layers)
        for name in loras.ATTENTION
    ]
    shapes = {
        f"{stem}.lora_{side}.weight": (rank, width) if side == "A" else (width, rank)
        for stem in stems
        for side in "AB"
    }
    if patch:
        shapes |= {"transformer.patch_embed.proj.lora_A.weight": (rank, *inputs)}
        shapes |= {
            "transformer.patch_embed.proj.lora_B.weight": (width, rank, *[1] * (len(inputs) - 1))
        }
        shapes |= {
            "transformer.proj_out.lora_A.weight": (rank, width),
            "transformer.proj_out.lora_B.weight": (outputs, rank),
        }
    return shapes


PUBLISHED = {"cogvideox-5b-i2v": "CogVideoX-5B-I2V", "cogvideox1.5-5b-i2v": "CogVideoX1.5-5B-I2V"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_loras_match_to_the_last_tensor(name: str) -> None:
    found = match(
        file_of(official(PUBLISHED[name], patch=False), settings={"r": 128, "lora_alpha": 64}),
        named(name),
        0.8,
    )
    assert (
        found.line()
        == "lora a.safetensors: 336 of 336 tensors matched, rank 128, alpha 64, weight 0.8"
    )
    assert len(found.checked().factors) == 168
    assert match(file_of(official(PUBLISHED[name])), named(name)).faults == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("model", MODELS)
def test_another_published_models_lora_is_refused_by_its_name(name: str, model: str) -> None:
    if PUBLISHED[name] == model:
        return
    found = match(file_of(official(model)), named(name))
    with pytest.raises(
        ValueError,
        match=(
            rf"^lora a.safetensors must fit {name}: its shapes are those of {model}; "
            r"transformer.* must "
        ),
    ) as caught:
        found.checked()
    assert "\n" not in str(caught.value)


def test_the_small_model_is_recognised_by_its_attention_alone() -> None:
    found = match(file_of(official("CogVideoX-2B", patch=False)), named("cogvideox-5b-i2v"))
    assert found.general == ["its shapes are those of CogVideoX-2B"]


def test_flat_patches_are_of_the_other_generation_whatever_their_size() -> None:
    """Patches of CogVideoX1.5-5B have as many inputs, 128, as those of CogVideoX-5B-I2V."""
    shapes = {
        name: shape for name, shape in official("CogVideoX1.5-5B").items() if "proj_out" not in name
    }
    assert match(file_of(shapes), named("cogvideox-5b-i2v")).general == [
        "its shapes are those of CogVideoX1.5-5B"
    ]


@pytest.mark.parametrize(("family", "other"), [("1.0", "1.5"), ("1.5", "1.0")], indirect=["family"])
def test_a_lora_of_the_other_generation_is_refused_whatever_its_size(
    family: str, other: str, config: CheckpointConfig, tmp_path: Path
) -> None:
    made = loras.pairs(twins.transformer(**twins.FAMILIES[other]), EVERY)
    found = match(open_lora(loras.diffusers(tmp_path, made, RANK)), config)
    assert found.general == [f"it was made for CogVideoX {other}, and this is CogVideoX {family}"]
    with pytest.raises(
        ValueError,
        match=(
            r"^lora a.safetensors must fit this cogvideox.*-i2v checkpoint: it was made for "
            r"CogVideoX "
        ),
    ):
        found.checked()


BASES = [
    "THUDM/CogVideoX-5b-I2V",
    "zai-org/CogVideoX1.5-5B-I2V",
    "/data/v1.5/CogVideoX-5b",
    "alibaba-pai/CogVideoX-Fun-V1.5-5b-InP",
    "/home/u/cogvideox-factory/models/CogVideoX1.5-5B-I2V",
    r"C:\cogvideox\models\cogvideox-5b-1.5-i2v",
    "/data/cogvideox1.5-runs/CogVideoX-5b-I2V",
    "THUDM/CogVideo1.5-5B-I2V",
]
FIRSTS = (BASES[0], BASES[2], BASES[6])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("where", ["header", "adapter_config.json", "card"])
def test_the_base_that_a_lora_states_decides(
    base: str,
    where: str,
    attention: loras.Pairs,
    family: str,
    config: CheckpointConfig,
    tmp_path: Path,
) -> None:
    if where == "adapter_config.json":
        (tmp_path / where).write_text(
            json.dumps({"base_model_name_or_path": base, "r": RANK, "lora_alpha": RANK})
        )
    elif where == "card":
        (tmp_path / "README.md").write_text(
            f"---\nlicense: other\nbase_model: {base}\ntags:\n- lora\n---\n# A LoRA\n"
        )
    stated = loras.header(base_model_name_or_path=base) if where == "header" else None
    found = match(
        open_lora(loras.save(tmp_path / "a.safetensors", loras.peft(attention), stated)), config
    )
    its = "1.0" if base in FIRSTS else "1.5"
    if its == family:
        assert found.faults == []
        assert found.line().endswith(f", weight 1, made for {base}")
    else:
        assert found.faults == [
            f"it says that it was made for {base}, of CogVideoX {its}, and this is CogVideoX "
            f"{family}"
        ]
