"""Sums of a quantized layer as integer hardware makes them: products of codes, in an accumulator of few bits.

An adder in two's complement that runs over wraps around, so that what it holds in the end is the true sum modulo 2^P,
in whatever order the products were added. One that saturates depends on the order, and is not here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def wrapped(sums: Tensor, bits: int) -> Tensor:
    """Whole numbers, of any shape, as an accumulator of P bits holds them: from −2^(P−1) to 2^(P−1) − 1.

    >>> wrapped(torch.tensor([7.0, 8.0, -8.0, -9.0]), 4).tolist()
    [7.0, -8.0, -8.0, 7.0]
    """
    half = 2 ** (bits - 1)
    return (sums + half).remainder(2 * half) - half


def safe_bits(codes: Tensor, activation_bits: int) -> int:
    """Bits of an accumulator that no input of unsigned codes makes run over.

    Args:
        codes: Weights of a layer as whole numbers, [C, …].
        activation_bits: Those of the inputs, of which each may be any code.

    The largest sum of a channel has the largest input at every positive weight and zero at the others, and the smallest
    the reverse: ‖w‖₁ decides, as in A2Q (Colbert et al. 2023, Sec. 3).

    >>> safe_bits(torch.tensor([[1.0, -2.0, 1.0]]), activation_bits=1)  # from −2 to 2: two bits end at 1
    3
    """
    top = 2**activation_bits - 1
    dims = tuple(range(1, codes.dim()))
    highest, lowest = (int(top * side.clamp(min=0).sum(dims).max()) for side in (codes, -codes))
    return 1 + max(highest.bit_length(), max(lowest - 1, 0).bit_length())


@contextmanager
def narrow(layers: Mapping[str, nn.Module], steps: Mapping[str, Tensor], bits: int) -> Iterator[None]:
    """Within the block the layers sum whole numbers, in accumulators of so many bits; a bias is added afterwards.

    Args:
        layers: Quantized convolutions and linear layers by name.
        steps: Their steps: a number, or [C, 1, …, 1] with one a channel.
        bits: P. The sums themselves are made in float32, or where they might reach 2^24 in float64, and so are whole.

    A layer whose input does not say of which `step` it is, since it is in full precision or was reshaped on its way,
    computes as it did. Codes of 8 bits are read without error from activations in bfloat16, too, which have as many.
    """
    for name, layer in layers.items():
        layer.forward = _summing(layer, steps[name], bits)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward  # the class's own is found again


def _summing(layer: nn.Module, step: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        unit = getattr(x, "step", None)
        if unit is None:
            return type(layer).forward(layer, x)
        with torch.autocast(x.device.type, enabled=False):
            weights, codes = (layer.weight.float() / step).round(), (x.float() / unit).round()
            if weights.abs().flatten(1).sum(1).max() * codes.abs().max() >= 2**24:
                weights, codes = weights.double(), codes.double()
            summed = (
                linear(codes, weights) if isinstance(layer, nn.Linear) else layer._conv_forward(codes, weights, None)
            )
            ones = (1,) * (weights.dim() - 2)  # height and width
            outputs = wrapped(summed, bits) * (step.float() * unit).reshape(-1, *ones)
            if layer.bias is not None:
                outputs = outputs + layer.bias.reshape(-1, *ones)
        return outputs.to(x.dtype)

    return forward
