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

FEW = 8  # levels a value from which on values are cheaper than levels to go through
LARGE = 2**20  # values; a larger tensor has landmarks
LANDMARKS, TAIL = 2**16, 2**10  # of them in all, and at each end


class EmpiricalDistribution:
    """A tensor as a distribution: its values sorted, with prefix sums in float64 and Σx².

    Raises `KureError` for an empty tensor and for infinite or NaN values.
    """

    def __init__(self, x: Tensor | np.ndarray):
        x = torch.as_tensor(x)
        self.values = values = _sorted(x.reshape(1, -1), x.shape)[0]
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
        if self.values.size * FEW < len(level):  # cheaper value by value, say for a depthwise channel
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


class EmpiricalRows:
    """The channels of a tensor [C, …] as distributions of their own, whose steps are searched for together.

    Of each it knows what `EmpiricalDistribution` does, and computes it with the same operations, so that a channel has
    the same step in company and alone. Raises `KureError` for a channel that is empty or not finite.
    """

    def __init__(self, x: Tensor):
        self.values = _sorted(x.flatten(1), x.shape[1:])
        zeros = np.zeros((len(self.values), 1))
        self.sums = np.concatenate([zeros, np.cumsum(self.values, axis=1, dtype=np.float64)], axis=1)
        self.square_sum = np.cumsum(np.square(self.values, dtype=np.float64), axis=1)[:, -1]
        below_zero = np.array([np.searchsorted(row, 0) for row in self.values])
        self.mean_abs = (self.sums[:, -1] - 2 * self.sums[np.arange(len(zeros)), below_zero]) / self.values.shape[1]
        self.max_abs = np.maximum(-self.values[:, 0], self.values[:, -1]).astype(np.float64)

    def moments(self, steps: np.ndarray, bits: int, grid: Format) -> tuple[np.ndarray, np.ndarray]:
        """Σ x·level and Σ level² over each channel at its own steps [C, …], with levels in units of the step."""
        level = levels(bits, grid).numpy()
        middle = (level[1:] + level[:-1]) / 2
        flat = np.ascontiguousarray(steps.reshape(len(steps), -1))
        if self.values.shape[1] * FEW < len(level):
            nearest = level[np.searchsorted(middle, self.values[:, None] / flat[..., None])]
            product = np.stack([of_steps @ row for of_steps, row in zip(nearest, self.values, strict=True)])
            square = np.square(nearest).sum(-1)
        else:
            of_rows = compiled.row_moments if compiled else _row_moments
            product, square = of_rows(self.values, self.sums, middle, level, flat)
        return product.reshape(steps.shape), square.reshape(steps.shape)

    def mse(self, steps: np.ndarray, bits: int, grid: Format, rough: bool = False) -> np.ndarray:
        """E[(X − Q_Δ(X))²] of each channel at its own steps [C, …]; no channel is so large that `rough` would help."""
        product, square = self.moments(steps, bits, grid)
        square_sum = self.square_sum.reshape(-1, *[1] * (steps.ndim - 1))
        error = square_sum - 2 * steps * product + steps**2 * square
        return np.maximum(error, 0) / self.values.shape[1]


def _sorted(rows: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The values of each row [C, n] in ascending order, on the processor, as float32 or float64."""
    rows = rows.detach() if rows.dtype in (torch.float32, torch.float64) else rows.detach().double()
    values = np.sort(rows.cpu().numpy(), axis=-1)
    if values.size == 0 or not np.isfinite(values[:, [0, -1]]).all():
        raise KureError(f"Cannot choose a step for a tensor of shape {tuple(shape)}: "
                        "it is empty or holds infinite or NaN values.")  # fmt: skip
    return values


def _row_moments(
    values: np.ndarray, sums: np.ndarray, middle: np.ndarray, level: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `compiled.row_moments` computes: two arrays of [C, steps]."""
    rows = zip(values, sums, steps, strict=True)
    found = [_level_moments(row, of_row, None, middle, level, own) for row, of_row, own in rows]
    product, square = zip(*found, strict=True)
    return np.stack(product), np.stack(square)


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
