"""What devices do to weights beside quantizing them: steps that are off, bits that flip, rounding at random.

Random numbers depend on the draw and on the layer's name and on nothing else, so that networks of one architecture meet
the same errors on every machine.
"""

import numpy as np
import torch
from torch import Tensor

from kure_lib.paths import KureError, check_known
from kure_lib.tensors.grids import Grid

#: Each kind with the least and the greatest amount, both left out, that its name may carry; None: it carries none.
#: `steps` multiplies the step of each layer by a factor of its own, log-uniform between 1/amount and amount; `flips`
#: inverts each stored bit with the probability that is its amount; `stochastic` rounds a weight to one of its two
#: neighbouring levels, with probabilities that leave it unchanged on average.
KINDS: dict[str, tuple[float, float] | None] = {"steps": (1.0, np.inf), "flips": (0.0, 1.0), "stochastic": None}


def parse(name: str) -> tuple[str, float]:
    """The kind of a perturbation and its amount, nan if it has none; raises `KureError` for one that there is not.

    >>> parse("flips 1e-4"), parse("stochastic")
    (('flips', 0.0001), ('stochastic', nan))
    """
    kind, *amounts = name.split() or [""]
    check_known("perturbation", kind, KINDS)
    limits = KINDS[kind]
    try:
        (amount,) = [float(each) for each in amounts] if limits else [np.nan, *map(float, amounts)]
    except ValueError:
        raise KureError(f"The perturbation '{name}' cannot be read: write for example 'steps 1.25', 'flips 1e-4' or "
                        "'stochastic'.") from None  # fmt: skip
    if limits and not limits[0] < amount < limits[1]:
        raise KureError(f"The perturbation '{name}' cannot be: give {kind} a number between {limits[0]:g} and "
                        f"{limits[1]:g}.")  # fmt: skip
    return kind, amount


def canonical(name: str) -> str:
    """The one way to write a perturbation, by which records know it.

    >>> canonical("flips 1e-4")
    'flips 0.0001'
    """
    kind, amount = parse(name)
    return kind if np.isnan(amount) else f"{kind} {amount:g}"


def generator(draw: int, layer: str) -> np.random.Generator:
    """The random numbers of one draw for the layer of that name."""
    return np.random.Generator(np.random.PCG64([draw, *layer.encode()]))


def step_factor(ratio: float, rng: np.random.Generator) -> float:
    """A factor that is log-uniform between 1/ratio and ratio."""
    return float(ratio ** rng.uniform(-1, 1))


def flipped(levels: Tensor, step: Tensor, bits: int, grid: Grid, rate: float, rng: np.random.Generator) -> Tensor:
    """Levels of an M-bit grid, of any shape, after each of their M bits was inverted with probability `rate`.

    The code of a level counts from the lowest one. In two's complement the same flips do the same: the two differ in
    their highest bit alone, which is inverted. At a higher rate the bits flip that flip at a lower one, and more.

    >>> from kure_lib.tensors.grids import MID_RISE
    >>> flipped(torch.tensor([-1.5, 1.5]), torch.tensor(1.0), 2, MID_RISE, 1 - 1e-9, generator(0, "conv")).tolist()
    [1.5, -1.5]
    """
    step = step.to(levels)
    words = (rng.random((levels.numel(), bits)) < rate) @ (1 << np.arange(bits))
    codes = (levels / step - grid.offset).round().long() - grid.lowest(bits)
    codes = codes ^ torch.from_numpy(words).view(levels.shape).to(levels.device)
    return ((codes + grid.lowest(bits)).to(levels.dtype) + grid.offset) * step


def stochastic(weight: Tensor, step: Tensor, bits: int, grid: Grid, rng: np.random.Generator) -> Tensor:
    """One of the two levels beside each weight, the nearer the likelier, so that their mean is the weight.

    Weights beyond the outermost levels are clipped to them.
    """
    step = step.to(weight)
    chance = torch.from_numpy(rng.random(tuple(weight.shape))).to(weight.device)
    codes = (weight.double() / step.double() - grid.offset + chance).floor()
    codes = codes.clamp(grid.lowest(bits), grid.highest(bits))
    return (codes.to(weight.dtype) + grid.offset) * step
