"""Statistics other than kurtosis that tell how uniform a tensor is, and the penalties made of them.

Each statistic takes a tensor of any shape (floating point, at least three values, not all equal) and
returns a scalar tensor; none depends on the tensor's scale, nor, except `magnitude_variation`, on its
mean. All but the Kolmogorov–Smirnov distance are differentiable. A constant tensor gives NaN.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from kure_lib.tensors.kurtosis import kurtosis


def magnitude_variation(x: Tensor) -> Tensor:
    """Coefficient of variation of |w|: 1/√3 for a uniform tensor, √(π/2 − 1) normal, 1 Laplace.

    Zero when all magnitudes are equal. What a reviewer of the paper suggests in place of kurtosis.

    >>> round(magnitude_variation(torch.linspace(-1, 1, 10_001)).item(), 3)
    0.577
    """
    magnitude = x.abs()
    return magnitude.std(correction=0) / magnitude.mean()


def range_ratio(x: Tensor) -> Tensor:
    """Half the range in standard deviations: √3 for a uniform tensor, never below 1.

    Only the two outermost values have a gradient through the range (range loss: arXiv 2303.08253).

    >>> round(range_ratio(torch.linspace(-1, 1, 10_001)).item(), 3)
    1.732
    """
    return (x.max() - x.min()) / (2 * x.std(correction=0))


def outliers(x: Tensor) -> Tensor:
    """Mean excess of |w| over two standard deviations, in standard deviations: zero for a uniform tensor.

    About 0.017 for a normal one. The margin loss of arXiv 2303.08253 in units of the tensor's own spread; there the
    margin is learned.

    >>> outliers(torch.linspace(-1, 1, 10_001)).item()
    0.0
    """
    return (x.abs() / x.std(correction=0) - 2).relu().mean()


def entropy(x: Tensor) -> Tensor:
    """Differential entropy in nats from spacings of sorted values (Vasicek 1976), window ⌊√n + ½⌋.

    Equal values within a window give −∞. At a given variance the normal tensor has the most.

    >>> abs(entropy(torch.linspace(0, 1, 100_000)).item()) < 0.01  # log of the width
    True
    """
    x = x.flatten().sort().values
    n, window = x.numel(), int(sqrt(x.numel()) + 0.5)
    padded = torch.cat([x[:1].expand(window), x, x[-1:].expand(window)])
    return (n / (2 * window) * (padded[2 * window :] - padded[: -2 * window])).log().mean()


def entropy_gap(x: Tensor) -> Tensor:
    """Entropy missing to that of a uniform tensor of the same range: log(max − min) − entropy, in nats.

    Zero for a uniform tensor (up to the estimator's bias) and positive for any other.

    >>> bool(entropy_gap(torch.linspace(-3, 3, 10_000)) < 0.02)
    True
    """
    return (x.max() - x.min()).log() - entropy(x)


def wasserstein(x: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance to the uniform tensor of equal mean and variance, over the variance.

    Sorted values against uniform quantiles: 0 for a uniform tensor, 2 − 2√(3/π) = 0.045 for a normal one.

    >>> bool(wasserstein(torch.linspace(-1, 1, 10_000)) < 1e-6)
    True
    """
    x = x.flatten().sort().values
    ranks = torch.arange(x.numel(), dtype=x.dtype, device=x.device)
    quantiles = sqrt(3) * ((2 * ranks + 1) / x.numel() - 1)
    return ((x - x.mean()) / x.std(correction=0) - quantiles).square().mean()


def kolmogorov_smirnov(x: Tensor) -> Tensor:
    """Largest gap between the distribution functions of a tensor and of the uniform one of equal mean and
    variance: 0 to 1, about 0.06 for a normal tensor. A measure, not a loss: it has no useful gradient.

    >>> bool(kolmogorov_smirnov(torch.linspace(-1, 1, 10_000)) < 1e-3)
    True
    """
    x = x.detach().flatten().double().sort().values
    cdf = ((x - x.mean()) / (2 * sqrt(3) * x.std(correction=0)) + 0.5).clamp(0, 1)
    ranks = torch.arange(x.numel() + 1, dtype=x.dtype, device=x.device) / x.numel()
    return torch.maximum((cdf - ranks[:-1]).max(), (ranks[1:] - cdf).max())


#: Penalties to compare, each a scalar ≥ 0 that is least, and about zero, for a uniform tensor.
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "kurtosis": lambda x: (kurtosis(x) - 1.8).square(),
    "variation": lambda x: (magnitude_variation(x) - 1 / sqrt(3)).square(),
    "range": lambda x: (range_ratio(x) - sqrt(3)).square(),
    "entropy": entropy_gap,
    "wasserstein": wasserstein,
}

#: Those that sort the tensor: n·log n operations a step where the others read it a few times.
SORTING = frozenset({"entropy", "wasserstein"})
