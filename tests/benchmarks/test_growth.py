"""Time and memory of the KURE term and of the best steps, for one tensor of ten thousand to a billion weights."""

import pytest
import torch
from measuring import alone
from reporting import GROWTH, Growth

from kure_lib.tensors.kurtosis import kurtoses
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import best_step

BITS = (2, 3, 4, 5, 6, 8)
SIZES = [10**power for power in range(4, 10)]


def weights(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def term(size: int):
    """A round: the KURE term of one tensor, and its gradient."""
    weight = weights(size).requires_grad_()

    def work() -> None:
        weight.grad = None
        (kurtoses([weight]) - 1.8).square().sum().backward()

    return work


def steps(size: int):
    """A round: the steps of least squared error at six bit-widths."""
    weight = weights(size)

    def work() -> None:
        distribution = EmpiricalDistribution(weight)
        for bits in BITS:
            best_step(distribution, bits)

    return work


@pytest.mark.parametrize(
    ("name", "prepare", "largest", "held"), [("kure", term, 10**9, 1.05), ("steps", steps, 10**8, 7.5)]
)
def test_growth(keep, say, name, prepare, largest, held):
    """Beside the weights there is room for the gradient and no second copy; of the steps, for sorting and sums."""
    sizes, found = [size for size in SIZES if size <= largest], []
    for size in sizes:
        found.append(alone(prepare, size, rounds=3 if size > 10**7 else 15))
        say(f"{GROWTH[name]}: {size:,}")
    growth = Growth(name, tuple(sizes), *map(tuple, zip(*found, strict=True)))
    keep("growth", name, growth)
    assert growth.bytes[-1] <= held * 4 * sizes[-1], "peak memory in copies of the weights"
