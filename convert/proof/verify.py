"""A converted checkpoint against a trace of the reference: every stage fed with the reference's own
input, which says where a fault is, and every stage running freely from the start, which says what
it comes to."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cogi2v_jax import __version__, loading
from cogi2v_jax.devices.compiling import Stopwatch
from cogi2v_jax.devices.sharding import fetch, put, split
from cogi2v_jax.pipeline import (
    Conditions,
    Prepared,
    condition,
    decode_part,
    denoise,
    encode,
    prepare,
    ready,
    run,
)
from cogi2v_jax.request import Noise, Request
from cogi2v_jax.sampling.noise import draw_as_torch
from cogi2v_jax.sampling.schedule import Tableau, draws, guide, step
from cogi2v_jax.weights.checkpoint import Models

from .trace import Trace, open_trace

FED, FREE = "fed", "free"
PIXELS = ("video",)  # what is judged by its PSNR
EXACT = ("ids", "timesteps")
# In float32: relative errors, and dB.
MOST = {FED: 1e-5, FREE: 1e-4}
LEAST_PSNR = 60.0
# In bfloat16 beside a float32 trace: our error over the reference's own. Nothing is asked to be
# closer than float32 is.
RATIO, CLOSE = 1.1, 1e-6
# In bfloat16 alone, where rounding can't be told from small faults: only that there is no large
# one. What runs freely is not judged.
COARSE, COARSE_PSNR = 5e-2, 30.0


class Row(NamedTuple):
    """One stage of one mode, at one step where it has steps."""

    stage: str
    mode: str
    step: int | None
    error: float  # relative to the norm of what is right
    norm: float  # of what is right
    reference_error: float | None  # the reference's own, where there is a truth
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
        """Of what is allowed: how near to its limit, or how far beyond."""
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
        """Fed stages first: they tell where a fault is."""
        return sorted((row for row in self.rows if not row.passed), key=lambda row: row.mode != FED)

    def lines(self, markdown: bool = False) -> list[str]:
        """As a table: of every stage the step that passes its limit furthest, or else comes nearest
        to it."""
        shown: list[tuple[str, ...]] = [
            (
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
        ]
        for stage, mode in dict.fromkeys((row.stage, row.mode) for row in self.rows):
            rows = [row for row in self.rows if (row.stage, row.mode) == (stage, mode)]
            shown.append(_cells(max(rows, key=lambda row: (not row.passed, row.share)), len(rows)))
        if markdown:
            table = [
                f"| {' | '.join(cells)} |"
                for cells in (shown[0], ("---",) * len(shown[0]), *shown[1:])
            ]
        else:
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            table = [
                "  ".join(
                    cell.ljust(width) for cell, width in zip(cells, widths, strict=True)
                ).rstrip()
                for cells in shown
            ]
        return [self.title(), "", *table, "", self.verdict()]

    def title(self) -> str:
        reference, ours = self.about["reference"], self.about["ours"]
        theirs = f"diffusers {reference['diffusers']} with torch {reference['torch']} on {reference['device']}"
        return f"{self.about['checkpoint']} in {reference['dtype']}: jax {ours['jax']} on {ours['device']} against {theirs}"

    def verdict(self) -> str:
        if not self.faults:
            return (
                f"pass: {len(self.rows)} figures of {len({row.stage for row in self.rows})} stages"
            )
        first = self.faults[0]
        at = "" if first.step is None else f" at step {first.step}"
        return f"FAIL: {len(self.faults)} of {len(self.rows)} figures, the first {first.stage}, {first.mode}{at}"

    def json(self) -> str:
        rows = [{**row._asdict(), "verdict": _verdict(row)} for row in self.rows]
        finite = [
            {
                name: None if value in (math.inf, -math.inf) or value != value else value
                for name, value in row.items()
            }
            for row in rows
        ]
        return json.dumps(
            {**self.about, "verdict": "FAIL" if self.faults else "pass", "rows": finite}, indent=1
        )


def _verdict(row: Row) -> str:
    return "FAIL" if not row.passed else "-" if row.limit is None else "pass"


def _cells(row: Row, steps: int) -> tuple[str, ...]:
    at = "" if row.step is None else f"{row.step} of {steps}"
    limit = "-" if row.limit is None else f"{row.limit:g} dB" if row.by_psnr else f"{row.limit:.2g}"
    psnr = "" if row.psnr is None else f"{row.psnr:.1f}"
    where = ",".join(map(str, row.where))
    return (
        row.stage,
        row.mode,
        at,
        f"{row.error:.2e}",
        limit,
        f"{row.worst:.2e}",
        where,
        f"{row.cosine:.6f}",
        psnr,
        _verdict(row),
    )


def verify(checkpoint: str, trace: Path, truth: Path | None = None) -> Report:
    """Runs every stage in the trace's dtype. `truth` is a float32 trace of the same request, for a
    bfloat16 one. Raises ValueError or FileNotFoundError, in one line, for what can't be
    compared."""
    given, exact = open_trace(trace), open_trace(truth) if truth else None
    if exact:
        _check_truth(given, exact)
    models = loading.load(checkpoint, given.made["dtype"], vae_tiling=given.made["vae_tiling"])
    rows = [_judge(ours, given, exact) for ours in Stages(models, given).all()]
    if exact:
        rows = _judge_together(rows)
    ours = {
        "program": f"cogi2v-jax {__version__}",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    about = {
        "checkpoint": models.config.title,
        "trace": str(trace),
        "truth": truth and str(truth),
        "reference": given.made,
        "ours": ours,
    }
    return Report(rows, about)


def _check_truth(trace: Trace, truth: Trace) -> None:
    """Raises ValueError unless both are of one request, in bfloat16 and in float32."""
    if (trace.made["dtype"], truth.made["dtype"]) != ("bfloat16", "float32"):
        kinds = f"{truth.made['dtype']} beside {trace.made['dtype']}"
        raise ValueError(f"truth must be a float32 trace beside a bfloat16 one: got {kinds}")
    differ = [name for name in trace.settings if trace.settings[name] != truth.settings[name]]
    differ += [
        name for name in ("checkpoint", "vae_tiling") if trace.made[name] != truth.made[name]
    ]
    differ += [
        name
        for name in ("picture", "ids")
        if not np.array_equal(trace.read(name), truth.read(name))
    ]
    if differ:
        raise ValueError(
            f"truth must be a trace of the same request: got {truth.path} with another {', '.join(differ)}"
        )


class Ours(NamedTuple):
    """What a stage of ours gave. Its name is that of the reference's tensor."""

    stage: str
    mode: str
    value: Any
    step: int | None = None


def _judge(ours: Ours, trace: Trace, truth: Trace | None) -> Row:
    theirs = trace.read(ours.stage, ours.step)
    right = theirs if truth is None else truth.read(ours.stage, ours.step)
    value = np.asarray(ours.value, np.float64)
    if value.shape != right.shape or theirs.shape != right.shape:
        raise ValueError(
            f"{ours.stage} must have the shape {list(right.shape)} of the trace: got {list(value.shape)}"
        )
    difference, right = np.abs(value - right), np.asarray(right, np.float64)
    where = tuple(
        map(
            int,
            np.unravel_index(
                np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape
            ),
        )
    )
    error, worst = _relative(value, right), float(difference[where])
    mean = float(np.mean(difference**2))
    psnr = math.inf if mean == 0 else -10 * float(np.log10(mean))  # NaN where anything is
    cosine = float(
        np.vdot(value, right) / max(np.linalg.norm(value) * np.linalg.norm(right), 1e-300)
    )
    single, own = (
        trace.made["dtype"] == "float32",
        None if truth is None else _relative(theirs, right),
    )
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
    norm = float(np.linalg.norm(right))
    return Row(
        ours.stage,
        ours.mode,
        ours.step,
        error,
        norm,
        own,
        limit,
        worst,
        where,
        cosine,
        seen,
        bool(passed),
    )


def _judge_together(rows: list[Row]) -> list[Row]:
    """Beside a truth the steps of a stage pass or fail together: two roundings of one value differ
    by more than a tenth at some step of fifty, and not over all of them."""
    judged = {}
    for stage, mode in dict.fromkeys((row.stage, row.mode) for row in rows):
        same = [row for row in rows if (row.stage, row.mode) == (stage, mode)]
        if stage in EXACT:
            continue
        ours, theirs, least = (
            math.hypot(*(share * row.norm for share, row in zip(shares, same, strict=True)))
            for shares in (
                [row.error for row in same],
                [RATIO * (row.reference_error or 0.0) for row in same],
                [CLOSE] * len(same),
            )
        )
        judged[stage, mode] = ours <= max(theirs, least)
    return [row._replace(passed=judged.get((row.stage, row.mode), row.passed)) for row in rows]


def _relative(value: Any, right: Any) -> float:
    return float(
        np.linalg.norm(np.asarray(value, np.float64) - right) / max(np.linalg.norm(right), 1e-30)
    )


@dataclass(frozen=True)
class Stages:
    """Our stages, by the programs that make videos."""

    models: Models
    trace: Trace

    def all(self) -> Iterator[Ours]:
        """In the order of the data, each as its name in `trace.LAYOUTS` says. Raises ValueError for
        a trace of another checkpoint."""
        yield Ours("ids", FED, self.prepared.ids)
        yield Ours("pixels", FED, self.prepared.pixels)
        yield Ours(
            "text", FED, fetch(self._run("text", self.prepared.phases.text(self.trace.read("ids"))))
        )
        yield Ours("text", FREE, fetch(self.free.text))
        yield from self._image()
        yield from self._noise()
        yield Ours("timesteps", FED, self.prepared.phases.rows.timestep)
        yield Ours("guidance", FED, self.prepared.phases.rows.guidance)
        yield from self._steps()
        padding = self.prepared.phases.shape.padding
        last = self.trace.read("latents", self.trace.steps - 1)
        for mode, latents in ((FED, last), (FREE, self.latents[-1])):
            video = fetch(
                decode_part(self.models, latents[:, padding:], self.watch, self.prepared.phases)
            )
            yield Ours("video", mode, np.clip(video.astype(np.float32) * 0.5 + 0.5, 0, 1))

    def _noise(self) -> Iterator[Ours]:
        """What `--noise torch` draws for the trace's seed."""
        request, shape = self.prepared.request, self.prepared.phases.shape
        counts = draws(self.models.config.scheduler, request.scheduler, self.trace.steps)
        posterior, initial, steps = draw_as_torch(
            [self.trace.settings["seed"]], self.models.dtype, shape[:4], counts
        )
        yield Ours("posterior_noise", FED, posterior)
        yield Ours("initial", FED, initial)
        for index, drawn in enumerate(() if steps is None else steps):
            yield Ours("noise", FED, drawn, index)

    def _image(self) -> Iterator[Ours]:
        phases, scale = self.prepared.phases, self.prepared.request.latent_scale(self.models.config)
        noise, words = self.trace.read("posterior_noise"), self.words

        def drawn(moments: Any, noise: Any) -> Float[np.ndarray, "b t h w c"]:
            moments = jnp.asarray(moments, self.models.dtype)
            return fetch(
                self._run(
                    "image", phases.image(put(moments, split(phases.mesh, "video")), noise, words)
                )
            )

        yield Ours(
            "moments",
            FED,
            fetch(encode(self.models, self.trace.read("pixels"), self.watch, phases)),
        )
        yield Ours("moments", FREE, fetch(self.free.moments))
        yield Ours("posterior", FED, drawn(self.trace.read("moments"), noise)[:, :1] / scale)
        image = fetch(self.free.image)
        yield Ours("posterior", FREE, image[:, :1] / scale)
        # A posterior of no width about the reference's own draw.
        sample = self.trace.read("posterior")
        yield Ours(
            "image",
            FED,
            drawn(
                np.concatenate([sample, np.full_like(sample, -np.inf)], axis=-1),
                np.zeros_like(noise),
            ),
        )
        yield Ours("image", FREE, image)

    def _steps(self) -> Iterator[Ours]:
        """The network's predictions, their guidance and the step."""
        text, image = self.trace.read("text"), self.trace.read("image")
        fed = self.free._replace(
            text=self._put(text, "batch", self.models.dtype), image=self._put(image, "video")
        )
        x = self.trace.read("initial")
        for index in range(self.trace.steps):
            if self.trace.has("guided", index):
                yield from self._predictions(FED, x, index, fed)
                yield from self._predictions(FREE, self.latents[index], index, self.free)
                yield Ours("latents", FED, self._stepped(x, index), index)
            yield Ours("latents", FREE, self.latents[index + 1], index)
            x = self.trace.read("latents", index)

    def _predictions(self, mode: str, x: Any, index: int, given: Conditions) -> Iterator[Ours]:
        names = [name for name in ("unconditional", "conditional") if self.trace.has(name, index)]
        pair = {
            name: self._predicted(x, index, given, float(name == "conditional")) for name in names
        }
        yield from (Ours(name, mode, v, index) for name, v in pair.items())
        if mode == FED:
            pair = {name: jnp.asarray(self.trace.read(name, index)) for name in names}
        yield Ours(
            "guided",
            mode,
            guide(self._row(index), **pair) if len(pair) > 1 else pair["conditional"],
            index,
        )

    def _stepped(self, x: Any, index: int) -> Float[Array, "b t h w c"]:
        """The reference's latents after a step of ours with its prediction."""
        given = [
            self.trace.read(name, index) if self.trace.has(name, index) else 0 * x
            for name in ("guided", "x0_prev", "noise")
        ]
        return step(self._row(index), *map(jnp.asarray, (x, *given)))[0]

    def _row(self, index: int) -> Tableau:
        return Tableau(*(column[index] for column in self.prepared.phases.rows))

    def _predicted(
        self, x: Any, index: int, given: Conditions, guidance: float
    ) -> Float[Array, "b t h w c"]:
        """One of a pair's predictions, from the loop itself: a schedule is data, and one that lands
        on v shows it."""
        phases = self.prepared.phases
        flat = {name: np.full_like(column, 0) for name, column in phases.rows._asdict().items()}
        ones = np.ones_like(phases.rows.x0)
        rows = phases.rows._replace(
            **flat
            | {
                "timestep": phases.rows.timestep,
                "guidance": guidance * ones,
                "sigma": -ones,
                "x0": ones,
            }
        )
        carry = (self._put(x, "video"),) * 2
        noise = self.prepared.noise.of_slab(index, 1)
        call = phases.denoise(
            carry,
            index,
            rows,
            given.shifts,
            noise,
            self.words,
            given.image,
            given.text,
            self.positions,
            slab=1,
        )
        return jnp.asarray(fetch(ready(self.models, phases, self.watch, call)(*call.args)[0]))

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch()

    @cached_property
    def prepared(self) -> Prepared:
        """The trace's request, with the reference's own draws."""
        request = Request(self.trace.read("picture"), **self.trace.settings)
        steps = range(self.trace.steps)
        drawn = (
            np.stack([self.trace.read("noise", index) for index in steps])
            if self.trace.has("noise", 0)
            else None
        )
        return prepare(
            self.models,
            request,
            Noise(self.trace.read("posterior_noise"), self.trace.read("initial"), drawn),
        )

    @cached_property
    def free(self) -> Conditions:
        """From the prompt and the picture."""
        return condition(self.models, self.prepared, self.watch)

    @cached_property
    def latents(self) -> list[Float[np.ndarray, "b t h w c"]]:
        """Running freely: the noise, then the latents after every step, padding included."""
        walk = [self.trace.read("initial")]
        denoise(
            self.models,
            self.prepared,
            self.free,
            1,
            lambda step, steps, x: walk.append(fetch(x)),
            self.watch,
        )
        return walk

    @cached_property
    def words(self) -> Any:
        return put(self.prepared.words, split(self.prepared.phases.mesh))

    @cached_property
    def positions(self) -> Any:
        return self.prepared.phases.positions()

    def _run(self, phase: str, call: Any) -> Any:
        return run(self.models, self.prepared.phases, self.watch, phase, call)

    def _put(self, value: Any, axis: str, dtype: Any = np.float32) -> Any:
        return put(np.asarray(value, dtype), split(self.prepared.phases.mesh, axis))
