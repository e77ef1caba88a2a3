"""Samplers: from the noise levels of a schedule to columns of a tableau, on the host in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..config import SchedulerConfig


def alphas_cumprod(config: SchedulerConfig) -> Float[np.ndarray, " levels"]:
    """alpha_bar of every training timestep: scaled-linear betas, the SNR shift, then the zero-SNR
    rescaling of arXiv 2305.08891, in this order."""
    first, last = config.beta_start**0.5, config.beta_end**0.5
    betas = np.linspace(first, last, config.num_train_timesteps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def trailing_timesteps(config: SchedulerConfig, steps: int) -> Int[np.ndarray, " i"]:
    """Training timesteps from the noisiest down. Raises ValueError for the step counts at which the
    reference's float range has one entry too many: its last timestep would be -1, which is pure
    noise and destroys the video."""
    total = config.num_train_timesteps

    def trailing(count: int) -> np.ndarray:
        return np.round(np.arange(total, 0, -total / count)).astype(np.int64) - 1

    def valid(count: int) -> bool:
        return 1 <= count <= total and len(trailing(count)) == count

    if not valid(steps):
        below = next(filter(valid, range(min(steps - 1, total), 0, -1)), None)
        above = next(filter(valid, range(max(steps + 1, 1), total + 1)), None)
        nearest = " or ".join(str(count) for count in (below, above) if count is not None)
        why = " (this count rounds to one timestep too many, and the last would be pure noise)"
        rule = f"from 1 to {total}{why if 1 <= steps <= total else ''}"
        raise ValueError(f"num_inference_steps must be {rule}: got {steps}; nearest is {nearest}")
    return trailing(steps)


class Levels(NamedTuple):
    """The steps of a schedule that are run, and their noise levels in float64."""

    timesteps: Int[np.ndarray, " i"]  # of training
    here: Float[np.ndarray, " i"]  # alpha_bar where a step begins
    landing: Float[np.ndarray, " i"]  # and where it ends
    one_step: Bool[np.ndarray, " i"]  # it uses nothing that was kept: the first, one to no noise


def noise_levels(config: SchedulerConfig, steps: int, first: int = 0) -> Levels:
    """The levels of a schedule of so many steps, from step `first` on. A step lands one stride
    further, which is where the next one begins only if the step count divides the training
    timesteps. Below timestep zero there is no noise. Raises ValueError as `trailing_timesteps`."""
    timesteps, alphas = trailing_timesteps(config, steps)[first:], alphas_cumprod(config)
    below = timesteps - config.num_train_timesteps // steps
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    landing = np.where(below >= 0, alphas[np.maximum(below, 0)], final)
    one_step = (np.arange(len(timesteps)) == 0) | (below < 0)
    return Levels(timesteps, alphas[timesteps], landing, one_step)


class Coefficients(NamedTuple):
    """What a sampler fills: its columns of the tableau, and how often the reference draws noise in
    each step, of which the last draw counts."""

    x: np.ndarray
    x0: np.ndarray
    past: np.ndarray  # [i n]
    noise: np.ndarray
    keep_x: np.ndarray
    keep_x0: np.ndarray
    draws: np.ndarray


def _coefficients(
    x: np.ndarray,
    x0: np.ndarray,
    *past: np.ndarray,
    noise: Any = 0,
    keep_x: Any = 0,
    keep_x0: Any = 1,
    draws: Any = 0,
) -> Coefficients:
    """Of a sampler that keeps x0, draws nothing, and uses nothing that was kept, where nothing else
    is said."""
    zeros = np.zeros_like(x)
    rest = (zeros + one for one in (noise, keep_x, keep_x0, draws))
    return Coefficients(x, x0, np.stack(past or (zeros,), axis=-1), *rest)


def ddim(levels: Levels) -> Coefficients:
    """DDIM (arXiv 2010.02502) without noise, for v-prediction."""
    _, here, landing, _ = levels
    x = np.sqrt((1 - landing) / (1 - here))
    return _coefficients(x, np.sqrt(landing) - x * np.sqrt(here))


def _half_log_snr(levels: np.ndarray) -> np.ndarray:
    """log(alpha / sigma): infinite without signal and without noise."""
    with np.errstate(divide="ignore"):
        return np.log(np.sqrt(levels / (1 - levels)))


def dpm(levels: Levels) -> Coefficients:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2 with noise). The log-SNR is infinite at
    both ends, and the infinities have a meaning (the first step forgets x, the last adds no noise),
    so they are carried through here; no coefficient is infinite."""
    _, here, landing, one_step = levels
    half_log_snr = _half_log_snr(here)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = _half_log_snr(landing) - half_log_snr
        r = np.diff(half_log_snr, prepend=np.nan) / h
        second = 0.5 / r  # the weight of the multistep correction; 0 after an infinite first step
        x = np.sqrt((1 - landing) / (1 - here)) * np.exp(-h)
    second = np.where(one_step, 0.0, second)
    gain = -np.expm1(-2 * h) * np.sqrt(landing)
    noise = np.sqrt(1 - landing) * np.sqrt(1 - np.exp(-2 * h))
    # The reference draws for the one-step result first, which a multistep correction replaces.
    drawn = np.where(one_step, 1, 2)
    return _coefficients(x, gain * (1 + second), -gain * second, noise=noise, draws=drawn)


def dpm2m(levels: Levels) -> Coefficients:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): as `dpm`, without noise."""
    _, here, landing, one_step = levels
    half_log_snr = _half_log_snr(here)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = _half_log_snr(landing) - half_log_snr
        second = 0.5 * h / np.diff(half_log_snr, prepend=np.nan)
    second = np.where(one_step, 0.0, second)
    gain = -np.expm1(-h) * np.sqrt(landing)
    x = np.sqrt((1 - landing) / (1 - here))
    return _coefficients(x, gain * (1 + second), -gain * second)


def dpm3m(levels: Levels) -> Coefficients:
    """DPM-Solver++(3M) (arXiv 2211.01095, appendix B). Its weights are those of the divided
    differences of x0 over the half log-SNR; a neighbour at an infinite one has the weight zero.
    With one neighbour it is `dpm2m`."""
    _, here, landing, one_step = levels
    half_log_snr = _half_log_snr(here)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = _half_log_snr(landing) - half_log_snr
        h = np.where(one_step, 1.0, h)
        # The distances to the last step, and between the last two.
        near, far = (np.full_like(h, np.inf) for _ in range(2))
        near[1:] = np.diff(half_log_snr)
        far[2:] = near[1:-1]
        r, share = near / h, np.where(np.isinf(far), 0.0, near / (near + far))
        first, second = 1 / r, h / far  # of the two differences; zero where infinitely far
        curved = np.where(np.isinf(far), 0.0, h / (near + far))
    once = -np.expm1(-h) * np.sqrt(landing)
    slope = np.where(np.isinf(far), 0.5 * once, (np.expm1(-h) / h + 1) * np.sqrt(landing))
    bend = ((np.expm1(-h) + h) / h**2 - 0.5) * np.sqrt(landing)
    newest = slope * (1 + share) - bend * curved  # of the difference to the last step's x0
    older = -slope * share + bend * curved  # of the difference between those of the last two
    newest, older = newest * first, older * second
    newest, older = (np.where(one_step, 0.0, weight) for weight in (newest, older))
    x = np.sqrt((1 - landing) / (1 - here))
    alone = np.sqrt(landing) - x * np.sqrt(here)  # DDIM, which this is in one step
    once = np.where(one_step, alone, once)
    return _coefficients(x, once + newest, older - newest, -older)


def deis(levels: Levels) -> Coefficients:
    """DEIS (arXiv 2204.13902) of order 2, polynomials in log(rho) with rho = sigma / alpha. What it
    extrapolates, and so what a step keeps, is the predicted noise (x - alpha x0) / sigma."""
    _, here, landing, one_step = levels
    alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho, end = sigma / alpha, np.sqrt((1 - landing) / landing)
        before = np.concatenate([[np.inf], rho[:-1]])
        # The integral over rho of log(rho / rho_here) / log(rho_before / rho_here), to the landing.
        past = (end * (np.log(end / rho) - 1) + rho) / np.log(before / rho)
    past = np.where(one_step, 0.0, past) * np.sqrt(landing)
    x = np.sqrt((1 - landing) / (1 - here))
    x0 = np.sqrt(landing) - x * alpha + past * alpha / sigma
    return _coefficients(x - past / sigma, x0, past, keep_x=1 / sigma, keep_x0=-alpha / sigma)


SAMPLERS: dict[str, Callable[[Levels], Coefficients]] = {
    "ddim": ddim,
    "dpm": dpm,
    "dpm2m": dpm2m,
    "dpm3m": dpm3m,
    "deis": deis,
}
