"""Uniform quantization grids, and the one quantizer that every other module uses.

A grid says which multiples of the step are levels; the step says how far apart they are; the scope
(per tensor, per channel or per block) is the shape of the step. The three choices are independent, and
a format that is no uniform grid, a codebook of `formats`, may stand wherever a grid does.

The literature means three different things by "uniform M-bit quantizer", and several of the paper's
statements are true on one grid and false on another, so a grid is always named.
"""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from kure_lib.paths import KureError
from kure_lib.tensors.formats import CODEBOOKS, Codebook, nearest

MAX_BITS = 16


@dataclass(frozen=True)
class Grid:
    """A family of uniform grids, one for each bit-width M: level = (code + offset) · step.

    Codes run from `lowest(M)` to `highest(M)`.

    >>> [(MID_RISE.lowest(2) + k + MID_RISE.offset) for k in range(4)]
    [-1.5, -0.5, 0.5, 1.5]
    """

    name: str
    offset: float
    signed: bool = True
    extra_level: bool = False

    def lowest(self, bits: int) -> int:
        return -(2 ** (bits - 1)) if self.signed else 0

    def highest(self, bits: int) -> int:
        codes = 2**bits + self.extra_level
        return self.lowest(bits) + codes - 1

    def levels(self, bits: int) -> np.ndarray:
        """All levels [levels] in units of the step, ascending, float64."""
        return np.arange(self.lowest(bits), self.highest(bits) + 1) + self.offset

    def outermost(self, bits: int) -> float:
        """Distance of the highest level from zero, in steps."""
        return self.highest(bits) + self.offset or 1.0


#: 2^M levels, symmetric, none at zero: what the authors' released code uses.
MID_RISE = Grid("mid_rise", offset=0.5)
#: 2^M + 1 levels, clipped at ±2^(M−1)Δ: Eq. 1 of the paper, and what its lemmas are about.
MID_TREAD = Grid("mid_tread", offset=0.0, extra_level=True)
#: Two's complement, −2^(M−1) … 2^(M−1) − 1: what integer hardware computes with.
SIGNED_INT = Grid("signed_int", offset=0.0)
#: 0 … 2^M − 1: activations after a ReLU.
UNSIGNED = Grid("unsigned", offset=0.0, signed=False)

GRIDS = {grid.name: grid for grid in (MID_RISE, MID_TREAD, SIGNED_INT, UNSIGNED)}


def grid_named(name: str) -> Grid | Codebook:
    """The grid or codebook of that name; `KureError` lists the known ones."""
    known = GRIDS | CODEBOOKS
    if name not in known:
        raise KureError(f"Unknown quantization grid '{name}': choose one of {', '.join(known)}.")
    return known[name]


def check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= bits <= MAX_BITS:
        raise KureError(f"Cannot quantize to {bits} bits: give a whole number from 1 to {MAX_BITS}.")


def levels(bits: int, grid: Grid | Codebook = MID_RISE) -> Tensor:
    """All levels of the grid in units of the step, ascending, float64 of shape [levels].

    >>> levels(2, SIGNED_INT).tolist()
    [-2.0, -1.0, 0.0, 1.0]
    """
    check_bits(bits)
    return torch.from_numpy(grid.levels(bits))


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (Bengio et al. 2013)."""
    return x + (x.round() - x).detach()


def quantize(x: Tensor, step: Tensor | float, bits: int, grid: Grid | Codebook = MID_RISE) -> Tensor:
    """Q_Δ(x): the nearest level of an M-bit grid of the given step (paper, Eq. 1), or of a codebook of that scale.

    `x` has any shape; `step` > 0 is a number or a tensor that broadcasts against it (a [C, 1, 1, 1]
    step quantizes per channel, one of x's own shape by blocks). Gradients are straight-through: 1 inside the
    clipping range and 0 outside for `x`, the quantization error in steps for `step` (the gradient LSQ trains with).
    Raises `KureError` for a bit-width that is not a codebook's.

    >>> quantize(torch.tensor([-9.0, 0.2, 0.8]), 1.0, 2).tolist()
    [-1.5, 0.5, 0.5]
    """
    check_bits(bits)
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
