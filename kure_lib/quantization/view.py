"""A quantized network is a view of the full-precision one, for as long as a `with` block lasts."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

from kure_lib.networks import activations
from kure_lib.networks.layers import latent_weight, quantized_layers, restored
from kure_lib.paths import KureError
from kure_lib.quantization import calibration
from kure_lib.tensors.grids import MID_RISE, UNSIGNED, Format, check_bits
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step
from kure_lib.tensors.steps import power_of_two as nearest_power_of_two

BATCH = 256  # images at a time for new batch-norm statistics
TRAINED_METHODS = ("dorefa", "lsq")  # steps that quantization-aware training left (see `qat`)


class QuantizationSpec(BaseModel):
    """How a network is quantized for an evaluation; the defaults are full precision.

    The fields are those of `quantized`; `calibration` counts the training images, from the first on, from which
    activations, batch-norm statistics and LAPQ's steps are learned. The methods `dorefa` and `lsq` stand for the
    quantizer that a network was trained with. `master` is the way, one of `master.METHODS`, in which weights of
    `weight_bits` are made from an 8-bit copy instead of from the network's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int | None = Field(None, ge=1, le=16)
    method: str = "mse"
    grid: str = "mid_rise"
    step_ratio: float = Field(1.0, gt=0)
    per_channel: bool = False
    block: int | None = Field(None, ge=1)
    activation_bits: int | None = Field(None, ge=1, le=16)
    activation_ratio: float = Field(1.0, gt=0)
    power_of_two: bool = False
    bias_correction: bool = False
    fold_batch_norm: bool = False
    reestimate_batch_norm: bool = False
    calibration: int | None = Field(None, ge=1)
    master: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_calibration(cls, fields: dict) -> dict:
        """Where calibration images are needed, how many of the first training images they are stands in the key."""
        needed = fields.get("activation_bits") or fields.get("reestimate_batch_norm") or fields.get("method") == "lapq"
        needed = needed and fields.get("method") not in TRAINED_METHODS
        return {"calibration": calibration.IMAGES, **fields} if needed else fields

    @property
    def key(self) -> str:
        """The fields that are not at their defaults, as JSON: the name of the evaluation in its record."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)


class FakeQuantize(nn.Module):
    """The parametrization W → Q_Δ(W); with `correction`, each output channel keeps its mean and variance."""

    def __init__(self, step: Tensor, bits: int, grid: Format, correction: bool = False):
        super().__init__()
        self.bits, self.grid, self.correction = bits, grid, correction
        self.register_buffer("step", step)
        self._seen, self._kept = None, None

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


def corrected(levels: Tensor, weight: Tensor) -> Tensor:
    """The quantized weights, shifted and scaled so that each output channel has the mean and variance it had.

    [C, …], both. A batch norm or the layer's own scale can absorb the two numbers a channel (Banner et al. 2019).
    A channel that fell on a single level is only shifted.
    """
    dims = tuple(range(1, weight.dim()))
    center, level_center = weight.mean(dims, keepdim=True), levels.mean(dims, keepdim=True)
    spread = (levels - level_center).square().sum(dims, keepdim=True)
    scale = ((weight - center).square().sum(dims, keepdim=True) / spread).sqrt()
    return (levels - level_center) * torch.where(spread > 0, scale, 1.0) + center


def folded(model: nn.Module) -> nn.Module:
    """A copy of the model in which every batch norm is folded into the convolution before it.

    Folding multiplies each output channel by a scale of its own: per tensor, the weights are no longer
    distributed as they were.
    """
    model = copy.deepcopy(model).eval()
    previous = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and isinstance(previous and previous[1], nn.Conv2d):
            model.set_submodule(previous[0], fuse_conv_bn_eval(previous[1], module))
            model.set_submodule(name, nn.Identity())
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            previous = name, module
    return model


def weight_steps(
    layers: Mapping[str, nn.Module], bits: int, grid: Format = MID_RISE, method: str = "mse",
    per_channel: bool = False, block: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The step of each layer's weights, as they are in full precision, chosen by `method` (see `steps.best_step`).

    Raises `KureError` naming the layer if its weights cannot be quantized.
    """
    chosen = {}
    for name, layer in layers.items():
        try:
            chosen[name] = best_step(latent_weight(layer), bits, grid, method, per_channel, block)
        except KureError as error:
            raise KureError(f"Layer '{name}' cannot be quantized: {error}") from None
    return chosen


@contextmanager
def quantized(
    model: nn.Module,
    weight_bits: int | None,
    method: str = "mse",
    grid: Format = MID_RISE,
    step_ratio: float = 1.0,
    layers: Iterable[str] | None = None,
    per_channel: bool = False,
    block: int | None = None,
    activation_bits: int | None = None,
    activation_ratio: float = 1.0,
    images: Tensor | None = None,
    power_of_two: bool = False,
    bias_correction: bool = False,
    reestimate_batch_norm: bool = False,
    steps: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """The model with the weights of its layers, and what its ReLUs put out, quantized; None leaves either as it is.

    The step of each layer, channel or `block` is chosen by `method` (see `steps.best_step`) and multiplied by
    `step_ratio`, the Δ/Δ̃ of the paper's Fig. 4; `power_of_two` then rounds it. `layers` names the layers; the
    default is all but the first and the last. Activations are quantized on the `UNSIGNED` grid, with steps
    calibrated on `images` [N, C, H, W] by the same method and multiplied by `activation_ratio`. `steps` gives steps
    of layers and sites instead of choosing them. `bias_correction` is that of `corrected`, `reestimate_batch_norm`
    that of `calibration.reestimated_batch_norm`. A step of `steps` that is changed in place takes effect at the
    next forward pass. Nothing is written into the model: after the block, also when an exception leaves it, it is
    what it was. Raises `KureError` for an unknown layer, for weights that cannot be
    quantized, and where calibration images are needed and there are none.
    """
    chosen = _chosen(model, layers)
    for ratio in (step_ratio, activation_ratio):
        if not ratio > 0:
            raise KureError(f"The step ratio must be above zero, not {ratio}.")
    for bits in {weight_bits, activation_bits} - {None}:
        check_bits(bits)
    if (activation_bits or reestimate_batch_norm) and (images is None or not len(images)):
        raise KureError("Activations and batch norms are calibrated on images: give at least one.")
    given = dict(steps or {})

    def final(step: Tensor, ratio: float) -> Tensor:
        step = step if ratio == 1 else step * ratio
        return nearest_power_of_two(step) if power_of_two else step

    with ExitStack() as stack:
        if activation_bits is not None:  # before the weights change
            sites = set(activations.quantized_sites(model, images[:1]))
            if not sites <= given.keys():
                observed = calibration.observe(model, images)
                given = calibration.activation_steps(observed, activation_bits, method) | given
            site_steps = {site: final(given[site], activation_ratio) for site in sites}
        if weight_bits is not None:
            missing = {name: layer for name, layer in chosen.items() if name not in given}
            given |= weight_steps(missing, weight_bits, grid, method, per_channel, block)
            stack.enter_context(restored(chosen))
            for name, layer in chosen.items():
                step = final(given[name], step_ratio).to(layer.weight.device)
                fake_quantize = FakeQuantize(step, weight_bits, grid, bias_correction)
                parametrize.register_parametrization(layer, "weight", fake_quantize)
        if activation_bits is not None:
            first, *_, last = activations.sites(model, images[:1])
            quantizer = _quantizer(site_steps, activation_bits, {first, last})
            stack.enter_context(activations.replaced(model, quantizer))
        if reestimate_batch_norm:
            stack.enter_context(calibration.reestimated_batch_norm(model, images.split(BATCH)))
        yield model


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    chosen = quantized_layers(model)
    if layers is None:
        return chosen
    layers = list(layers)
    if unknown := [name for name in layers if name not in chosen]:
        raise KureError(f"'{unknown[0]}' is not a layer that is quantized: choose from {', '.join(chosen)}.")
    return {name: chosen[name] for name in layers}


def _quantizer(site_steps: Mapping[str, Tensor], bits: int, ends: set[str]):
    def replace(site: str, output: Tensor) -> Tensor:
        if site in ends:
            return output
        if site not in site_steps:
            raise KureError(f"The activations at '{site}' were never calibrated: the calibration images do not reach "
                            "them; give images that do.")  # fmt: skip
        step = site_steps[site].to(output.device, torch.float32)
        return quantize(output.float(), step, bits, UNSIGNED).to(output.dtype)

    return replace
