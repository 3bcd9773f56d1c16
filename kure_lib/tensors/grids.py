"""Uniform grids and codebooks: which multiples of the step are levels.

A grid says which multiples of the step are levels; the step says how far apart they are; the scope (per tensor,
per channel or per block) is the shape of the step. The three choices are independent, and a codebook, the levels of
a number format that are not evenly spaced, may stand wherever a grid does; its step is called scale.

The literature means three different things by "uniform M-bit quantizer", and several of the paper's statements are
true on one grid and false on another, so a grid is always named.
"""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from kure_lib.paths import KureError, check_known

MAX_BITS = 16
FULL = 32  # bits of a float32, which is not quantized


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

Format = Grid | Codebook

GRIDS: dict[str, Grid] = {grid.name: grid for grid in (MID_RISE, MID_TREAD, SIGNED_INT, UNSIGNED)}
CODEBOOKS: dict[str, Codebook] = {
    book.name: book for book in (FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E2M1, POWER_OF_TWO_4, NF4)
}


def grid_named(name: str) -> Format:
    """The grid or codebook of that name; `KureError` lists the known ones."""
    known = GRIDS | CODEBOOKS
    check_known("quantization grid", name, known)
    return known[name]


def check_bits(bits: int, grid: Format = MID_RISE) -> None:
    """Raise `KureError` unless `bits` is a whole number from 1 to `MAX_BITS` and `grid` a grid or a codebook."""
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= bits <= MAX_BITS:
        raise KureError(f"Cannot quantize to {bits} bits: give a whole number from 1 to {MAX_BITS}.")
    if not isinstance(grid, Grid | Codebook):
        raise KureError(f"{grid!r} is no grid: give one itself, such as MID_RISE, or grid_named({MID_RISE.name!r}).")


def levels(bits: int, grid: Format = MID_RISE) -> Tensor:
    """All levels of the grid in units of the step, ascending, float64 of shape [levels].

    >>> levels(2, SIGNED_INT).tolist()
    [-2.0, -1.0, 0.0, 1.0]
    """
    check_bits(bits, grid)
    return torch.from_numpy(grid.levels(bits))


@dataclass(frozen=True)
class Bits:
    """Bit-widths of weights and activations; None stands for full precision.

    Raises `KureError` for a bit-width that no grid has.

    >>> Bits.named("4/FP"), str(Bits(4, 8)), str(Bits()), Bits(3).widths
    (Bits(weight=4, activation=None), '4/8', 'FP', (3, 32))
    """

    weight: int | None = None
    activation: int | None = None

    def __post_init__(self) -> None:
        for bits in {self.weight, self.activation} - {None}:
            check_bits(bits)

    @classmethod
    def named(cls, name: str) -> "Bits":
        """The bit-widths that a name such as "4/FP", "8/8" or "FP" stands for, as the paper's tables write them."""
        parts = ["FP", "FP"] if name == "FP" else name.split("/")
        if len(parts) != 2 or not all(part == "FP" or part.isdecimal() for part in parts):
            raise KureError(f"Cannot read the bit-widths '{name}': write for example 4/FP, 8/8 or FP.")
        return cls(*(None if part == "FP" else int(part) for part in parts))

    def __str__(self) -> str:
        names = ["FP" if bits is None else str(bits) for bits in (self.weight, self.activation)]
        return "FP" if names == ["FP", "FP"] else "/".join(names)

    @property
    def widths(self) -> tuple[int, int]:
        """The widths as numbers for the axes of figures, where full precision has the 32 bits of float32."""
        return self.weight or FULL, self.activation or FULL
