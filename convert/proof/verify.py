"""A converted checkpoint against a trace of the reference. Stages fed with the reference's own
inputs show where a fault is; stages that run freely from the prompt and the picture show what it
amounts to."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cogi2v_jax import __version__, loading
from cogi2v_jax.disk import one_line

from .replay import FED, FREE, Ours, Replay
from .trace import Trace, open_trace

PIXELS = ("video",)  # judged by PSNR
EXACT = ("ids", "timesteps")
# In float32: the largest relative error, and the least PSNR in dB.
MOST = {FED: 1e-5, FREE: 1e-4}
LEAST_PSNR = 60.0
# In bfloat16 beside a float32 trace: our error over the reference's own. No error is asked to be
# smaller than float32 allows.
RATIO, CLOSE = 1.1, 1e-6
# In bfloat16 alone, where rounding hides small faults: only large ones are found. Stages that run
# freely are not judged.
COARSE, COARSE_PSNR = 5e-2, 30.0
COLUMNS = (
    "stage",
    "input",
    "step",
    "relative error",
    "limit",
    "largest difference",
    "at",
    "cosine",
    "PSNR",
    "verdict",
)


class Row(NamedTuple):
    """One result in one mode, of one step where there are steps."""

    stage: str
    mode: str
    step: int | None
    error: float  # relative to the norm of the truth, or of the trace where there is none
    norm: float  # of the truth or trace
    reference_error: float | None  # the reference's own, beside a truth
    limit: float | None  # of the error, or of the PSNR in dB; None: not judged
    worst: float  # the largest difference
    where: tuple[int, ...]  # its index, channels last
    cosine: float
    psnr: float | None  # of pixels, in dB
    passed: bool

    @property
    def by_psnr(self) -> bool:
        return self.psnr is not None and self.reference_error is None

    @property
    def share(self) -> float:
        """The error as a share of its limit."""
        if self.limit is None or self.error != self.error:
            return 0.0 if self.passed else float("inf")
        if self.by_psnr:
            return self.limit / max(self.psnr or 0.0, 1e-9)
        return self.error / self.limit if self.limit else float(self.error > 0)


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    about: dict[str, Any]

    @property
    def faults(self) -> list[Row]:
        """Fed stages first: they show where a fault is."""
        return sorted((row for row in self.rows if not row.passed), key=lambda row: row.mode != FED)

    def lines(self, markdown: bool = False) -> list[str]:
        """As a table: of every stage the step furthest beyond its limit, or else nearest to it."""
        shown: list[tuple[str, ...]] = [COLUMNS]
        for stage, mode in dict.fromkeys((row.stage, row.mode) for row in self.rows):
            rows = [row for row in self.rows if (row.stage, row.mode) == (stage, mode)]
            shown.append(_cells(max(rows, key=lambda row: (not row.passed, row.share)), len(rows)))
        if markdown:
            shown.insert(1, ("---",) * len(COLUMNS))
            table = [f"| {' | '.join(cells)} |" for cells in shown]
        else:
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            padded = (map(str.ljust, cells, widths) for cells in shown)
            table = ["  ".join(cells).rstrip() for cells in padded]
        return [self.title(), "", *table, "", self.verdict()]

    def title(self) -> str:
        reference, ours = self.about["reference"], self.about["ours"]
        versions = f"diffusers {reference['diffusers']} with torch {reference['torch']}"
        checkpoint = f"{self.about['checkpoint']} in {reference['dtype']}"
        devices = ours["device"], reference["device"]
        against = f"{versions} on {devices[1]}"
        return one_line(f"{checkpoint}: jax {ours['jax']} on {devices[0]} against {against}")

    def verdict(self) -> str:
        figures, stages = len(self.rows), len({row.stage for row in self.rows})
        if not self.faults:
            return f"pass: {figures} figures of {stages} stages"
        first = self.faults[0]
        at = "" if first.step is None else f" at step {first.step}"
        what = f"the first {first.stage}, {first.mode}{at}"
        return f"FAIL: {len(self.faults)} of {figures} figures, {what}"

    def json(self) -> str:
        def finite(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [
            {name: finite(value) for name, value in row._asdict().items()}
            | {"verdict": _verdict(row)}
            for row in self.rows
        ]
        verdict = "FAIL" if self.faults else "pass"
        return json.dumps({**self.about, "verdict": verdict, "rows": rows}, indent=1)


def _verdict(row: Row) -> str:
    return "FAIL" if not row.passed else "-" if row.limit is None else "pass"


def _cells(row: Row, steps: int) -> tuple[str, ...]:
    at = "" if row.step is None else f"{row.step} of {steps}"
    limit = "-" if row.limit is None else f"{row.limit:g} dB" if row.by_psnr else f"{row.limit:.2g}"
    psnr = "" if row.psnr is None else f"{row.psnr:.1f}"
    where = ",".join(map(str, row.where))
    errors = f"{row.error:.2e}", limit, f"{row.worst:.2e}", where
    return row.stage, row.mode, at, *errors, f"{row.cosine:.6f}", psnr, _verdict(row)


def verify(checkpoint: str, trace: Path, truth: Path | None = None) -> Report:
    """Runs every stage in the dtype of the trace. `truth` is a float32 trace of the same request,
    for a bfloat16 one. Raises ValueError or FileNotFoundError, in one line, for what cannot be
    compared."""
    given, exact = open_trace(trace), open_trace(truth) if truth else None
    if exact:
        _check_truth(given, exact)
    models = loading.load(checkpoint, given.made["dtype"], vae_tiling=given.made["vae_tiling"])
    rows = [_judge(ours, given, exact) for ours in Replay(models, given).results()]
    if exact:
        rows = _judge_together(rows)
    device = jax.devices()[0].device_kind
    program = {"program": f"cogi2v-jax {__version__}", "jax": jax.__version__, "device": device}
    about = {
        "checkpoint": models.config.title,
        "trace": str(trace),
        "truth": truth and str(truth),
        "reference": given.made,
        "ours": program,
    }
    return Report(rows, about)


def _check_truth(trace: Trace, truth: Trace) -> None:
    """Raises ValueError unless both are of one request, in bfloat16 and in float32."""
    if (trace.made["dtype"], truth.made["dtype"]) != ("bfloat16", "float32"):
        dtypes = f"{truth.made['dtype']} beside {trace.made['dtype']}"
        raise ValueError(f"truth must be a float32 trace beside a bfloat16 one: got {dtypes}")
    made, arrays = ("checkpoint", "vae_tiling"), ("picture", "ids")
    differ = [name for name in trace.settings if trace.settings[name] != truth.settings[name]]
    differ += [name for name in made if trace.made[name] != truth.made[name]]
    differ += [name for name in arrays if not np.array_equal(trace.read(name), truth.read(name))]
    if differ:
        got = f"{truth.path} with another {', '.join(differ)}"
        raise ValueError(f"truth must be a trace of the same request: got {got}")


def _judge(ours: Ours, trace: Trace, truth: Trace | None) -> Row:
    theirs = trace.read(ours.stage, ours.step)
    right = theirs if truth is None else truth.read(ours.stage, ours.step)
    value = np.asarray(ours.value, np.float64)
    if value.shape != right.shape or theirs.shape != right.shape:
        rule = f"the shape {list(right.shape)} of the trace"
        raise ValueError(f"{ours.stage} must have {rule}: got {list(value.shape)}")
    difference, right = np.abs(value - right), np.asarray(right, np.float64)
    largest = np.argmax(np.where(np.isnan(difference), np.inf, difference))
    where = tuple(map(int, np.unravel_index(largest, difference.shape)))
    error, worst = _relative(value, right), float(difference[where])
    mean = float(np.mean(difference**2))
    psnr = math.inf if mean == 0 else -10 * float(np.log10(mean))  # NaN where a value is NaN
    norm = float(np.linalg.norm(right))
    cosine = float(np.vdot(value, right) / max(np.linalg.norm(value) * norm, 1e-300))
    single = trace.made["dtype"] == "float32"
    own = None if truth is None else _relative(theirs, right)
    limit: float | None
    if ours.stage in EXACT:
        limit, passed = 0.0, worst == 0
    elif own is not None:
        limit = max(RATIO * own, CLOSE)
        passed = error <= limit
    elif not single and ours.mode == FREE:
        limit, passed = None, bool(np.isfinite(value).all())
    elif ours.stage in PIXELS:
        limit = LEAST_PSNR if single else COARSE_PSNR
        passed = psnr >= limit
    else:
        limit = MOST[ours.mode] if single else COARSE
        passed = error <= limit
    seen = psnr if ours.stage in PIXELS else None
    errors = error, norm, own, limit, worst, where, cosine, seen
    return Row(ours.stage, ours.mode, ours.step, *errors, bool(passed))


def _judge_together(rows: list[Row]) -> list[Row]:
    """Beside a truth the steps of a stage pass or fail together: two roundings of one value differ
    by more than a tenth at some step of fifty, but not over all steps."""

    def total(rows: list[Row], share: Callable[[Row], float]) -> float:
        return math.hypot(*(share(row) * row.norm for row in rows))

    passed = {}
    for stage, mode in dict.fromkeys((row.stage, row.mode) for row in rows):
        same = [row for row in rows if (row.stage, row.mode) == (stage, mode)]
        if stage not in EXACT:
            theirs = total(same, lambda row: RATIO * (row.reference_error or 0.0))
            limit = max(theirs, total(same, lambda row: CLOSE))
            passed[stage, mode] = total(same, lambda row: row.error) <= limit
    return [row._replace(passed=passed.get((row.stage, row.mode), row.passed)) for row in rows]


def _relative(value: Any, right: Any) -> float:
    difference = np.linalg.norm(np.asarray(value, np.float64) - right)
    return float(difference / max(np.linalg.norm(right), 1e-30))
