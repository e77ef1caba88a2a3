"""Sampling schedules as tables. A sampler fills a `Tableau` on the host in float64; one `step`
walks any of them on the device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from ..config import SchedulerConfig

Column = Float[Any, "*i"]  # numpy on the host, jax on the device, where one row of it is a scalar


class Tableau(NamedTuple):
    """One row a step. A step is x0 = alpha x - sigma v, then x = A x + B x0 + C x0_prev + D
    noise."""

    timestep: Int[Any, "*i"]
    guidance: Column
    alpha: Column
    sigma: Column
    x: Column  # A
    x0: Column  # B
    x0_prev: Column  # C; zero for one-step schemes
    noise: Column  # D; zero for deterministic schemes


def step(
    row: Tableau,
    x: Float[Array, "b t h w c"],
    v: Float[Array, "b t h w c"],
    x0_prev: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """One step of any schedule, all in float32: (next x, this step's x0)."""
    x0 = row.alpha * x - row.sigma * v
    return row.x * x + row.x0 * x0 + row.x0_prev * x0_prev + row.noise * noise, x0


def guide(
    row: Tableau, unconditional: Float[Array, "b t h w c"], conditional: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c"]:
    """Classifier-free guidance (arXiv 2207.12598) of a pair of predictions, in float32."""
    return unconditional + row.guidance * (conditional - unconditional)


def alphas_cumprod(config: SchedulerConfig) -> Float[np.ndarray, " levels"]:
    """Noise levels of training: scaled-linear betas, the SNR shift, then the zero-SNR rescale of
    arXiv 2305.08891, in this order."""
    betas = (
        np.linspace(
            config.beta_start**0.5,
            config.beta_end**0.5,
            config.num_train_timesteps,
            dtype=np.float64,
        )
        ** 2
    )
    alphas = np.cumprod(1 - betas)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def trailing_timesteps(config: SchedulerConfig, steps: int) -> Int[np.ndarray, " i"]:
    """Training timesteps from the noisiest down. Raises for the step counts at which the
    reference's float range has one entry too many: it would end on timestep -1, which is pure
    noise, and destroy the video."""
    total = config.num_train_timesteps

    def walk(count: int) -> np.ndarray:
        return np.round(np.arange(total, 0, -total / count)).astype(np.int64) - 1

    def valid(count: int) -> bool:
        return 1 <= count <= total and len(walk(count)) == count

    if not valid(steps):
        below = next((count for count in range(min(steps - 1, total), 0, -1) if valid(count)), None)
        above = next((count for count in range(max(steps + 1, 1), total + 1) if valid(count)), None)
        nearest = " or ".join(str(count) for count in (below, above) if count is not None)
        why = (
            ""
            if not 1 <= steps <= total
            else " (this count rounds to one timestep too many, and the last would be pure noise)"
        )
        raise ValueError(
            f"num_inference_steps must be from 1 to {total}{why}: got {steps}; nearest is {nearest}"
        )
    return walk(steps)


def _levels(config: SchedulerConfig, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise level of every step and of the one it lands on: a whole stride further on, which is the
    next row's only where the step count divides the training timesteps. Landing below zero is
    landing on no noise at all."""
    alphas = alphas_cumprod(config)
    landing = timesteps - config.num_train_timesteps // len(timesteps)
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    return alphas[timesteps], np.where(landing >= 0, alphas[np.maximum(landing, 0)], final)


def _ddim(config: SchedulerConfig, timesteps: np.ndarray) -> dict[str, np.ndarray]:
    """DDIM (arXiv 2010.02502) without noise, for v-prediction."""
    here, next_ = _levels(config, timesteps)
    x = np.sqrt((1 - next_) / (1 - here))
    none = np.zeros_like(x)
    return {
        "x": x,
        "x0": np.sqrt(next_) - x * np.sqrt(here),
        "x0_prev": none,
        "noise": none,
        "draws": none,
    }


def _dpm(config: SchedulerConfig, timesteps: np.ndarray) -> dict[str, np.ndarray]:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2 with noise): the log-SNR is infinite at
    both ends, and the infinities carry meaning (no memory of x at the start, no noise at the end),
    so they are followed here and never reach the device."""
    here, next_ = _levels(config, timesteps)
    with np.errstate(divide="ignore", invalid="ignore"):
        half_log_snr = np.log(np.sqrt(here / (1 - here)))
        h = np.log(np.sqrt(next_ / (1 - next_))) - half_log_snr
        r = np.diff(half_log_snr, prepend=np.nan) / h
        # Weight of the multistep correction; 1/inf = 0 after an infinite first step.
        second = 0.5 / r
        x = np.sqrt((1 - next_) / (1 - here)) * np.exp(-h)
    landing = timesteps - config.num_train_timesteps // len(timesteps)
    one_step = (np.arange(len(timesteps)) == 0) | (landing < 0)
    second = np.where(one_step, 0.0, second)
    gain = -np.expm1(-2 * h) * np.sqrt(next_)
    noise = np.sqrt(1 - next_) * np.sqrt(1 - np.exp(-2 * h))
    # The reference makes the one-step result first, of noise of its own, and may throw it away.
    draws = np.where(one_step, 1, 2)
    return {
        "x": x,
        "x0": gain * (1 + second),
        "x0_prev": -gain * second,
        "noise": noise,
        "draws": draws,
    }


# A sampler's own columns, and `draws`: how often the reference draws noise in a step, the last of
# which counts.
SCHEDULES: dict[str, Callable[[SchedulerConfig, np.ndarray], dict[str, np.ndarray]]] = {
    "ddim": _ddim,
    "dpm": _dpm,
}


def _dynamic(scale: float, steps: int, timesteps: np.ndarray) -> np.ndarray:
    """The reference's dynamic guidance. It mixes the step count with training timesteps, so the
    cosine's argument reaches millions: deliberate there, and meaningless in float32."""
    return np.array(
        [
            1 + scale * (1 - math.cos(math.pi * ((steps - int(t)) / steps) ** 5.0)) / 2
            for t in timesteps
        ]
    )


def tableau(
    config: SchedulerConfig,
    scheduler: str,
    steps: int,
    guidance_scale: float,
    use_dynamic_cfg: bool,
) -> Tableau:
    """The whole schedule of a request: `steps` rows, float32 (timesteps int32). Raises ValueError
    for counts that break the reference."""
    if scheduler not in SCHEDULES:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULES)}: got {scheduler!r}")
    timesteps = trailing_timesteps(config, steps)
    here, _ = _levels(config, timesteps)
    own = SCHEDULES[scheduler](config, timesteps)
    columns = {
        "guidance": _dynamic(guidance_scale, steps, timesteps)
        if use_dynamic_cfg
        else np.full(steps, guidance_scale),
        "alpha": np.sqrt(here),
        "sigma": np.sqrt(1 - here),
        **{name: column for name, column in own.items() if name in Tableau._fields},
    }
    if not all(np.isfinite(column).all() for column in columns.values()):
        raise ValueError(
            f"scheduler {scheduler} must have finite coefficients: got others from {config}"
        )
    return Tableau(
        timestep=timesteps.astype(np.int32),
        **{name: column.astype(np.float32) for name, column in columns.items()},
    )


def draws(config: SchedulerConfig, scheduler: str, steps: int) -> Int[np.ndarray, " i"]:
    """How often the reference draws noise in every step of a schedule that `tableau` takes."""
    return SCHEDULES[scheduler](config, trailing_timesteps(config, steps))["draws"].astype(int)
