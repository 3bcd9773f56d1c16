"""Quantization-aware training: DoReFa (Zhou et al. 2016) and LSQ (Esser et al., ICLR 2020) as views of a network.

Within the view the forward pass computes with quantized weights and activations, while the optimizer moves the latent
full-precision weights, on which KURE acts too. The same view with other bit-widths or another step ratio is how a
trained network is tested at settings it was not trained for: the latent weights stay, the quantizer changes. As after
training, the first and the last layer, and the first and the last activation, are not quantized.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kure_lib.networks import activations
from kure_lib.networks.layers import LatentWeight, latent_weight, quantized_layers, restored
from kure_lib.paths import KureError
from kure_lib.quantization import calibration
from kure_lib.quantization.view import FakeQuantize
from kure_lib.tensors.grids import MID_RISE, SIGNED_INT, UNSIGNED, Bits
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step
from kure_lib.training.configs import QatConfig
from kure_lib.training.protocol import Steps, TrainingMethod

GRIDS = {"dorefa": MID_RISE, "lsq": SIGNED_INT}  # of the weights, by quantizer


class QuantizationAwareTraining(TrainingMethod):
    """Training within the quantized view of a network; LSQ's steps are learned and begin by `images`."""

    def __init__(self, model: nn.Module, config: QatConfig, images: Tensor):
        activations.check_rectified(model)
        self.model, self.config = model, config
        self.steps = initial_steps(model, config, images)
        self._sites = activations.quantized_sites(model, images[:1])

    def view(self) -> AbstractContextManager:
        return quantized(self.model, self.config, self.steps, self._sites)


class LearnedStepQuantize(torch.autograd.Function):
    """Clip to [low, high] steps, round, with the gradients of LSQ's Eqs. 3 and 5; `scale` is its g.

    It reads the tensor few times and computes in the tensor's own type: bfloat16 holds every whole number up to 256,
    hence all codes of 8 bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:
        value = step.item()
        quantized = (x * (1 / value)).round_().clamp_(low, high).mul_(value)
        ctx.save_for_backward(x, step, quantized)
        ctx.limits, ctx.scale = (low * value, high * value), scale
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, quantized = ctx.saved_tensors
        to_x = torch.ops.aten.hardtanh_backward(gradient, x, *ctx.limits)
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None
        # in steps: round(v) − v where x has a gradient, the outermost code where it has none
        inside = (quantized - x).mul_(to_x).sum(dtype=step.dtype)
        outside = (gradient - to_x).mul_(quantized).sum(dtype=step.dtype)
        return to_x, (ctx.scale / step.item() * (inside + outside)).reshape(step.shape), None, None, None


class DoReFaWeight(LatentWeight):
    """W → Q(tanh W / max|tanh W|) on a mid-rise grid of 2^M levels from −1 to 1, of step 2/(2^M − 1). None: no grid."""

    def __init__(self, bits: int | None, ratio: float = 1.0):
        super().__init__()
        self.bits, self.ratio = bits, ratio

    def forward(self, weight: Tensor) -> Tensor:
        squashed = weight.tanh()
        squashed = squashed / squashed.detach().abs().max()
        if self.bits is None:
            return squashed
        return quantize(squashed, self.ratio * (1 / MID_RISE.outermost(self.bits)), self.bits)


class LsqWeight(LatentWeight):
    """W → Q_Δ(W) on the signed grid with a learned Δ.

    At a bit-width M′ other than the M it was learned for, Δ is multiplied by 2^(M − M′): the clipping range stays where
    training put it, and only the number of levels inside it changes. None: neither clipped nor rounded.
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
    if config.quantizer == "dorefa":
        return Steps()
    means = {name: latent_weight(layer).detach().abs().mean().item() for name, layer in quantized_layers(model).items()}
    highest = dict.fromkeys(means, SIGNED_INT.highest(config.weight_bits))
    for site, seen in calibration.observe(model, images).items():
        means[site], highest[site] = seen.mean_abs, UNSIGNED.highest(config.activation_bits)
    for name, mean in means.items():
        if not mean > 0:
            raise KureError(f"'{name}' is zero everywhere, so that LSQ has no step to begin with: train the network in "
                            "full precision first, or take DoReFa.")  # fmt: skip
    return Steps.of({name: 2 * means[name] / highest[name] ** 0.5 for name in means}, images.device)


@contextmanager
def quantized(
    model: nn.Module,
    config: QatConfig,
    steps: Steps,
    sites: Iterable[str],
    bits: Bits | None = None,
    step_ratio: float = 1.0,
    refit: bool = False,
) -> Iterator[nn.Module]:
    """The network as it is trained, or tested at other settings; after the block it is what it was.

    Args:
        model: The network with its latent weights.
        config: How it is trained.
        steps: The learned steps.
        sites: The activations to quantize (`activations.quantized_sites`).
        bits: Bit-widths to test at, for activations the trained one or full precision; None: those of training.
        step_ratio: Factor on the steps of weights.
        refit: Whether these are of least squared error at the bit-width tested at, instead of the trained ones.
    """
    bits = config.bits if bits is None else bits
    own = None if refit else bits.weight
    with ExitStack() as stack:
        stack.enter_context(restored(layers := quantized_layers(model)))
        for name, layer in layers.items():
            weight = (
                DoReFaWeight(own, step_ratio)
                if config.quantizer == "dorefa"
                else LsqWeight(steps[name], config.weight_bits, own, step_ratio)
            )
            parametrize.register_parametrization(layer, "weight", weight)
            if refit and bits.weight is not None:
                grid = GRIDS[config.quantizer]
                step = step_ratio * best_step(layer.weight.detach(), bits.weight, grid)
                parametrize.register_parametrization(layer, "weight", FakeQuantize(step, bits.weight, grid))
        if bits.activation is not None:
            replace = _activation_quantizer(config.quantizer, bits.activation, steps, set(sites))
            stack.enter_context(activations.replaced(model, replace))
        yield model


def _activation_quantizer(quantizer: str, bits: int, steps: Steps, sites: set[str]) -> Callable[[str, Tensor], Tensor]:
    high = UNSIGNED.highest(bits)
    unit = torch.tensor(1 / high)  # DoReFa clips to [0, 1]

    def replace(site: str, output: Tensor) -> Tensor:
        if site not in sites:
            return output
        step, scale = (unit, 1.0) if quantizer == "dorefa" else (steps[site], (output[0].numel() * high) ** -0.5)
        return LearnedStepQuantize.apply(output, step, 0, high, scale)

    return replace
