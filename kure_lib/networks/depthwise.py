"""Kernels that make small networks fast to train on a processor: depthwise convolutions, and a gradient's layout."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """A 3 × 3 depthwise convolution that is fast to train on a processor.

    Two of oneDNN's kernels are slow there, by 10 to 300 times: the gradient of the weights for maps of
    2 × 2, done here as nine products of shifted maps, and in bfloat16 the gradient of the input for
    stride 2, done here in float32. Elsewhere this is `nn.Conv2d`.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.in_channels, layer.out_channels, 3, layer.stride, 1, groups=layer.groups, bias=False)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.bias is not None:  # a bias comes from a folded batch norm: no training
            return super().forward(x)
        autocast = torch.is_autocast_enabled("cpu")
        return _Depthwise.apply(x.bfloat16() if autocast else x, self.weight, self.stride[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.conv2d(x, weight.to(x.dtype), None, stride, 1, 1, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wide = torch.float32 if ctx.stride == 2 else x.dtype
        grad_x, _ = _convolution_backward(grad.to(wide), x.to(wide), weight.to(wide), ctx.stride, (True, False))
        if ctx.stride == 1 and x.shape[-1] <= SMALL_MAP:
            return grad_x.to(x.dtype), _shifted_products(grad, x), None
        _, grad_weight = _convolution_backward(grad, x, weight.to(x.dtype), ctx.stride, (False, True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


SMALL_MAP = 2  # pixels a side


def _convolution_backward(grad, x, weight, stride, wanted):
    pair, padding, dilation = (stride, stride), (1, 1), (1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, pair, padding, dilation, False, (0, 0), len(weight), (*wanted, False)
    )[:2]


def _shifted_products(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient [C, 1, 3, 3] of a stride-1 depthwise filter: tap (i, j) sees x moved by (i − 1, j − 1)."""
    size = x.shape[-1]
    inside = {-1: (slice(1, None), slice(None, -1)), 0: (slice(None),) * 2, 1: (slice(None, -1), slice(1, None))}
    result = x.new_zeros(x.shape[1], 1, 3, 3, dtype=torch.float32)
    for i, j in product((-1, 0, 1), repeat=2):
        if abs(i) < size and abs(j) < size:
            (rows, x_rows), (columns, x_columns) = inside[i], inside[j]
            overlap = grad[:, :, rows, columns] * x[:, :, x_rows, x_columns]
            result[:, 0, i + 1, j + 1] = overlap.sum((0, 2, 3), dtype=torch.float32)
    return result


class DenseGradient(nn.Module):
    """The identity; the gradient that passes it is laid out in memory as the images are.

    The gradient of a mean over positions is one number repeated with stride zero, on which the backward
    passes of the layers before it fall back to code several times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return x
