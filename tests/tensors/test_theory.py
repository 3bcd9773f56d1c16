"""Theory against independent oracles: quadrature cell by cell, Monte Carlo, sympy, published optima."""

from math import sqrt

import numpy as np
import pytest
import scipy.stats
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad

from kure_lib.tensors.distributions import with_kurtosis
from kure_lib.tensors.grids import CODEBOOKS, MID_RISE, MID_TREAD, NF4, SIGNED_INT, UNSIGNED
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import mse_curve
from kure_lib.tensors.theory import UNIT_VARIANCE, Laplace, Normal, Uniform, derivatives, mse, optimal_step, sensitivity

SIGNED = (MID_RISE, MID_TREAD, SIGNED_INT)
SCIPY = {
    "uniform": scipy.stats.uniform(-sqrt(3), 2 * sqrt(3)),
    "normal": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=1 / sqrt(2)),
}
#: Optimal uniform quantizers of a normal variable, J. Max, IRE Trans. Inf. Theory 6 (1960), table II.
MAX_1960 = [1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041]

grids = pytest.mark.parametrize("grid", SIGNED, ids=lambda grid: grid.name)
names = pytest.mark.parametrize("name", UNIT_VARIANCE)


def mse_by_quadrature(frozen, step, bits, grid):
    """Integrate (x − level)² f(x) over each cell of the quantizer; nothing shared with the library."""
    levels = grid.levels(bits) * step
    low, high = frozen.support()
    edges = np.concatenate([[low], (levels[1:] + levels[:-1]) / 2, [high]]).clip(low, high)
    total = 0.0
    for level, start, end in zip(levels, edges[:-1], edges[1:], strict=True):
        middle = np.clip(frozen.median(), start, end)  # a Laplace density has its peak there
        for a, b in ((start, middle), (middle, end)):
            if a < b:
                square = quad(lambda x, c=level: (x - c) ** 2 * frozen.pdf(x), a, b, epsabs=1e-18, epsrel=1e-12)
                total += square[0]
    return total


@names
@grids
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("ratio", [0.4, 1.0, 1.9])
def test_closed_form_equals_quadrature(name, grid, bits, ratio):
    step = ratio * optimal_step(UNIT_VARIANCE[name], bits, grid)
    expected = mse_by_quadrature(SCIPY[name], step, bits, grid)
    assert mse(UNIT_VARIANCE[name], step, bits, grid) == pytest.approx(expected, rel=1e-9)


OTHERS = {
    "heavy_tails": scipy.stats.t(5),
    "skewed": scipy.stats.skewnorm(4, loc=-0.3),
    "bounded": scipy.stats.beta(2, 3, loc=-0.4),
}


@pytest.mark.parametrize("frozen", OTHERS.values(), ids=OTHERS)
@grids
def test_any_scipy_distribution_equals_quadrature(frozen, grid):
    for bits, step in ((2, 0.7 * frozen.std()), (4, 0.2 * frozen.std())):
        expected = mse_by_quadrature(frozen, step, bits, grid)
        assert mse(frozen, step, bits, grid) == pytest.approx(expected, rel=1e-9)


def test_one_sided_distribution_on_the_unsigned_grid():
    frozen = scipy.stats.expon()
    expected = mse_by_quadrature(frozen, 0.3, 3, UNSIGNED)
    assert mse(frozen, 0.3, 3, UNSIGNED) == pytest.approx(expected, rel=1e-9)


@names
@grids
def test_scipy_route_equals_closed_form_with_derivatives(name, grid):
    steps = np.geomspace(0.03, 2.0, 60)
    for bits in (1, 4, 8):
        table, closed = ((mse(d, steps, bits, grid), *derivatives(d, steps, bits, grid))
                         for d in (SCIPY[name], UNIT_VARIANCE[name]))  # fmt: skip
        np.testing.assert_allclose(table[0], closed[0], rtol=1e-9)
        np.testing.assert_allclose(table[1:], closed[1:], rtol=1e-7, atol=1e-8)


every_book = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)


@names
@every_book
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7])
def test_the_identity_holds_for_codebooks(name, book, ratio):
    step = ratio * optimal_step(UNIT_VARIANCE[name], book.bits, book)
    expected = mse_by_quadrature(SCIPY[name], step, book.bits, book)
    assert mse(UNIT_VARIANCE[name], step, book.bits, book) == pytest.approx(expected, rel=1e-9)


def test_the_identity_holds_for_a_codebook_and_a_skewed_distribution():
    """NF4 is the codebook without symmetry."""
    frozen = OTHERS["skewed"]
    for step in (0.8, 2.2):
        assert mse(frozen, step, 4, NF4) == pytest.approx(mse_by_quadrature(frozen, step, 4, NF4), rel=1e-9)


@every_book
@pytest.mark.parametrize("kurtosis", [1.4, 1.8, 1.9, 3.0, 9.0])
def test_no_scale_of_a_codebook_beats_the_optimum(book, kurtosis):
    """Over 40 octaves, far beyond those that are searched: floats are nearly scale-free, but not entirely."""
    dist = with_kurtosis(kurtosis)
    best = optimal_step(dist, book.bits, book)
    line = np.exp2(np.linspace(-20, 20, 8000)) / book.values[-1]
    found = np.concatenate([mse(dist, part, book.bits, book) for part in np.array_split(line, 40)])
    assert mse(dist, best, book.bits, book) <= found.min() * (1 + 1e-9)
    first, second = derivatives(dist, best, book.bits, book)
    assert abs(first) * best < 1e-9 and second > 0


@names
@every_book
def test_slopes_of_a_codebook_are_differences(name, book):
    dist = UNIT_VARIANCE[name]
    step = 1.13 * optimal_step(dist, book.bits, book)
    around = step * (1 + np.array([-1e-4, 1e-4]))
    low, high = mse(dist, around, book.bits, book)
    first_low, first_high = derivatives(dist, around, book.bits, book)[0]
    first, second = derivatives(dist, step, book.bits, book)
    assert first == pytest.approx((high - low) / np.diff(around)[0], rel=1e-4)
    assert second == pytest.approx((first_high - first_low) / np.diff(around)[0], rel=1e-3)


@names
@grids
def test_monte_carlo_agrees_within_its_error(name, grid):
    n, bits = 400_000, 3
    x = torch.from_numpy(SCIPY[name].rvs(n, random_state=np.random.default_rng(7)))
    for step in (0.2, 0.5, 1.1):
        squared = (x - quantize(x, step, bits, grid)) ** 2
        error = squared.std().item() / sqrt(n)
        assert abs(squared.mean().item() - mse(UNIT_VARIANCE[name], step, bits, grid)) < 4 * error


@names
@grids
@given(bits=st.integers(1, 8), ratio=st.floats(0.3, 3.0), side=st.sampled_from(["left", "right"]))
def test_derivatives_are_slopes_from_their_side(name, grid, bits, ratio, side):
    dist = UNIT_VARIANCE[name]
    step = ratio * optimal_step(dist, bits, grid)
    end = step * (1 + 2e-5 if side == "right" else 1 - 2e-5)
    assume(name != "uniform" or not has_kink_between(dist, step, end, bits, grid))
    first, second = derivatives(dist, np.array([step, end]), bits, grid, side)
    slopes = np.diff([mse(dist, [step, end], bits, grid), first]).ravel() / (end - step)
    assert slopes[0] == pytest.approx(first.mean(), abs=1e-6)  # the trapezoid rule
    assert slopes[1] == pytest.approx(second.mean(), rel=1e-4, abs=1e-4)


def has_kink_between(uniform, step, end, bits, grid):
    """Whether a threshold leaves [−a, a] as the step changes; one that starts on the end has left already."""
    h = np.abs(np.arange(grid.lowest(bits), grid.highest(bits)) + grid.offset + 0.5)
    inside = (h * step < uniform.a * (1 - 1e-12)) if step < end else (h * step <= uniform.a * (1 + 1e-12))
    return bool((inside != (h * end < uniform.a)).any())


def test_second_derivative_jumps_where_a_threshold_leaves_a_uniform_tensor():
    kink = 2 / (2**4 - 1)  # a = 1: the last threshold of Eq. 1's grid sits on the tensor's end
    left = derivatives(Uniform(1.0), kink, 4, MID_TREAD, side="left")
    right = derivatives(Uniform(1.0), kink, 4, MID_TREAD, side="right")
    assert float(left[0]) == pytest.approx(0, abs=1e-12) == float(right[0])
    assert float(left[1]) == pytest.approx(-8) and float(right[1]) == pytest.approx(7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lemma_2_and_its_derivatives_symbolically(bits):
    a, step = sympy.Rational(1), sympy.Symbol("step", positive=True)
    clip = 2 ** (bits - 1) * step
    lemma = (a - clip) ** 3 / (3 * a) + 2**bits * step**3 / (24 * a)
    for at in np.linspace(0.2, 1, 9) * 2 / (2**bits - 1):
        first, second = derivatives(Uniform(1.0), at, bits, MID_TREAD, side="left")
        assert mse(Uniform(1.0), at, bits, MID_TREAD) == pytest.approx(float(lemma.subs(step, at)), rel=1e-9)
        assert first == pytest.approx(float(lemma.diff(step).subs(step, at)), abs=1e-9)
        assert second == pytest.approx(float(lemma.diff(step, 2).subs(step, at)), abs=1e-8)


def test_optimal_steps_of_a_normal_tensor_are_those_of_max():
    for bits, published in enumerate(MAX_1960, start=1):
        digits = 3 if bits == 1 else 4
        assert round(optimal_step(Normal(), bits, MID_RISE), digits) == published


@pytest.mark.parametrize("bits", range(1, 9))
def test_optimal_steps_of_a_uniform_tensor_in_closed_form(bits):
    half = 2 ** (bits - 1)
    assert optimal_step(Uniform(3.0), bits, MID_RISE) == pytest.approx(3 / half, rel=1e-12)
    assert optimal_step(Uniform(3.0), bits, MID_TREAD) == pytest.approx(3 / (half + 0.5), rel=1e-12)
    signed = 3 / (half - 0.5 + 1 / (2 * half - 1))
    assert optimal_step(Uniform(3.0), bits, SIGNED_INT) == pytest.approx(signed, rel=1e-11)


@names
@grids
def test_no_step_on_a_dense_line_beats_the_optimum(name, grid):
    for bits in (1, 2, 5, 8):
        best = optimal_step(UNIT_VARIANCE[name], bits, grid)
        line = mse(UNIT_VARIANCE[name], np.geomspace(1e-3, 20, 4000), bits, grid)
        assert mse(UNIT_VARIANCE[name], best, bits, grid) <= line.min() * (1 + 1e-9)


@given(scale=st.floats(1e-3, 1e3), step=st.floats(0.02, 5), bits=st.integers(1, 8))
@grids
def test_distortion_scales_with_the_variance(scale, step, bits, grid):
    for family in (Uniform, Normal, Laplace):
        expected = scale**2 * mse(family(1.0), step, bits, grid)
        assert mse(family(scale), scale * step, bits, grid) == pytest.approx(expected, rel=1e-8)


@names
@grids
def test_sensitivity_is_zero_at_the_optimum_and_keeps_the_shape_of_eps(name, grid):
    eps = np.linspace(-0.05, 0.05, 11)
    gamma = sensitivity(UNIT_VARIANCE[name], eps, 3, grid)
    assert gamma.shape == eps.shape and gamma[5] == 0 and (gamma[[0, -1]] > 0).all()


def test_samples_agree_with_the_exact_curve_of_their_tensor():
    x = torch.randn(5_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = np.geomspace(0.05, 2, 40)
    for grid in SIGNED:
        curve = mse_curve(x, torch.from_numpy(steps), 3, grid).numpy()
        np.testing.assert_allclose(mse(EmpiricalDistribution(x), steps, 3, grid), curve, rtol=1e-9)
        np.testing.assert_allclose(mse(x, steps, 3, grid), curve, rtol=1e-9)


@pytest.mark.parametrize("step", [0.0, -1.0, [0.1, 0.0]])
def test_a_step_must_be_positive(step):
    with pytest.raises(ValueError, match="above zero"):
        mse(Normal(), step, 4, MID_RISE)


def test_infinite_variance_and_foreign_objects_are_named():
    with pytest.raises(ValueError, match="finite"):
        mse(scipy.stats.cauchy(), 1.0, 4, MID_RISE)
    with pytest.raises(TypeError, match="'normal' is not a distribution"):
        mse("normal", 1.0, 4, MID_RISE)
