"""Distributions as the theory of distortion sees them: three functions of a threshold b, exact.

`excess` is E(X − b)⁺, `tail` P(X > b) and `density` f(b); a threshold at or below zero counts the other side,
E(b − X)⁺ and P(X < b). Beside them stand `mean` and `variance`.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Protocol

import numpy as np
from scipy.optimize import brentq
from scipy.special import beta, betainc, erfc, gamma, gammaincc, gammaln
from torch import Tensor

from kure_lib.tensors.samples import EmpiricalDistribution

PIECE = list(zip(*np.polynomial.legendre.leggauss(16), strict=True))  # (node, weight) on [−1, 1]
HALF_LINE = list(zip(*np.polynomial.legendre.leggauss(64), strict=True))
EDGE = 1e-12  # relative distance at which a threshold counts as lying on a jump of the density


class Distribution(Protocol):
    """A random variable as `theory` sees it: its mean, its variance, and three functions of thresholds."""

    @property
    def mean(self) -> float: ...
    @property
    def variance(self) -> float: ...
    def excess(self, b: np.ndarray) -> np.ndarray: ...
    def tail(self, b: np.ndarray) -> np.ndarray: ...
    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray: ...


@dataclass(frozen=True)
class Uniform:
    """X uniform on [−a, a]: variance a²/3, kurtosis 1.8."""

    a: float = 1.0
    mean: ClassVar[float] = 0.0

    @property
    def variance(self) -> float:
        return self.a**2 / 3

    def excess(self, b: np.ndarray) -> np.ndarray:
        return np.maximum(self.a - np.abs(b), 0) ** 2 / (4 * self.a)

    def tail(self, b: np.ndarray) -> np.ndarray:
        return np.maximum(self.a - np.abs(b), 0) / (2 * self.a)

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        edge = self.a * (1 - EDGE if side == "right" else 1 + EDGE)
        return (np.abs(b) <= edge) / (2 * self.a)


@dataclass(frozen=True)
class Normal:
    """X normal with mean 0 and standard deviation `sigma`: kurtosis 3."""

    sigma: float = 1.0
    mean: ClassVar[float] = 0.0

    @property
    def variance(self) -> float:
        return self.sigma**2

    def excess(self, b: np.ndarray) -> np.ndarray:
        return self.variance * self.density(b) - np.abs(b) * self.tail(b)

    def tail(self, b: np.ndarray) -> np.ndarray:
        return erfc(np.abs(b) / (self.sigma * sqrt(2))) / 2

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        return np.exp(-((b / self.sigma) ** 2) / 2) / (self.sigma * sqrt(2 * np.pi))


@dataclass(frozen=True)
class Laplace:
    """X with density exp(−|x|/b)/(2b): variance 2b², kurtosis 6."""

    b: float = 1.0
    mean: ClassVar[float] = 0.0

    @property
    def variance(self) -> float:
        return 2 * self.b**2

    def excess(self, b: np.ndarray) -> np.ndarray:
        return self.b * self.tail(b)

    def tail(self, b: np.ndarray) -> np.ndarray:
        return np.exp(-np.abs(b) / self.b) / 2

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        return self.tail(b) / self.b


#: The three tensors of the paper at variance 1, so that their distortions compare.
UNIT_VARIANCE: dict[str, Distribution] = {
    "uniform": Uniform(sqrt(3)),
    "normal": Normal(1.0),
    "laplace": Laplace(1 / sqrt(2)),
}


@dataclass(frozen=True)
class GeneralizedNormal:
    """X with density ∝ exp(−|x/α|^β): Laplace at β = 1, normal at 2, uniform as β → ∞ (`scipy.stats.gennorm`)."""

    beta: float
    alpha: float = 1.0
    mean: ClassVar[float] = 0.0

    @property
    def variance(self) -> float:
        return self.alpha**2 * gamma(3 / self.beta) / gamma(1 / self.beta)

    @property
    def kurtosis(self) -> float:
        return float(np.exp(gammaln(5 / self.beta) + gammaln(1 / self.beta) - 2 * gammaln(3 / self.beta)))

    def excess(self, b: np.ndarray) -> np.ndarray:
        beyond = self.alpha * gamma(2 / self.beta) / (2 * gamma(1 / self.beta)) * self._left(b, 2)
        return beyond - np.abs(b) * self.tail(b)

    def tail(self, b: np.ndarray) -> np.ndarray:
        return self._left(b, 1) / 2

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        return self.beta * np.exp(-self._exponent(b)) / (2 * self.alpha * gamma(1 / self.beta))

    def _exponent(self, b):
        with np.errstate(over="ignore", under="ignore"):  # where nothing is left, the exponent is infinite
            return (np.abs(b) / self.alpha) ** self.beta

    def _left(self, b, k):
        """The share of E|X|^(k − 1) that lies beyond |b|; near zero from a series, for a large β underflows there."""
        exponent = self._exponent(b)
        near = 1 - (np.abs(b) / self.alpha) ** k / gamma(1 + k / self.beta)
        return np.where(exponent < EDGE**2, near, gammaincc(k / self.beta, exponent))


@dataclass(frozen=True)
class SymmetricBeta:
    """X on [−a, a] with density ∝ (1 − (x/a)²)^(p − 1): uniform at p = 1, two humps at the ends below it."""

    p: float
    a: float = 1.0
    mean: ClassVar[float] = 0.0

    @property
    def variance(self) -> float:
        return self.a**2 / (2 * self.p + 1)

    @property
    def kurtosis(self) -> float:
        return 3 - 6 / (2 * self.p + 3)

    def excess(self, b: np.ndarray) -> np.ndarray:
        inside = np.maximum(1 - (b / self.a) ** 2, 0)
        return self.a * inside**self.p / (2 * self.p * beta(0.5, self.p)) - np.abs(b) * self.tail(b)

    def tail(self, b: np.ndarray) -> np.ndarray:
        return betainc(self.p, self.p, np.maximum(1 - np.abs(b) / self.a, 0) / 2)

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        inside = 1 - (b / self.a) ** 2
        return np.where(inside > EDGE, np.maximum(inside, EDGE) ** (self.p - 1), 0) / (self.a * beta(0.5, self.p))


def with_kurtosis(kurtosis: float) -> Distribution:
    """The symmetric distribution of variance 1 with that kurtosis, of a family that runs through the paper's three.

    Generalized normal above 1.8, uniform there, symmetric beta below it (down to 1, two values). Raises ValueError
    for a kurtosis of 1 or less, which no distribution but one of two values has.

    >>> round(with_kurtosis(6).beta, 6), round(with_kurtosis(1.4).p, 6)
    (1.0, 0.375)
    """
    if not 1 < kurtosis < np.inf:
        raise ValueError(f"There is no distribution with a density and a kurtosis of {kurtosis}: it must be above 1.")
    if kurtosis == 1.8:
        return UNIT_VARIANCE["uniform"]
    if kurtosis < 1.8:
        p = 3 / (3 - kurtosis) - 1.5
        return SymmetricBeta(p, sqrt(2 * p + 1))
    shape = np.exp(brentq(lambda log: GeneralizedNormal(np.exp(log)).kurtosis - kurtosis, np.log(0.1), np.log(1e5)))
    return GeneralizedNormal(float(shape), float(GeneralizedNormal(shape).variance ** -0.5))


class Integrated:
    """Any frozen `scipy.stats` distribution: E(X − b)⁺ = ∫ P(X > x) dx over x > b, by Gauss–Legendre.

    Tabulated once at quantiles, so that a threshold adds one short piece; good to 1e-12 standard deviations.
    """

    def __init__(self, dist: Any) -> None:
        self.dist, self.mean, self.variance = dist, float(dist.mean()), float(dist.var())
        if not np.isfinite(self.variance):
            raise ValueError(f"{dist} has variance {self.variance}; distortion needs a finite one.")
        far = np.geomspace(1e-12, 0.01, 96)
        middle, ends = np.linspace(0.01, 0.99, 321), [end for end in dist.support() if np.isfinite(end)]
        self.knots = np.unique(np.concatenate([dist.ppf(far), dist.ppf(middle), dist.isf(far), ends]))
        pieces = self._integral(self.knots[:-1], self.knots[1:])
        self.table = np.append(pieces[::-1].cumsum()[::-1], 0.0) + self._beyond(self.knots[-1])

    def excess(self, b: np.ndarray) -> np.ndarray:
        right = self._right_excess(b)
        return np.where(b > 0, right, right + b - self.mean)  # E(b − X)⁺ = E(X − b)⁺ + b − μ

    def tail(self, b: np.ndarray) -> np.ndarray:
        return np.where(b > 0, self.dist.sf(b), self.dist.cdf(b))

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
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


def as_distribution(dist: Any) -> Distribution:
    """What `theory` computes with: a distribution of this module, a frozen scipy one, a tensor or an array.

    Raises TypeError for anything else.
    """
    if hasattr(dist, "excess"):
        return dist
    if hasattr(dist, "sf"):
        return Integrated(dist)
    if isinstance(dist, Tensor) or np.ndim(dist):
        return EmpiricalDistribution(dist)
    raise TypeError(f"{dist!r} is not a distribution: give Uniform, Normal, Laplace, a scipy one or samples.")
