"""The house rules: who may import whom, what the packages never import, which names stay outside,
how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"cogi2v_jax": ROOT / "cogi2v_jax", "cogi2v_convert": ROOT / "convert"}
# A module imports from its own folder and from those before it; files that lie in no folder have a
# place of their own.
ORDER = """
    cogi2v_jax cogi2v_jax.disk cogi2v_jax.lookalikes cogi2v_jax.config cogi2v_jax.request cogi2v_jax.arguments
    cogi2v_jax.kernels cogi2v_jax.devices cogi2v_jax.models cogi2v_jax.media cogi2v_jax.weights cogi2v_jax.sampling
    cogi2v_jax.pipeline
    cogi2v_convert cogi2v_convert.tables cogi2v_convert.sources cogi2v_convert.writing
    cogi2v_convert.conversion cogi2v_convert.lora_match cogi2v_convert.inspection
    cogi2v_jax.loading cogi2v_convert.proof cogi2v_convert.__main__ cogi2v_jax.apps cogi2v_jax.sample
""".split()  # noqa: SIM905
READ_BY_TORCH = (
    "cogi2v_convert.proof.record",
    "cogi2v_convert.sources.tensor_files",
)


def name_of(package: str, path: Path) -> str:
    parts = [package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


MODULES = {
    name_of(package, path): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


def imports(name: str) -> Iterator[str]:
    """Full names of what a module imports at any depth, functions included, but for type checkers
    alone."""
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
            # A module, as in `from . import noise`, or a name in one.
            yield from (f"{source}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def folder_of(name: str) -> str:
    """The entry of ORDER that a module belongs to: itself, or its folder."""
    return name if name in ORDER else name.rpartition(".")[0]


def test_folders_import_from_earlier_folders_alone_and_have_no_circles_inside() -> None:
    # A package's own page imports lazily, from anywhere.
    pairs = [
        (name, other)
        for name in MODULES
        if name not in PACKAGES
        for other in imports(name)
        if other in MODULES
    ]
    assert [
        pair for pair in pairs if ORDER.index(folder_of(pair[1])) > ORDER.index(folder_of(pair[0]))
    ] == []
    within = {
        name: {other for one, other in pairs if one == name and folder_of(other) == folder_of(name)}
        for name in MODULES
    }
    tuple(TopologicalSorter(within).static_order())  # raises CycleError


@pytest.mark.parametrize("name", [name for name in MODULES if name not in READ_BY_TORCH])
def test_a_module_imports_no_torch(name: str) -> None:
    assert {"torch", "transformers", "diffusers"} & {
        imported.split(".")[0] for imported in imports(name)
    } == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("cogi2v_jax")])
def test_torchs_names_stay_in_the_conversion_tables(name: str) -> None:
    text = MODULES[name].read_text()
    assert [
        word for word in ("hidden_states", "transformer_blocks", "attn1", "to_out") if word in text
    ] == []


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
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
