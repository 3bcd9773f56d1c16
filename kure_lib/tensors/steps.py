"""Step rules: how the step Δ of a grid is chosen for a tensor, its channels or its blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from torch import Tensor

from kure_lib.paths import KureError, check_known
from kure_lib.tensors import theory
from kure_lib.tensors.grids import FP8_E4M3, MID_RISE, Codebook, Format, check_bits, levels
from kure_lib.tensors.quantizers import nearest
from kure_lib.tensors.samples import EmpiricalDistribution, EmpiricalRows

# Search for the step of least MSE.
COARSE, FINE = 512, 12  # points of the first scan and of each finer one
DENSER = 4  # factor on COARSE for codebooks, whose MSE has a valley for every level of an octave
VALLEYS, ROUNDS = 12, 1  # valleys that are followed, and finer scans after the first
# Search for the step of least p-norm.
SCAN, SAMPLE, SCAN_SAMPLE = 48, 2**16, 2**13  # points of the scan, values in all, values while scanning


def _as_distribution(x: Tensor | EmpiricalDistribution) -> EmpiricalDistribution:
    return x if isinstance(x, EmpiricalDistribution) else EmpiricalDistribution(x)


def mse_curve(x: Tensor | EmpiricalDistribution, steps: ArrayLike, bits: int, grid: Format = MID_RISE) -> Tensor:
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
    """The step of least MSE over all steps whose outermost level lies within twice the largest magnitude.

    This is the global minimum for grids and floats: a larger step of a grid is coarser, and a float at half the scale
    keeps all levels within reach. NF4 alone could fit a few values better by chance at a larger scale. The MSE is a
    parabola in Δ between two steps at which some value changes its cell. A first scan finds the deepest valleys, finer
    scans follow each of them, and the iteration Δ = Σ x·code / Σ code² ends at the bottom of the parabola.
    """
    return float(_mse_steps(x, bits, grid)[0])


def _mse_steps(x: EmpiricalDistribution | EmpiricalRows, bits: int, grid: Format) -> np.ndarray:
    """`mse_step` of each of C distributions, [C], all at once; of one, C is 1."""
    max_abs, mean_abs = np.atleast_1d(x.max_abs), np.atleast_1d(x.mean_abs)
    widest = 2 * max_abs / grid.outermost(bits)
    points = COARSE * (DENSER if isinstance(grid, Codebook) else 1)
    steps = np.geomspace(widest * np.minimum(0.1, mean_abs / (4 * max_abs)), widest, points, axis=-1)
    low, high = _around(steps, valleys := _valleys(x.mse(steps, bits, grid, rough=True)))
    for _ in range(ROUNDS):
        steps = np.linspace(low, high, FINE, axis=-1)
        low, high = _narrowed(steps, x.mse(steps, bits, grid), (valleys == valleys[:, :1]).all(-1))
    steps = np.linspace(low, high, FINE, axis=-1)
    step = _taken(steps, x.mse(steps, bits, grid).argmin(-1))
    for _ in range(FINE):
        product, square = x.moments(step, bits, grid)
        before, step = step, product / np.maximum(square, np.finfo(float).tiny)
        if (step == before).all():
            break
    return _taken(step, x.mse(step, bits, grid).argmin(-1))


def _valleys(error: np.ndarray) -> np.ndarray:
    """The places of the lowest valleys of each scan, lowest first, `VALLEYS` at most; the lowest fills up the rest."""
    padded = np.pad(error, ((0, 0), (1, 1)), constant_values=np.inf)
    valley = (error <= padded[:, :-2]) & (error <= padded[:, 2:])
    order = np.argsort(np.where(valley, error, np.inf), axis=-1, kind="stable")
    order = order[:, : min(valley.sum(-1).max(), VALLEYS)]
    return np.where(np.take_along_axis(valley, order, -1), order, order[:, :1])


def _narrowed(steps: np.ndarray, error: np.ndarray, alone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of the lowest step of each finer scan [C, V, k]; where a valley is alone, of each valley in it."""
    low, high = (side[..., 0] for side in _around(steps, error.argmin(-1)[..., None]))
    if not alone.any():
        return low, high
    found = _around(steps[alone, 0], _valleys(error[alone, 0]))
    width = max(low.shape[1], found[0].shape[1])
    sides = [_filled(side, width) for side in (low, high)]
    for side, of_alone in zip(sides, found, strict=True):
        side[alone] = _filled(of_alone, width)
    return sides[0], sides[1]


def _filled(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), mode="edge")


def _around(steps: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of some places of each scan."""
    below, above = np.maximum(places - 1, 0), np.minimum(places + 1, steps.shape[-1] - 1)
    return np.take_along_axis(steps, below, -1), np.take_along_axis(steps, above, -1)


def _taken(steps: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.take_along_axis(steps, place[..., None], -1)[..., 0]


def percentile_step(x: EmpiricalDistribution, bits: int, grid: Format, percent: float = 99.9) -> float:
    """The step whose outermost level is a percentile of the magnitudes, 99.9 unless named."""
    magnitudes = np.abs(x.values)
    return float(np.percentile(magnitudes[magnitudes > 0], percent)) / grid.outermost(bits)


def lp_step(x: EmpiricalDistribution, bits: int, grid: Format, p: float = 2.0) -> float:
    """The step of least E|X − Q_Δ(X)|^p, on at most `SAMPLE` quantiles of the tensor; LAPQ starts here.

    A large p weighs the few clipped values more, a small p the many values in the middle.
    """
    values = x.values[:: -(-x.values.size // SAMPLE)].astype(np.float64)
    level = levels(bits, grid).numpy()
    middle = (level[1:] + level[:-1]) / 2

    def error(step: float, values: np.ndarray = values) -> float:
        ends = np.searchsorted(values / step, middle, side="right")  # of the cells: values are in ascending order
        counts = np.append(ends, values.size)
        counts[1:] -= ends
        nearest = np.repeat(level, counts)
        return float((np.abs(values - step * nearest) ** p).mean())

    widest = 2 * max_abs_step(x, bits, grid)
    steps = np.geomspace(widest * min(0.1, x.mean_abs / (4 * x.max_abs)), widest, SCAN)
    fewer = values[:: -(-values.size // SCAN_SAMPLE)]
    best = int(np.argmin([error(step, fewer) for step in steps]))
    bounds = steps[max(best - 1, 0)], steps[min(best + 1, SCAN - 1)]
    return float(minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-4 * bounds[0]}).x)


#: Families that aciq fits, by E|X|/√E[X²].
FAMILIES = {"normal": (2 / np.pi) ** 0.5, "laplace": 0.5**0.5, "uniform": 0.75**0.5}


def aciq_step(x: EmpiricalDistribution, bits: int, grid: Format, family: str | None = None) -> float:
    """The optimal step of a `normal`, `laplace` or `uniform` distribution fitted to the tensor (Banner et al. 2019).

    Without a name the family is the one whose E|X|/√E[X²] is closest to the tensor's. On an unsigned grid the
    positive values are taken for one half of a symmetric distribution.
    """
    count = x.values.size if grid.signed else max(int((x.values > 0).sum()), 1)
    size, rms = x.mean_abs * x.values.size / count, (x.square_sum / count) ** 0.5
    fitted = {"normal": theory.Normal(rms), "laplace": theory.Laplace(size), "uniform": theory.Uniform(x.max_abs)}
    family = family or min(FAMILIES, key=lambda name: abs(FAMILIES[name] - size / rms))
    return float(theory.optimal_step(fitted[family], bits, grid))


#: Step rules by name; an argument follows the name after a colon, as in "lp:2.5".
STEP_RULES: dict[str, Callable[..., float]] = {
    "mse": mse_step, "max_abs": max_abs_step, "percentile": percentile_step, "lp": lp_step, "aciq": aciq_step,
}  # fmt: skip
BLOCK_RULES = ("max_abs", "mx", "nvfp4")
LARGEST_NORM = 16  # the hundredth power of a small error is below what float64 holds, and all steps look as good


def _percent(text: str) -> float:
    if not 0 < (percent := float(text)) <= 100:
        raise KureError(f"A percentile lies above 0 and at most at 100; {percent:g} does not.")
    return percent


def _norm(text: str) -> float:
    if not 0 < (p := float(text)) <= LARGEST_NORM:
        raise KureError(f"The norm p must be above zero and at most {LARGEST_NORM}, not {p:g}.")
    return p


def _family(text: str) -> str:
    check_known("family for aciq", text, FAMILIES)
    return text


_ARGUMENTS: dict[str, Callable[[str], float | str]] = {"percentile": _percent, "lp": _norm, "aciq": _family}


@dataclass(frozen=True)
class Scope:
    """Which values share one step: those of a tensor, of an output channel, or of a block of `size` within one."""

    name: str
    size: int | None = None

    def __str__(self) -> str:
        return f"per {self.name}" + (f" of {self.size}" if self.size else "")


PER_TENSOR, PER_CHANNEL = Scope("tensor"), Scope("channel")


def per_block(size: int) -> Scope:
    """The scope in which `size` weights of a channel in a row share a step; the last block may be shorter."""
    if size < 1:
        raise KureError(f"A block of {size} values cannot have a step of its own: give a size from 1 on.")
    return Scope("block", size)


def parse_rule(rule: str, scope: Scope = PER_TENSOR) -> tuple[str, list]:
    """The name of a step rule and its arguments; raises `KureError` for a rule that there is not in that scope.

    >>> parse_rule("lp:2.5")
    ('lp', [2.5])
    """
    name, _, argument = rule.partition(":")
    check_known(f"rule to choose a step {scope}", name, BLOCK_RULES if scope.size else STEP_RULES)
    try:
        return name, [_ARGUMENTS[name](argument)] if argument else []
    except (KeyError, ValueError):
        raise KureError(
            f"The step rule '{rule}' cannot be read: write for example lp:2.5, percentile:99.9 or aciq:laplace; the "
            "others stand alone."
        ) from None


def best_step(
    x: Tensor | EmpiricalDistribution, bits: int, grid: Format = MID_RISE, rule: str = "mse", scope: Scope = PER_TENSOR
) -> Tensor:
    """The step Δ for a tensor, or for each of its channels or blocks.

    Args:
        x: Values of any shape; an `EmpiricalDistribution` of them serves several bit-widths with one sort.
        bits: Bit-width M of the grid.
        grid: Grid or codebook.
        rule: `mse` (least mean squared error, the paper's Δ̃), `max_abs` (no clipping), `percentile:99.9`, `lp:2.5`
            (least p-norm of the error), `aciq:laplace` (optimal for a fitted distribution); what follows the colon
            may be left out. Blocks take `max_abs`, `mx` or `nvfp4` (see `block_scale`).
        scope: `PER_TENSOR`, `PER_CHANNEL` (first dimension) or `per_block(size)`.

    Returns:
        float32 without dimensions, [C, 1, …, 1] per channel, or of x's own shape by blocks.

    Raises:
        KureError: The rule is unknown, the tensor is empty, all zero, or has infinite or NaN values, or it has fewer
            than two dimensions and is to have several steps.

    >>> best_step(torch.linspace(-1, 1, 1001), bits=2).item()
    0.5...
    """
    name, arguments = parse_rule(rule, scope)
    check_bits(bits, grid)
    if scope != PER_TENSOR:
        if isinstance(x, EmpiricalDistribution):
            raise KureError(f"Steps {scope} are chosen for a tensor: an EmpiricalDistribution has lost its shape.")
        if x.dim() < 2:
            raise KureError(f"Steps {scope} need the channels of a tensor, and one of shape {tuple(x.shape)} has none.")
        if scope.size:
            return _block_steps(x, bits, grid, name, scope.size)
        return _channel_steps(x, bits, grid, rule).reshape(-1, *[1] * (x.dim() - 1))
    x = _as_distribution(x)
    _check_not_zero(x.max_abs)
    step = STEP_RULES[name](x, bits, grid, *arguments)
    _check_positive(step, bits, grid)
    return torch.tensor(step, dtype=torch.float32)


def distortion(x: Tensor | EmpiricalDistribution, bits: int, grid: Format = MID_RISE) -> float:
    """MSE(X, Δ̃)/Var X: what the step of least squared error leaves, in parts of the variance; float64.

    Raises `KureError` as `best_step` does, and for a tensor of equal values, which has no variance.

    >>> round(distortion(torch.linspace(-1, 1, 100_001), bits=4) * 4**4, 3)
    1.0
    """
    x = _as_distribution(x)
    if x.values[0] == x.values[-1]:
        raise KureError("The distortion of a tensor is in parts of its variance, and all values of this one are equal.")
    return mse_curve(x, best_step(x, bits, grid).item(), bits, grid).item() / x.variance


def _check_not_zero(largest: float | Tensor | np.floating) -> None:
    if largest == 0:
        raise KureError("Cannot choose a step for a tensor that is zero everywhere.")


def _channel_steps(x: Tensor, bits: int, grid: Format, rule: str) -> Tensor:
    """A step for each channel: those of least squared error in one search, by the other rules one after the other."""
    if rule != "mse" or not x.numel():
        return torch.stack([best_step(channel, bits, grid, rule) for channel in x])
    rows = EmpiricalRows(x)
    _check_not_zero(rows.max_abs.min())
    steps = _mse_steps(rows, bits, grid)
    _check_positive(steps.min(), bits, grid)
    return torch.from_numpy(steps).float()


def _check_positive(step: float, bits: int, grid: Format) -> None:
    if not step > 0:
        raise KureError(f"No step suits the tensor: the {bits}-bit grid {grid.name} has no levels on its side of zero.")


def _block_steps(x: Tensor, bits: int, grid: Format, rule: str, size: int) -> Tensor:
    rows = x.detach().abs().flatten(1).float()
    if not rows.isfinite().all():
        raise KureError("Cannot choose steps for blocks with infinite or NaN values.")
    _check_not_zero(rows.max())
    width = rows.shape[1]
    blocks = torch.nn.functional.pad(rows, (0, -width % size)).unflatten(1, (-1, size))
    scale = block_scale(blocks.amax(-1), rule, grid.outermost(bits))
    return scale.repeat_interleave(size, 1)[:, :width].reshape(x.shape)


def power_of_two(step: Tensor) -> Tensor:
    """The nearest power of two in log2, so that scaling is a shift (paper, Supp. Table 5).

    >>> power_of_two(torch.tensor([0.9, 0.3])).tolist()
    [1.0, 0.25]
    """
    return torch.exp2(torch.log2(step).round())


def block_scale(largest: Tensor, rule: str, outermost: float) -> Tensor:
    """The scale of each block from the largest magnitude in it, of the same shape; `outermost` is the highest level.

    `max_abs` puts that level on the magnitude. `mx` is the Microscaling specification's (Sec. 6.3): a power of
    two, 2^(⌊log2 max⌋ − ⌊log2 outermost⌋), of 8 bits, so that what lies above the level saturates. `nvfp4` is that
    of NVIDIA's format: `max_abs` rounded to FP8 E4M3, in units of a float32 scale of the whole tensor that puts
    448 on the largest. A block of zeros gets the smallest scale there is. Raises `KureError` for another rule.

    >>> block_scale(torch.tensor([0.9, 12.0]), "mx", 6.0).tolist()
    [0.125, 2.0]
    """
    ideal = largest / outermost
    if rule == "max_abs":
        return torch.where(ideal > 0, ideal, 1.0)
    if rule == "mx":  # frexp is exact where log2 need not be
        exponent = torch.frexp(largest).exponent - torch.frexp(torch.tensor(outermost)).exponent
        return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, exponent, -126).clamp(-126, 127))
    if rule == "nvfp4":
        tensor_scale = ideal.max() / FP8_E4M3.values[-1]
        smallest = FP8_E4M3.values[FP8_E4M3.values.index(0.0) + 1]
        return nearest(ideal / tensor_scale, FP8_E4M3).clamp(min=smallest) * tensor_scale
    raise KureError(f"The scale of a block cannot be chosen by '{rule}': choose max_abs, mx or nvfp4.")
