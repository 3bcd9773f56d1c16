"""The one quantizer that every other module uses: the nearest level of a grid or of a codebook."""

from functools import cache

import torch
from torch import Tensor

from kure_lib.tensors.grids import MID_RISE, Codebook, Format, check_bits


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (Bengio et al. 2013)."""
    return x + (x.round() - x).detach()


def quantize(x: Tensor, step: Tensor | float, bits: int, grid: Format = MID_RISE) -> Tensor:
    """Q_Δ(x): the nearest level of an M-bit grid of the given step (paper, Eq. 1), or of a codebook of that scale.

    `x` has any shape; `step` > 0 is a number or a tensor that broadcasts against it (a [C, 1, 1, 1]
    step quantizes per channel, one of x's own shape by blocks). Gradients are straight-through: 1 inside the
    clipping range and 0 outside for `x`, the quantization error in steps for `step` (the gradient LSQ trains with).
    Raises `KureError` for a bit-width that is not a codebook's.

    >>> quantize(torch.tensor([-9.0, 0.2, 0.8]), 1.0, 2).tolist()
    [-1.5, 0.5, 0.5]
    """
    check_bits(bits, grid)
    step = torch.as_tensor(step, dtype=x.dtype, device=x.device)
    if isinstance(grid, Codebook):
        grid.levels(bits)  # an error if the format has other bits
        return nearest(x / step, grid) * step
    if not (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):  # the same numbers in fewer passes
        codes = x.mul(step.reciprocal())
        codes = codes.sub_(grid.offset) if grid.offset else codes
        codes = codes.round_().clamp_(grid.lowest(bits), grid.highest(bits))
        return (codes.add_(grid.offset) if grid.offset else codes).mul_(step)
    codes = round_straight_through(x * step.reciprocal() - grid.offset)
    clipped = codes.detach().clamp(grid.lowest(bits), grid.highest(bits))
    # not `codes.clamp`: its gradient ends before the outermost codes, not after them
    return (torch.where(codes == clipped, codes, clipped) + grid.offset) * step


@cache
def _cells(book: Codebook, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [K] and the highest number of every cell but the last, [K − 1]: the tie, if it belongs below."""
    levels = torch.tensor(book.values, dtype=torch.float64, device=device)
    ties = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    codes = torch.arange(len(levels), device=device) - book.values.index(0.0)
    upper_is_even = codes[1:] % 2 == 0
    below = torch.nextafter(ties, torch.full_like(ties, -torch.inf))
    return levels.to(dtype), torch.where(upper_is_even, below, ties)


def nearest(x: Tensor, book: Codebook) -> Tensor:
    """The nearest level to each value, in units of the scale: ties to the even code, saturating, NaN stays NaN.

    The gradient is straight-through: 1 as far as rounding does not overflow, which is half a gap beyond the
    outermost levels, and 0 outside.

    >>> from kure_lib.tensors.grids import FP4_E2M1
    >>> nearest(torch.tensor([0.25, 0.75, 2.5, 100.0]), FP4_E2M1).tolist()
    [0.0, 1.0, 2.0, 6.0]
    """
    levels, ends = _cells(book, x.dtype, x.device)
    value = x.detach()
    low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    overflows = (value < low) | (value > high)
    return levels[torch.bucketize(value.contiguous(), ends)] + torch.where(overflows, 0.0, x - value)
