"""Grids and the quantizer: properties, PyTorch's integer arithmetic as an oracle, and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kure_lib.paths import KureError
from kure_lib.tensors.grids import GRIDS, MID_RISE, MID_TREAD, SIGNED_INT, UNSIGNED, grid_named, levels
from kure_lib.tensors.quantizers import quantize

grids = st.sampled_from(list(GRIDS.values()))
bit_widths = st.integers(1, 8)
# a step any tensor of weights could have; not a power of two, so that products are rounded
step_sizes = st.floats(1e-4, 1e3).map(lambda step: float(np.float32(step)))
vectors = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("grid", "two_bits", "count", "low", "high"),
    [
        (MID_RISE, [-1.5, -0.5, 0.5, 1.5], lambda m: 2**m, lambda m: -(2**m - 1) / 2, lambda m: (2**m - 1) / 2),
        (MID_TREAD, [-2, -1, 0, 1, 2], lambda m: 2**m + 1, lambda m: -(2 ** (m - 1)), lambda m: 2 ** (m - 1)),
        (SIGNED_INT, [-2, -1, 0, 1], lambda m: 2**m, lambda m: -(2 ** (m - 1)), lambda m: 2 ** (m - 1) - 1),
        (UNSIGNED, [0, 1, 2, 3], lambda m: 2**m, lambda m: 0, lambda m: 2**m - 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_levels_are_those_of_the_design(grid, two_bits, count, low, high):
    assert levels(2, grid).tolist() == two_bits
    for bits in range(1, 17):
        grid_levels = levels(bits, grid)
        assert grid_levels.dtype == torch.float64
        assert len(grid_levels) == count(bits)
        assert (grid_levels[0].item(), grid_levels[-1].item()) == (low(bits), high(bits))
        assert bool((grid_levels.diff() == 1).all())


def test_grids_are_found_by_name_and_unknown_names_are_told():
    assert [grid_named(name) for name in ("mid_rise", "mid_tread", "signed_int", "unsigned")] == [
        MID_RISE, MID_TREAD, SIGNED_INT, UNSIGNED,
    ]  # fmt: skip
    with pytest.raises(KureError, match=r"'fp8'.*mid_rise, mid_tread, signed_int, unsigned"):
        grid_named("fp8")


@pytest.mark.parametrize("bits", [0, -1, 17, 2.5, 4.0, True, None, "4"])
def test_impossible_bit_widths_are_errors(bits):
    for use in (lambda: levels(bits), lambda: quantize(torch.zeros(2), 1.0, bits)):
        with pytest.raises(KureError, match="bits: give a whole number from 1 to 16"):
            use()


def test_bit_widths_may_come_out_of_a_table():
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(quantize(x, 0.3, np.int64(3)), quantize(x, 0.3, 3))


@given(grid=grids, bits=st.integers(1, 16), step=step_sizes, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_level_is_mapped_to_itself(grid, bits, step, dtype):
    on_grid = levels(bits, grid).to(dtype) * torch.tensor(step, dtype=dtype)
    assert torch.equal(quantize(on_grid, step, bits, grid), on_grid)


@given(grid=grids, bits=bit_widths, step=step_sizes, values=vectors)
def test_quantizing_is_to_the_nearest_level_bounded_monotone_and_idempotent(grid, bits, step, values):
    x = torch.tensor(sorted(values), dtype=torch.float32) * min(step, 1.0)
    result = quantize(x, step, bits, grid)
    allowed = (levels(bits, grid) * step).numpy()

    distance = np.abs(x.double().numpy()[:, None] - allowed).min(1)
    np.testing.assert_allclose((x.double() - result.double()).abs(), distance, rtol=1e-5, atol=1e-5 * step)
    assert result.min() >= np.float32(allowed[0]) and result.max() <= np.float32(allowed[-1])
    assert bool((result.diff() >= 0).all())
    assert torch.equal(quantize(result, step, bits, grid), result)


@given(grid=st.sampled_from([MID_RISE, MID_TREAD]), bits=bit_widths, step=step_sizes, values=vectors)
def test_symmetric_grids_are_odd(grid, bits, step, values):
    x = torch.tensor(values, dtype=torch.float64)
    x = x[(x / step - grid.offset) % 1 != 0.5]  # ties are broken to the even code, which is not symmetric
    torch.testing.assert_close(quantize(-x, step, bits, grid), -quantize(x, step, bits, grid), rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(grid=grids, bits=bit_widths, seed=st.integers(0, 2**31))
def test_a_step_for_each_channel_quantizes_each_row_with_its_own(grid, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 2, 2, generator=generator)
    step = torch.rand(5, 1, 1, 1, generator=generator) + 0.05
    rows = [quantize(row, one.item(), bits, grid) for row, one in zip(x, step, strict=True)]
    assert torch.equal(quantize(x, step, bits, grid), torch.stack(rows))


INTEGER_GRIDS = pytest.mark.parametrize("grid", [SIGNED_INT, UNSIGNED], ids=lambda grid: grid.name)


def with_ties(step):
    """Random numbers, and all multiples of half a step near zero: every tie between two levels."""
    x = 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    return torch.cat([x, torch.arange(-600, 600) * 0.5 * step, torch.tensor([-1e9, 0.0, -0.0, 1e9])])


@INTEGER_GRIDS
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [0.5, 0.1, 1 / 3, 0.0078431])
def test_integer_grids_are_bit_for_bit_pytorchs(grid, bits, step):
    x = with_ties(step)
    step = torch.tensor(step)
    wanted = torch.fake_quantize_per_tensor_affine(
        x, step, torch.tensor(0, dtype=torch.int32), grid.lowest(bits), grid.highest(bits)
    )
    assert torch.equal(quantize(x, step, bits, grid), wanted)


@INTEGER_GRIDS
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_integer_grids_per_channel_are_bit_for_bit_pytorchs(grid, bits):
    x = with_ties(0.25)[:20_000].reshape(8, 50, 10, 5)
    step = torch.linspace(0.01, 0.7, 8)
    wanted = torch.fake_quantize_per_channel_affine(
        x, step, torch.zeros(8, dtype=torch.int32), 0, grid.lowest(bits), grid.highest(bits)
    )
    assert torch.equal(quantize(x, step.reshape(8, 1, 1, 1), bits, grid), wanted)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_gradient_is_one_inside_the_range_and_zero_outside(grid, bits):
    step, margin = 0.3, 1e-3
    grid_levels = levels(bits, grid).float()
    low, high = (grid_levels[0] - 0.5) * step, (grid_levels[-1] + 0.5) * step
    inside = torch.linspace((low + margin).item(), (high - margin).item(), 50)
    outside = torch.tensor([low - 5, low - margin, high + margin, high + 5])
    x = torch.cat([inside, outside]).requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(x, step, bits, grid).sum(), x)
    assert gradient.tolist() == [1.0] * 50 + [0.0] * 4


def test_mid_rise_is_clipped_where_the_paper_says():
    """τ = 2^(M−1)Δ: the straight-through gradient ends there."""
    bits, step = 3, 0.5
    clip = 2 ** (bits - 1) * step
    x = torch.tensor([clip - 1e-3, clip + 1e-3]).requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(x, step, bits).sum(), x)
    assert gradient.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_the_gradient_of_the_step_is_lsqs(grid, bits):
    """Esser et al. 2020, Eq. 3: ⌊v/s⌉ − v/s inside the range, the outermost level outside.

    They end the range at the outermost level, we, like PyTorch, half a step later, where its cell ends.
    """
    x = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    allowed = levels(bits, grid)
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((quantize(x, step, bits, grid) * weights).sum(), step)

    scaled = x / step.detach()
    nearest = allowed[(scaled[:, None] - allowed).abs().argmin(1)]
    outside = (scaled < allowed[0] - 0.5) | (scaled > allowed[-1] + 0.5)
    wanted = (torch.where(outside, nearest, nearest - scaled) * weights).sum()
    assert gradient.item() == pytest.approx(wanted.item(), rel=1e-10)


@INTEGER_GRIDS
def test_both_gradients_are_those_of_pytorchs_learnable_quantizer(grid):
    bits = 3
    x = (2 * torch.randn(1000, generator=torch.Generator().manual_seed(3))).requires_grad_()
    step = torch.tensor([0.37], requires_grad=True)
    zero = torch.zeros(1, requires_grad=True)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, grid.lowest(bits), grid.highest(bits), 1.0)
    upstream = torch.linspace(-1, 2, 1000)
    wanted = torch.autograd.grad(theirs, (x, step), upstream)
    gradient = torch.autograd.grad(quantize(x, step, bits, grid), (x, step), upstream)
    torch.testing.assert_close(gradient[0], wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_a_step_for_each_channel_gets_a_gradient_for_each_channel():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(4))
    step = torch.linspace(0.1, 0.4, 4).reshape(4, 1).requires_grad_()
    (together,) = torch.autograd.grad(quantize(x, step, 3).sum(), step)
    for row, one, gradient in zip(x, step.detach(), together, strict=True):
        one = one.clone().requires_grad_()
        (alone,) = torch.autograd.grad(quantize(row, one, 3).sum(), one)
        torch.testing.assert_close(gradient, alone)


def test_quantizing_leaves_its_input_and_keeps_its_type():
    x = torch.randn(50, dtype=torch.float64)
    before = x.clone()
    assert quantize(x, torch.tensor(0.3, dtype=torch.float32), 4).dtype == torch.float64
    assert torch.equal(x, before)
