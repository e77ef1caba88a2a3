"""What samplers, steps, guidance and dtypes do to the videos of the embedded model: the table of
docs/sampling.md.

    python benchmarks/adherence_table.py [--model NAME] [--scenes N] [--write]

Each row is a setting away from the model's defaults (DDIM, 50 steps, constant guidance 2, float32),
on the held-out scenes of `adherence.py`, which says what the columns are."""

import argparse
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adherence import figures, held_out, make
from vs_reference import replace_tables

import cogi2v_jax
from cogi2v_jax.names import ASSETS
from cogi2v_jax.training import shapes

PAGE = Path(__file__).parent.parent / "docs" / "sampling.md"
COLUMNS = ("follows", "nearest", "first", "clip", "colour", "two")
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{f"guidance {scale:g}": {"guidance_scale": float(scale)} for scale in (1, 1.5, 3, 4, 6, 8)},
    **{f"{steps} steps": {"num_inference_steps": steps} for steps in (10, 20, 30)},
    **{
        f"DPM, {steps} steps": {"scheduler": "dpm", "num_inference_steps": steps}
        for steps in (10, 20, 50)
    },
    **{
        f"DPM, dynamic guidance {scale}": {
            "scheduler": "dpm",
            "use_dynamic_cfg": True,
            "guidance_scale": float(scale),
        }
        for scale in (3, 6)
    },
}


def variants(model: str, scratch: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(the row's name, the model, settings)."""
    from cogi2v_convert.conversion import to_flax  # pyright: ignore[reportMissingImports]

    models = cogi2v_jax.load(model, "float32")
    for name, settings in ROWS.items():
        yield name, models, settings
    yield "bfloat16", cogi2v_jax.load(model, "bfloat16"), {}
    source = ASSETS / model if (ASSETS / model).is_dir() else Path(model)
    to_flax(source, scratch / "int8", dtype="int8")
    yield "int8 weights", cogi2v_jax.load(scratch / "int8", "float32"), {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = "the embedded model, or a diffusers folder (default: cogi2v-tiny)"
    parser.add_argument("--model", default="cogi2v-tiny", help=model)
    parser.add_argument("--scenes", type=int, default=6, help="of every motion (default: 6)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    scenes = held_out([*shapes.TRAINED], options.scenes)
    lines = [f"| {' | '.join(['', *COLUMNS])} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    with tempfile.TemporaryDirectory(prefix="cogi2v-adherence-") as scratch:
        for name, models, settings in variants(options.model, Path(scratch)):
            row = figures(make(models, scenes, settings), exact=False)
            cells = (f"{row[column]:.{1 if row[column] > 1 else 3}f}" for column in COLUMNS)
            lines.append(f"| {' | '.join([name, *cells])} |")
            print(lines[-1], flush=True)
    about = f"{len(scenes)} scenes, on a CPU, jax {version('jax')}."
    text = "\n".join([*lines, "", about])
    print(text)
    if options.write:
        replace_tables(PAGE, "benchmarks/adherence_table.py", text)


if __name__ == "__main__":
    main()
