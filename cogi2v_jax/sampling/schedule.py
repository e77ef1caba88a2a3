"""Sampling schedules as tables. Samplers fill a `Tableau` on the host in float64 (samplers.py); on
the device one `step` serves them all."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import SchedulerConfig
from .samplers import SAMPLERS, noise_levels

BLURRED = 0.04  # share of the steps in which `motion` low-passes the image: the first 2 of 50
EXACT = 1e-12  # released checkpoints are off by at most 5e-16
Column = Float[Any, "*i"]  # numpy on the host, jax on the device, where one row of it is a scalar


class Tableau(NamedTuple):
    """One row a step: x0 = alpha x - sigma v, then x = A x + B x0 + C past + D noise, where `past`
    is what the last n steps kept, newest first; this one keeps E x + F x0."""

    timestep: Int[Any, "*i"]
    guidance: Column
    image_guidance: Column  # 1 where the prediction without text is the image's alone
    low_pass: Column  # share of the image's latents that are low-passed, 0 or 1
    alpha: Column
    sigma: Column
    x: Column  # A
    x0: Column  # B
    past: Float[Any, "*i n"]  # C; zero for one-step schemes
    noise: Column  # D; zero for deterministic schemes
    keep_x: Column  # E
    keep_x0: Column  # F


def step(
    row: Tableau,
    x: Float[Array, "b t h w c"],
    v: Float[Array, "b t h w c"],
    past: tuple[Float[Array, "b t h w c"], ...],
    noise: Float[Array, "b t h w c"],
) -> tuple[Float[Array, "b t h w c"], tuple[Float[Array, "b t h w c"], ...]]:
    """One step of any schedule, all in float32: (next x, next past)."""
    x0 = row.alpha * x - row.sigma * v
    later = row.x * x + row.x0 * x0
    for n, kept in enumerate(past):
        later += row.past[n] * kept
    return later + row.noise * noise, (row.keep_x * x + row.keep_x0 * x0, *past[:-1])


Latents = Float[Array, "b t h w c"]


def guide(row: Tableau, unconditional: Latents, conditional: Latents) -> Latents:
    """Classifier-free guidance (arXiv 2207.12598) of a pair of predictions, in float32."""
    return unconditional + row.guidance * (conditional - unconditional)


def guide_across(row: Tableau, unconditional: Latents, conditional: Latents, x: Latents) -> Latents:
    """Adaptive projected guidance (arXiv 2410.02416) without its part along the prediction, its
    momentum and its limit: of the difference of both x0, what is orthogonal to the conditional
    one."""
    x0 = row.alpha * x - row.sigma * conditional
    difference = row.sigma * (unconditional - conditional)  # of both x0
    across = difference - _dot(difference, x0) / _dot(x0, x0) * x0
    return conditional - (row.guidance - 1) / row.sigma * across


def guide_scaled(row: Tableau, unconditional: Latents, conditional: Latents, x: Latents) -> Latents:
    """CFG-Zero* (arXiv 2503.18886) without its zero steps, which are of flow matching: guidance
    from the unconditional prediction at the scale that brings it nearest to the conditional one."""
    scale = _dot(conditional, unconditional) / _dot(unconditional, unconditional)
    return guide(row, scale * unconditional, conditional)


def _dot(a: Latents, b: Latents) -> Float[Array, "b 1 1 1 1"]:
    return jnp.sum(a * b, axis=(1, 2, 3, 4), keepdims=True)


METHODS: dict[str, Callable[[Tableau, Latents, Latents, Latents], Latents]] = {
    "cfg": lambda row, unconditional, conditional, x: guide(row, unconditional, conditional),
    "apg": guide_across,
    "cfg_zero": guide_scaled,
}


class Guidance(NamedTuple):
    """What the loop is compiled for: how predictions are combined, and which are computed."""

    method: str = "cfg"  # of METHODS
    skips: bool = False  # only the conditional one in steps where guidance is 1
    thirds: bool = False  # a third one in steps where image guidance is not 1


def dynamic_guidance(scale: float, timesteps: np.ndarray) -> np.ndarray:
    """The reference's dynamic guidance. It mixes the step count with training timesteps, so that
    the cosine's argument reaches millions: meaningless in float32, hence computed here."""
    steps = len(timesteps)
    phases = (math.pi * ((steps - int(t)) / steps) ** 5.0 for t in timesteps)
    return np.array([1 + scale * (1 - math.cos(phase)) / 2 for phase in phases])


def tableau(
    config: SchedulerConfig,
    scheduler: str,
    steps: int,
    guidance_scale: float | tuple[float, ...],
    use_dynamic_cfg: bool,
    *,
    motion: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_skip: float = 0.0,
    image_guidance: float = 1.0,
    first: int = 0,
) -> Tableau:
    """The schedule of a request: a row for each of `steps` steps from step `first` on, float32
    (timesteps int32). Raises ValueError for an unknown scheduler, for step counts that break the
    reference, and for noise levels that no float64 coefficients fit."""
    if scheduler not in SAMPLERS:
        raise ValueError(f"scheduler must be one of {', '.join(SAMPLERS)}: got {scheduler!r}")
    levels = noise_levels(config, steps, first)
    *columns, _ = SAMPLERS[scheduler](levels)
    columns = [np.sqrt(levels.here), np.sqrt(1 - levels.here), *columns]
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"scheduler {scheduler} must have finite coefficients: {config} has not")
    if use_dynamic_cfg and not isinstance(guidance_scale, tuple):
        guidance = dynamic_guidance(guidance_scale, levels.timesteps)
    else:
        guidance = np.broadcast_to(np.asarray(guidance_scale, float), (steps,))[first:]
    index = np.arange(first, steps)
    begin, end = (share * steps for share in guidance_interval)
    guided = (begin <= index) & (index < end) & (np.abs(guidance - 1) > guidance_skip)
    guidance = np.where(guided, guidance, 1.0)
    low_pass = (index <= BLURRED * (steps - 1)) * float(motion > 0)
    image = np.where(low_pass, 0.0, image_guidance)
    rows = Tableau(levels.timesteps, guidance, image, low_pass, *columns)
    if faults := find_broken_identities(rows, levels.landing):
        got = f"{' and '.join(faults)} for {config}"
        raise ValueError(f"scheduler {scheduler} must have exact coefficients: got {got}")
    return Tableau(rows.timestep.astype(np.int32), *(c.astype(np.float32) for c in rows[1:]))


def find_broken_identities(rows: Tableau, landing: np.ndarray) -> list[str]:
    """Which of two identities a tableau breaks in float64. They hold for every sampler whose
    predictions are exact: where x is alpha X + sigma E, a step lands on alpha_next X + sigma_next
    E' with noise E' of unit variance. For example the last DDIM row (alpha_next 1): x 0, x0 1, and
    0 * alpha + 1 + 0 == 1."""
    signal, share = rows.x * rows.alpha + rows.x0, rows.x * rows.sigma  # of X and of E
    for n in range(rows.past.shape[1]):  # what was kept n + 1 steps before is made of X and E too
        weight = rows.past[n + 1 :, n]
        alpha, sigma, keep_x, keep_x0 = (
            column[: len(weight)] for column in (rows.alpha, rows.sigma, rows.keep_x, rows.keep_x0)
        )
        signal[n + 1 :] += weight * (keep_x * alpha + keep_x0)
        share[n + 1 :] += weight * keep_x * sigma
    variance = share**2 + rows.noise**2
    errors = {"signal": signal - np.sqrt(landing), "variance": variance - (1 - landing)}
    most = {name: np.max(np.abs(error)) for name, error in errors.items()}
    return [f"{name} off by {error:.1e}" for name, error in most.items() if error > EXACT]


def loop_shifts(frames: int, steps: int) -> Int[np.ndarray, " {steps}"]:
    """By how many of `frames` latent frames each step of a loop is shifted: multiples of a number
    near their half that has no divisor in common with them, so that every frame comes to every
    place."""
    stride = next(n for n in range(frames // 2, 0, -1) if math.gcd(n, frames) == 1)
    return (stride * np.arange(steps) % frames).astype(np.int32)


def draws(
    config: SchedulerConfig, scheduler: str, steps: int, first: int = 0
) -> Int[np.ndarray, " i"]:
    """How often the reference draws noise in each step of a schedule that `tableau` accepts."""
    return SAMPLERS[scheduler](noise_levels(config, steps, first)).draws.astype(int)
