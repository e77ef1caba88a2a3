"""LoRA files: every format gives the same change, and unused tensors are listed."""

import json
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.lora_match import match
from cogi2v_convert.sources.lora_file import open_lora
from cogi2v_convert.tables.lora_keys import meaning
from cogi2v_convert.tables.rules import Rule, expand
from cogi2v_convert.tables.transformer import table
from safetensors.numpy import save_file
from tolerances import relative_error

from cogi2v_jax import disk, loading
from cogi2v_jax.arguments import parse_loras
from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.weights.lora import Lora

RANK = 4
FINETRAINERS = (
    *loras.ATTENTION,
    "net.0.proj",
    "net.2",
    "proj_out",
    "embed.proj",
    "text_proj",
    "linear",
    "linear_1",
    "linear_2",
)


@pytest.fixture(scope="module")
def config(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> CheckpointConfig:
    return loading.read_config(twins.save(pipe, tmp_path_factory.mktemp("source"), spiece=False))


@pytest.fixture(scope="module")
def made(pipe: Any) -> loras.Pairs:
    """For every linear weight, with values that bfloat16 represents."""
    pairs = loras.pairs(pipe.transformer, FINETRAINERS, RANK)
    return {name: (a.bfloat16().float(), b.bfloat16().float()) for name, (a, b) in pairs.items()}


@pytest.fixture(scope="module")
def attention(made: loras.Pairs) -> loras.Pairs:
    return {name: pair for name, pair in made.items() if "attn1" in name}


def assert_same(lora: Lora, made: loras.Pairs, scale: float, config: CheckpointConfig) -> None:
    """`to_flax` of the reference's whole change equals the product of our factors."""
    homes = expand(table(config.transformer), config.transformer.num_layers)
    assert len(lora.factors) == len(made)
    for name, (a, b) in made.items():
        rule, layer = homes[f"{name}.weight"]
        down, up, own = lora.factors[rule.flax, layer]
        theirs = rule.to_flax(scale * loras.delta(a, b).numpy())
        assert (
            relative_error(own * (down.astype(np.float64) @ up.astype(np.float64)), theirs) < 1e-6
        ), name


def test_these_are_all_linear_weights(made: loras.Pairs, config: CheckpointConfig) -> None:
    homes = expand(table(config.transformer), config.transformer.num_layers)
    assert {f"{name}.weight" for name in made} == {
        name for name, home in homes.items() if home.rule.is_linear
    }


@pytest.mark.parametrize("write", loras.FORMATS, ids=lambda write: write.__name__)
def test_every_format_of_every_linear_weight_means_the_same(
    write: Any, made: Any, config: CheckpointConfig, tmp_path: Path
) -> None:
    found = match(open_lora(write(tmp_path, made, RANK)), config, 0.7)
    assert found.faults == []
    assert all(row.place for row in found.rows.values())
    assert (found.checked().weight, found.ranks) == (0.7, {RANK})
    assert_same(found.checked(), made, 0.5, config)


@pytest.mark.parametrize("write", loras.ATTENTION_FORMATS, ids=lambda write: write.__name__)
def test_formats_of_the_attention_mean_the_same(
    write: Any, attention: Any, config: CheckpointConfig, tmp_path: Path
) -> None:
    found = match(open_lora(write(tmp_path, attention, RANK)), config)
    assert_same(found.checked(), attention, 0.5, config)
    assert all(row.place for row in found.rows.values())


def test_without_an_alpha_it_is_the_rank_of_each_weight(
    pipe: Any, config: CheckpointConfig, tmp_path: Path
) -> None:
    narrow, wide = (
        loras.pairs(pipe.transformer, ("to_q",), 2),
        loras.pairs(pipe.transformer, ("to_v",), 70),
    )
    found = match(
        open_lora(loras.save(tmp_path / "a.safetensors", loras.peft(narrow | wide))), config
    )
    assert_same(found.checked(), narrow | wide, 1.0, config)
    assert (
        found.line()
        == "lora a.safetensors: 12 of 12 tensors matched, rank 2 to 70, alpha 2 to 70 (not "
        "stated: as the rank), weight 1"
    )


def test_a_rank_as_large_as_the_weight_works(
    pipe: Any, config: CheckpointConfig, tmp_path: Path
) -> None:
    """DimensionX's files have rank 256 on attention and MLP."""
    made = loras.pairs(pipe.transformer, (*loras.ATTENTION, "net.0.proj", "net.2"), 96)
    found = match(open_lora(loras.diffusers(tmp_path, made, 96)), config)
    assert_same(found.checked(), made, 0.5, config)
    assert (
        found.line() == "lora a.safetensors: 36 of 36 tensors matched, rank 96, alpha 48, weight 1"
    )


def test_the_alpha_of_a_module_overrides_the_header_and_the_header_the_file_beside(
    attention: loras.Pairs, config: CheckpointConfig, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 400.0}))
    file = loras.save(
        tmp_path / "a.safetensors", loras.peft(attention), loras.header(r=RANK, lora_alpha=RANK / 2)
    )
    assert_same(match(open_lora(file), config).checked(), attention, 0.5, config)
    own = {f"transformer.{name}.alpha": torch.tensor([RANK * 3.0]) for name in attention}
    file = loras.save(
        tmp_path / "a.safetensors",
        loras.peft(attention) | own,
        loras.header(r=RANK, lora_alpha=RANK / 2),
    )
    assert_same(match(open_lora(file), config).checked(), attention, 3.0, config)
    file = loras.save(tmp_path / "a.safetensors", loras.peft(attention))
    assert_same(match(open_lora(file), config).checked(), attention, 100.0, config)


def test_in_a_folder_the_default_name_or_the_only_file_is_opened(
    attention: loras.Pairs, tmp_path: Path
) -> None:
    loras.save(tmp_path / "other.safetensors", loras.peft(attention))
    assert open_lora(tmp_path).name == "other.safetensors"
    loras.save(tmp_path / "pytorch_lora_weights.safetensors", loras.peft(attention))
    assert open_lora(tmp_path).name == f"{tmp_path.name}/pytorch_lora_weights.safetensors"
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "another.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=r"must hold pytorch_lora_weights.safetensors or one file of a LoRA: found 2 in ",
    ):
        open_lora(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "A.SAFETENSORS"])
def test_in_a_folder_a_file_of_any_suffix_is_found_beside_a_trainer_s(
    name: str, attention: loras.Pairs, tmp_path: Path
) -> None:
    save = torch.save if name.endswith(".bin") else lambda tensors, path: loras.save(path, tensors)
    save(loras.peft(attention), tmp_path / name)
    for beside in ("optimizer.bin", "scheduler.bin", "optimizer.pt", "adapter_config.json"):
        (tmp_path / beside).write_text("{}")
    assert open_lora(tmp_path).path == tmp_path / name


@pytest.mark.parametrize("given", ["", "3"])
def test_in_a_run_of_sat_or_deepspeed_the_latest_step_is_opened(
    given: str, attention: loras.Pairs, tmp_path: Path
) -> None:
    for step in ("2", "3"):
        (tmp_path / step).mkdir()
        file = loras.sat(tmp_path / step, attention, RANK)
        (file.parent / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "latest").write_text("3")
    assert open_lora(tmp_path / given).path == file


def test_a_folder_of_steps_says_what_to_give(tmp_path: Path) -> None:
    for step in (1000, 500):
        (tmp_path / f"checkpoint-{step}").mkdir()
    way = f"found 0 in {tmp_path}; give one of its steps, as {tmp_path}/checkpoint-"
    with pytest.raises(FileNotFoundError, match=way):
        open_lora(tmp_path)


ADDRESS = "https://huggingface.co/someone/orbit"


def test_a_weight_follows_a_colon_and_a_name_may_contain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a:0.5", "b:c"):
        Path(name).touch()
    asked = [
        "someone/orbit",
        "someone/orbit@v2:0.5",
        f"{ADDRESS}/resolve/main/a.safetensors",
        f"{ADDRESS}:0.5",
        "a",
        "a:0.5",
        "a:-.25",
        "a:0.5:2",
        "b:c",
        "b:c:1e-1",
        ("b:c", 3),
        (Path("a"), 0.0),
        ("a", "0.5"),
        str(tmp_path / "a"),
    ]
    assert parse_loras(asked) == [
        ("someone/orbit", 1.0),
        ("someone/orbit@v2", 0.5),
        (f"{ADDRESS}/resolve/main/a.safetensors", 1.0),
        (ADDRESS, 0.5),
        (Path("a"), 1.0),
        (Path("a:0.5"), 1.0),
        (Path("a"), -0.25),
        (Path("a:0.5"), 2.0),
        (Path("b:c"), 1.0),
        (Path("b:c"), 0.1),
        (Path("b:c"), 3.0),
        (Path("a"), 0.0),
        (Path("a"), 0.5),
        (tmp_path / "a", 1.0),
    ]
    for wrong in ("a:", "a:x", "a:nan", "a:-inf", ("a", []), ("a", "big")):
        with pytest.raises(ValueError, match="the weight of lora a must be a finite number: got "):
            parse_loras([wrong])
    names = ("c", "c:1", "c/b.safetensors", "a/b/c", "b", "b:d:1", ":1")
    names += ("~nobody-of-this-name/c", "~no-one:1")
    names += ("https://example.com/a.safetensors", "https://example.com/a:0.5")
    with pytest.raises(ValueError, match=r"loras must be FILE, .*: got \('a', None, 'a'\)"):
        parse_loras([("a", None, "a")])
    for missing in names:
        with pytest.raises(
            (FileNotFoundError, ValueError),
            match="lora must be an existing file or folder, or a hub id: found no",
        ):
            parse_loras([missing])
    way = f"found no someone/orbit/c/d.bin; for a file on the hub give {ADDRESS}/blob/main/c/d.bin"
    with pytest.raises(FileNotFoundError, match=way):
        parse_loras(["someone/orbit/c/d.bin:0.5"])


OF_TEXT = "is of a text encoder, which stays as it is"
OF_NONE = "is of no linear weight of this network"
SCALE = "is a scale, which isn't read: give it as the LoRA's weight"
DORA, BIAS = "is a DoRA's magnitude, which isn't read: ", "is a change of a bias, which isn't read"
ADAPTER = "is of another kind of adapter than a LoRA"
NO_LORA = "is not a LoRA's tensor"
UNMATCHED = {
    "text_encoder.text_model.layers.0.q_proj.lora_A.weight": OF_TEXT,
    "lora_te1_text_model_0_q.lora_down.weight": OF_TEXT,
    "transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": DORA,
    "transformer.transformer_blocks.0.attn1.to_q.dora_scale": DORA,
    "transformer.transformer_blocks.0.attn1.to_q.lora_B.bias": BIAS,
    "transformer.transformer_blocks.0.attn1.to_q.lora_B.default.bias": BIAS,
    "transformer.transformer_blocks.0.attn1.to_q.lokr_w1": ADAPTER,
    "transformer.transformer_blocks.0.attn1.to_q.lora_scale": SCALE,
    "transformer.transformer_blocks.0.attn1.norm_q.lora_A.weight": OF_NONE,
    "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight": OF_NONE,
    "transformer.layers.0.attention.query_key_value.matrix_A.3": OF_NONE,
    "transformer.layers.0.attention.query_key_value.original.weight": NO_LORA,
    "transformer_blocks.0.attn1.to_q.weight": NO_LORA,
}


def test_unused_tensors_are_listed_with_their_reasons(
    attention: loras.Pairs, config: CheckpointConfig, tmp_path: Path
) -> None:
    more = {name: torch.zeros(2, 2) for name in UNMATCHED}
    found = match(
        open_lora(loras.save(tmp_path / "a.safetensors", loras.peft(attention) | more)), config
    )
    assert_same(found.checked(), attention, 1.0, config)
    assert {row.key for row in found.rows.values() if not row.place} == UNMATCHED.keys()
    assert all(found.rows[key].reason.startswith(reason) for key, reason in UNMATCHED.items())
    assert found.line().startswith("lora a.safetensors: 24 of 37 tensors matched, rank 4, ")
    assert len(found.unmatched()) == 13
    assert found.unmatched(3)[2] == "  ! and 11 more"


@pytest.mark.parametrize("stated", [{"use_dora": True}, {"peft_type": "LOKR"}])
def test_settings_of_another_adapter_are_named(
    stated: dict[str, Any], attention: loras.Pairs, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    said: list[str] = []
    open_lora(loras.save(tmp_path / "a.safetensors", loras.peft(attention)), said.append)
    kind = stated.get("peft_type", "DORA")
    assert said == [
        f"lora a.safetensors: it says that it is a {kind}: its pairs are merged as a LoRA's"
    ]


def test_at_most_twenty_unused_tensors_are_listed(
    attention: loras.Pairs, config: CheckpointConfig, tmp_path: Path
) -> None:
    more = {f"text_encoder.{number}.lora_A.weight": torch.zeros(2, 2) for number in range(500)}
    found = match(
        open_lora(loras.save(tmp_path / "a.safetensors", loras.peft(attention) | more)), config
    )
    assert len(found.unmatched()) == 20
    assert found.unmatched()[-1] == "  ! and 481 more"


def test_meanings_and_factors_need_no_network() -> None:
    assert meaning("lora_unet__transformer_blocks_12_ff_net_0_proj.lora_up.weight")[:2] == (
        "transformer_blocks.12.ff.net.0.proj",
        "B",
    )
    assert meaning("lora_transformer_blocks_7_attn1_to_out_0.alpha")[:2] == (
        "transformer_blocks.7.attn1.to_out.0",
        "alpha",
    )
    assert meaning("diffusion_model.transformer_blocks.3.norm1.linear.lora_A.weight")[:2] == (
        "transformer_blocks.3.norm1.linear",
        "A",
    )
    assert meaning("model.diffusion_model.transformer.layers.9.mlp.dense_4h_to_h.matrix_B.0")[
        :2
    ] == ("transformer_blocks.9.ff.net.2", "B")
    down, up = Rule("a", "a.kernel", "(n k r) i -> i (n r k)", {"n": 1, "r": 2}).factors(
        np.eye(4), np.arange(16).reshape(4, 4)
    )
    np.testing.assert_array_equal(up, np.arange(16).reshape(4, 4)[[0, 2, 1, 3]].T)
    np.testing.assert_array_equal(down, np.eye(4))


def test_text_from_a_file_can_not_move_a_terminal_s_cursor(
    attention: loras.Pairs, config: CheckpointConfig, tmp_path: Path
) -> None:
    key = "text_encoder.\x1b[2J\n.lora_A.weight"
    header = {"base_model": "mine\x1b]0;title\x07"}
    tensors = loras.peft(attention) | {key: torch.zeros(1)}
    found = match(open_lora(loras.save(tmp_path / "a.safetensors", tensors, header)), config)
    assert found.line().endswith(r", made for mine\x1b]0;title\x07")
    assert found.unmatched() == [rf"  ! text_encoder.\x1b[2J\n.lora_A.weight {OF_TEXT}"]
    found.refuse(key, "is refused")
    found.lora = None
    with pytest.raises(ValueError, match="must fit") as caught:
        found.checked()
    assert str(caught.value).isprintable()


CARDS = {
    "a word": "base_model: THUDM/A",
    "a word with a comment": "base_model: THUDM/A # the first",
    "quotes": 'base_model: "THUDM/A"',
    "a list": "base_model:\n- THUDM/A\n- 'THUDM/B'",
    "a flow list": "tags: [x]\nbase_model: [THUDM/A, THUDM/B]",
    "a flow list of lines": "base_model: [\n  THUDM/A,\n  THUDM/B\n]",
    "a word beside what is no YAML": "instance_prompt: a dog: running\nbase_model: THUDM/A",
}


@pytest.mark.parametrize("form", CARDS)
@pytest.mark.parametrize("name", ["README.md", "readme.md"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_card_states_its_bases_in_every_form_of_yaml(
    form: str, name: str, end: str, mark: str, tmp_path: Path
) -> None:
    card = f"{mark}---\n{CARDS[form]}\nlicense: other\n---\n# A LoRA\nbase_model: none\n"
    (tmp_path / name).write_bytes(card.replace("\n", end).encode())
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    expected = ("THUDM/A", "THUDM/B") if "list" in form else ("THUDM/A",)
    assert open_lora(tmp_path / "a.safetensors").bases == expected


WHOLE = "---\nbase_model: THUDM/A\nlicense: other\n---\n# Café\n"
STRANGE = {
    "a blank line before": f" \n{WHOLE}".encode(),
    "closed by dots": WHOLE.replace("other\n---", "other\n...").encode(),
    "not closed": WHOLE.replace("other\n---", "other\n").encode(),
    "latin-1": WHOLE.encode("latin-1"),
    "UTF-16": WHOLE.encode("utf-16"),
}


@pytest.mark.parametrize("card", STRANGE)
@pytest.mark.parametrize("step", ["", "checkpoint-500"])
def test_a_card_states_its_base_in_every_encoding_and_beside_every_step(
    card: str, step: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(STRANGE[card])
    file = tmp_path / step / "a.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file({"a": np.zeros(1, np.float32)}, file)
    assert open_lora(file).bases == ("THUDM/A",)


@pytest.mark.parametrize("card", [disk.POINTER.decode(), "---\nbase_model: [\n---\n"])
def test_a_card_that_can_not_be_read_is_named(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    said: list[str] = []
    assert open_lora(tmp_path / "a.safetensors", said.append).bases == ()
    (line,) = said
    assert line.startswith("lora a.safetensors: its card, which may name its base, is not read: ")


@pytest.mark.parametrize("card", ["", "---\n", "---\na: [\n---\n", "---\n- a\n---\n", "a: 1\n"])
def test_a_card_without_readable_front_matter_states_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    assert open_lora(tmp_path / "a.safetensors").bases == ()


def test_all_that_a_lora_states_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: THUDM/B\n---\n")
    header = {"base_model": "THUDM/A"}
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors", header)
    assert open_lora(tmp_path / "a.safetensors").bases == ("THUDM/A", "THUDM/B")
