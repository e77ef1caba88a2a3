"""Recipes: strict, with every fault in one line."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from cogi2v_jax.training.recipe import FREE, KINDS, RECIPES, Recipe, changed_keys, read_recipe

NEEDED = 'method = "lora"\ndata = "data"\noutput = "out"\nsteps = 200\n'


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(NEEDED + text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_found_by_its_name(path: Path) -> None:
    recipe = read_recipe(path.stem)
    assert recipe == read_recipe(str(path))
    stated = tomllib.loads(path.read_text(encoding="utf-8"))
    assert all(getattr(recipe, key) == value for key, value in stated.items() if key != "targets")


def test_changes_replace_keys_and_are_read_by_their_kinds(tmp_path: Path) -> None:
    changes = ["steps=7", "learning_rate=1e-3", "targets=attention,text_in", "ema=.5", "alpha=3"]
    changes += [
        "warmup=0",
        "tensorboard=true",
        "image_latent_scale=sat",
        "model=123",
        "image_noise=false",
    ]
    recipe = read_recipe(written(tmp_path, "rank = 4\n"), changes)
    assert (recipe.steps, recipe.learning_rate, recipe.rank) == (7, 1e-3, 4)
    assert recipe.targets == ("attention", "text_in")
    assert (recipe.ema, recipe.alpha, recipe.model) == (0.5, 3.0, "123")
    assert recipe.tensorboard is True
    assert recipe.image_noise is False
    assert read_recipe(written(tmp_path, ""), ["image_latent_scale=1.5"]).image_latent_scale == 1.5


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("lerning_rate = 1\n", [], "lerning_rate is no key of a recipe"),
        ("rank = 2.5\n", [], "rank must be a whole number from 1 to 4096: got 2.5"),
        ("rank = true\n", [], "rank must be a whole number"),
        ('rank = "4"\nema = 1.0\n', [], "ema must be a number from 0 to below 1: got 1.0"),
        ("learning_rate = nan\n", [], "learning_rate must be a positive number: got nan"),
        ("", ["steps=many"], "steps must be a positive integer below 2**31: got 'many'"),
        ("", ["steps"], "changes must be key=value: got 'steps'"),
        ("", ["image_noise=no"], "image_noise must be true or false: got 'no'"),
        ("", ["image_latent_scale=-1"], "image_latent_scale must be reference, sat, trainer or"),
        ("", ["seed=1" + "0" * 400], "seed must be a whole number"),
        ("", ["targets="], "targets must be a list of names: got ''"),
        ('init = "random"\n', [], "init must be a LoRA or nothing where method is lora"),
        ("crop = 32\nkl = 1\n", [], "kl, crop must be left out: do nothing where method is lora"),
        ("", ["method=full", "rank=4"], "rank must be left out: does nothing where method is full"),
        ("", ["method=vae", "kept=all"], "kept must be left out: does nothing where method is vae"),
        ("", ["method=vae", "decoder_only=true", "kl=1"], "kl must be left out where decoder_only"),
        ("final_rate = 0.1\n", [], "final_rate must be left out: does nothing where method is"),
        ("targets = []\n", [], "targets must be a list of names: got []"),
        ("", ["output=a\udcff"], "output must be text in UTF-8: got 'a\\udcff'"),
        ('optimizer = "prodigy"\n', [], "learning_rate must be given where optimizer is prodigy"),
        ("warmup = 200\n", [], "warmup must be below steps 200: got 200"),
        ("validate_every = 5\n", [], "validation and validate_every must be given together"),
        ('schedule = "cosine"\nwarmup = 200\n', [], "warmup must be below steps 200: got 200"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, text: str, changes: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=r"recipe\.toml: ") as caught:
        read_recipe(written(tmp_path, text), changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "lora"\nrank = 0\nx = 1\n')
    with pytest.raises(ValueError, match=r"recipe\.toml: ") as caught:
        read_recipe(str(path))
    for fault in ("data must be given", "steps must be given", "rank must be", "x is no key"):
        assert fault in str(caught.value)


def test_a_recipe_that_is_not_there_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"recipe must be a TOML file or one of .*lora-tiny"):
        read_recipe("no-such")


def test_a_written_recipe_reads_the_same_and_names_what_changed(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, 'targets = ["mlp"]\ninit = "a \\"b\\" \\\\ c"\n'))
    recipe = dataclasses.replace(recipe, output="猫 😀\x7f\t\n")
    path = tmp_path / "again.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(str(path)) == recipe
    assert changed_keys(recipe, recipe.to_toml()) == []
    longer = dataclasses.replace(recipe, steps=300, checkpoint_every=7)
    assert changed_keys(longer, recipe.to_toml()) == []
    other = dataclasses.replace(recipe, targets=("attention",), rank=4)
    assert changed_keys(other, recipe.to_toml()) == [
        "rank was 128 and is 4",
        'targets was ["mlp"] and is ["attention"]',
    ]


def test_every_key_has_a_kind_and_what_may_change_is_a_key() -> None:
    assert {one.name for one in dataclasses.fields(Recipe)} == KINDS.keys()
    assert {*FREE} < KINDS.keys()
