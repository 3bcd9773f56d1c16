"""A tensor as a distribution whose distortion on any grid is known exactly, and fast.

The distortion of a tensor is a sum over the cells of the grid of Σx² − 2·level·Σx + level²·n. With the
tensor sorted once and its prefix sums at hand, each of the three sums is a difference of two look-ups,
so a step costs as many binary searches as the grid has cells, however large the tensor.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kure_lib.paths import KureError
from kure_lib.tensors.grids import Format, levels

try:
    from kure_lib.tensors import compiled
except ImportError:  # numba makes it faster, and is not required
    compiled = None

LARGE = 2**20  # values; a larger tensor has landmarks
LANDMARKS, TAIL = 2**16, 2**10  # of them in all, and at each end


class EmpiricalDistribution:
    """A tensor as a distribution: its values sorted, with prefix sums in float64 and Σx².

    Raises `KureError` for an empty tensor and for infinite or NaN values.
    """

    def __init__(self, x: Tensor | np.ndarray):
        x = torch.as_tensor(x)
        x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().double()
        values = np.sort(x.reshape(-1).cpu().numpy())
        if values.size == 0 or not np.isfinite(values[[0, -1]]).all():
            raise KureError(f"Cannot choose a step for a tensor of shape {tuple(x.shape)}: "
                            "it is empty or holds infinite or NaN values.")  # fmt: skip
        self.values = values
        self.sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        self.square_sum = np.cumsum(np.square(values, dtype=np.float64))[-1]

    @property
    def mean_abs(self) -> float:
        below_zero = np.searchsorted(self.values, 0)
        return float((self.sums[-1] - 2 * self.sums[below_zero]) / self.values.size)

    @property
    def max_abs(self) -> float:
        return float(max(-self.values[0], self.values[-1]))

    @property
    def mean(self) -> float:
        return float(self.sums[-1] / self.values.size)

    @cached_property
    def variance(self) -> float:
        return float(self.values.var(dtype=np.float64))

    def excess(self, b: np.ndarray) -> np.ndarray:
        """E(X − b)⁺, or E(b − X)⁺ for a threshold at or below zero; the next two complete what `theory` asks for."""
        below = np.searchsorted(self.values, b)
        left = b * below - self.sums[below]
        right = self.sums[-1] - self.sums[below] - b * (self.values.size - below)
        return np.where(b > 0, right, left) / self.values.size

    def tail(self, b: np.ndarray) -> np.ndarray:
        """P(X > b), or P(X < b) for a threshold at or below zero."""
        below = np.searchsorted(self.values, b)
        return np.where(b > 0, self.values.size - below, below) / self.values.size

    def density(self, b: np.ndarray, side: str = "right") -> np.ndarray:
        """Zero: between two samples the distortion is a parabola, and only its kinks have a density."""
        return np.zeros_like(b)

    @cached_property
    def landmarks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some 65,000 of the values of a large tensor, all near its ends, with the sum and the number below each.

        They fit into the cache. A value between two landmarks may be counted to the wrong side of a threshold,
        where both levels are about as far away, so that the distortion comes out right but for the second order.
        """
        size = self.values.size
        between = np.arange(TAIL, size - TAIL, size // LANDMARKS)
        ranks = np.concatenate([np.arange(TAIL), between, np.arange(size - TAIL, size + 1)])
        return self.values[ranks[:-1]], self.sums[ranks], ranks

    def moments(self, steps: np.ndarray, bits: int, grid: Format, rough: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Σ x·level and Σ level² over the tensor at each step, with levels in units of the step: as `steps` each."""
        level = levels(bits, grid).numpy()
        middle = (level[1:] + level[:-1]) / 2
        if self.values.size < len(level):  # cheaper value by value, say for a channel
            nearest = level[np.searchsorted(middle, self.values / steps[..., None])]
            return nearest @ self.values, np.square(nearest).sum(-1)
        values, sums, ranks = self.landmarks if rough and self.values.size > LARGE else (self.values, self.sums, None)
        of_levels = compiled.level_moments if compiled else _level_moments
        product, square = of_levels(values, sums, ranks, middle, level, steps.ravel())
        return product.reshape(steps.shape), square.reshape(steps.shape)

    def mse(self, steps: np.ndarray, bits: int, grid: Format, rough: bool = False) -> np.ndarray:
        """E[(X − Q_Δ(X))²] at each step, of the shape of `steps`; `rough` takes the landmarks of a large tensor."""
        product, square = self.moments(steps, bits, grid, rough)
        error = self.square_sum - 2 * steps * product + steps**2 * square
        return np.maximum(error, 0) / self.values.size


def _level_moments(
    values: np.ndarray,
    sums: np.ndarray,
    ranks: np.ndarray | None,
    middle: np.ndarray,
    level: np.ndarray,
    steps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What `compiled.level_moments` computes, for all steps at once: two arrays of [steps]."""
    ends = np.searchsorted(values, np.multiply.outer(steps, middle).astype(values.dtype))
    ends = np.pad(ends, ((0, 0), (1, 1)), constant_values=((0, 0), (0, values.size)))
    counts = np.diff(ends if ranks is None else ranks[ends])
    return np.diff(sums[ends]) @ level, counts @ np.square(level)
