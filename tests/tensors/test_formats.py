"""Number formats against ml_dtypes, published tables, and their own definitions worked out number by number."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kure_lib.paths import KureError
from kure_lib.quantization import view
from kure_lib.tensors.grids import (
    CODEBOOKS,
    FP4_E2M1,
    FP8_E4M3,
    MID_RISE,
    NF4,
    POWER_OF_TWO_4,
    float_format,
    grid_named,
    levels,
)
from kure_lib.tensors.quantizers import nearest, quantize
from kure_lib.tensors.steps import best_step, block_scale, per_block

ORACLES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn, "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
#: Dettmers et al., QLoRA (2023), appendix E; single-precision numbers.
NF4_PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

every_book = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)
every_oracle = pytest.mark.parametrize("name", ORACLES)


@every_oracle
def test_the_levels_are_all_finite_numbers_of_the_format(name):
    kind, book = ORACLES[name], CODEBOOKS[name]
    codes = np.arange(2**book.bits, dtype=np.uint8).view(kind).astype(np.float64)
    assert list(book.values) == np.unique(codes[np.isfinite(codes)]).tolist()
    assert book.outermost(book.bits) == float(ml_dtypes.finfo(kind).max)


@every_oracle
def test_rounding_is_bit_for_bit_that_of_ml_dtypes(name):
    """At every level, every tie, the two numbers beside each tie, and at random, within the range: they overflow."""
    values = np.array(CODEBOOKS[name].values, dtype=np.float32)
    ties = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    random = [rng.uniform(values[0], values[-1], 100_000), np.exp2(rng.uniform(-20, 16, 100_000))]
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, ties, *beside, *random, -random[1], [-0.0]]).astype(np.float32)
    x = x.clip(values[0], values[-1])
    wanted = x.astype(ORACLES[name]).astype(np.float32)
    assert np.array_equal(nearest(torch.from_numpy(x), CODEBOOKS[name]).numpy(), wanted)


@every_oracle
@pytest.mark.parametrize("scale", [0.25, 0.013, 3.7])
def test_a_scaled_format_is_ml_dtypes_between_a_division_and_a_product(name, scale):
    book = CODEBOOKS[name]
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * book.outermost(book.bits) * scale / 3
    ratio = (x / scale).numpy().clip(book.values[0], book.values[-1])
    wanted = torch.from_numpy(ratio.astype(ORACLES[name]).astype(np.float32)) * torch.tensor(scale)
    assert torch.equal(quantize(x, scale, book.bits, book), wanted)


def test_normal_float_has_the_published_values():
    np.testing.assert_allclose(NF4.values, NF4_PUBLISHED, rtol=0, atol=2e-7)


def test_a_power_of_two_format_is_zero_and_powers_of_two():
    values = np.array(POWER_OF_TWO_4.values)
    assert len(values) == 2**4 - 1  # its two zeros are one level
    exponents = np.log2(values[values > 0])
    assert np.array_equal(exponents, exponents.round()) and np.array_equal(np.diff(exponents), np.ones(6))
    assert float_format("e2m0", 2, 0).values == (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


@every_book
@settings(max_examples=50)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), scale=st.floats(1e-3, 1e3))
def test_the_result_is_a_level_and_none_is_nearer(book, values, scale):
    x = torch.tensor(values, dtype=torch.float64)
    result = quantize(x, scale, book.bits, book)
    allowed = book.levels(book.bits) * scale
    distance = np.abs(x.numpy()[:, None] - allowed).min(1)
    np.testing.assert_allclose((x - result).abs(), distance, rtol=1e-12, atol=1e-12 * scale)
    assert set(result.tolist()) <= set(allowed.tolist())
    assert torch.equal(quantize(result, scale, book.bits, book), result)


@every_book
def test_it_saturates_and_keeps_nan_and_the_type(book):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-math.inf, -1e30, 1e30, math.inf, math.nan], dtype=dtype)
        result = nearest(x, book)
        low, high = torch.tensor([book.values[0], book.values[-1]], dtype=dtype)
        assert result.dtype == dtype
        assert result[:2].tolist() == [low.item()] * 2 and result[2:4].tolist() == [high.item()] * 2
        assert result[4].isnan()


@every_book
def test_gradients_are_straight_through_and_lsqs(book):
    generator = torch.Generator().manual_seed(2)
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2000, generator=generator, dtype=torch.float64) * 0.5 * book.values[-1] * 0.37
    x.requires_grad_()
    upstream = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    to_x, to_step = torch.autograd.grad(quantize(x, step, book.bits, book), (x, step), upstream)
    level, ratio = levels(book.bits, book), (x / step).detach()
    closest = level[(ratio[:, None] - level).abs().argmin(1)]
    gap = level.diff()
    outside = (ratio < level[0] - gap[0] / 2) | (ratio > level[-1] + gap[-1] / 2)
    assert outside.any()
    torch.testing.assert_close(to_x, torch.where(outside, 0.0, upstream), rtol=1e-12, atol=0)
    wanted = (torch.where(outside, closest, closest - ratio) * upstream).sum()
    assert to_step.item() == pytest.approx(wanted.item(), rel=1e-9)


@every_book
def test_a_format_has_the_bits_it_has(book):
    assert grid_named(book.name) is book
    for use in (lambda: levels(book.bits + 1, book), lambda: quantize(torch.zeros(2), 1.0, book.bits - 1, book)):
        with pytest.raises(KureError, match=f"{book.name} has {book.bits} bits"):
            use()


# Blocks


def by_hand(block, element, method, tensor_largest):
    """One block, value by value, from the texts of the two specifications."""
    largest = max(abs(v) for v in block)
    if method == "mx":
        scale = 2.0 ** (math.floor(math.log2(largest)) - math.floor(math.log2(float(ml_dtypes.finfo(element).max))))
    else:  # in float32, as the tensor's scale is kept
        top = np.float32(ml_dtypes.finfo(element).max)
        whole = np.float32(tensor_largest) / top / np.float32(448)
        scale = np.float32(np.float32(largest) / top / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    top = float(ml_dtypes.finfo(element).max)
    ratio = (np.array(block, dtype=np.float32) / np.float32(scale)).clip(-top, top)
    return ratio.astype(element).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize(("method", "size"), [("mx", 32), ("nvfp4", 16)])
@every_oracle
def test_block_formats_follow_their_specifications(name, method, size):
    book, generator = CODEBOOKS[name], torch.Generator().manual_seed(3)
    x = torch.randn(8, 20, 3, 3, generator=generator) * torch.logspace(-3, 3, 8).reshape(8, 1, 1, 1)
    step = best_step(x, book.bits, book, method, per_block(size))
    assert step.shape == x.shape
    result = quantize(x, step, book.bits, book).flatten(1).numpy()
    for row, quantized in zip(x.flatten(1).numpy(), result, strict=True):  # 180 values: the last block is shorter
        for start in range(0, row.size, size):
            block = row[start : start + size]
            if method == "nvfp4" and np.abs(block).max() / x.abs().max().item() < 1e-4:
                continue  # E4M3 underflows and the library keeps its smallest scale
            wanted = by_hand(block, ORACLES[name], method, x.abs().max().item())
            assert np.array_equal(quantized[start : start + size], wanted)


def test_a_microscaling_scale_is_a_power_of_two_and_saturates_at_most_a_third():
    largest = torch.exp2(torch.linspace(-10, 10, 1001))
    scale = block_scale(largest, "mx", 6.0)
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert (largest / scale).min() >= 4 and (largest / scale).max() < 8


def test_the_scales_of_nvfp4_are_e4m3_numbers_and_the_largest_is_not_clipped():
    largest = torch.rand(500, generator=torch.Generator().manual_seed(4)) + 0.01
    scale = block_scale(largest, "nvfp4", 6.0)
    unit = largest.max() / 6 / 448
    codes = (scale / unit).double().numpy()
    assert np.abs(codes[:, None] - np.array(FP8_E4M3.values)).min(1).max() < 1e-4
    assert codes.max() == pytest.approx(448)
    assert (largest / 6 / scale).max() <= 1 + 2**-4 + 1e-6


def test_unrounded_block_scales_put_the_outermost_level_on_the_largest_value():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    step = best_step(x, 4, MID_RISE, "max_abs", per_block(16))
    wanted = x.abs().reshape(4, 4, 16).amax(-1) / MID_RISE.outermost(4)
    assert torch.equal(step, wanted.repeat_interleave(16, 1))


@pytest.mark.parametrize("method", ["max_abs", "mx", "nvfp4"])
def test_a_block_of_zeros_stays_zero(method):
    x = torch.cat([torch.zeros(2, 32), torch.ones(2, 32)])
    step = best_step(x, 4, FP4_E2M1, method, per_block(32))
    assert step.isfinite().all() and (step > 0).all()
    assert torch.equal(quantize(x, step, 4, FP4_E2M1)[:2], x[:2])
    network = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
    with torch.no_grad():
        network[1].weight[3] = 0
    with view.quantized(network, weight_bits=4, grid=FP4_E2M1, step_rule=method, scope=per_block(32)):
        assert network[1].weight[3].abs().max() == 0 < network[1].weight[2].abs().max()
    with pytest.raises(KureError, match="zero everywhere"):
        best_step(torch.zeros(2, 32), 4, FP4_E2M1, method, per_block(32))


def test_blocks_that_cannot_be_scaled_are_errors():
    x = torch.randn(4, 32)
    with pytest.raises(KureError, match=r"'mse'.*max_abs, mx, nvfp4"):
        best_step(x, 4, FP4_E2M1, "mse", per_block(32))
    with pytest.raises(KureError, match="block of 0"):
        best_step(x, 4, FP4_E2M1, "mx", per_block(0))
    with pytest.raises(KureError, match="infinite or NaN"):
        best_step(torch.full((2, 32), math.nan), 4, FP4_E2M1, "mx", per_block(32))
    with pytest.raises(KureError, match="'mx'"):
        best_step(x, 4, FP4_E2M1, "mx")
