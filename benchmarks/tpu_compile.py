"""Compiles our programs at full size for TPUs, on a machine without one, and reports the compiler's
figures.

    python benchmarks/tpu_compile.py --model cogvideox-5b-i2v --mesh v5e-8 --stage denoise
        --json row.json [--hlo program.txt]
    python benchmarks/tpu_compile.py [--model NAME] [--mesh NAME] [--stage NAME] [--again]
    python benchmarks/tpu_compile.py --markdown

The first writes one row. The second compiles those combinations of what is not given that
configs/plans.toml lacks, with `--again` all of them, and writes them there. The third prints
configs/plans.toml as a table.

Nothing here is a measured time. `peak_gib` is the memory that the compiler gives a program on a
device, arguments and outputs included; a program that it refuses for its memory does not fit. Of
a step of training `summed_gib` is another account: arguments, outputs and temporaries.
Static seconds are the scheduled cycles over the chip's clock, plus the sent bytes at 100 GB/s.
docs/performance.md says how far measured times were from such figures. Every row names the jax and
libtpu that made it.

Every row is compiled in its own process, because libtpu reads its flags once.

The stage `train` is a step of the model's recipe in configs/training/, with `key=value` changed as
on its command line, and with the word `int8` on int8 weights:

    python benchmarks/tpu_compile.py --model cogvideox-5b-i2v --mesh v5e-1 --stage train int8
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cogi2v_jax.devices.plan import STAGES

ROOT = Path(__file__).parent.parent
PLANS = ROOT / "configs" / "plans.toml"
MODELS = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
TRAIN = "train"
# Steps of training that configs/plans.toml has: model, mesh, and changes of the recipe.
TRAININGS = (
    ("cogvideox-5b-i2v", "v5e-1", "int8"),
    ("cogvideox-5b-i2v", "v5e-1", "rank=16"),
    ("cogvideox-5b-i2v", "v5e-8", ""),
    ("cogvideox-5b-i2v", "v6e-1", ""),
    ("cogvideox-5b-i2v", "v6e-8", ""),
    ("cogvideox-5b-i2v", "v5p-8", ""),
    ("cogvideox-5b-i2v", "v7x-8", ""),
    ("cogvideox1.5-5b-i2v", "v5e-8", ""),
    ("cogvideox1.5-5b-i2v", "v6e-8", ""),
)
WITH_KERNELS = ("denoise", TRAIN)  # stages; their static seconds need the schedules of kernels
Row = dict[str, Any]
Name = tuple[str, str, str, str]  # of a row: model, mesh, stage and changes of a recipe


def make_environment(schedules: Path | None) -> dict[str, str]:
    """Returns the environment in which libtpu compiles for chips that the machine lacks. With a
    folder for `schedules`, libtpu also writes the last schedule of every kernel that still shows
    delays there. The caller's own libtpu flags stay."""
    dump = f"--xla_jf_dump_to={schedules} --xla_jf_dump_llo_text=true"
    dump += " --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
    path = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump if schedules else ''}",
        # An executable from the cache is not compiled and dumps nothing.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(path),
    }


def compile_row(name: Name, attention: str, hlo: Path | None = None) -> Row:
    """Compiles one stage in its own process and returns its row. Where libtpu writes the schedules
    of kernels, compiling takes half as long again. Raises RuntimeError with the compiler's last
    lines if it fails for another reason than memory."""
    model, mesh, stage, changes = name
    with tempfile.TemporaryDirectory(prefix="cogi2v-compile-") as scratch:
        row, schedules = Path(scratch, "row.json"), Path(scratch, "schedules")
        schedules.mkdir()
        command = [sys.executable, "-m", "tpu_stage", f"--model={model}", f"--mesh={mesh}"]
        command += [f"--stage={stage}", f"--attention={attention}"]
        command += [f"--schedules={schedules}", f"--json={row}"]
        command += [*([f"--hlo={hlo}"] if hlo else []), *changes.split()]
        environment = make_environment(schedules if stage in WITH_KERNELS else None)
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-15:])
            raise RuntimeError(last or f"the compiler's process ended with {done.returncode}")
        return json.loads(row.read_text()) | read_versions()


def read_versions() -> Row:
    return {"jax": version("jax"), "libtpu": version("libtpu"), "date": time.strftime("%Y-%m-%d")}


def read_rows() -> dict[Name, Row]:
    """Reads the rows of configs/plans.toml by their names."""
    rows = tomllib.loads(PLANS.read_text()).get("row", []) if PLANS.exists() else []
    names = ("model", "mesh", "stage", "changes")
    return {tuple(row.get(name, "") for name in names): row for row in rows}  # pyright: ignore[reportReturnType]


def write(rows: Iterable[Row]) -> None:
    """Writes configs/plans.toml under another name, then renames it, so that an interrupted run
    does not leave half a file."""

    def table(row: Row) -> str:
        # JSON's strings, numbers, true and false are TOML's.
        return "\n".join(["[[row]]", *(f"{key} = {json.dumps(row[key])}" for key in row)])

    head = (
        "# What the TPU compiler says of every stage on every mesh; nothing here was measured. "
        "Written by benchmarks/tpu_compile.py."
    )
    part = PLANS.with_suffix(".part")
    part.write_text("\n\n".join([head, *map(table, rows)]) + "\n")
    part.replace(PLANS)


def format_cells(row: Row) -> list[str]:
    """Returns a row's cells as text, with "-" for figures that the compiler did not reach."""

    def figure(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if key in row else "-"

    figures = [figure("peak_gib", ".2f"), figure("flops", ".1f", 1e-12)]
    figures += [figure("collective_mib_per_layer", ".1f"), figure("static_seconds", ".2f")]
    stage = " ".join([row["stage"], *row.get("changes", "").split()])
    names = [row["model"], row["mesh"], stage, "yes" if row["fits"] else "no"]
    compiler = f"{row['jax']}, {row['libtpu']}"
    return [*names, *figures, figure("compile_seconds", ".0f"), compiler]


HEAD = ["model", "mesh", "stage", "fits", "GiB a device", "TFLOP a device", "MiB sent a layer"]
HEAD += ["static s", "compiled in s", "jax, libtpu"]
WIDTHS = [19, 6, 7, 4, 12, 14, 16, 8, 13, 18]


def format_line(parts: list[str]) -> str:
    return "  ".join(part.ljust(width) for part, width in zip(parts, WIDTHS, strict=True)).rstrip()


def format_markdown(rows: Iterable[Row]) -> str:
    lines = [HEAD, ["-" * len(name) for name in HEAD], *map(format_cells, rows)]
    return "\n".join(f"| {' | '.join(parts)} |" for parts in lines)


def every_name(meshes: Iterable[str]) -> list[Name]:
    """The rows that configs/plans.toml is to have, in order."""
    sampling = itertools.product(MODELS, meshes, STAGES, [""])
    return [*sampling, *((model, mesh, TRAIN, changes) for model, mesh, changes in TRAININGS)]


def main() -> None:
    known = tomllib.loads((ROOT / "configs" / "meshes.toml").read_text())["meshes"]
    tpus = [name for name, mesh in known.items() if "topology" in mesh]
    about = "Compiles our programs for TPUs on a machine without one."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--mesh", choices=tpus)
    parser.add_argument("--stage", "--phase", choices=(*STAGES, TRAIN))
    about = "of the recipe, for one --model, one --mesh and the stage train"
    parser.add_argument("changes", metavar="key=value", nargs="*", help=about)
    parser.add_argument("--attention", default="auto", help="as of cogi2v-sample")
    about = "write the rows there and leave configs/plans.toml alone"
    parser.add_argument("--json", type=Path, help=about)
    about = "write the optimised programs there; for a single row"
    parser.add_argument("--hlo", type=Path, help=about)
    about = "compile rows anew that configs/plans.toml has"
    parser.add_argument("--again", action="store_true", help=about)
    about = "print configs/plans.toml as a table and compile nothing"
    parser.add_argument("--markdown", action="store_true", help=about)
    args = parser.parse_args()
    if args.markdown:
        print(format_markdown(read_rows().values()))
        return
    places = {name: place for place, name in enumerate(every_name(tpus))}
    asked = args.model, args.mesh, args.stage
    wanted = [
        name
        for name in places
        if all(given in (None, own) for given, own in zip(asked, name[:3], strict=True))
    ]
    if args.changes or not wanted:
        if None in asked or args.stage != TRAIN:
            parser.error("key=value must go with one --model, one --mesh and --stage train")
        wanted = [(*asked, " ".join(args.changes))]
    if args.hlo and len(wanted) > 1:
        rule = "--hlo must go with one --model, one --mesh and one --stage"
        parser.error(f"{rule}: got {len(wanted)} rows")
    try:
        read_versions()
    except PackageNotFoundError as missing:
        rule = "benchmarks/tpu_compile.py must have libtpu (Linux on x86-64)"
        sys.exit(f"{rule}: {missing}; pip install libtpu")
    rows = {} if args.json else read_rows()
    print(format_line(HEAD), flush=True)
    failures = []
    for name in wanted:
        if args.again or name not in rows:
            try:
                rows[name] = compile_row(name, args.attention, args.hlo)
            except RuntimeError as error:
                failures.append(f"{' '.join(name)}: {error}")
                continue
            if not args.json:
                last = len(places)
                write(rows[name] for name in sorted(rows, key=lambda name: places.get(name, last)))
        print(format_line(format_cells(rows[name])), flush=True)
    if args.json:
        made = list(rows.values())
        args.json.write_text(json.dumps(made[0] if len(wanted) == 1 and made else made, indent=1))
    sys.exit("\n\n".join(failures) or 0)


if __name__ == "__main__":
    main()
