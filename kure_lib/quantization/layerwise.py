"""Rounding that looks at what a layer does with its inputs, layer after layer.

A convolution multiplies each patch x of its input by its weights, written as a matrix W with a row for each output
channel. So what other weights Ŵ change in its output on calibration images is known from the moments of the patches:
E‖(Ŵ − W)x‖² = tr (Ŵ − W) H (Ŵ − W)ᵀ with H = E[x xᵀ]. Neither method of rounding needs to see an image again.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kure_lib.networks import device
from kure_lib.networks.layers import evaluating
from kure_lib.paths import KureError
from kure_lib.quantization import adaround, gptq
from kure_lib.quantization.spec import QuantizationSpec

BATCH = 64  # images at a time


@torch.inference_mode(False)
@torch.no_grad()
def rounded(
    model: nn.Module, full: nn.Module, name: str, step: Tensor, images: Tensor, spec: QuantizationSpec
) -> Tensor:
    """The weights of a layer on the grid of `spec`, rounded by `spec.reconstruction`.

    Args:
        model: The network, whose earlier layers are quantized already.
        full: The same network in full precision; only AdaRound looks at it.
        name: The layer.
        step: Its step, of any shape that broadcasts against the weights.
        images: Calibration images [N, C, H, W].
        spec: How the network is quantized.

    Raises:
        KureError: The images do not reach the layer.
    """
    layer = model.get_submodule(name)
    weight = layer.weight.detach()
    matrix, steps = (_matrix(layer, each) for each in (weight, step.expand_as(weight).clone()))
    seen = inputs(model, name, images)
    given = matrix, steps, spec.weight_bits, spec.grid, moment(layer, seen, seen)
    if spec.reconstruction == "gptq":
        levels = gptq.rounded(*given)
    else:
        levels = adaround.rounded(*given, moment(layer, inputs(full, name, images), seen), spec.iterations)
    return torch.empty_like(weight).copy_(levels.reshape(weight.shape))  # in the layout of the weights


class _Reached(Exception):
    """What is wanted has been seen: the rest of the network need not be computed."""


def inputs(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a layer of the model, in evaluation mode, gets for a batch of images, [N, …] in float32.

    A layer that is used several times is looked at in its first use. Raises `KureError` if there is none.
    """
    seen: list[Tensor] = []

    def note(layer: nn.Module, arguments: tuple) -> None:
        seen.append(arguments[0].float())
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    with evaluating(model), handle:
        for batch in images.split(BATCH):
            try:
                with device.autocast():
                    model(batch)
            except _Reached:
                continue
            raise KureError(f"The calibration images do not reach layer '{name}', which is to be rounded by what it "
                            "sees: leave it out of layers, or give images that do.")  # fmt: skip
    return torch.cat(seen)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each weight of a layer is multiplied by at each position of its output: [groups, positions, columns].

    `x` is the input of a convolution of any dimension, [N, C, …], or of a linear layer, [N, …, C], which has one group.
    """
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = pad(x, layer._reversed_padding_repeated_twice, mode)
    dims = len(layer.kernel_size)
    for dim, size, stride, dilation in zip(
        range(2, 2 + dims), layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + dims).unflatten(1 + dims, (layer.groups, -1))  # [N, positions…, groups, channels, kernel…]
    return x.flatten(2 + dims).flatten(0, dims).transpose(0, 1)


def moment(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """E[x yᵀ] over the patches of two inputs of a layer, float64 [groups, columns, columns]."""
    total, count = torch.zeros((), dtype=torch.float64, device=x.device), 0
    for x_batch, y_batch in zip(x.split(BATCH), y.split(BATCH), strict=True):
        left, right = patches(layer, x_batch), patches(layer, y_batch)
        total, count = total + (left.mT @ right).double(), count + left.shape[1]
    return total / count


def _matrix(layer: nn.Module, values: Tensor) -> Tensor:
    """Values of the shape of a layer's weights as [groups, rows, columns]."""
    return values.flatten(1).unflatten(0, (getattr(layer, "groups", 1), -1))
