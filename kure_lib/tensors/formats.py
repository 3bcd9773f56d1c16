"""Number formats whose levels are not evenly spaced, as codebooks, and the scales that blocks of weights share.

A codebook takes the place of a grid: its levels are multiples of the step, here called scale, and the scope
of the scale (tensor, channel, block) is a choice of its own. `quantizers.quantize` serves both.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from kure_lib.paths import KureError


@dataclass(frozen=True)
class Codebook:
    """A number format of `bits` bits: its `values`, ascending, in units of the scale.

    Codes count from zero outwards, as floats are encoded, and a tie goes to the even one.

    >>> FP4_E2M1.levels(4).tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """

    name: str
    bits: int
    values: tuple[float, ...]
    signed = True

    def levels(self, bits: int) -> np.ndarray:
        """All levels [levels], float64; `KureError` for a bit-width that is not the format's."""
        if bits != self.bits:
            raise KureError(f"The format {self.name} has {self.bits} bits: it cannot have {bits}.")
        return np.array(self.values)

    def outermost(self, bits: int) -> float:
        """The highest level."""
        return float(self.levels(bits)[-1])


def float_format(name: str, exponent: int, mantissa: int, top: float | None = None) -> Codebook:
    """A signed float with gradual underflow that spends no code on infinity; `top` ends it earlier.

    With exponent field e > 0 and fraction f the magnitude is 2^(e − bias)·(1 + f), with e = 0 it is 2^(1 − bias)·f,
    where bias = 2^(exponent − 1) − 1 (OCP 8-bit floating point and Microscaling specifications, 2023). Without
    a mantissa what is left are zero and powers of two.

    >>> float_format("e3m0", 3, 0).values[7:]
    (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """
    field, fraction = np.divmod(np.arange(2 ** (exponent + mantissa)), 2**mantissa)
    power = np.maximum(field, 1) - (2 ** (exponent - 1) - 1)
    magnitudes = 2.0**power * ((field > 0) + fraction / 2**mantissa)
    magnitudes = magnitudes[magnitudes <= (top or np.inf)]
    return Codebook(name, 1 + exponent + mantissa, (*(-magnitudes[:0:-1]).tolist(), *magnitudes.tolist()))


FP8_E4M3 = float_format("fp8_e4m3", 4, 3, top=448)
FP8_E5M2 = float_format("fp8_e5m2", 5, 2, top=57344)
FP6_E2M3 = float_format("fp6_e2m3", 2, 3)
FP6_E3M2 = float_format("fp6_e3m2", 3, 2)
FP4_E2M1 = float_format("fp4_e2m1", 2, 1)
#: Sign and exponent: zero and ±2^k for seven neighbouring k.
POWER_OF_TWO_4 = float_format("pot4", 3, 0)


def _normal_float() -> tuple[float, ...]:
    """Quantiles of a normal variable, eight above zero and seven below (Dettmers et al. 2023, Sec. 3).

    The outermost probability is the mean of 1 − 1/30 and 1 − 1/32, as in the authors' code.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (ndtri(np.linspace(0.5, outermost, count)) / ndtri(outermost) for count in (9, 8))
    return (*(-negative[:0:-1]).tolist(), *positive.tolist())


NF4 = Codebook("nf4", 4, _normal_float())

CODEBOOKS = {book.name: book for book in (
    FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E2M1, POWER_OF_TWO_4, NF4,
)}  # fmt: skip


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

    >>> nearest(torch.tensor([0.25, 0.75, 2.5, 100.0]), FP4_E2M1).tolist()
    [0.0, 1.0, 2.0, 6.0]
    """
    levels, ends = _cells(book, x.dtype, x.device)
    value = x.detach()
    low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    overflows = (value < low) | (value > high)
    return levels[torch.bucketize(value.contiguous(), ends)] + torch.where(overflows, 0.0, x - value)


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
