"""Schedules against diffusers' two CogVideoX schedulers, for many step counts."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
)
from tolerances import TOLERANCE, assert_close

from cogi2v_jax.config import SchedulerConfig
from cogi2v_jax.sampling import samplers
from cogi2v_jax.sampling.samplers import SAMPLERS, Coefficients, Levels
from cogi2v_jax.sampling.schedule import Tableau, draws, step, tableau

REFERENCES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
INEXACT = {"rescale_betas_zero_snr": False, "set_alpha_to_one": False}
SETTINGS = {
    "5b": twins.SCHEDULER,
    "2b": {**twins.SCHEDULER, "snr_shift_scale": 3.0},
    "neither end exact": {**twins.SCHEDULER, **INEXACT},
}
SHAPE = (1, 2, 3, 4, 5)


def config(name: str = "5b") -> SchedulerConfig:
    return SchedulerConfig.from_json(SETTINGS[name], "scheduler")


def theirs(scheduler: str, settings: str, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(initial x, the noise that each step uses (the second of two draws), x after each step) of
    the reference."""
    reference = REFERENCES[scheduler](**SETTINGS[settings])
    reference.set_timesteps(steps)
    start = x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    x0, before, noise, path = None, None, [], []
    # Two equal streams: one for the reference, one to know what it draws.
    drawing, knowing = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for t in reference.timesteps:
        v = torch.sin(x + t / 100)
        if scheduler == "ddim":
            x = reference.step(v, t, x, return_dict=False)[0]
            noise.append(torch.full(SHAPE, 1e6))  # must not be used
        else:
            draws = 1 if x0 is None or t < 1000 // steps else 2
            noise.append([torch.randn(SHAPE, generator=knowing) for _ in range(draws)][-1])
            x, x0 = reference.step(v, x0, t, before, x, generator=drawing)
        before = t
        path.append(x)
    return start.numpy(), torch.stack(noise).numpy(), torch.stack(path).numpy()


def path_of(
    rows: Tableau, start: Any, velocity: Callable[[Tableau, Any], Any], noise: Any = None
) -> np.ndarray:
    """x after each step of ours."""

    def one(carry: tuple, given: tuple) -> tuple:
        (x, past), (row, drawn) = carry, given
        x, past = step(row, x, velocity(row, x), past, drawn)
        return (x, past), x

    past = (jnp.zeros(SHAPE),) * rows.past.shape[1]
    given = np.zeros((len(rows.x), *SHAPE), np.float32) if noise is None else noise
    return np.asarray(jax.lax.scan(one, (jnp.asarray(start), past), (rows, given))[1])


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scheduler", REFERENCES)
def test_every_step_of_a_trajectory_gives_what_the_references_step_gives(
    scheduler: str, settings: str, steps: int
) -> None:
    start, noise, path = theirs(scheduler, settings, steps)

    rows = tableau(config(settings), scheduler, steps, 6.0, False)
    ours = path_of(rows, start, lambda row, x: jnp.sin(x + row.timestep / 100), noise)
    assert ours.dtype == np.float32
    assert_close(ours, path, TOLERANCE["trajectory"])


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50])
@pytest.mark.parametrize("scheduler", REFERENCES)
def test_draws_counts_how_often_the_reference_draws_noise(
    scheduler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(torch, "randn", lambda shape, **_: drawn.append(1) or torch.zeros(shape))
    reference = REFERENCES[scheduler](**SETTINGS["5b"])
    reference.set_timesteps(steps)
    x, x0, before, counts = torch.zeros(SHAPE), None, None, []
    for t in reference.timesteps:
        drawn.clear()
        if scheduler == "ddim":
            reference.step(x, t, x)
        else:
            _, x0 = reference.step(x, x0, t, before, x)
        before = t
        counts.append(len(drawn))
    assert draws(config(), scheduler, steps).tolist() == counts


GENERAL = {  # diffusers' own schedulers of these samplers, for levels without an infinite log-SNR
    "dpm2m": (DPMSolverMultistepScheduler, 2),
    "dpm3m": (DPMSolverMultistepScheduler, 3),
    "deis": (DEISMultistepScheduler, 2),
}


# These divide 1000, so that each step lands on the next; below 15 theirs end with lower orders.
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("scheduler", GENERAL)
def test_multistep_samplers_step_as_those_of_diffusers(scheduler: str, steps: int) -> None:
    levels = samplers.alphas_cumprod(config("neither end exact"))
    kind, order = GENERAL[scheduler]
    betas = 1 - levels / np.concatenate([[1.0], levels[:-1]])
    settings = {"trained_betas": betas, "solver_order": order, "prediction_type": "v_prediction"}
    settings |= {"timestep_spacing": "trailing"}
    if kind is DPMSolverMultistepScheduler:
        settings |= {"final_sigmas_type": "sigma_min"}
    reference: Any = kind(**settings)
    reference.set_timesteps(steps)
    rows = tableau(config("neither end exact"), scheduler, steps, 6.0, False)
    np.testing.assert_array_equal(reference.timesteps, rows.timestep)
    start = x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ours = path_of(rows, start.numpy(), lambda row, x: jnp.sin(x + row.timestep / 100))
    for index, t in enumerate(reference.timesteps[:-1]):  # the last one they take otherwise
        x = reference.step(torch.sin(x + t / 100), t, x, return_dict=False)[0]
        # Their coefficients are float32; the largest error is 1.0e-5.
        assert_close(ours[index], x.numpy(), 2 * TOLERANCE["trajectory"])


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("scheduler", GENERAL)
def test_multistep_samplers_come_nearer_to_the_exact_trajectory_than_ddim(
    scheduler: str, steps: int
) -> None:
    """For data of a normal distribution with the deviation 0.5, whose velocity is known, noise x
    leads to x / 2. Order 1 of the steps at both ends limits what the others gain."""

    def velocity(row: Tableau, x: Any) -> Any:
        return row.alpha * row.sigma * (1 - 0.25) / (row.alpha**2 * 0.25 + row.sigma**2) * x

    def error(scheduler: str) -> float:
        rows = tableau(config(), scheduler, steps, 6.0, False)
        return float(abs(path_of(rows, np.ones(SHAPE, np.float32), velocity)[-1] - 0.5).max())

    assert error(scheduler) < 0.85 * error("ddim")


LEVELS = {  # alphas_cumprod at a timestep, of (5b, 2b)
    0: (0.99915, 0.9974543276430069),
    1: (0.9982334461401823, 0.9948006264269799),
    19: (0.9810104569288466, 0.9465729792377547),
    99: (0.8880858947943182, 0.7308668667588629),
    499: (0.24235916655614523, 0.09596956169073541),
    899: (0.0030330723706475447, 0.0009687879820230554),
    979: (8.578784340054837e-05, 2.7194360400217652e-05),
    998: (1.967888056621291e-07, 6.230788467394798e-08),
    999: (0.0, 0.0),
}


def test_noise_levels_of_training_have_the_known_values() -> None:
    ours = np.stack(
        [samplers.alphas_cumprod(config(name))[list(LEVELS)] for name in ("5b", "2b")], axis=1
    )
    np.testing.assert_allclose(ours, list(LEVELS.values()), rtol=1e-12)


@pytest.mark.parametrize(
    ("index", "x", "m2", "m3", "noise"),
    [
        (1, 0.4780603963088363, -0.01494099761266826, 1.0, 0.878124541419584),
        (2, 0.6377554637929064, -0.018001178951425757, 1.3046098595804587, 0.7697396982151647),
        (48, 0.4728116943631907, -0.5271370823711186, 1.8062950225557235, 0.10053114580849667),
    ],
)
def test_dpm_coefficients_have_the_known_values(
    index: int, x: float, m2: float, m3: float, noise: float
) -> None:
    rows = tableau(config(), "dpm", 50, 6.0, False)
    ours = [rows.x[index], rows.x0[index], rows.past[index, 0], rows.noise[index]]
    np.testing.assert_allclose(ours, [x, -m2 * m3, m2 * (m3 - 1), noise], rtol=2e-7)


DYNAMIC = """
2.291487 2.543503 6.974352 6.420358 2.788098 4.271942 1.037598 4.1704 1.617975 6.983127
1.004789 2.871981 6.976805 1.633099 4.329747 2.436601 6.377304 6.00684 3.447874 3.198098
1.654759 6.610011 1.194746 4.29534 6.985373 1.521266 1.761637 1.057938 4.127507 1.482273
2.002566 5.947659 4.143219 6.53055 6.139848 6.999941 6.168399 1.11992 2.097506 6.685006
6.999215 2.343218 6.212752 1.25053 6.999645 6.864372 1.063552 1.000001 1.000004 1.123398
"""


def test_dynamic_guidance_has_the_known_values() -> None:
    ours = tableau(config(), "dpm", 50, 6.0, True).guidance
    np.testing.assert_allclose(ours, [float(value) for value in DYNAMIC.split()], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "scale"), [(1, 6.0), (7, 3.5), (30, 0.5), (1000, 6.0)])
def test_dynamic_guidance_is_the_formula_in_float64_and_constant_guidance_the_scale(
    steps: int, scale: float
) -> None:
    rows = tableau(config(), "ddim", steps, scale, True)
    phases = [math.pi * ((steps - t) / steps) ** 5.0 for t in rows.timestep.tolist()]
    expected = [1 + scale * ((1 - math.cos(phase)) / 2) for phase in phases]
    np.testing.assert_array_equal(rows.guidance, np.float32(expected))
    constant = tableau(config(), "ddim", steps, scale, False).guidance
    np.testing.assert_array_equal(constant, np.full(steps, scale, np.float32))


def is_accepted(steps: int) -> bool:
    try:
        return len(samplers.trailing_timesteps(config(), steps)) == steps
    except ValueError:
        return False


def named_in(error: Exception) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(error).split("nearest is")[1])]


def test_all_step_counts_but_62_have_the_references_timesteps_and_these_are_refused() -> None:
    reference, refused = CogVideoXDDIMScheduler(**twins.SCHEDULER), []
    for steps in range(1, 1001):
        reference.set_timesteps(steps)
        if len(reference.timesteps) == steps:
            np.testing.assert_array_equal(
                samplers.trailing_timesteps(config(), steps), reference.timesteps
            )
            continue
        refused.append(steps)
        line = f"num_inference_steps must be .*: got {steps}; nearest is"
        with pytest.raises(ValueError, match=line) as caught:
            samplers.trailing_timesteps(config(), steps)
        below, above = named_in(caught.value)
        assert below < steps < above
        assert [count for count in range(below, above + 1) if is_accepted(count)] == [below, above]
    assert len(refused) == 62
    assert refused[:5] == [61, 103, 121, 122, 201]


@pytest.mark.parametrize(("steps", "nearest"), [(-3, 1), (0, 1), (1001, 1000), (5000, 1000)])
def test_step_counts_out_of_range_are_refused_with_the_range_and_its_nearest_end(
    steps: int, nearest: int
) -> None:
    line = f"num_inference_steps must be from 1 to 1000: got {steps}; nearest is {nearest}$"
    with pytest.raises(ValueError, match=line):
        samplers.trailing_timesteps(config(), steps)


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_every_tableau_is_finite_and_32_bits_wide(scheduler: str) -> None:
    for steps in filter(is_accepted, range(1, 1001)):
        rows = tableau(config(), scheduler, steps, 6.0, False)
        kept = (steps, 2 if scheduler == "dpm3m" else 1)
        assert [column.shape for column in rows] == 8 * [(steps,)] + [kept] + 3 * [(steps,)]
        assert [column.dtype for column in rows] == [np.int32] + 11 * [np.float32]
        assert all(np.isfinite(column).all() for column in rows), steps


@pytest.mark.parametrize("column", ["x", "x0", "past"])
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_column_that_is_off_by_a_billionth_breaks_an_identity(
    scheduler: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SAMPLERS[scheduler]

    def wrong(*given: Any) -> Coefficients:
        right = sampler(*given)
        return right._replace(**{column: getattr(right, column) + 1e-9})

    monkeypatch.setitem(SAMPLERS, scheduler, wrong)
    # What DEIS keeps is noise.
    broken = "variance" if (scheduler, column) == ("deis", "past") else "signal"
    with pytest.raises(ValueError, match=f"must have exact coefficients: got {broken} off by"):
        tableau(config(), scheduler, 50, 6.0, True)


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_noise_that_is_off_by_a_billionth_breaks_the_identity_of_the_variance(
    scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of two kinds: what x keeps (the signal is restored in x0), and what is added."""
    sampler = SAMPLERS[scheduler]

    def keeps(levels: Levels) -> Coefficients:
        right, alpha = sampler(levels), np.sqrt(levels.here)
        return right._replace(x=right.x + 1e-9, x0=right.x0 - 1e-9 * alpha)

    def adds(*given: Any) -> Coefficients:
        right = sampler(*given)
        return right._replace(noise=np.sqrt(right.noise**2 + 1e-9))

    for wrong in (keeps, adds):
        monkeypatch.setitem(SAMPLERS, scheduler, wrong)
        with pytest.raises(ValueError, match="must have exact coefficients: got variance off by"):
            tableau(config(), scheduler, 50, 6.0, True)


def test_noise_levels_that_float64_cannot_resolve_are_refused_in_one_line() -> None:
    levels = SchedulerConfig(10, 0.00085, 1e-12, snr_shift_scale=0.001)
    with pytest.raises(ValueError, match=r"^scheduler dpm must have exact coefficients: .*\)$"):
        tableau(levels, "dpm", 7, 6.0, False)


def test_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="scheduler must be one of ddim, dpm, dpm2m, dpm3m, deis: got 'euler'"
    ):
        tableau(config(), "euler", 50, 6.0, False)
