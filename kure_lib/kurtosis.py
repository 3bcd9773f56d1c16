"""Kurt[X] = E[((X − μ)/σ)⁴], with a gradient in closed form.

Written with autograd, the kurtosis of n weights reads and writes some fifteen arrays of n numbers.
Both directions are closed, so two sweeps over the weights are enough: one gathers the moments, one writes

    dK/dw = 4/(n·m₂²) · ((w − μ)³ − m₃ − K·m₂·(w − μ)),

at about the speed of copying them. Moments are taken block by block about the block's own mean and
moved to the common mean afterwards, so a mean far from zero costs no digits.
"""

import math

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
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        value = _Kurtosis.apply(x if _is_dense(x) else x.contiguous(), channels)
    else:
        rows = x.float().reshape(channels, n)
        mean = rows.mean(1, keepdim=True)
        m2, m4 = ((rows - mean) ** 2).mean(1), ((rows - mean) ** 4).mean(1)
        value = torch.where(_varies(mean[:, 0], m2, rows.dtype), m4 / m2**2, math.nan)
    if not torch.isfinite(value).all():
        raise KureError("Kurtosis is not defined for zero variance (or one too small or large for "
                        f"{str(x.dtype).removeprefix('torch.')}) or for infinite or NaN values.")  # fmt: skip
    value = value if per_channel else value.squeeze(0)
    return value * ((n - 1) / n) ** 2 if unbiased else value


class _Kurtosis(torch.autograd.Function):
    """[C] kurtoses of the C equal parts of a dense tensor."""

    @staticmethod
    def forward(ctx, x, channels):
        length = BLOCK if channels == 1 else x.numel() // channels
        sums = _power_sums(_in_memory_order(x), length)
        mean, m2, m3, m4 = _central_moments(sums.reshape(channels, -1, sums.shape[1]))
        with np.errstate(all="ignore"):  # a value that is not finite is reported by the caller
            value = np.where(_varies(mean, m2, x.dtype), m4 / m2**2, math.nan)
        ctx.save_for_backward(x)
        ctx.moments = mean, m2, m3, value
        return torch.from_numpy(value).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        (x,) = ctx.saved_tensors
        mean, m2, m3, value = ctx.moments
        scale = 4 * len(mean) / x.numel() * grad_value.double().numpy() / m2**2
        grad = torch.empty_like(x)
        flat, out = _in_memory_order(x), _in_memory_order(grad)
        center = mean.astype(flat.dtype)
        coefficients = np.stack([center, mean - center, value * m2, m3, scale], axis=1)
        _write_gradient(flat, coefficients.astype(flat.dtype), out)
        return grad, None


def _varies(mean, m2, dtype: torch.dtype):
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


def _central_moments(sums):
    """Mean, m₂, m₃, m₄ of each channel, [C] each, from the power sums of its blocks, [C, blocks, 6]."""
    size, center, s1, s2, s3, s4 = np.moveaxis(sums, -1, 0)
    n = size.sum(1)
    mean = (size * center + s1).sum(1) / n
    d = center - mean[:, None]
    m2 = s2 + 2 * d * s1 + size * d**2
    m3 = s3 + 3 * d * s2 + 3 * d**2 * s1 + size * d**3
    m4 = s4 + 4 * d * s3 + 6 * d**2 * s2 + 4 * d**3 * s1 + size * d**4
    return mean, *(m.sum(1) / n for m in (m2, m3, m4))


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


def _slowest_first(x: Tensor) -> Tensor:
    """The same tensor with its dimensions in the order of their strides: channels-last weights lie so."""
    return x.permute(sorted(range(x.dim()), key=lambda i: (-x.stride(i), i)))


def _is_dense(x: Tensor) -> bool:
    """Whether the values lie in memory without gaps, one part of the first dimension after the other."""
    return _slowest_first(x).is_contiguous() and x.dim() > 0 and x.stride(0) == max(x.stride())


def _in_memory_order(x: Tensor) -> np.ndarray:
    """The values of a dense tensor as they lie in memory: a flat view, no copy."""
    return _slowest_first(x.detach()).view(-1).numpy()
