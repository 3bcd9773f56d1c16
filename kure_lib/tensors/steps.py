"""How the step Δ of a grid is chosen for a tensor."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kure_lib.paths import KureError
from kure_lib.tensors import theory
from kure_lib.tensors.grids import FP8_E4M3, MID_RISE, Codebook, Format, check_bits, levels
from kure_lib.tensors.quantizers import nearest
from kure_lib.tensors.samples import EmpiricalDistribution

COARSE, FINE = 512, 12  # points of the first scan and of each finer one
DENSER = 4  # times as many points in the first scan for codebooks: a float has a valley for every level of an octave
VALLEYS, ROUNDS = 12, 1  # valleys that are followed, and finer scans after the first
SCAN, SAMPLE, SCAN_SAMPLE = 48, 2**16, 2**13  # norms other than the second: steps tried, values looked at, while so


def _as_distribution(x: Tensor | EmpiricalDistribution) -> EmpiricalDistribution:
    return x if isinstance(x, EmpiricalDistribution) else EmpiricalDistribution(x)


def mse_curve(x: Tensor | EmpiricalDistribution, steps, bits: int, grid: Format = MID_RISE) -> Tensor:
    """MSE(X, Δ) = E[(X − Q_Δ(X))²] at each of the steps: float64 of shape [steps], exact.

    >>> mse_curve(torch.tensor([-0.9, 0.2, 0.5]), [1.0], bits=2).item()
    0.0833333...
    """
    steps = np.atleast_1d(np.asarray(steps, dtype=np.float64))
    return torch.from_numpy(_as_distribution(x).mse(steps, bits, grid))


def max_abs_step(x: EmpiricalDistribution, bits: int, grid: Format) -> float:
    """The step whose outermost level is the largest magnitude: nothing is clipped."""
    return x.max_abs / grid.outermost(bits)


def mse_step(x: EmpiricalDistribution, bits: int, grid: Format) -> float:
    """The step of least MSE, the global minimum; for NF4, of those that reach at most twice as far as the tensor.

    The outermost level lies at most at twice the largest magnitude: beyond, a float at half the scale has all the
    levels it had within reach and more, and a grid has finer ones; only NF4 may fit a few values better by chance.
    Between two steps at which some value changes its cell, the MSE is a parabola in Δ. A scan over all useful steps
    finds the deepest valleys, finer scans follow each of them down, and from there Δ = Σ x·code / Σ code², with the
    codes of the Δ before, leads to the bottom of the parabola.
    """
    widest = 2 * max_abs_step(x, bits, grid)
    points = COARSE * (DENSER if isinstance(grid, Codebook) else 1)
    steps = np.geomspace(widest * min(0.1, x.mean_abs / (4 * x.max_abs)), widest, points)[None]
    for finer in range(1 + ROUNDS):
        low, high = _brackets(steps, x.mse(steps, bits, grid, rough=not finer))
        steps = np.linspace(low, high, FINE, axis=-1)
    best = x.mse(steps, bits, grid).argmin(-1)
    step = steps[np.arange(len(best)), best]
    for _ in range(FINE):
        product, square = x.moments(step, bits, grid)
        before, step = step, product / np.maximum(square, np.finfo(float).tiny)
        if (step == before).all():
            break
    return float(step[x.mse(step, bits, grid).argmin()])


def _brackets(steps: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of the lowest point of each scan; of a single scan, of its `VALLEYS` lowest valleys."""
    if len(steps) == 1:
        padded = np.pad(error[0], 1, constant_values=np.inf)
        valleys = np.flatnonzero((padded[1:-1] <= padded[:-2]) & (padded[1:-1] <= padded[2:]))
        best = valleys[np.argsort(error[0, valleys], kind="stable")[:VALLEYS]]
        steps = np.repeat(steps, len(best), axis=0)
    else:
        best = error.argmin(-1)
    row = np.arange(len(best))
    return steps[row, np.maximum(best - 1, 0)], steps[row, np.minimum(best + 1, steps.shape[1] - 1)]


def percentile_step(x: EmpiricalDistribution, bits: int, grid: Format, percent: float = 99.9) -> float:
    """The step whose outermost level is a percentile of the magnitudes, 99.9 unless named."""
    if not 0 < percent <= 100:
        raise KureError(f"A percentile lies above 0 and at most at 100; {percent:g} does not.")
    magnitudes = np.abs(x.values)
    return float(np.percentile(magnitudes[magnitudes > 0], percent)) / grid.outermost(bits)


def lp_step(x: EmpiricalDistribution, bits: int, grid: Format, p: float = 2.0) -> float:
    """The step of least E|X − Q_Δ(X)|^p, on at most `SAMPLE` quantiles of the tensor; LAPQ starts here.

    A large p minds the clipped values more, a small one the many in the middle.
    """
    if not 0 < p < np.inf:
        raise KureError(f"The norm p must be above zero and finite, not {p:g}.")
    values = x.values[:: -(-x.values.size // SAMPLE)].astype(np.float64)
    level = levels(bits, grid).numpy()
    middle = (level[1:] + level[:-1]) / 2

    def error(step: float, values: np.ndarray = values) -> float:
        nearest = level[np.searchsorted(middle, values / step)]
        return float((np.abs(values - step * nearest) ** p).mean())

    widest = 2 * max_abs_step(x, bits, grid)
    steps = np.geomspace(widest * min(0.1, x.mean_abs / (4 * x.max_abs)), widest, SCAN)
    fewer = values[:: -(-values.size // SCAN_SAMPLE)]
    best = int(np.argmin([error(step, fewer) for step in steps]))
    bounds = steps[max(best - 1, 0)], steps[min(best + 1, SCAN - 1)]
    return float(minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-4 * bounds[0]}).x)


def aciq_step(x: EmpiricalDistribution, bits: int, grid: Format, family: str | None = None) -> float:
    """The optimal step of a `normal`, `laplace` or `uniform` distribution fitted to the tensor (Banner et al. 2019).

    Without a name the family is the one whose E|X|/√E[X²] is closest to the tensor's. On an unsigned grid the
    positive values are taken for one half of a symmetric distribution.
    """
    count = x.values.size if grid.signed else max(np.count_nonzero(x.values > 0), 1)
    size, rms = x.mean_abs * x.values.size / count, (x.square_sum / count) ** 0.5
    fitted = {"normal": theory.Normal(rms), "laplace": theory.Laplace(size), "uniform": theory.Uniform(x.max_abs)}
    ratios = {"normal": (2 / np.pi) ** 0.5, "laplace": 0.5**0.5, "uniform": 0.75**0.5}
    family = family or min(ratios, key=lambda name: abs(ratios[name] - size / rms))
    if family not in fitted:
        raise KureError(f"Unknown family '{family}' for aciq: choose one of {', '.join(fitted)}.")
    return float(theory.optimal_step(fitted[family], bits, grid))


METHODS: dict[str, Callable[..., float]] = {
    "mse": mse_step, "max_abs": max_abs_step, "percentile": percentile_step, "lp": lp_step, "aciq": aciq_step,
}  # fmt: skip
ARGUMENTS = {"percentile": float, "lp": float, "aciq": str}


def best_step(
    x: Tensor | EmpiricalDistribution, bits: int, grid: Format = MID_RISE, method: str = "mse",
    per_channel: bool = False, block: int | None = None,
) -> Tensor:  # fmt: skip
    """The step Δ for a tensor, float32 without dimensions; or for each channel, of shape [C, 1, …, 1].

    Or with `block` for that many weights of a channel in a row, the last block perhaps shorter, of the tensor's own
    shape: then `method` is `max_abs`, `mx` or `nvfp4` (see `formats.block_scale`).

    `method` is `mse` (least mean squared error, Δ̃ of the paper), `max_abs` (no clipping), `percentile:99.9`,
    `lp:2.5` (least p-norm of the error) or `aciq:laplace` (optimal for a fitted distribution); what follows the
    colon may be left out. To ask for several bit-widths of one tensor, hand over an `EmpiricalDistribution` of
    it. Raises `KureError` for an unknown method, and for a tensor that is empty, all zero, or has infinite or
    NaN values.

    >>> best_step(torch.linspace(-1, 1, 1001), bits=2).item()
    0.5...
    """
    if block is not None:
        return _block_steps(x, bits, grid, method, per_channel, block)
    name, _, argument = method.partition(":")
    if name not in METHODS:
        raise KureError(f"Unknown method '{method}' to choose a step: choose one of {', '.join(METHODS)}.")
    try:
        arguments = [ARGUMENTS[name](argument)] if argument else []
    except (KeyError, ValueError):
        raise KureError(f"The method '{method}' cannot be read: write for example lp:2.5, percentile:99.9 or "
                        "aciq:laplace; mse and max_abs stand alone.") from None  # fmt: skip
    check_bits(bits)
    if per_channel:
        steps = [best_step(channel, bits, grid, method) for channel in x]
        return torch.stack(steps).reshape(-1, *[1] * (x.dim() - 1))
    x = _as_distribution(x)
    _check_not_zero(x.max_abs)
    step = METHODS[name](x, bits, grid, *arguments)
    if not step > 0:
        raise KureError(f"No step suits the tensor: the {bits}-bit grid {grid.name} has no levels on its side of zero.")
    return torch.tensor(step, dtype=torch.float32)


def _check_not_zero(largest: float | Tensor) -> None:
    if largest == 0:
        raise KureError("Cannot choose a step for a tensor that is zero everywhere.")


def _block_steps(x: Tensor, bits: int, grid: Format, method: str, per_channel: bool, block: int) -> Tensor:
    if per_channel or block < 1:
        raise KureError(f"A block of {block} values cannot have a step of its own: give a size from 1 on, and "
                        "no steps per channel.")  # fmt: skip
    rows = x.detach().abs().flatten(1).float()
    if not rows.isfinite().all():
        raise KureError("Cannot choose steps for blocks with infinite or NaN values.")
    _check_not_zero(rows.max())
    width = rows.shape[1]
    blocks = torch.nn.functional.pad(rows, (0, -width % block)).unflatten(1, (-1, block))
    scale = block_scale(blocks.amax(-1), method, grid.outermost(bits))
    return scale.repeat_interleave(block, 1)[:, :width].reshape(x.shape)


def power_of_two(step: Tensor) -> Tensor:
    """The nearest power of two in log2, so that scaling is a shift (paper, Supp. Table 5).

    >>> power_of_two(torch.tensor([0.9, 0.3])).tolist()
    [1.0, 0.25]
    """
    return torch.exp2(torch.log2(step).round())


def block_scale(largest: Tensor, method: str, outermost: float) -> Tensor:
    """The scale of each block from the largest magnitude in it, of the same shape; `outermost` is the highest level.

    `max_abs` puts that level on the magnitude. `mx` is the Microscaling specification's (Sec. 6.3): a power of
    two, 2^(⌊log2 max⌋ − ⌊log2 outermost⌋), of 8 bits, so that what lies above the level saturates. `nvfp4` is that
    of NVIDIA's format: `max_abs` rounded to FP8 E4M3, in units of a float32 scale of the whole tensor that puts
    448 on the largest. A block of zeros gets the smallest scale there is. Raises `KureError` for another method.

    >>> block_scale(torch.tensor([0.9, 12.0]), "mx", 6.0).tolist()
    [0.125, 2.0]
    """
    ideal = largest / outermost
    if method == "max_abs":
        return torch.where(ideal > 0, ideal, 1.0)
    if method == "mx":  # frexp is exact where log2 need not be
        exponent = torch.frexp(largest).exponent - torch.frexp(torch.tensor(outermost)).exponent
        return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, exponent, -127).clamp(-127, 127))
    if method == "nvfp4":
        tensor_scale = ideal.max() / FP8_E4M3.values[-1]
        smallest = FP8_E4M3.values[FP8_E4M3.values.index(0.0) + 1]
        return nearest(ideal / tensor_scale, FP8_E4M3).clamp(min=smallest) * tensor_scale
    raise KureError(f"The scale of a block cannot be chosen by '{method}': choose max_abs, mx or nvfp4.")
