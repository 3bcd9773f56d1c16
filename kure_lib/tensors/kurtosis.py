"""Kurt[X] = E[((X − μ)/σ)⁴], with a gradient in closed form.

Written with autograd, the kurtosis of n weights reads and writes some fifteen arrays of n numbers.
Both directions are closed, so two sweeps over the weights are enough: one gathers the moments, one writes

    dK/dw = 4/(n·m₂²) · ((w − μ)³ − m₃ − K·m₂·(w − μ)),

at about the speed of copying them. Moments are taken block by block about the block's own mean and
moved to the common mean afterwards, so a mean far from zero costs no digits.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kure_lib.paths import KureError

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
    value = _values([x], channels)
    if not torch.isfinite(value).all():
        raise KureError("Kurtosis is not defined for zero variance (or one too small or large for "
                        f"{str(x.dtype).removeprefix('torch.')}) or for infinite or NaN values.")  # fmt: skip
    value = value if per_channel else value.squeeze(0)
    return value * ((n - 1) / n) ** 2 if unbiased else value


def kurtoses(tensors: Sequence[Tensor]) -> Tensor:
    """The kurtosis of each of L tensors of one type, [L]; NaN, not an error, where it is not defined.

    A net has many small tensors: one node of the graph for all of them costs less than the work itself.
    """
    return _values(tensors, channels=1)


def _values(tensors: Sequence[Tensor], channels: int) -> Tensor:
    """Kurtosis of each tensor, or of each of the equal parts of one; NaN where it is not defined."""
    kinds = {(x.device.type, x.dtype) for x in tensors}
    if kinds == {("cpu", torch.float32)} or kinds == {("cpu", torch.float64)}:
        return _Kurtosis.apply(channels, *(x if _is_dense(x) else x.contiguous() for x in tensors))
    return torch.cat([_by_formula(x.float().reshape(channels, -1)) for x in tensors])


def _by_formula(rows: Tensor) -> Tensor:
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
            _write_gradient(_in_memory_order(x), rows, _in_memory_order(gradient))
        return None, *gradients


def _moments(x: Tensor, channels: int) -> np.ndarray:
    """Mean, m₂, m₃, m₄ of each of the equal parts of a dense tensor: [channels, 4].

    Two calls, as compiled into one the sums would be vectorized in one way where the compiler has just seen
    them and in another where they come from its cache, and no run would repeat another bit for bit.
    """
    length = BLOCK if channels == 1 else x.numel() // channels
    return _central_moments(_power_sums(_in_memory_order(x), length), channels)


def _varies(mean, m2, dtype):
    """Whether the variance is more than what rounding makes of equal values, and its square no underflow."""
    limits = torch.finfo(dtype)
    return (m2 > (limits.eps * mean) ** 2) & (m2 * m2 > limits.tiny)


FAST = {"reassoc", "contract", "nsz", "arcp"}  # lets sums be vectorized; NaNs and infinities stay what they are


@numba.njit(cache=True, fastmath=FAST)
def _power_sums(x, length):
    """For each `length` values: how many, a centre c close to their mean, Σ(x − c)ᵏ for k = 1 … 4; [blocks, 6]."""
    number = x.dtype.type
    sums = np.empty(((x.size + length - 1) // length, 6))
    for k in range(len(sums)):
        block = x[k * length : (k + 1) * length]
        s1, s2, s3, s4 = number(0), number(0), number(0), number(0)
        for i in range(block.size):
            s1 += block[i]
        center = number(s1 / block.size)
        s1 = number(0)
        for i in range(block.size):
            d = block[i] - center
            square = d * d
            s1 += d
            s2 += square
            s3 += square * d
            s4 += square * square
        sums[k, 0], sums[k, 1] = block.size, center
        sums[k, 2], sums[k, 3], sums[k, 4], sums[k, 5] = s1, s2, s3, s4
    return sums


@numba.njit(cache=True, error_model="numpy")
def _central_moments(sums, channels):
    """Mean, m₂, m₃, m₄ of each channel, [channels, 4], from the power sums of its blocks."""
    blocks = len(sums) // channels
    moments = np.zeros((channels, 4))
    for channel in range(channels):
        of_channel, result = sums[channel * blocks : (channel + 1) * blocks], moments[channel]
        n, total = 0.0, 0.0
        for size, center, s1, _, _, _ in of_channel:
            n += size
            total += size * center + s1
        mean = total / n
        for size, center, s1, s2, s3, s4 in of_channel:
            d = center - mean
            result[1] += s2 + 2 * d * s1 + size * d**2
            result[2] += s3 + 3 * d * s2 + 3 * d**2 * s1 + size * d**3
            result[3] += s4 + 4 * d * s3 + 6 * d**2 * s2 + 4 * d**3 * s1 + size * d**4
        result[1:] /= n
        result[0] = mean
    return moments


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _write_gradient(x, coefficients, out):
    """out = scale · (d·(d² − K·m₂) − m₃) with d = x − μ and one row of coefficients for each channel."""
    length = x.size // len(coefficients)
    for k in range(len(coefficients)):
        center, rest, bend, shift, scale = coefficients[k]  # μ in two parts, so that d keeps its digits
        source, target = x[k * length : (k + 1) * length], out[k * length : (k + 1) * length]
        for i in range(length):
            d = (source[i] - center) - rest
            target[i] = scale * (d * (d * d - bend) - shift)


def _is_dense(x: Tensor) -> bool:
    """Whether the values lie in memory without gaps, one part of the first dimension after the other."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _in_memory_order(x: Tensor) -> np.ndarray:
    """The values of a dense tensor as they lie in memory: a flat view, no copy."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()
