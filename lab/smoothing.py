"""A smooth curve through losses at several prune ratios, so that the luck of single runs does not decide what is best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grasp_lora.errors import GraspError

DEGREES = (2, 3, 4, 5)


@dataclass(frozen=True)
class SmoothFit:
    """A smooth curve through the mean losses at several ratios.

    Args:
        ratio: where it is lowest, on the range that was asked for.
        loss: its lowest value there.
        degree: of the polynomial.
        curve: the polynomial; call it with a ratio.
    """

    ratio: float
    loss: float
    degree: int
    curve: np.polynomial.Legendre

    def __call__(self, ratio: float) -> float:
        return float(self.curve(ratio))


def smooth(
    ratios: Sequence[float], losses: Sequence[float] | NDArray[np.float64], low: float, high: float
) -> SmoothFit:
    """Fit a smooth curve to mean losses over the ratio.

    A polynomial of degree 2 to 5, the degree with the least squared leave-one-out error at the inner points: the end points are
    left out of that choice, since leaving one of them out makes it an extrapolation. Our choice: final losses fall gently with
    the ratio and then rise steeply, which a fixed low degree cannot follow, and the choice keeps a high one from following noise.

    Args:
        ratios: increasing, at least four.
        losses: one per ratio.
        low, high: where the lowest value is sought, as far as there were ratios.

    Raises:
        GraspError: there are too few ratios.
    """
    low, high = max(low, ratios[0]), min(high, ratios[-1])
    if len(ratios) < 4 or low >= high:
        raise GraspError(
            f"a smooth fit between {low} and {high} to ratios {list(ratios)}; at least four are needed, with some inside"
        )
    x, y = np.asarray(ratios, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    scaled = (2 * x - x[0] - x[-1]) / (x[-1] - x[0])
    errors = {}
    for degree in DEGREES:
        if degree <= len(x) - 2:
            basis = np.linalg.qr(np.polynomial.legendre.legvander(scaled, degree)).Q
            left_out = (y - basis @ (basis.T @ y)) / (1 - (basis**2).sum(1))
            errors[degree] = float((left_out[1:-1] ** 2).sum())
    degree = min(errors, key=errors.__getitem__)
    curve = np.polynomial.Legendre.fit(x, y, degree)
    grid = np.linspace(low, high, 1401)
    values = curve(grid)
    best = int(np.argmin(values))
    return SmoothFit(float(grid[best]), float(values[best]), degree, curve)
