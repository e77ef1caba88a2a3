"""The house rules: who may import whom, what the packages never import, which names stay outside, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"cogi2v_jax": ROOT / "cogi2v_jax", "cogi2v_convert": ROOT / "convert"}
FLOORS = {
    -1: "relatives",
    0: "config watch",
    1: "request schedule positions media tokenizer noise manifest sharding flags fingerprint executables hosts",
    2: "arguments layers recipe strips",
    2.5: "kernels.heads",
    3: "attention",
    4: "models.t5 models.vae models.transformer",
    4.5: "lora",
    5: "checkpoint compiled models.tiling",
    5.1: "wanted",
    5.2: "bucket",
    5.3: "fetch",
    6: "phases",
    6.5: "pipeline",
    # The conversion package is one floor with an order of its own.
    7.0: "cogi2v_convert.rules cogi2v_convert.files cogi2v_convert.kin cogi2v_convert.trace cogi2v_convert.targets",
    7.05: "cogi2v_convert.sat cogi2v_convert.making",
    7.1: "cogi2v_convert.t5 cogi2v_convert.vae cogi2v_convert.transformer cogi2v_convert.weights cogi2v_convert.lora_file",
    7.11: "cogi2v_convert.int8",
    7.12: "cogi2v_convert.sums",
    7.15: "cogi2v_convert.units cogi2v_convert.manifest cogi2v_convert.diffusers cogi2v_convert.lora_keys",
    7.17: "cogi2v_convert.sources",
    7.2: "cogi2v_convert.conversion cogi2v_convert.lora",
    7.3: "cogi2v_convert.inspection cogi2v_convert.compare cogi2v_convert.reference",
    8: "hub plan",
    8.1: "cogi2v_convert.verify",
    8.2: "cogi2v_convert.__main__",
    9: "sample preflight",
}
READ_BY_TORCH = ("cogi2v_convert.reference", "cogi2v_convert.files")  # the one runs it, the other has it read what it wrote
FLOOR = {
    name if name.startswith("cogi2v_") else f"cogi2v_jax.{name}": floor for floor, residents in FLOORS.items() for name in residents.split()
}


def name_of(package: str, path: Path) -> str:
    parts = [package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(package, path): path for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))}
RESIDENTS = [name for name, path in MODULES.items() if path.name != "__init__.py"]  # a package's own page imports lazily, from anywhere


def imports(name: str) -> Iterator[str]:
    """Full names of what a module imports at any depth, functions included, but for type checkers alone."""
    path, pending = MODULES[name], [ast.parse(MODULES[name].read_text())]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)  # a module, as in `from . import noise`, or a name in one
        pending += ast.iter_child_nodes(node)


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert set(RESIDENTS) == set(FLOOR)


@pytest.mark.parametrize("name", RESIDENTS)
def test_a_module_imports_from_lower_floors_alone(name: str) -> None:
    imported = set(imports(name))
    assert {other: FLOOR[other] for other in imported & FLOOR.keys() if FLOOR[other] >= FLOOR[name]} == {}
    # The package's own page leads to every floor.
    assert {other for other in imported if other.rpartition(".")[0] == "cogi2v_jax"} <= {*FLOOR, "cogi2v_jax.__version__"}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in READ_BY_TORCH])
def test_a_module_imports_no_torch(name: str) -> None:
    assert {"torch", "transformers", "diffusers"} & {imported.split(".")[0] for imported in imports(name)} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("cogi2v_jax")])
def test_torchs_names_stay_in_the_conversion_tables(name: str) -> None:
    text = MODULES[name].read_text()
    assert [word for word in ("hidden_states", "transformer_blocks", "attn1", "to_out") if word in text] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_file_fits_one_sitting(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 420


@pytest.mark.parametrize(
    "line",
    [
        "cogi2v_jax.sample.parser().parse_args(['--image', 'a.png', '--prompt', 'b', '--image_latent_scale', 'sat'])",
        "cogi2v_jax.sample.main(['--help'])",
        "cogi2v_jax.sample.main(['--version'])",
        "cogi2v_jax.sample.main(['--no_such_flag'])",
        "cogi2v_jax.sample.main(['--image', 'no such image.png', '--prompt', 'a'])",
        "cogi2v_jax.sample.main(['--manifest', 'no such jobs.csv'])",
        "cogi2v_jax.sample.main(['--lora_path', 'no such lora.safetensors:0.5'])",
        "cogi2v_jax.Request('a.png', 'b'), cogi2v_jax.Noise(), cogi2v_jax.__version__, dir(cogi2v_jax)",
        "cogi2v_convert.__main__.main(['--help'])",
        "cogi2v_convert.__main__.main(['no-such-command'])",
        "cogi2v_convert.__main__.main(['compare', 'no such a.mp4', 'no such b.mp4'])",
    ],
)
def test_arguments_and_their_errors_do_not_wait_for_jax(line: str, tmp_path: Path) -> None:
    script = f"""
import sys
import cogi2v_jax.sample, cogi2v_convert.__main__
try:
    {line}
except SystemExit:
    pass
sys.exit(str(heavy) if (heavy := sys.modules.keys() & {{"jax", "flax", "orbax", "torch"}}) else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
