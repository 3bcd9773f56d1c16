"""Distortion of a quantized random variable: exact, with derivatives, for any distribution.

All of it rests on one identity. A uniform grid of step Δ has levels (k + o)Δ, so Q_Δ climbs by Δ each
time |X| passes a decision threshold b_j = h_jΔ half-way between two levels. Summing by parts over
these stairs leaves no integral over cells:

    MSE(Δ)   = Var X + (μ − oΔ)² − 2Δ Σ_j E(X − b_j)⁺
    MSE′(Δ)  = −2o(μ − oΔ) − 2 Σ_j E(X − b_j)⁺ + 2Δ Σ_j |h_j| P(X > b_j)
    MSE″(Δ)  = 2o² + 4 Σ_j |h_j| P(X > b_j) − 2Δ Σ_j h_j² f(b_j)

where a threshold at or below zero counts the other side, E(b_j − X)⁺ and P(X < b_j). A distribution
therefore needs three functions of a threshold: `excess` E(X − b)⁺, `tail` P(X > b), `density` f(b).
The paper's quantizer (Eq. 1) is the grid with 2^M + 1 levels; no statement here depends on that.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfc

PIECE = list(zip(*np.polynomial.legendre.leggauss(16), strict=True))  # (node, weight) on [−1, 1]
HALF_LINE = list(zip(*np.polynomial.legendre.leggauss(64), strict=True))
EDGE = 1e-12  # relative distance at which a threshold counts as lying on a jump of the density


@dataclass(frozen=True)
class Uniform:
    """X uniform on [−a, a]: variance a²/3, kurtosis 1.8."""

    a: float = 1.0
    mean = 0.0

    @property
    def variance(self):
        return self.a**2 / 3

    def excess(self, b):
        return np.maximum(self.a - np.abs(b), 0) ** 2 / (4 * self.a)

    def tail(self, b):
        return np.maximum(self.a - np.abs(b), 0) / (2 * self.a)

    def density(self, b, side="right"):
        edge = self.a * (1 - EDGE if side == "right" else 1 + EDGE)
        return (np.abs(b) <= edge) / (2 * self.a)


@dataclass(frozen=True)
class Normal:
    """X normal with mean 0 and standard deviation `sigma`: kurtosis 3."""

    sigma: float = 1.0
    mean = 0.0

    @property
    def variance(self):
        return self.sigma**2

    def excess(self, b):
        return self.variance * self.density(b) - np.abs(b) * self.tail(b)

    def tail(self, b):
        return erfc(np.abs(b) / (self.sigma * sqrt(2))) / 2

    def density(self, b, side="right"):
        return np.exp(-((b / self.sigma) ** 2) / 2) / (self.sigma * sqrt(2 * np.pi))


@dataclass(frozen=True)
class Laplace:
    """X with density exp(−|x|/b)/(2b): variance 2b², kurtosis 6."""

    b: float = 1.0
    mean = 0.0

    @property
    def variance(self):
        return 2 * self.b**2

    def excess(self, b):
        return self.b * self.tail(b)

    def tail(self, b):
        return np.exp(-np.abs(b) / self.b) / 2

    def density(self, b, side="right"):
        return self.tail(b) / self.b


#: The three tensors of the paper at variance 1, so that their distortions compare.
UNIT_VARIANCE = {"uniform": Uniform(sqrt(3)), "normal": Normal(1.0), "laplace": Laplace(1 / sqrt(2))}


class Integrated:
    """Any frozen `scipy.stats` distribution: E(X − b)⁺ = ∫ P(X > x) dx over x > b, by Gauss–Legendre.

    Tabulated once at quantiles, so that a threshold adds one short piece; good to 1e-12 standard deviations.
    """

    def __init__(self, dist):
        self.dist, self.mean, self.variance = dist, float(dist.mean()), float(dist.var())
        if not np.isfinite(self.variance):
            raise ValueError(f"{dist} has variance {self.variance}; distortion needs a finite one.")
        far = np.geomspace(1e-12, 0.01, 96)
        middle, ends = np.linspace(0.01, 0.99, 321), [end for end in dist.support() if np.isfinite(end)]
        self.knots = np.unique(np.concatenate([dist.ppf(far), dist.ppf(middle), dist.isf(far), ends]))
        pieces = self._integral(self.knots[:-1], self.knots[1:])
        self.table = np.append(pieces[::-1].cumsum()[::-1], 0.0) + self._beyond(self.knots[-1])

    def excess(self, b):
        right = self._right_excess(b)
        return np.where(b > 0, right, right + b - self.mean)  # E(b − X)⁺ = E(X − b)⁺ + b − μ

    def tail(self, b):
        return np.where(b > 0, self.dist.sf(b), self.dist.cdf(b))

    def density(self, b, side="right"):
        return self.dist.pdf(b * (1 + EDGE if side == "right" else 1 - EDGE))

    def _right_excess(self, b):
        """∫ P(X > x) dx over x > b: down to the next knot, then from the table."""
        low, high = self.knots[[0, -1]]
        inside = np.clip(b, low, high)
        knot = np.searchsorted(self.knots, inside)
        value = np.where(b < low, self.mean - b, self._integral(inside, self.knots[knot]) + self.table[knot])
        return np.where(b > high, self._beyond(np.maximum(b, high)), value)

    def _integral(self, start, end):
        half = (np.asarray(end) - start) / 2
        return half * sum(weight * self.dist.sf(start + half * (1 + node)) for node, weight in PIECE)

    def _beyond(self, b):
        """The last 1e-12 of probability: x = b + σ(1 + u)/(1 − u) maps −1 < u < 1 to the half-line."""
        sigma, sf = sqrt(self.variance), self.dist.sf
        return sigma * sum(w * sf(b + sigma * (1 + u) / (1 - u)) * 2 / (1 - u) ** 2 for u, w in HALF_LINE)


class Samples:
    """X equally likely to be any value of an array or tensor: exact sums over the sorted values."""

    def __init__(self, x):
        self.values = np.sort(np.asarray(x, dtype=np.float64).ravel())
        self.sums = np.append(0.0, self.values.cumsum())
        self.mean, self.variance = self.values.mean(), self.values.var()

    def excess(self, b):
        below = np.searchsorted(self.values, b)
        left = b * below - self.sums[below]
        right = self.sums[-1] - self.sums[below] - b * (self.values.size - below)
        return np.where(b > 0, right, left) / self.values.size

    def tail(self, b):
        below = np.searchsorted(self.values, b)
        return np.where(b > 0, self.values.size - below, below) / self.values.size

    def density(self, b, side="right"):
        return np.zeros_like(b)


def mse(dist, step, bits, grid):
    """MSE(X, Δ) = E[(X − Q_Δ(X))²] (paper, Eq. 2).

    `dist` is one of this module's, a frozen scipy one, a tensor or its `steps.EmpiricalDistribution`; `step`
    is positive, a number or an array in the units of X; the result has its shape and the units of X².
    Raises ValueError for a step of zero or less, TypeError for another `dist`.

    >>> from kure_lib.quantizers import MID_TREAD
    >>> round(12 * float(mse(Uniform(8.5), 1.0, bits=4, grid=MID_TREAD)), 9)  # Δ = 2a/(2⁴ + 1): MSE = Δ²/12
    1.0
    """
    dist, step = _as_distribution(dist), _as_steps(step)
    excess = dist.excess(step[..., None] * _h(bits, grid)).sum(-1)
    return dist.variance + (dist.mean - grid.offset * step) ** 2 - 2 * step * excess


def derivatives(dist, step, bits, grid, side="right"):
    """∂MSE/∂Δ and ∂²MSE/∂Δ² at `step`: two arrays of its shape, in units of X and of 1.

    Where a threshold meets a jump of the density (an end of a uniform tensor) the second one jumps too:
    `side` is the side of Δ, "left" or "right", to take it from. For samples it is the one between kinks.

    >>> from kure_lib.quantizers import MID_TREAD
    >>> first, second = derivatives(Uniform(1.0), 2 / 17, bits=4, grid=MID_TREAD)
    >>> abs(round(float(first), 12)), round(float(second), 12)
    (0.0, 8.0)
    """
    dist, step = _as_distribution(dist), _as_steps(step)
    h, o = _h(bits, grid), grid.offset
    b = step[..., None] * h
    tail, distance = dist.tail(b), np.abs(h)
    first = -2 * o * (dist.mean - o * step) - 2 * dist.excess(b).sum(-1) + 2 * step * (tail @ distance)
    second = 2 * o**2 + 4 * (tail @ distance) - 2 * step * (dist.density(b, side) @ h**2)
    return first, second


def optimal_step(dist, bits, grid):
    """Δ̃: the step of least MSE, a float, to the precision at which MSE′ can be told from zero.

    A root of MSE′ beside the lowest of 500 steps from 2^−(M+1) to 8 standard deviations.

    >>> from kure_lib.quantizers import MID_RISE
    >>> round(optimal_step(Normal(), bits=4, grid=MID_RISE), 4)  # Max (1960), table II
    0.3352
    """
    dist = _as_distribution(dist)
    scale = sqrt(dist.variance + dist.mean**2)
    steps = scale * np.geomspace(2.0 ** -(bits + 1), 8, 500)
    lowest = int(np.clip(np.argmin(mse(dist, steps, bits, grid)), 1, len(steps) - 2))

    def slope(step):
        return float(derivatives(dist, step, bits, grid)[0])

    return float(brentq(slope, steps[lowest - 1], steps[lowest + 1], xtol=1e-15 * scale, rtol=1e-14))


def sensitivity(dist, eps, bits, grid):
    """Γ(X, ε) = |MSE(X, Δ̃ + ε) − MSE(X, Δ̃)| (paper, Eq. 4); ε is signed: below zero it clips more.

    >>> from kure_lib.quantizers import SIGNED_INT
    >>> gamma = sensitivity(Uniform(1.0), [-0.05, 0.05], bits=4, grid=SIGNED_INT)
    >>> bool(gamma[0] > gamma[1])
    True
    """
    best = optimal_step(dist := _as_distribution(dist), bits, grid)
    return np.abs(mse(dist, best + np.asarray(eps, dtype=float), bits, grid) - mse(dist, best, bits, grid))


def _as_distribution(dist):
    if hasattr(dist, "excess"):
        return dist
    if hasattr(dist, "sf"):
        return Integrated(dist)
    values = getattr(dist, "values", dist)
    if np.ndim(values := dist if callable(values) else values):  # a tensor has a method of that name
        return Samples(values)
    raise TypeError(f"{dist!r} is not a distribution: give Uniform, Normal, Laplace, a scipy one or samples.")


def _as_steps(step):
    step = np.asarray(step, dtype=np.float64)
    if not (step > 0).all():
        raise ValueError(f"A quantization step must be above zero; the smallest given is {step.min()}.")
    return step


def _h(bits, grid):
    """Thresholds between neighbouring levels, in steps: [levels − 1]."""
    return np.arange(grid.lowest(bits), grid.highest(bits)) + grid.offset + 0.5
