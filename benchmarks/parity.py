"""Random checkpoints of both families, recorded by the reference and verified by us, for the table
of docs/same_model.md.

    python benchmarks/parity.py [--steps N] [--write]

The networks are small but have everything that the released ones have (heads of 64, 16 latent
channels, learned table or `ofs`, both rotary grids), so that the mathematics are compared. Released
weights can go through the same two commands, `cogi2v-convert record` and `verify`.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vs_reference import replace_tables, write_random  # exits if the reference is not installed

# isort: split
from cogi2v_convert.proof.record import record  # pyright: ignore[reportMissingImports]
from cogi2v_convert.proof.verify import FED, Report, verify  # pyright: ignore[reportMissingImports]

from cogi2v_jax import Request
from cogi2v_jax.names import ASSETS

PAGE = Path(__file__).parent.parent / "docs" / "same_model.md"
FAMILIES: dict[str, dict[str, Any]] = {
    "5B-I2V": {"sample_height": 12, "sample_width": 18, "sample_frames": 17}
    | {"use_learned_positional_embeddings": True},
    "1.5-5B-I2V": {"patch_size_t": 2, "ofs_embed_dim": 512, "patch_bias": False}
    | {"sample_height": 300, "sample_width": 300},
}


def verify_family(scratch: Path, family: str, steps: int) -> tuple[Report, Report]:
    """Records and verifies a family. Returns the reports of float32, and of bfloat16 compared with
    the float32 trace."""
    latents = {"scaling_factor": 0.7, "invert_scale_latents": family.startswith("1.5")}
    source = write_random(scratch / family, latents, {"num_layers": 6} | FAMILIES[family])
    settings: dict[str, Any] = {"height": 96, "width": 144, "num_frames": 17}
    settings |= {"num_inference_steps": steps, "guidance_scale": 6.0, "use_dynamic_cfg": True}
    settings |= {"scheduler": "dpm", "fit": "stretch", "noise": "torch"}
    request = Request(ASSETS / "example.png", "the red circle moves left", **settings)
    single, half = (scratch / f"{family}.{dtype}" for dtype in ("float32", "bfloat16"))
    for trace in (single, half):
        print(record(source, trace, request, dtype=trace.suffix[1:]), file=sys.stderr, flush=True)
    return verify(str(source), single), verify(str(source), half, single)


def format_table(reports: dict[str, tuple[Report, Report]]) -> list[str]:
    """Returns the lines of a table of the worst step of every stage: in float32 the relative error,
    for the video the PSNR; in bfloat16 our error over the reference's."""
    heads = [f"{family}, {what}" for family in reports for what in ("float32", "bfloat16")]
    lines = [f"| {' | '.join(['stage', 'input', *heads])} |", f"|{'---|' * (2 + len(heads))}"]
    rows = next(iter(reports.values()))[0].rows
    for stage, mode in dict.fromkeys((row.stage, row.mode) for row in rows):
        cells = [stage, "the reference's" if mode == FED else "our own"]
        for single, half in reports.values():
            ours, theirs = (
                [row for row in report.rows if (row.stage, row.mode) == (stage, mode)]
                for report in (single, half)
            )
            psnr = [row.psnr for row in ours if row.psnr is not None]
            error = max(row.error for row in ours)
            cells.append(f"{min(psnr):.0f} dB" if psnr else f"{error:.1e}" if error else "equal")
            ratios = [row.error / row.reference_error for row in theirs if row.reference_error]
            cells.append(f"{max(ratios):.2f} x" if ratios else "equal")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    about = "Both families compared with the reference, stage by stage."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cogi2v-parity-") as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # the random weights stay out of the user's cache
        reports = {family: verify_family(Path(scratch), family, args.steps) for family in FAMILIES}
    packages = ("jax", "torch", "diffusers", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    steps = f"{args.steps} DPM steps with dynamic guidance"
    about = f"Random weights, 96x144, 17 frames, {steps}, on a CPU: {versions}."
    text = "\n".join([*format_table(reports), "", about])
    print(text)
    if args.write:
        replace_tables(PAGE, "benchmarks/parity.py", text)
    faults = [
        f"{family}: {report.verdict()}"
        for family, both in reports.items()
        for report in both
        if report.faults
    ]
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
