"""The loops that numba compiles, where it is installed; `kurtosis` and `samples` say what is done without it."""

import numba
import numpy as np

FAST = {"reassoc", "contract", "nsz", "arcp"}  # lets sums be vectorized; NaNs and infinities stay what they are


@numba.njit(cache=True, fastmath=FAST)
def power_sums(x: np.ndarray, length: int) -> np.ndarray:
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
def central_moments(sums: np.ndarray, channels: int) -> np.ndarray:
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
def write_gradient(x: np.ndarray, coefficients: np.ndarray, out: np.ndarray) -> None:
    """out = scale · (d·(d² − K·m₂) − m₃) with d = x − μ and one row of coefficients for each channel."""
    length = x.size // len(coefficients)
    for k in range(len(coefficients)):
        center, rest, bend, shift, scale = coefficients[k]  # μ in two parts, so that d keeps its digits
        source, target = x[k * length : (k + 1) * length], out[k * length : (k + 1) * length]
        for i in range(length):
            d = (source[i] - center) - rest
            target[i] = scale * (d * (d * d - bend) - shift)


@numba.njit(cache=True)
def level_moments(
    values: np.ndarray,
    sums: np.ndarray,
    ranks: np.ndarray | None,
    middle: np.ndarray,
    level: np.ndarray,
    steps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Cell after cell for every step; `ranks` are the numbers of values below, where not all values are given.

    Each cell ends close to where it did at the step before, and is looked for from there.
    """
    product, square = np.empty(steps.size), np.empty(steps.size)
    ends = np.full(level.size, values.size)  # the last cell has no end
    for s in range(steps.size):
        first, second, start = 0.0, 0.0, 0
        for k in range(level.size):
            if k < middle.size:
                ends[k] = _first_from(values, values.dtype.type(steps[s] * middle[k]), ends[k])
            end = ends[k]
            count = end - start if ranks is None else ranks[end] - ranks[start]
            first += level[k] * (sums[end] - sums[start])
            second += level[k] * level[k] * count
            start = end
        product[s], square[s] = first, second
    return product, square


@numba.njit(cache=True)
def row_moments(
    values: np.ndarray, sums: np.ndarray, middle: np.ndarray, level: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`level_moments` of each row of values [C, n] at its own steps [C, k]."""
    product, square = np.empty_like(steps), np.empty_like(steps)
    for row in range(len(steps)):
        product[row], square[row] = level_moments(values[row], sums[row], None, middle, level, steps[row])
    return product, square


@numba.njit(cache=True)
def _first_from(values, threshold, guess):
    """The first index whose value is not below the threshold: strides from a guess double until it lies between two."""
    low, high, stride = guess, guess, 1
    if guess < values.size and values[guess] < threshold:
        while low + stride <= values.size and values[low + stride - 1] < threshold:
            low += stride
            stride *= 2
        high = min(low + stride - 1, values.size)
    else:
        while high >= stride and not values[high - stride] < threshold:
            high -= stride
            stride *= 2
        low = max(high - stride + 1, 0)
    while low < high:
        half = (low + high) // 2
        if values[half] < threshold:
            low = half + 1
        else:
            high = half
    return low
