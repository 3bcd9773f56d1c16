"""Steps against brute force: every step for small tensors, hundreds for large ones, closed forms for known laws."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kure_lib.findings import paper
from kure_lib.paths import KureError
from kure_lib.tensors import samples, theory
from kure_lib.tensors.grids import (
    CODEBOOKS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    GRIDS,
    MID_RISE,
    MID_TREAD,
    POWER_OF_TWO_4,
    SIGNED_INT,
    UNSIGNED,
    levels,
)
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.samples import LARGE, EmpiricalDistribution
from kure_lib.tensors.steps import PER_CHANNEL, best_step, distortion, mse_curve, per_block, power_of_two

EVERY_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)


def brute_mse(x, step, bits, grid):
    """Mean squared distance to the nearest level: every value against every level, in float64."""
    x = np.asarray(x, dtype=np.float64).ravel()
    total = 0.0
    for part in np.array_split(x, max(1, x.size * 2**bits // 2_000_000)):
        total += (np.abs(part[:, None] - levels(bits, grid).numpy() * step).min(1) ** 2).sum()
    return total / x.size


def all_best(x, bits, grid):
    """The least MSE of any step: on each interval between breakpoints it is a parabola with a known bottom."""
    level = levels(bits, grid).numpy()
    between = (level[1:] + level[:-1]) / 2
    between = between[between != 0]
    points = (x[:, None] / between).ravel()
    points = np.unique(points[points > 0]) if (points > 0).any() else np.ones(1)  # none for one bit, mid-rise
    middles = np.concatenate([[points[0] / 2], (points[1:] + points[:-1]) / 2, [2 * points[-1]]])
    codes = level[np.abs(x[None, :, None] - middles[:, None, None] * level).argmin(-1)]
    above, below = (codes * x).sum(1), (codes**2).sum(1)
    bottoms = above[below > 0] / below[below > 0]
    return min(brute_mse(x, step, bits, grid) for step in np.concatenate([bottoms[bottoms > 0], points]))


def draw(law, size, grid, seed=0):
    rng = np.random.default_rng(seed)
    x = getattr(rng, law)(size=size) if law != "uniform" else rng.uniform(-1, 1, size)
    return np.abs(x) if grid == UNSIGNED else x


@EVERY_GRID
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_curve_is_brute_force(grid, bits, dtype):
    x = torch.from_numpy(draw("laplace", 3000, UNSIGNED if grid == UNSIGNED else MID_RISE)).to(dtype)
    steps = np.geomspace(1e-3, 10, 25)
    wanted = [brute_mse(x, step, bits, grid) for step in steps]
    curve = mse_curve(x, steps, bits, grid)
    assert curve.dtype == torch.float64 and curve.shape == (25,)
    np.testing.assert_allclose(curve, wanted, rtol=1e-6, atol=1e-12)
    assert torch.equal(mse_curve(EmpiricalDistribution(x), steps, bits, grid), curve)


@EVERY_GRID
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_curve_is_the_error_of_the_quantizer_itself(grid, bits):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in (0.01, 0.3, 1.7):
        error = (x - quantize(x, step, bits, grid)).square().mean().item()
        assert mse_curve(x, step, bits, grid).item() == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_distortion_is_the_least_error_of_any_step_in_parts_of_the_variance(scale):
    x = scale * (draw("laplace", 40, MID_RISE) + 0.3)
    least = all_best(x, 3, MID_TREAD) / x.var()
    assert distortion(torch.from_numpy(x), 3, MID_TREAD) == pytest.approx(least, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(list(GRIDS.values())), bits=st.integers(1, 4), size=st.integers(2, 30),
    law=st.sampled_from(["normal", "laplace", "uniform", "exponential"]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_no_step_at_all_is_better_on_a_small_tensor(grid, bits, size, law, seed):
    x = draw(law, size, grid, seed)
    if grid == SIGNED_INT and bits == 1:
        x = np.append(x, -1.0)  # its levels are −Δ and 0: something must lie below zero
    step = best_step(torch.from_numpy(x), bits, grid).double().item()
    slack = 1e-10 * np.square(x).mean()  # the step is float32
    assert brute_mse(x, step, bits, grid) <= all_best(x, bits, grid) * (1 + 1e-6) + slack


EVERY_BOOK = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)


@EVERY_BOOK
def test_the_curve_of_a_codebook_is_brute_force_and_its_quantizers(book):
    x = torch.from_numpy(draw("laplace", 3000, MID_RISE))
    steps = np.geomspace(1e-2, 10, 7) / book.values[-1]
    curve = mse_curve(x, steps, book.bits, book)
    np.testing.assert_allclose(curve, [brute_mse(x, step, book.bits, book) for step in steps], rtol=1e-9)
    errors = [(x - quantize(x, step, book.bits, book)).square().mean().item() for step in steps]
    np.testing.assert_allclose(curve, errors, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    book=st.sampled_from([FP4_E2M1, POWER_OF_TWO_4]), size=st.integers(2, 30),
    law=st.sampled_from(["normal", "laplace", "uniform", "exponential"]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_no_scale_of_a_float_at_all_is_better_on_a_small_tensor(book, size, law, seed):
    x = draw(law, size, MID_RISE, seed)
    step = best_step(torch.from_numpy(x), 4, book).double().item()
    slack = 1e-10 * np.square(x).mean()  # the step is float32
    assert brute_mse(x, step, 4, book) <= all_best(x, 4, book) * (1 + 1e-6) + slack


@EVERY_BOOK
@pytest.mark.parametrize("law", ["normal", "laplace", "uniform", "standard_cauchy"])
def test_no_scale_of_40_octaves_is_better_on_a_large_tensor(book, law):
    x = torch.from_numpy(draw(law, 30_000, MID_RISE)).float()
    scan = np.exp2(np.linspace(-8, 32, 4000)) * x.abs().max().item() / book.values[-1]
    found = mse_curve(x, best_step(x, book.bits, book).double().item(), book.bits, book)
    others = torch.cat([mse_curve(x, part, book.bits, book) for part in np.array_split(scan, 8)])
    assert found.item() <= others.min().item() * (1 + 1e-5)


@pytest.mark.parametrize("book", [FP8_E4M3, FP8_E5M2], ids=lambda book: book.name)
def test_a_float_that_covers_a_tensor_is_no_better_at_twice_the_scale(book):
    """What bounds the search: every level within reach at 2Δ is one at Δ too."""
    for law in ("normal", "laplace", "uniform"):
        x = torch.from_numpy(draw(law, 2000, MID_RISE))
        covering = x.abs().max().item() / book.values[-1] * np.linspace(1, 2, 20)
        assert (mse_curve(x, covering, book.bits, book) <= mse_curve(x, 2 * covering, book.bits, book) + 1e-15).all()


@EVERY_BOOK
@pytest.mark.parametrize("method", ["max_abs", "percentile", "lp:3", "aciq:normal"])
def test_every_method_serves_codebooks(book, method):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(8))
    best, chosen = (mse_curve(x, best_step(x, book.bits, book, m).item(), book.bits, book) for m in ("mse", method))
    assert best <= chosen * (1 + 1e-6) and chosen < 0.08  # a power of two has 14 dB


@EVERY_GRID
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("law", ["normal", "laplace", "uniform", "standard_cauchy"])
def test_no_step_of_400_is_better_on_a_large_tensor(grid, bits, law):
    x = torch.from_numpy(draw(law, 30_000, grid)).float()
    step = best_step(x, bits, grid)
    assert step.dtype == torch.float32 and step.shape == ()
    scan = np.geomspace(0.02, 2, 400) * x.abs().max().item() / grid.outermost(bits)
    found, others = mse_curve(x, step.double().item(), bits, grid), mse_curve(x, scan, bits, grid)
    assert found.item() <= others.min().item() * (1 + 1e-6)


@EVERY_GRID
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sparse_weights_with_an_outlier_have_their_best_step(grid, bits):
    generator = torch.Generator().manual_seed(3)
    x = 0.01 * torch.randn(20_000, generator=generator) * (torch.rand(20_000, generator=generator) < 0.3)
    x = torch.cat([x.abs() if grid == UNSIGNED else x, torch.tensor([1.0])])
    scan = np.geomspace(1e-4, 2, 400) / grid.outermost(bits)
    found = mse_curve(x, best_step(x, bits, grid).double().item(), bits, grid).item()
    assert found <= mse_curve(x, scan, bits, grid).min().item() * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outlier", [None, 60.0], ids=["normal", "with_outlier"])
def test_the_first_look_by_landmarks_leads_to_the_best_step(bits, outlier):
    x = torch.randn(LARGE + 10_000, generator=torch.Generator().manual_seed(5))
    x[0] = outlier or x[0]
    x = EmpiricalDistribution(x)
    scan = np.geomspace(0.02, 2, 300) * x.max_abs / MID_RISE.outermost(bits)
    exact, rough = x.mse(scan, bits, MID_RISE), x.mse(scan, bits, MID_RISE, rough=True)
    assert not np.array_equal(exact, rough)
    np.testing.assert_array_less(exact, rough * (1 + 1e-9))
    np.testing.assert_allclose(rough, exact, rtol=2e-3)
    step = best_step(x, bits).double().item()
    nearby = step * np.linspace(0.99, 1.01, 51)
    assert mse_curve(x, step, bits).item() <= min(exact.min(), x.mse(nearby, bits, MID_RISE).min()) * (1 + 1e-7)


@pytest.mark.parametrize("row", list(paper.MAX_1960.itertuples()), ids=lambda row: f"{row.bits}bits")
def test_a_normal_tensor_has_maxs_step(row):
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    # of 10⁶ values the optimum is uncertain by about a thousandth, more where the valley is flat
    assert best_step(x, row.bits, MID_RISE).item() == pytest.approx(row.step, rel=6e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_a_uniform_tensor_has_the_step_that_tiles_its_range(bits):
    """On [−a, a]: 2^M cells of mid-rise, 2^M + 1 of Eq. 1 (Lemma 3, the + of its ±)."""
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    assert best_step(x, bits, MID_RISE).item() == pytest.approx(2 / 2**bits, rel=1e-3)
    assert best_step(x, bits, MID_TREAD).item() == pytest.approx(2 / (2**bits + 1), rel=1e-3)


@given(scale=st.floats(1e-6, 1e6), bits=st.integers(1, 8), grid=st.sampled_from([MID_RISE, MID_TREAD, SIGNED_INT]))
@settings(max_examples=30, deadline=None)
def test_the_step_grows_with_the_tensor(scale, bits, grid):
    x = torch.randn(500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one = mse_curve(x, best_step(x, bits, grid).double().item(), bits, grid).item()
    other = mse_curve(x * scale, best_step(x * scale, bits, grid).double().item(), bits, grid).item()
    assert other == pytest.approx(one * scale**2, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 5])
@EVERY_GRID
def test_max_abs_puts_the_outermost_level_on_the_largest_magnitude(grid, bits):
    x = torch.tensor([-0.3, 0.1, 0.9]) if grid != SIGNED_INT or bits > 1 else torch.tensor([-0.9, 0.1, 0.3])
    step = best_step(x, bits, grid, rule="max_abs").item()
    outermost = levels(bits, grid).abs().max() if grid == SIGNED_INT and bits == 1 else levels(bits, grid)[-1]
    assert step * outermost == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("method", ["mse", "max_abs"])
def test_steps_per_channel_are_those_of_the_rows(method):
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(6))
    x *= torch.logspace(-3, 3, 6).reshape(6, 1, 1, 1)
    steps = best_step(x, 3, rule=method, scope=PER_CHANNEL)
    assert steps.shape == (6, 1, 1, 1)
    for row, step in zip(x, steps, strict=True):
        assert torch.equal(best_step(row, 3, rule=method), step.squeeze())


@pytest.mark.parametrize("shape", [(40, 1, 3, 3), (24, 50), (5, 3000)], ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_a_channel_has_the_same_step_in_company_and_alone(grid, shape, monkeypatch):
    """To the last bit, from normal weights to two heaps of equal ones, and with and without the compiler."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    x[1:3] = x[1:3].sign() + 1e-3 * x[1:3]
    x[3] = torch.linspace(-1, 1, x[3].numel()).reshape(x[3].shape)
    for bits in (2, 4):
        steps = best_step(x, bits, grid, scope=PER_CHANNEL).flatten()
        assert steps.tolist() == [best_step(row, bits, grid).item() for row in x]
        with monkeypatch.context() as patch:
            patch.setattr(samples, "compiled", None)
            others = best_step(x, bits, grid, scope=PER_CHANNEL).flatten()
        for row, step, other in zip(x, steps, others, strict=True):  # sums in another order may take a valley as deep
            errors = mse_curve(row, [step.item(), other.item()], bits, grid)
            assert errors[0] == pytest.approx(errors[1].item(), rel=1e-5)


few_numbers = st.floats(-2, 2, width=16)  # so few that many are equal


@given(values=st.lists(few_numbers, min_size=1), threshold=few_numbers, guess=st.integers(0))
def test_from_any_guess_a_cell_ends_where_numpy_finds_it(values, threshold, guess):
    compiled = pytest.importorskip("kure_lib.tensors.compiled")
    values, threshold = np.sort(np.array(values, np.float32)), np.float32(threshold)
    found = compiled._first_from(values, threshold, guess % (values.size + 1))
    assert found == np.searchsorted(values, threshold)


def test_a_channel_without_a_step_is_refused_in_company():
    x = torch.randn(3, 30, generator=torch.Generator().manual_seed(8))
    with pytest.raises(KureError, match="zero everywhere"):
        best_step(torch.stack([x[0], 0 * x[1]]), 3, scope=PER_CHANNEL)
    with pytest.raises(KureError, match=r"tensor of shape \(30,\).*infinite or NaN"):
        best_step(torch.stack([x[0], x[1] / 0]), 3, scope=PER_CHANNEL)
    with pytest.raises(KureError, match="no levels on its side of zero"):
        best_step(torch.stack([x[0], -x[1].abs()]), 3, UNSIGNED, scope=PER_CHANNEL)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tensor_with_fewer_values_than_levels_is_like_many_copies_of_it(grid, bits):
    few = torch.randn(9, generator=torch.Generator().manual_seed(bits))
    many = few.repeat(100)
    steps = np.geomspace(1e-3, 1, 50)
    assert torch.allclose(mse_curve(few, steps, bits, grid), mse_curve(many, steps, bits, grid), rtol=1e-6, atol=1e-12)
    errors = [mse_curve(few, best_step(x, bits, grid).item(), bits, grid).item() for x in (few, many)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_distribution_answers_for_its_tensor():
    x = torch.randn(20, 30)
    distribution = EmpiricalDistribution(x)
    for bits in (2, 4):
        assert torch.equal(best_step(distribution, bits), best_step(x, bits))
    assert distribution.max_abs == pytest.approx(x.abs().max().item())
    assert distribution.mean_abs == pytest.approx(x.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_types_have_the_step_of_their_values(dtype):
    x = (100 * torch.randn(2000, generator=torch.Generator().manual_seed(7))).to(dtype)
    wanted = best_step(x.double(), 4)
    assert best_step(x, 4).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_step_needs_no_gradient_and_leaves_the_tensor():
    x = torch.randn(100, requires_grad=True)
    before = x.detach().clone()
    assert not best_step(x, 4).requires_grad
    assert torch.equal(x, before)


LAWS = {
    "normal": (torch.randn, theory.Normal(1.0)),
    "laplace": (lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n,)), theory.Laplace(1.0)),
    "uniform": (lambda n: torch.rand(n) * 2 - 1, theory.Uniform(1.0)),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("law", LAWS)
def test_aciq_recognizes_a_law_and_takes_its_optimal_step(law, bits):
    torch.manual_seed(0)
    draw, dist = LAWS[law]
    x = draw(200_000)
    for grid in (MID_RISE, SIGNED_INT):
        expected = theory.optimal_step(dist, bits, grid)
        assert best_step(x, bits, grid, "aciq").item() == pytest.approx(expected, rel=0.01)
        assert best_step(x, bits, grid, f"aciq:{law}").item() == best_step(x, bits, grid, "aciq").item()
        assert best_step(x, bits, grid, "mse").item() == pytest.approx(expected, rel=0.05)  # the tensor's own


@pytest.mark.parametrize("law", LAWS)
def test_aciq_after_a_relu_is_that_of_half_the_law(law):
    torch.manual_seed(0)
    x = LAWS[law][0](200_000).clamp(min=0)
    assert best_step(x, 4, UNSIGNED, "aciq").item() == pytest.approx(best_step(x, 4, UNSIGNED).item(), rel=0.05)


@EVERY_GRID
@pytest.mark.parametrize("p", [2.0, 3.0, 4.0])
def test_no_step_of_400_has_a_smaller_p_norm(grid, p):
    torch.manual_seed(0)
    x = torch.randn(5000).abs() if not grid.signed else torch.randn(5000)
    step = best_step(x, 3, grid, f"lp:{p}")

    def error(step):
        return (x - quantize(x, step, 3, grid)).abs().double().pow(p).mean().item()

    tried = torch.linspace(0.2, 3, 400) * step
    assert error(step) <= min(error(each) for each in tried) * (1 + 1e-3)


@pytest.mark.parametrize("bits", [2, 8])
def test_the_largest_norm_is_found_in_small_tensors_too(bits):
    torch.manual_seed(0)
    x = torch.randn(2000)
    step, small = (best_step(scale * x, bits, rule="lp:16").item() for scale in (1.0, 1e-12))
    assert small == pytest.approx(1e-12 * step, rel=1e-3)


def test_the_second_norm_is_the_mean_squared_error():
    torch.manual_seed(0)
    x = EmpiricalDistribution(torch.randn(50_000))
    for bits in (2, 4):
        steps = [best_step(x, bits, rule=method).item() for method in ("lp", "lp:2", "mse")]
        errors = mse_curve(x, steps, bits)
        assert errors.max() <= errors.min() * (1 + 1e-3)
    assert best_step(x, 4, rule="lp:4") > best_step(x, 4, rule="lp:2")  # minds the clipped ones more


def test_a_percentile_clips_the_share_it_names():
    x = torch.linspace(-1, 1, 10_001)
    for percent in (90.0, 99.0, 99.9):
        clip = best_step(x, 4, rule=f"percentile:{percent}") * MID_RISE.outermost(4)
        assert (x.abs() > clip).float().mean().item() == pytest.approx(1 - percent / 100, abs=2e-4)
    assert best_step(x, 4, rule="percentile:99.9") == best_step(x, 4, rule="percentile")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("percentile:0", "above 0"),
        ("percentile:150", "150 does not"),
        ("percentile:nan", "nan does not"),
        ("lp:0", "norm p .*not 0"),
        ("lp:-1", "not -1"),
        ("lp:17", "at most 16, not 17"),
        ("lp:inf", "not inf"),
        ("lp:two", "lp:two"),
        ("mse:3", "stand alone"),
        ("aciq:gamma", "family for aciq 'gamma'"),
        ("kl", "'kl'"),
    ],
)
def test_a_method_that_cannot_be_read_is_an_error(method, said):
    with pytest.raises(KureError, match=said):
        best_step(torch.randn(10), 4, rule=method)


@given(st.floats(1e-12, 1e12))
def test_a_power_of_two_is_the_nearest_in_the_exponent(step):
    rounded = power_of_two(torch.tensor(step, dtype=torch.float64)).item()
    exponent = math.log2(rounded)
    assert exponent == round(exponent)
    assert abs(exponent - math.log2(step)) <= 0.5 + 1e-12


def test_powers_of_two_per_channel_stay_what_they_are():
    steps = torch.exp2(torch.arange(-20.0, 20)).reshape(-1, 1, 1, 1)
    assert torch.equal(power_of_two(steps), steps)
    assert power_of_two(torch.tensor([1.40, 1.43])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(10), "zero everywhere"),
        (torch.empty(0), "empty"),
        (torch.tensor([1.0, math.nan]), "NaN"),
        (torch.tensor([math.nan, 1.0]), "NaN"),
        (torch.tensor([1.0, math.inf]), "infinite"),
        (torch.tensor([-math.inf, 1.0]), "infinite"),
    ],
)
@pytest.mark.parametrize("method", ["mse", "max_abs", "percentile", "lp", "aciq"])
def test_a_tensor_without_a_step_is_an_error(x, said, method):
    with pytest.raises(KureError, match=said):
        best_step(x, 4, rule=method)


@pytest.mark.parametrize("scope", [PER_CHANNEL, per_block(4)])
@pytest.mark.parametrize("shape", [(), (12,)])
def test_a_tensor_without_channels_has_no_steps_for_each(scope, shape):
    with pytest.raises(KureError, match=rf"Steps {scope} need the channels .* shape {re.escape(str(shape))} has none"):
        best_step(torch.ones(shape), 4, rule="max_abs", scope=scope)


@pytest.mark.parametrize(("x", "said"), [(torch.full((10,), -2.0), "are equal"), (torch.zeros(0), "empty")])
def test_what_has_no_variance_has_no_distortion(x, said):
    with pytest.raises(KureError, match=said):
        distortion(x, 4)


@pytest.mark.parametrize(("grid", "bits", "sign"), [(UNSIGNED, 4, -1), (SIGNED_INT, 1, 1)])
def test_a_tensor_on_the_wrong_side_of_zero_is_an_error(grid, bits, sign):
    x = sign * torch.rand(100)
    with pytest.raises(KureError, match=f"{grid.name}"):
        best_step(x, bits, grid)


def test_wrong_options_are_errors():
    x = torch.randn(10)
    with pytest.raises(KureError, match=r"'lapq'.*mse, max_abs"):
        best_step(x, 4, rule="lapq")
    for bits in (0, 17, 2.5, True):
        with pytest.raises(KureError, match=f"{bits} bits"):
            best_step(x, bits)
