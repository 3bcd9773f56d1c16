"""An integer master: quantized layers kept as 8-bit codes, from which a device makes any lower precision.

The full-precision weights are not part of it. The codes are two's complement: the grid is `SIGNED_INT`.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError, check_known
from kure_lib.quantization import view
from kure_lib.quantization.spec import ROUNDINGS, QuantizationSpec
from kure_lib.tensors.grids import SIGNED_INT
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, Scope, best_step

BITS = 8  # of the master
WORD = 4  # bytes of a number in float32


@dataclass(frozen=True)
class Integers:
    """A tensor of weights as integers: value = (code + offset) · step.

    `codes` is int8 of the weights' shape; `step` is a float32 number, or [C, 1, …, 1] with one a channel.
    """

    codes: Tensor
    step: Tensor
    bits: int
    offset: float = 0.0

    @property
    def values(self) -> Tensor:
        return (self.codes + self.offset) * self.step

    @property
    def bytes(self) -> int:
        """What it takes to keep the codes, packed at `bits` each, and the steps."""
        return math.ceil(self.codes.numel() * self.bits / 8) + WORD * self.step.numel()

    def to(self, bits: int, rounding: str = "step") -> "Integers":
        """The same weights in fewer bits, made from the codes alone by one of `spec.ROUNDINGS`.

        Raises `KureError` for an unknown rounding, and for more bits than there are.

        >>> master = Integers(torch.tensor([-128, -1, 8, 127], dtype=torch.int8), torch.tensor(0.5), 8)
        >>> [master.to(4, rounding).codes.tolist() for rounding in ("even", "half_up", "truncate")]
        [[-8, 0, 0, 7], [-8, 0, 1, 7], [-8, -1, 0, 7]]
        """
        check_known("rounding", rounding, ROUNDINGS)
        if not 1 <= bits <= self.bits:
            raise KureError(f"Cannot make {bits} bits of {self.bits}: give a whole number from 1 to {self.bits}.")
        if bits == self.bits:
            return self
        if rounding == "step":
            scope = PER_CHANNEL if self.step.dim() else PER_TENSOR
            step = best_step(self.values, bits, SIGNED_INT, scope=scope).to(self.step.device)
            return integers(self.values, bits, step)
        merged = 2 ** (self.bits - bits)  # codes that become one
        if rounding == "even":
            codes = (self.codes / merged).round()
        else:
            codes = ((self.codes.short() + (merged // 2 if rounding == "half_up" else 0)) / merged).floor()
        codes = codes.clamp(max=SIGNED_INT.highest(bits)).to(torch.int8)
        return Integers(codes, self.step * merged, bits, (merged - 1) / (2 * merged) if rounding == "middle" else 0.0)


def integers(weight: Tensor, bits: int, step: Tensor) -> Integers:
    """The nearest codes of a tensor for a step, at most 8 bits each."""
    codes = (weight.detach() / step).round().clamp(SIGNED_INT.lowest(bits), SIGNED_INT.highest(bits))
    return Integers(codes.to(torch.int8), step, bits)


def of(model: nn.Module, scope: Scope = PER_TENSOR) -> dict[str, Integers]:
    """Every quantized layer of a network as 8-bit integers, with steps of least squared error.

    Raises `KureError` naming the layer if its weights cannot be quantized.
    """
    layers = quantized_layers(model)
    steps = view.weight_steps(layers, QuantizationSpec(weight_bits=BITS, grid=SIGNED_INT, scope=scope))
    return {name: integers(layer.weight, BITS, steps[name].to(layer.weight.device)) for name, layer in layers.items()}


def kept_bytes(model: nn.Module, stored: Mapping[str, Integers] | None = None) -> int:
    """Bytes of a network: its layers in `stored` as integers, every other parameter and statistic in float32."""
    stored = stored or {}
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    replaced = sum(each.codes.numel() for each in stored.values())
    return WORD * (sum(value.numel() for value in floats) - replaced) + sum(each.bytes for each in stored.values())


def served(model: nn.Module, stored: Mapping[str, Integers]) -> AbstractContextManager[nn.Module]:
    """The model computing with integer weights in place of its own, as in `view.served`."""
    return view.served(model, {name: each.values for name, each in stored.items()})
