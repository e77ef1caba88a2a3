"""Sampling schedules as tables. A sampler fills a `Tableau` on the host in float64; on the device
one `step` serves them all."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import SchedulerConfig

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


def levels(config: SchedulerConfig, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha_bar of every step, and of the level that the step lands on: one stride further, which
    is the next row's only where the step count divides the training timesteps. Below timestep zero
    there is no noise."""
    alphas = alphas_cumprod(config)
    landing = timesteps - config.num_train_timesteps // len(timesteps)
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    return alphas[timesteps], np.where(landing >= 0, alphas[np.maximum(landing, 0)], final)


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


def ddim(config: SchedulerConfig, timesteps: np.ndarray) -> Coefficients:
    """DDIM (arXiv 2010.02502) without noise, for v-prediction."""
    here, landing = levels(config, timesteps)
    x = np.sqrt((1 - landing) / (1 - here))
    return _coefficients(x, np.sqrt(landing) - x * np.sqrt(here))


def _half_log_snr(levels: np.ndarray) -> np.ndarray:
    """log(alpha / sigma): infinite without signal and without noise."""
    with np.errstate(divide="ignore"):
        return np.log(np.sqrt(levels / (1 - levels)))


def _one_step(config: SchedulerConfig, timesteps: np.ndarray) -> np.ndarray:
    """Which steps use nothing that was kept: the first, and one to no noise."""
    first = np.arange(len(timesteps)) == 0
    return first | (timesteps < config.num_train_timesteps // len(timesteps))


def dpm(config: SchedulerConfig, timesteps: np.ndarray) -> Coefficients:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2 with noise). The log-SNR is infinite at
    both ends, and the infinities have a meaning (the first step forgets x, the last adds no noise),
    so they are carried through here; no coefficient is infinite."""
    (here, landing), one_step = levels(config, timesteps), _one_step(config, timesteps)
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


def dpm2m(config: SchedulerConfig, timesteps: np.ndarray) -> Coefficients:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): as `dpm`, without noise."""
    here, landing = levels(config, timesteps)
    half_log_snr = _half_log_snr(here)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = _half_log_snr(landing) - half_log_snr
        second = 0.5 * h / np.diff(half_log_snr, prepend=np.nan)
    second = np.where(_one_step(config, timesteps), 0.0, second)
    gain = -np.expm1(-h) * np.sqrt(landing)
    x = np.sqrt((1 - landing) / (1 - here))
    return _coefficients(x, gain * (1 + second), -gain * second)


def dpm3m(config: SchedulerConfig, timesteps: np.ndarray) -> Coefficients:
    """DPM-Solver++(3M) (arXiv 2211.01095, appendix B). Its weights are those of the divided
    differences of x0 over the half log-SNR; a neighbour at an infinite one has the weight zero.
    With one neighbour it is `dpm2m`."""
    here, landing = levels(config, timesteps)
    half_log_snr = _half_log_snr(here)
    one_step = _one_step(config, timesteps)
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


def deis(config: SchedulerConfig, timesteps: np.ndarray) -> Coefficients:
    """DEIS (arXiv 2204.13902) of order 2, polynomials in log(rho) with rho = sigma / alpha. What it
    extrapolates, and so what a step keeps, is the predicted noise (x - alpha x0) / sigma."""
    here, landing = levels(config, timesteps)
    alpha, sigma, one_step = np.sqrt(here), np.sqrt(1 - here), _one_step(config, timesteps)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho, end = sigma / alpha, np.sqrt((1 - landing) / landing)
        before = np.concatenate([[np.inf], rho[:-1]])
        # The integral over rho of log(rho / rho_here) / log(rho_before / rho_here), to the landing.
        past = (end * (np.log(end / rho) - 1) + rho) / np.log(before / rho)
    past = np.where(one_step, 0.0, past) * np.sqrt(landing)
    x = np.sqrt((1 - landing) / (1 - here))
    x0 = np.sqrt(landing) - x * alpha + past * alpha / sigma
    return _coefficients(x - past / sigma, x0, past, keep_x=1 / sigma, keep_x0=-alpha / sigma)


SAMPLERS: dict[str, Callable[[SchedulerConfig, np.ndarray], Coefficients]] = {
    "ddim": ddim,
    "dpm": dpm,
    "dpm2m": dpm2m,
    "dpm3m": dpm3m,
    "deis": deis,
}


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
) -> Tableau:
    """The schedule of a request: `steps` rows, float32 (timesteps int32). Raises ValueError for an
    unknown scheduler, for step counts that break the reference, and for noise levels that no
    float64 coefficients fit."""
    if scheduler not in SAMPLERS:
        raise ValueError(f"scheduler must be one of {', '.join(SAMPLERS)}: got {scheduler!r}")
    timesteps = trailing_timesteps(config, steps)
    here, landing = levels(config, timesteps)
    *columns, _ = SAMPLERS[scheduler](config, timesteps)
    columns = [np.sqrt(here), np.sqrt(1 - here), *columns]
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"scheduler {scheduler} must have finite coefficients: {config} has not")
    if use_dynamic_cfg and not isinstance(guidance_scale, tuple):
        guidance = dynamic_guidance(guidance_scale, timesteps)
    else:
        guidance = np.broadcast_to(np.asarray(guidance_scale, float), (steps,))
    index = np.arange(steps)
    begin, end = (share * steps for share in guidance_interval)
    guided = (begin <= index) & (index < end) & (np.abs(guidance - 1) > guidance_skip)
    guidance = np.where(guided, guidance, 1.0)
    low_pass = (index <= BLURRED * (steps - 1)) * float(motion > 0)
    image = np.where(low_pass, 0.0, image_guidance)
    rows = Tableau(timesteps, guidance, image, low_pass, *columns)
    if faults := find_broken_identities(rows, landing):
        got = f"{' and '.join(faults)} for {config}"
        raise ValueError(f"scheduler {scheduler} must have exact coefficients: got {got}")
    return Tableau(timesteps.astype(np.int32), *(c.astype(np.float32) for c in rows[1:]))


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


def draws(config: SchedulerConfig, scheduler: str, steps: int) -> Int[np.ndarray, " i"]:
    """How often the reference draws noise in each step of a schedule that `tableau` accepts."""
    return SAMPLERS[scheduler](config, trailing_timesteps(config, steps)).draws.astype(int)
