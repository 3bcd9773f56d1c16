"""Distortion of a quantized random variable: exact, with derivatives, for any distribution.

All of it rests on one identity. Q_Δ(X) climbs by g_jΔ from one level to the next each time |X| passes a
decision threshold b_j = h_jΔ half-way between the two. Summing by parts over these stairs, from the level
oΔ at zero outwards, leaves no integral over cells:

    MSE(Δ)   = Var X + (μ − oΔ)² − 2Δ Σ_j g_j E(X − b_j)⁺
    MSE′(Δ)  = −2o(μ − oΔ) − 2 Σ_j g_j E(X − b_j)⁺ + 2Δ Σ_j g_j |h_j| P(X > b_j)
    MSE″(Δ)  = 2o² + 4 Σ_j g_j |h_j| P(X > b_j) − 2Δ Σ_j g_j h_j² f(b_j)

where a threshold at or below zero counts the other side, E(b_j − X)⁺ and P(X < b_j). A uniform grid has
every g_j = 1, a codebook of `grids` its own. Of a distribution three functions of a threshold are needed
(see `distributions`): `excess` E(X − b)⁺, `tail` P(X > b), `density` f(b). The paper's quantizer (Eq. 1) is
the grid with 2^M + 1 levels.
"""

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from kure_lib.tensors.distributions import UNIT_VARIANCE, Laplace, Normal, Uniform, as_distribution
from kure_lib.tensors.grids import Format

__all__ = ["UNIT_VARIANCE", "Laplace", "Normal", "Uniform", "derivatives", "mse", "optimal_step", "sensitivity"]

VALLEYS, POINTS = 8, 24  # of the distortion against the step that are looked into, and at how many steps each


def mse(dist: Any, step: ArrayLike, bits: int, grid: Format) -> np.ndarray:
    """MSE(X, Δ) = E[(X − Q_Δ(X))²] (paper, Eq. 2).

    `dist` is one of `distributions`, a frozen scipy one, a tensor or its `samples.EmpiricalDistribution`; `step`
    is positive, a number or an array in the units of X; the result has its shape and the units of X².
    Raises ValueError for a step of zero or less, TypeError for another `dist`.

    >>> from kure_lib.tensors.grids import MID_TREAD
    >>> round(12 * float(mse(Uniform(8.5), 1.0, bits=4, grid=MID_TREAD)), 9)  # Δ = 2a/(2⁴ + 1): MSE = Δ²/12
    1.0
    """
    dist, steps = as_distribution(dist), _as_steps(step)
    o, gap, h = _stairs(bits, grid)
    excess = (gap * dist.excess(steps[..., None] * h)).sum(-1)
    return dist.variance + (dist.mean - o * steps) ** 2 - 2 * steps * excess


def derivatives(
    dist: Any, step: ArrayLike, bits: int, grid: Format, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """∂MSE/∂Δ and ∂²MSE/∂Δ² at `step`: two arrays of its shape, in units of X and of 1.

    Where a threshold meets a jump of the density (an end of a uniform tensor) the second one jumps too:
    `side` is the side of Δ, "left" or "right", to take it from. For samples it is the one between kinks.

    >>> from kure_lib.tensors.grids import MID_TREAD
    >>> first, second = derivatives(Uniform(1.0), 2 / 17, bits=4, grid=MID_TREAD)
    >>> abs(round(float(first), 12)), round(float(second), 12)
    (0.0, 8.0)
    """
    dist, steps = as_distribution(dist), _as_steps(step)
    o, gap, h = _stairs(bits, grid)
    b = steps[..., None] * h
    reached = dist.tail(b) @ (gap * np.abs(h))
    first = -2 * o * (dist.mean - o * steps) - 2 * (gap * dist.excess(b)).sum(-1) + 2 * steps * reached
    second = 2 * o**2 + 4 * reached - 2 * steps * (dist.density(b, side) @ (gap * h**2))
    return first, second


def optimal_step(dist: Any, bits: int, grid: Format) -> float:
    """Δ̃: the step of least MSE, a float, to the precision at which MSE′ can be told from zero.

    A root of MSE′ in the deepest valley among 500 steps, from where the outermost level lies a quarter of a standard
    deviation from zero to where levels are 8 apart on average. Floats are nearly scale-free: of scales a power of
    two apart and almost equally good, the one that reaches least far is best, and lies in that range.

    >>> from kure_lib.tensors.grids import MID_RISE
    >>> round(optimal_step(Normal(), bits=4, grid=MID_RISE), 4)  # Max (1960), table II
    0.3352
    """
    dist = as_distribution(dist)
    scale = sqrt(dist.variance + dist.mean**2)
    level = grid.levels(bits)
    steps = scale * np.geomspace(1 / (4 * np.abs(level).max()), 8 / np.diff(level).mean(), 500)
    coarse = mse(dist, steps, bits, grid)
    valleys = 1 + np.flatnonzero((coarse[1:-1] <= coarse[:-2]) & (coarse[1:-1] <= coarse[2:]))
    deepest = valleys[np.argsort(coarse[valleys])[:VALLEYS]]
    fine = np.linspace(steps[deepest - 1], steps[deepest + 1], POINTS)  # [points, valleys]
    point, valley = map(int, np.unravel_index(np.argmin(mse(dist, fine, bits, grid)), fine.shape))
    low, high = fine[max(point - 1, 0), valley], fine[min(point + 1, POINTS - 1), valley]

    def slope(step):
        return float(derivatives(dist, step, bits, grid)[0])

    return float(brentq(slope, low, high, xtol=1e-15 * scale, rtol=1e-14))


def sensitivity(dist: Any, eps: ArrayLike, bits: int, grid: Format) -> np.ndarray:
    """Γ(X, ε) = |MSE(X, Δ̃ + ε) − MSE(X, Δ̃)| (paper, Eq. 4); ε is signed: below zero it clips more.

    >>> from kure_lib.tensors.grids import SIGNED_INT
    >>> gamma = sensitivity(Uniform(1.0), [-0.05, 0.05], bits=4, grid=SIGNED_INT)
    >>> bool(gamma[0] > gamma[1])
    True
    """
    best = optimal_step(dist := as_distribution(dist), bits, grid)
    return np.abs(mse(dist, best + np.asarray(eps, dtype=float), bits, grid) - mse(dist, best, bits, grid))


def _as_steps(step):
    step = np.asarray(step, dtype=np.float64)
    if not (step > 0).all():
        raise ValueError(f"A quantization step must be above zero; the smallest given is {step.min()}.")
    return step


def _stairs(bits, grid):
    """In steps: the level at zero, and for each two neighbouring levels their distance and middle, [levels − 1]."""
    level = grid.levels(bits)
    h = (level[1:] + level[:-1]) / 2
    return level[np.count_nonzero(h <= 0)], np.diff(level), h
