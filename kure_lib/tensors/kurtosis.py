"""Kurt[X] = E[((X − μ)/σ)⁴], with a gradient in closed form.

Written with autograd, the kurtosis of n weights reads and writes some fifteen arrays of n numbers.
Both directions are closed, so two sweeps over the weights are enough: one gathers the moments, one writes

    dK/dw = 4/(n·m₂²) · ((w − μ)³ − m₃ − K·m₂·(w − μ)),

at about the speed of copying them. Moments are taken block by block about the block's own mean and
moved to the common mean afterwards, so a mean far from zero costs no digits. numba compiles these sweeps
for the processor; a GPU takes all tensors at once, as the rows of one matrix, in some forty kernels whatever their
number; in a compiled step, in half precision and without numba autograd differentiates the formula.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
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
ROW = 1024  # weights in a row of the matrix that a GPU computes with
SUMS = 2**26  # numbers, at most, in the matrix that sums its rows by tensor


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
    place, dtype = kinds.pop() if len(kinds) == 1 else ("", None)
    # FSDP frees the storage of a whole weight, which a view in numpy would forbid.
    elsewhere = torch.compiler.is_compiling() or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )
    if dtype in (torch.float32, torch.float64) and not elsewhere:
        dense = [x if _is_dense(x) else x.contiguous() for x in tensors]
        if place == "cpu" and compiled:
            return _Kurtosis.apply(channels, *dense)
        if place == "cuda" and channels == 1 and len(dense) * sum(x.numel() for x in dense) <= ROW * SUMS:
            return _OfRows.apply(*dense)
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


class _OfRows(torch.autograd.Function):
    """The kurtosis of each of L dense tensors of one device, [L], in a number of kernels that does not grow with L.

    All weights lie in one matrix [R, ROW], filled up with zeros where a tensor ends; sums over the rows of a tensor are
    a product with a matrix of zeros and ones in float64, so that they repeat bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        sizes, dtype = tuple(x.numel() for x in tensors), tensors[0].dtype
        owner, sums, inside, counts = _layout(sizes, tensors[0].device)
        padding = tensors[0].new_zeros(ROW)
        parts = [part for x in tensors for part in (_flat(x), padding[: -x.numel() % ROW])]
        rows = torch.cat(parts).view(-1, ROW)
        mean = (sums @ rows.sum(1).double()) / counts
        centered = (rows - mean.to(dtype)[owner, None]) * inside
        squares = centered * centered
        powers = [centered.sum(1), squares.sum(1), (squares * centered).sum(1), (squares * squares).sum(1)]
        rest, m2, m3, m4 = ((sums @ torch.stack(powers, 1).double()) / counts[:, None]).unbind(1)
        m4 = m4 - 4 * rest * m3 + 6 * rest**2 * m2 - 3 * rest**4  # about the mean, which float32 has rounded
        m3 = m3 - 3 * rest * m2 + 2 * rest**3
        m2 = m2 - rest**2
        value = torch.where(_varies(mean, m2, dtype), m4 / m2**2, math.nan)
        ctx.save_for_backward(centered, rest, m2, m3, value)
        ctx.like = [(x.shape, x.stride()) for x in tensors]
        return value.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple:
        centered, rest, m2, m3, value = ctx.saved_tensors
        sizes = tuple(shape.numel() for shape, _ in ctx.like)
        owner, _, _, counts = _layout(sizes, centered.device)
        scale = 4 / counts * grad_value.double() / m2**2
        rest, m3, slope, scale = torch.stack([rest, m3, value * m2, scale]).to(centered.dtype)[:, owner, None]
        centered = centered - rest
        gradient = ((centered * centered * centered - m3 - slope * centered) * scale).view(-1)
        found, begin = [], 0
        for shape, strides in ctx.like:
            found.append(gradient.as_strided(shape, strides, begin))
            begin += shape.numel() + -shape.numel() % ROW
        return tuple(found)


@lru_cache(maxsize=8)
def _layout(sizes: tuple[int, ...], place: torch.device) -> tuple[Tensor, ...]:
    """Of tensors laid out in rows: the owner of each row [R], its rows as ones [L, R], where weights lie, sizes [L]."""
    lengths = [math.ceil(size / ROW) for size in sizes]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(lengths))
    sums = (owner == torch.arange(len(sizes))[:, None]).double()
    filled = torch.cat([torch.arange(length * ROW) < size for length, size in zip(lengths, sizes, strict=True)])
    parts = (owner, sums, filled.view(-1, ROW), torch.tensor(sizes, dtype=torch.float64))
    return tuple(part.to(place) for part in parts)


def _flat(x: Tensor) -> Tensor:
    """The values of a dense tensor as they lie in memory: a view."""
    return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())


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
    return _flat(x).numpy()
