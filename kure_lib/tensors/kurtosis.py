"""Kurt[X] = E[((X − μ)/σ)⁴], with a gradient in closed form.

Written with autograd, the kurtosis of n weights reads and writes some fifteen arrays of n numbers.
Both directions are closed, so two sweeps over the weights are enough: one gathers the moments, one writes

    dK/dw = 4/(n·m₂²) · ((w − μ)³ − m₃ − K·m₂·(w − μ)),

at about the speed of copying them. Moments are taken block by block about the block's own mean and
moved to the common mean afterwards, so a mean far from zero costs no digits. numba compiles these sweeps
for the processor; on a GPU, in a compiled step, in half precision and without numba autograd
differentiates the formula.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kure_lib.paths import KureError

try:
    from kure_lib.tensors import compiled
except ImportError:  # numba makes it faster, and is not required
    compiled = None

BLOCK = 16_384  # weights in a block: 64 KiB, small enough to be read twice from the cache


def kurtosis(x: Tensor, unbiased: bool = False, per_channel: bool = False) -> Tensor:
    """Kurt[X] of a tensor, or of each of its channels (paper, Sec. 4).

    `x` is a floating-point tensor of any shape; the result has no dimensions, or is [C] with
    `per_channel` (C = size of the first dimension). `unbiased` divides by the σ that has n − 1 for n,
    as the authors' code does: a factor of ((n − 1)/n)². Uniform 1.8, normal 3, Laplace 6.
    Differentiable once. Raises `KureError` where kurtosis is not defined: fewer than two values,
    zero variance, infinities or NaNs.

    >>> round(kurtosis(torch.arange(1_000.0)).item(), 3)
    1.8
    """
    channels = x.shape[0] if per_channel and x.dim() else 1
    n = x.numel() // max(channels, 1)
    if n < 2:
        raise KureError(f"Kurtosis needs at least two values; the tensor has shape {tuple(x.shape)}.")
    value = kurtoses([x], channels)
    if not torch.isfinite(value).all():
        raise KureError("Kurtosis is not defined for zero variance (or one too small or large for "
                        f"{str(x.dtype).removeprefix('torch.')}) or for infinite or NaN values.")  # fmt: skip
    value = value if per_channel else value.squeeze(0)
    return value * ((n - 1) / n) ** 2 if unbiased else value


def kurtoses(tensors: Sequence[Tensor], channels: int = 1) -> Tensor:
    """The kurtosis of each of L tensors of one type, or of each of the equal parts of each: [L · channels].

    Where it is not defined it is NaN, not an error. A net has many small tensors: one node of the graph for all of them
    costs less than the work itself.
    """
    tensors = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors]  # of FSDP, each rank holds a part
    kinds = {(x.device.type, x.dtype) for x in tensors}
    served = kinds == {("cpu", torch.float32)} or kinds == {("cpu", torch.float64)}
    # FSDP frees the storage of a whole weight, which a view in numpy would forbid.
    elsewhere = torch.compiler.is_compiling() or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )
    if compiled and served and not elsewhere:
        return _Kurtosis.apply(channels, *(x if _is_dense(x) else x.contiguous() for x in tensors))
    return torch.cat([_by_formula(x.reshape(channels, -1)) for x in tensors])


def _by_formula(rows: Tensor) -> Tensor:
    """Of each row, in torch alone; moments of half precision are computed in float32."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    mean = rows.mean(1, keepdim=True)
    m2, m4 = ((rows - mean) ** 2).mean(1), ((rows - mean) ** 4).mean(1)
    return torch.where(_varies(mean[:, 0], m2, rows.dtype), m4 / m2**2, math.nan)


class _Kurtosis(torch.autograd.Function):
    """The kurtosis of each of the C equal parts of each of L dense tensors, [L·C]."""

    @staticmethod
    def forward(ctx: Any, channels: int, *tensors: Tensor) -> Tensor:
        mean, m2, m3, m4 = np.concatenate([_moments(x, channels) for x in tensors]).T
        with np.errstate(all="ignore"):  # a value that is not finite is reported by the caller
            value = np.where(_varies(mean, m2, tensors[0].dtype), m4 / m2**2, math.nan)
        ctx.save_for_backward(*tensors)
        ctx.moments = mean, m2, m3, value
        return torch.from_numpy(value).to(tensors[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple:
        tensors, (mean, m2, m3, value) = ctx.saved_tensors, ctx.moments
        channels = len(mean) // len(tensors)
        length = np.repeat([x.numel() / channels for x in tensors], channels)
        scale = 4 / length * grad_value.double().numpy() / m2**2
        gradients = [torch.empty_like(x) for x in tensors]
        number = _in_memory_order(tensors[0]).dtype
        center = mean.astype(number)
        coefficients = np.stack([center, mean - center, value * m2, m3, scale], axis=1).astype(number)
        for k, (x, gradient) in enumerate(zip(tensors, gradients, strict=True)):
            rows = coefficients[k * channels : (k + 1) * channels]
            compiled.write_gradient(_in_memory_order(x), rows, _in_memory_order(gradient))
        return None, *gradients


def _moments(x: Tensor, channels: int) -> np.ndarray:
    """Mean, m₂, m₃, m₄ of each of the equal parts of a dense tensor: [channels, 4].

    Two calls, as compiled into one the sums would be vectorized in one way where the compiler has just seen
    them and in another where they come from its cache, and no run would repeat another bit for bit.
    """
    length = BLOCK if channels == 1 else x.numel() // channels
    return compiled.central_moments(compiled.power_sums(_in_memory_order(x), length), channels)


def _varies(mean, m2, dtype):
    """Whether the variance is more than what rounding makes of equal values, and its square no underflow."""
    limits = torch.finfo(dtype)
    return (m2 > (limits.eps * mean) ** 2) & (m2 * m2 > limits.tiny)


def _is_dense(x: Tensor) -> bool:
    """Whether the values lie in memory without gaps, one part of the first dimension after the other."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _in_memory_order(x: Tensor) -> np.ndarray:
    """The values of a dense tensor as they lie in memory: a flat view, no copy."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()
