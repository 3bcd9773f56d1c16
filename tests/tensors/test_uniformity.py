"""The uniformizing statistics against scipy and closed forms."""

from math import log, pi, sqrt

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from kure_lib.tensors.uniformity import (
    PENALTIES,
    SORTING,
    entropy,
    entropy_gap,
    kolmogorov_smirnov,
    magnitude_variation,
    range_ratio,
    wasserstein,
)

N = 20_001
QUANTILES = (np.arange(N) + 0.5) / N
FAMILIES = {
    "uniform": scipy.stats.uniform(-1, 2),
    "normal": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(),
    "skewed": scipy.stats.gamma(2),
}
STATISTICS = (magnitude_variation, range_ratio, entropy_gap, wasserstein, kolmogorov_smirnov)

families = pytest.mark.parametrize("family", FAMILIES)


def sample(family, n=500, seed=3):
    return torch.from_numpy(FAMILIES[family].rvs(n, random_state=np.random.default_rng(seed)))


@families
@pytest.mark.parametrize("n", [10, 50, 1999])
def test_entropy_is_scipys_vasicek_estimator(family, n):
    x = sample(family, n)
    expected = scipy.stats.differential_entropy(x.numpy(), method="vasicek")
    assert entropy(x).item() == pytest.approx(expected, rel=1e-12)


@families
def test_kolmogorov_smirnov_is_scipys(family):
    x = sample(family)
    width = 2 * sqrt(3) * x.std(correction=0).item()
    law = scipy.stats.uniform(x.mean().item() - width / 2, width)
    expected = scipy.stats.kstest(x.numpy(), law.cdf).statistic
    assert kolmogorov_smirnov(x).item() == pytest.approx(expected, rel=1e-9)


@families
def test_wasserstein_is_the_cost_of_the_best_assignment(family):
    x = sample(family, 60)
    z = ((x - x.mean()) / x.std(correction=0)).numpy()
    quantiles = scipy.stats.uniform(-sqrt(3), 2 * sqrt(3)).ppf((np.arange(60) + 0.5) / 60)
    cost = (z[:, None] - quantiles) ** 2
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert wasserstein(x).item() == pytest.approx(cost[rows, columns].mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("statistic", "family", "value"),
    [
        (magnitude_variation, "uniform", 1 / sqrt(3)),
        (magnitude_variation, "normal", sqrt(pi / 2 - 1)),
        (magnitude_variation, "laplace", 1.0),
        (range_ratio, "uniform", sqrt(3)),
        (entropy, "uniform", log(2)),
        (entropy, "normal", 0.5 * log(2 * pi * np.e)),
        (entropy_gap, "uniform", 0.0),
        (wasserstein, "uniform", 0.0),
        (wasserstein, "normal", 2 - 2 * sqrt(3 / pi)),
        (kolmogorov_smirnov, "uniform", 0.0),
    ],
)
def test_values_of_known_distributions(statistic, family, value):
    x = torch.from_numpy(FAMILIES[family].ppf(QUANTILES))
    assert statistic(x).item() == pytest.approx(value, abs=0.01)


@given(scale=st.floats(1e-3, 1e3), family=st.sampled_from(list(FAMILIES)))
@pytest.mark.parametrize("statistic", STATISTICS)
def test_scale_does_not_matter(statistic, scale, family):
    x = sample(family)
    assert statistic(scale * x).item() == pytest.approx(statistic(x).item(), rel=1e-9, abs=1e-12)


@given(shift=st.floats(-10, 10), family=st.sampled_from(list(FAMILIES)))
@pytest.mark.parametrize("statistic", [s for s in STATISTICS if s is not magnitude_variation])
def test_the_mean_does_not_matter(statistic, shift, family):
    x = sample(family)
    assert statistic(x + shift).item() == pytest.approx(statistic(x).item(), rel=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_least_for_a_uniform_tensor(name):
    tensors = {family: torch.from_numpy(law.ppf(QUANTILES)) for family, law in FAMILIES.items()}
    values = {family: PENALTIES[name](x).item() for family, x in tensors.items()}
    assert min(values, key=values.get) == "uniform" and values["uniform"] < 0.02


@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "kurtosis"])
@families
def test_gradients_are_those_of_finite_differences(name, family):
    x = sample(family, 30).requires_grad_()
    torch.autograd.gradcheck(PENALTIES[name], x, atol=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_small_step_down_the_gradient_lowers_the_penalty(name):
    x = sample("normal").requires_grad_()
    before = PENALTIES[name](x)
    (grad,) = torch.autograd.grad(before, x)
    assert PENALTIES[name]((x - 1e-4 * grad / grad.norm()).detach()) < before


def test_shape_is_ignored():
    x = sample("normal", 600)
    for statistic in STATISTICS:
        assert statistic(x.reshape(10, 5, 4, 3)).item() == pytest.approx(statistic(x).item(), rel=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_what_sorts_is_named(name):
    waiting, seen = [PENALTIES[name](sample("normal").requires_grad_()).grad_fn], set()
    while waiting:  # through the graph of the backward pass
        node = waiting.pop()
        seen.add(node.name())
        waiting += [parent for parent, _ in node.next_functions if parent]
    assert any("Sort" in operation for operation in seen) == (name in SORTING)
