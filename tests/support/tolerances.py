"""How far a result may be from the reference, and why."""

import numpy as np

# Relative errors that are allowed, and why they are not smaller.
TOLERANCE = {
    # Float32 sums in another order. The largest is 7e-6: frequencies of the timesteps' sinusoids
    # differ in their last bit.
    "module": 1e-5,
    "trajectory": 1e-5,  # 50 float32 steps of one schedule
    "latents": 1e-4,  # the whole pipeline: errors of modules, carried through every step
    "bfloat16": 1.1,  # times the reference's own bfloat16 error
}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Asserts `relative_error`; a failure says how large it is, and where."""
    error = relative_error(ours, theirs)
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(difference), difference.shape))
    assert error <= tolerance, (
        f"relative error {error:.3g} > {tolerance:g}; largest {difference[worst]:.3g} at {worst}"
    )
