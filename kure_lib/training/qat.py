"""Quantization-aware training: DoReFa (Zhou et al. 2016) and LSQ (Esser et al., ICLR 2020) as views of a network.

Inside the view the forward pass computes with quantized weights and activations while the optimizer moves
the latent full-precision weights, on which KURE acts too. The same view with another bit-width or step ratio
is how a trained network is tested where it was not trained: latent weights kept, quantizer changed. As in
post-training quantization the first and the last layer, and the first and the last activation, stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kure_lib.networks import activations
from kure_lib.quantization import calibration
from kure_lib.quantization.view import quantized_layers, restored
from kure_lib.tensors.grids import MID_RISE, SIGNED_INT, UNSIGNED
from kure_lib.tensors.quantizers import quantize

TRAINED = -1  # in place of a bit-width: the one the network was trained for

Bits = Annotated[int, Field(ge=1, le=16)]


class QatConfig(BaseModel):
    """How a run is quantized while it is trained. LSQ needs two bits for weights: at one its Q_p is zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["dorefa", "lsq"]
    weight_bits: Annotated[int, Field(ge=2, le=16)]
    activation_bits: Bits

    @property
    def name(self) -> str:
        return f"{self.method} {self.weight_bits}/{self.activation_bits}"

    @classmethod
    def named(cls, name: str) -> "QatConfig":
        """From its name, such as "lsq 4/8": the method, the bits of weights and those of activations."""
        method, bits = name.split()
        weight_bits, activation_bits = map(int, bits.split("/"))
        return cls(method=method, weight_bits=weight_bits, activation_bits=activation_bits)


class Steps(dict[str, nn.Parameter]):
    """Learned steps by layer and activation site, kept in a checkpoint as a module's parameters are."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: step.detach() for name, step in self.items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        for name, step in self.items():
            step.data.copy_(saved[name])

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> "Steps":
        return cls({name: nn.Parameter(torch.tensor(step)) for name, step in numbers.items()})

    def as_numbers(self) -> dict[str, float]:
        return {name: step.item() for name, step in self.items()}


class LearnedStepQuantize(torch.autograd.Function):
    """Clip to [low, high] steps, round, with the gradients of LSQ's Eqs. 3 and 5; `scale` is its g.

    In few passes over the tensor, and in its own type: bfloat16 holds every whole number up to 256, hence
    all codes of 8 bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:
        value = step.item()
        quantized = (x * (1 / value)).round_().clamp_(low, high).mul_(value)
        ctx.save_for_backward(x, step, quantized)
        ctx.limits, ctx.scale = (low * value, high * value), scale
        return quantized

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, step, quantized = ctx.saved_tensors
        to_x = torch.ops.aten.hardtanh_backward(gradient, x, *ctx.limits)
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None
        # in steps: round(v) − v where x has a gradient, the outermost code where it has none
        inside = (quantized - x).mul_(to_x).sum(dtype=step.dtype)
        outside = (gradient - to_x).mul_(quantized).sum(dtype=step.dtype)
        return to_x, (ctx.scale / step.item() * (inside + outside)).reshape(step.shape), None, None, None


class DoReFaWeight(nn.Module):
    """W → Q(tanh W / max|tanh W|): 2^M levels from −1 to 1, a mid-rise grid of step 2/(2^M − 1). None: not rounded."""

    def __init__(self, bits: int | None, ratio: float = 1.0):
        super().__init__()
        self.bits, self.ratio = bits, ratio

    def forward(self, weight: Tensor) -> Tensor:
        squashed = weight.tanh()
        squashed = squashed / squashed.detach().abs().max()
        return squashed if self.bits is None else quantize(squashed, self.ratio * dorefa_step(self.bits), self.bits)


def dorefa_step(bits: int) -> float:
    return 1 / MID_RISE.outermost(bits)


class LsqWeight(nn.Module):
    """W → Q_Δ(W) on the signed grid with a learned Δ.

    At a bit-width M′ other than the M it was learned for, Δ is multiplied by 2^(M − M′): the clipping range
    stays where training put it, and only the levels inside it become more or fewer. None: neither clipped nor rounded.
    """

    def __init__(self, step: nn.Parameter, trained_bits: int, bits: int | None, ratio: float = 1.0):
        super().__init__()
        self._step = (step,)  # a tuple, for it is the run's, not the layer's
        self.trained_bits, self.bits, self.ratio = trained_bits, bits, ratio

    def forward(self, weight: Tensor) -> Tensor:
        if self.bits is None:
            return weight
        step = self._step[0] * (self.ratio * 2.0 ** (self.trained_bits - self.bits))
        low, high = SIGNED_INT.lowest(self.bits), SIGNED_INT.highest(self.bits)
        return LearnedStepQuantize.apply(weight, step, low, high, (weight.numel() * max(high, 1)) ** -0.5)


def initial_steps(model: nn.Module, config: QatConfig, images: Tensor) -> Steps:
    """LSQ's 2·mean|x|/√Q_p of every quantized layer and of every site on `images` [N, C, H, W]; none for DoReFa."""
    if config.method == "dorefa":
        return Steps()
    means = {name: layer.weight.detach().abs().mean().item() for name, layer in quantized_layers(model).items()}
    highest = dict.fromkeys(means, SIGNED_INT.highest(config.weight_bits))
    for site, seen in calibration.observe(model, images).items():
        means[site], highest[site] = seen.mean_abs, UNSIGNED.highest(config.activation_bits)
    return Steps.of({name: 2 * means[name] / highest[name] ** 0.5 for name in means})


@contextmanager
def quantized(
    model: nn.Module, config: QatConfig, steps: Steps, sites: list[str],
    weight_bits: int | None = TRAINED, activation_bits: int | None = TRAINED, step_ratio: float = 1.0,
) -> Iterator[nn.Module]:  # fmt: skip
    """The network as it is trained, or tested at other `weight_bits` (None: not rounded) or weight steps.

    `steps` are the learned ones, `sites` the activations to quantize (`activations.quantized_sites`);
    `activation_bits` is the trained one or None. After the block the model is what it was, with its latent weights.
    """
    weight_bits = config.weight_bits if weight_bits == TRAINED else weight_bits
    activation_bits = config.activation_bits if activation_bits == TRAINED else activation_bits
    with ExitStack() as stack:
        stack.enter_context(restored(layers := quantized_layers(model)))
        for name, layer in layers.items():
            if config.method == "dorefa":
                weight = DoReFaWeight(weight_bits, step_ratio)
            else:
                weight = LsqWeight(steps[name], config.weight_bits, weight_bits, step_ratio)
            parametrize.register_parametrization(layer, "weight", weight)
        if activation_bits is not None:
            replace = _activation_quantizer(config.method, activation_bits, steps, set(sites))
            stack.enter_context(activations.replaced(model, replace))
        yield model


def _activation_quantizer(method: str, bits: int, steps: Steps, sites: set[str]) -> Callable[[str, Tensor], Tensor]:
    high = UNSIGNED.highest(bits)
    unit = torch.tensor(1 / high)  # DoReFa clips to [0, 1]

    def replace(site: str, output: Tensor) -> Tensor:
        if site not in sites:
            return output
        step, scale = (unit, 1.0) if method == "dorefa" else (steps[site], (output[0].numel() * high) ** -0.5)
        return LearnedStepQuantize.apply(output, step, 0, high, scale)

    return replace
