"""The house rules: which folder may import which, what is never imported, where torch's names may
appear, how long a file may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"cogi2v_jax": ROOT / "cogi2v_jax", "cogi2v_convert": ROOT / "convert"}
# A module imports from its own folder and from those before it. Files in no folder are entries of
# their own.
ORDER = """
    cogi2v_jax cogi2v_jax.disk cogi2v_jax.lookalikes cogi2v_jax.config cogi2v_jax.names
    cogi2v_jax.request cogi2v_jax.arguments cogi2v_jax.terminal cogi2v_jax.kernels
    cogi2v_jax.devices cogi2v_jax.command cogi2v_jax.models cogi2v_jax.media cogi2v_jax.weights
    cogi2v_jax.sampling cogi2v_jax.pipeline
    cogi2v_convert cogi2v_convert.tables cogi2v_convert.sources cogi2v_convert.writing
    cogi2v_convert.conversion cogi2v_convert.lora_match cogi2v_convert.inspection
    cogi2v_jax.loading cogi2v_jax.training cogi2v_convert.proof cogi2v_convert.__main__
    cogi2v_jax.apps cogi2v_jax.sample cogi2v_jax.prepare cogi2v_jax.train cogi2v_jax.batch
""".split()  # noqa: SIM905
USE_TORCH = ("cogi2v_convert.proof.record", "cogi2v_convert.sources.tensor_files")


def name_of(package: str, path: Path) -> str:
    parts = [package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


MODULES = {
    name_of(package, path): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


def imports(name: str) -> Iterator[str]:
    """The full names of all that a module imports, inside functions too, except for type
    checkers."""
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
    # The __init__ of a package imports lazily, from anywhere.
    names = [name for name in MODULES if name not in PACKAGES]
    pairs = [(name, other) for name in names for other in imports(name) if other in MODULES]
    ranks = {name: ORDER.index(folder_of(name)) for name in MODULES}
    assert [(name, other) for name, other in pairs if ranks[other] > ranks[name]] == []
    inside: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, other in pairs:
        if ranks[other] == ranks[name]:
            inside[name].add(other)
    tuple(TopologicalSorter(inside).static_order())  # raises CycleError


@pytest.mark.parametrize("name", [name for name in MODULES if name not in USE_TORCH])
def test_a_module_imports_no_torch(name: str) -> None:
    libraries = {imported.split(".")[0] for imported in imports(name)}
    assert not libraries & {"torch", "transformers", "diffusers"}


def test_private_modules_of_libraries_are_imported_nowhere_but_in_one_benchmark() -> None:
    private = re.compile(r"^ *(import|from) (?!cogi2v_)\w[\w.]*(\.| import )_(?!_)", re.MULTILINE)
    folders = (*PACKAGES.values(), *(ROOT / name for name in ("benchmarks", "notebooks", "tests")))
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = [path for path in files if private.search(path.read_text(encoding="utf-8"))]
    # tests/benchmarks/test_gpu_compile.py says whether jax still has what it imports.
    assert found == [ROOT / "benchmarks" / "gpu_compile.py"]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("cogi2v_jax")])
def test_torchs_names_appear_in_the_conversion_only(name: str) -> None:
    text, names = MODULES[name].read_text(), ("hidden_states", "transformer_blocks", "attn1")
    assert [torchs for torchs in (*names, "to_out") if torchs in text] == []


def test_no_file_has_more_than_420_lines() -> None:
    folders = (*PACKAGES.values(), ROOT / "tests", ROOT / "benchmarks")
    files = {path for folder in folders for path in folder.rglob("*.py")}
    assert len(files) > 100
    assert [path for path in files if len(path.read_text().splitlines()) > 420] == []


@pytest.mark.parametrize(
    "line",
    [
        "cogi2v_jax.sample.parser().parse_args("
        "['--image', 'a.png', '--prompt', 'b', '--image_latent_scale', 'sat'])",
        "cogi2v_jax.sample.main(['--help'])",
        "cogi2v_jax.sample.main(['--version'])",
        "cogi2v_jax.sample.main(['--no_such_flag'])",
        "cogi2v_jax.sample.main(['--image', 'no such image.png', '--prompt', 'a'])",
        "cogi2v_jax.sample.main(['--manifest', 'no such jobs.csv'])",
        "cogi2v_jax.sample.main(['--lora_path', 'no such lora.safetensors:0.5'])",
        "cogi2v_jax.batch.main(['--help'])",
        "cogi2v_jax.batch.main(['no such jobs.csv', '--output_dir', 'out'])",
        "cogi2v_jax.prepare.main(['--help'])",
        "cogi2v_jax.prepare.main(['no such clips', 'out', '--model', 'cogi2v-tiny'])",
        "cogi2v_jax.Request('a.png', 'b'), cogi2v_jax.Noise(), dir(cogi2v_jax)",
        "cogi2v_jax.__version__",
        "cogi2v_convert.__main__.main(['--help'])",
        "cogi2v_convert.__main__.main(['no-such-command'])",
        "cogi2v_convert.__main__.main(['compare', 'no such a.mp4', 'no such b.mp4'])",
    ],
)
def test_arguments_and_their_errors_do_not_wait_for_jax(line: str, tmp_path: Path) -> None:
    script = f"""
import sys
import cogi2v_jax.batch, cogi2v_jax.prepare, cogi2v_jax.sample, cogi2v_convert.__main__
try:
    {line}
except SystemExit:
    pass
sys.exit(str(heavy) if (heavy := sys.modules.keys() & {{"jax", "flax", "orbax", "torch"}}) else 0)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
