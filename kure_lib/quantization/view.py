"""A quantized network is a view of the full-precision one, for as long as a `with` block lasts."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

from kure_lib.networks import activations
from kure_lib.networks.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    LatentWeight,
    evaluating,
    followed,
    latent_weight,
    quantized_layers,
    restored,
)  # fmt: skip
from kure_lib.paths import KureError, check_known
from kure_lib.quantization import accumulators, calibration, equalization, layerwise, perturbations, transforms
from kure_lib.quantization.spec import TRAINED_RULES, QuantizationSpec
from kure_lib.tensors.grids import Format, Grid
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step, power_of_two


class FakeQuantize(LatentWeight):
    """The parametrization W → Q_Δ(W); with `correction`, each output channel keeps its mean and variance."""

    def __init__(self, step: Tensor, bits: int, grid: Format, correction: bool = False):
        super().__init__()
        self.bits, self.grid, self.correction = bits, grid, correction
        self.register_buffer("step", step)
        self._seen: tuple | None = None
        self._kept: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() or weight.is_inference() or self.step.is_inference():
            return self._levels(weight)  # to be differentiated, or without a version to know it by
        seen = weight.data_ptr(), weight._version, self.step._version
        if seen != self._seen:  # quantize anew only what moved
            self._seen, self._kept = seen, self._levels(weight)
        return self._kept

    def _levels(self, weight: Tensor) -> Tensor:
        levels = quantize(weight, self.step, self.bits, self.grid)
        return corrected(levels, weight) if self.correction else levels

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.grid.name}, step {tuple(self.step.shape)}"


class Values(LatentWeight):
    """The parametrization that gives a layer other weights, whatever it holds itself."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = values

    def forward(self, weight: Tensor) -> Tensor:
        return self.values


@contextmanager
def served(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model computing with other weights, by the name of their layer; nothing is written into it.

    Raises `KureError` if one of the layers is quantized already.
    """
    layers = quantized_layers(model)
    with restored({name: layers[name] for name in weights}):
        for name, values in weights.items():
            parametrize.register_parametrization(layers[name], "weight", Values(values))
        yield model


def corrected(levels: Tensor, weight: Tensor, stored: Tensor | None = None) -> Tensor:
    """The quantized weights, shifted and scaled so that each output channel has the mean and variance it had.

    [C, …], all. A batch norm or the layer's own scale can absorb the two numbers a channel (Banner et al. 2019).
    A channel that fell on a single level is only shifted. With `stored` the two numbers, found for `levels`, are
    applied to what a faulty memory holds of them.
    """
    dims = tuple(range(1, weight.dim()))
    center, level_center = weight.mean(dims, keepdim=True), levels.mean(dims, keepdim=True)
    spread = (levels - level_center).square().sum(dims, keepdim=True)
    scale = ((weight - center).square().sum(dims, keepdim=True) / spread).sqrt()
    stored = levels if stored is None else stored
    return (stored - level_center) * torch.where(spread > 0, scale, 1.0) + center


def folded(model: nn.Module) -> nn.Module:
    """A copy of the model in which every batch norm that alone reads a convolution is folded into it.

    Folding multiplies each output channel by a scale of its own: per tensor, the weights are no longer
    distributed as they were. Raises `KureError` if the network cannot be followed from layer to layer.
    """
    model = copy.deepcopy(model).eval()
    calls = [node for node in followed(model, "leave fold_batch_norm out").nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    for node, norm in ((node, next(iter(node.users))) for node in calls if len(node.users) == 1):
        if norm in calls and uses[node.target] == uses[norm.target] == 1:
            layer, follower = model.get_submodule(node.target), model.get_submodule(norm.target)
            if isinstance(layer, CONVOLUTIONS) and isinstance(follower, BATCH_NORMS) and follower.track_running_stats:
                model.set_submodule(node.target, fuse_conv_bn_eval(layer, follower))
                model.set_submodule(norm.target, nn.Identity())
    return model


def weight_steps(layers: Mapping[str, nn.Module], spec: QuantizationSpec) -> dict[str, Tensor]:
    """The step of each layer's full-precision weights, before any ratio, by the rule, grid and scope of `spec`.

    Raises `KureError` naming the layer if its weights cannot be quantized.
    """
    chosen = {}
    for name, layer in layers.items():
        try:
            chosen[name] = best_step(latent_weight(layer), spec.weight_bits, spec.grid, spec.step_rule, spec.scope)
        except KureError as error:
            raise KureError(f"Layer '{name}' cannot be quantized: {error}") from None
    return chosen


def chosen_steps(
    model: nn.Module, spec: QuantizationSpec, images: Tensor | None = None, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The step of every layer and activation site that `spec` quantizes, before any ratio.

    Args:
        model: Network in full precision.
        spec: How it is quantized.
        images: Calibration images [N, C, H, W]; activations need at least one.
        given: Steps that need not be chosen.

    Raises:
        KureError: A layer is unknown or what a step is given for, nothing can be quantized, or weights or activations
            are such that no step suits them.
    """
    steps = dict(given or {})
    chosen = {} if spec.weight_bits is None else quantized_layers(model, spec.layers)
    sites = [] if spec.activation_bits is None else activations.quantized_sites(model, images[:1])
    for name in steps:
        check_known("layer or site that is quantized", name, [*chosen, *dict.fromkeys(sites)])
    if not set(sites) <= steps.keys():
        observed = calibration.observe(model, images)
        grid = activations.grid(model)
        steps = calibration.activation_steps(observed, spec.activation_bits, spec.step_rule, grid) | steps
    missing = {name: layer for name, layer in chosen.items() if name not in steps}
    return steps | (weight_steps(missing, spec) if missing else {})


@contextmanager
def quantized(
    model: nn.Module,
    spec: QuantizationSpec | None = None,
    images: Tensor | None = None,
    steps: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> Iterator[nn.Module]:
    """The model, quantized as `spec` says, for as long as the `with` block lasts.

    Nothing is written into the model: after the block, also when an exception leaves it, it is what it was.

    Args:
        model: Network in full precision; with `fold_batch_norm` or `transform` the view is of a changed copy.
        spec: How it is quantized; its fields may be given as keywords instead, as in `weight_bits=3`.
        images: Calibration images [N, C, H, W] for activations, batch norms and reconstruction.
        steps: Steps of layers and activation sites before any ratio, instead of choosing them by the rule of `spec`.
            Where no ratio is on it, a step changed in place takes effect at the next forward pass.

    Raises:
        KureError: A layer is unknown, weights cannot be quantized, a step is not above zero and finite or does not suit
            its weights, or calibration images are needed and missing.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 3))
    >>> with quantized(model, weight_bits=1) as view:
    ...     view[1].weight.unique().numel()
    2
    """
    if spec is None:
        spec = QuantizationSpec(**fields)
    elif fields or not isinstance(spec, QuantizationSpec):
        raise KureError("Quantize by a QuantizationSpec or by its fields as keywords, such as weight_bits=4.")
    needs_images = spec.activation_bits is not None or spec.reestimate_batch_norm or spec.reconstruction
    if needs_images and (images is None or not len(images)):
        raise KureError("Activations, batch norms and reconstruction are calibrated on images: give at least one.")
    if spec.rounding or spec.step_rule in TRAINED_RULES:
        raise KureError(f"The specification {spec.key} is about how a run was trained or stored: evaluate its record.")
    model = folded(model) if spec.fold_batch_norm else model
    model = equalization.equalized(model) if spec.equalized else model
    model = transforms.transformed(model, spec.transform, images) if spec.transform else model
    steps = chosen_steps(model, spec, images, steps)
    with ExitStack() as stack:
        if needs_images:
            stack.enter_context(evaluating(model))
        if spec.activation_bits is not None:
            first, *inner, last = activations.sites(model, images[:1])
            site_steps = {site: _final(site, steps[site], spec.activation_ratio, spec) for site in set(inner)}
        if spec.weight_bits is not None:
            chosen = quantized_layers(model, spec.layers)
            stack.enter_context(restored(chosen))
            full = copy.deepcopy(model) if spec.reconstruction else model
            final = {}
            for name, layer in chosen.items():
                ratio = spec.step_ratio * _step_factor(name, spec)
                step = final[name] = _final(name, steps[name], ratio, spec).to(layer.weight.device)
                if not _broadcasts(step, layer.weight):
                    raise KureError(
                        f"A step of shape {tuple(step.shape)} does not suit the weights {tuple(layer.weight.shape)} "
                        f"of layer '{name}': give one number, or [C, 1, …, 1]."
                    )
                if spec.reconstruction:  # in the network as it stands, with all layers before this one quantized
                    weights = Values(layerwise.rounded(model, full, name, step, images, spec))
                elif spec.perturbation == "stochastic":
                    weights = Values(_at_random(name, layer.weight.detach(), step, spec))
                else:
                    weights = FakeQuantize(step, spec.weight_bits, spec.grid, spec.bias_correction)
                parametrize.register_parametrization(layer, "weight", weights)
        if spec.activation_bits is not None:
            quantizer = _quantizer(site_steps, spec.activation_bits, activations.grid(model), {first, last})
            stack.enter_context(activations.replaced(model, quantizer))
        if spec.reestimate_batch_norm:
            batches, which = calibration.parts(images), spec.reestimate_batch_norm
            stack.enter_context(calibration.reestimated_batch_norm(model, batches, which))
        if spec.perturbation and spec.perturbation.startswith("flips"):  # in memory, after all else is done
            for name, layer in chosen.items():
                parametrize.register_parametrization(layer, "weight", Values(_flipped(name, layer, spec)))
        if spec.accumulator_bits is not None:
            stack.enter_context(accumulators.narrow(chosen, final, spec.accumulator_bits))
        yield model


def _step_factor(name: str, spec: QuantizationSpec) -> float:
    kind, ratio = perturbations.parse(spec.perturbation) if spec.perturbation else ("", 1.0)
    return perturbations.step_factor(ratio, perturbations.generator(spec.draw, name)) if kind == "steps" else 1.0


def _at_random(name: str, weight: Tensor, step: Tensor, spec: QuantizationSpec) -> Tensor:
    rng, grid = perturbations.generator(spec.draw, name), cast(Grid, spec.grid)
    levels = perturbations.stochastic(weight, step, spec.weight_bits, grid, rng)
    return corrected(levels, weight) if spec.bias_correction else levels


def _flipped(name: str, layer: nn.Module, spec: QuantizationSpec) -> Tensor:
    """The weights of a quantized layer after its codes have flipped bits; corrected as if none had."""
    rng, grid = perturbations.generator(spec.draw, name), cast(Grid, spec.grid)
    weight, step = latent_weight(layer).detach(), layer.parametrizations.weight[0].step
    levels, (_, rate) = quantize(weight, step, spec.weight_bits, grid), perturbations.parse(spec.perturbation)
    wrong = perturbations.flipped(levels, step, spec.weight_bits, grid, rate, rng)
    return corrected(levels, weight, wrong) if spec.bias_correction else wrong


def _final(name: str, step: Tensor, ratio: float, spec: QuantizationSpec) -> Tensor:
    if not (isinstance(step, Tensor) and step.is_floating_point()):
        raise KureError(f"The step of '{name}' is {step!r}: give a tensor of floating-point numbers.")
    step = step if ratio == 1 else step * ratio
    step = power_of_two(step) if spec.power_of_two else step
    wrong = step[~((step >= torch.finfo(step.dtype).tiny) & step.isfinite())]  # a smaller one counts as zero in places
    if len(wrong):
        raise KureError(f"The step of '{name}' is {wrong[0]:g}: give steps and ratios whose product is above zero and "
                        "finite.")  # fmt: skip
    return step


def _broadcasts(step: Tensor, weight: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(step.shape, weight.shape) == weight.shape
    except RuntimeError:
        return False


def _quantizer(
    site_steps: Mapping[str, Tensor], bits: int, grid: Grid, ends: set[str]
) -> Callable[[str, Tensor], Tensor]:
    def replace(site: str, output: Tensor) -> Tensor:
        if site in ends:
            return output
        if site not in site_steps:
            raise KureError(f"The activations at '{site}' were never calibrated: the calibration images do not reach "
                            "them; give images that do.")  # fmt: skip
        step = site_steps[site].to(output.device, torch.float32)
        values = quantize(output.float(), step, bits, grid).to(output.dtype)
        values.step = step  # for a layer that sums codes
        return values

    return replace
