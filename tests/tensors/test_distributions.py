"""Families of distributions against scipy, and what their kurtosis is asked to be."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from kure_lib.tensors.distributions import UNIT_VARIANCE, GeneralizedNormal, SymmetricBeta, with_kurtosis

FAMILIES = {
    "peaked": (GeneralizedNormal(0.7, 1.3), scipy.stats.gennorm(0.7, scale=1.3)),
    "laplace": (GeneralizedNormal(1.0, 0.5), scipy.stats.laplace(scale=0.5)),
    "normal": (GeneralizedNormal(2.0, 2**0.5), scipy.stats.norm()),
    "flat": (GeneralizedNormal(9.0, 2.0), scipy.stats.gennorm(9, scale=2)),
    "humps": (SymmetricBeta(0.375, 1.5), scipy.stats.beta(0.375, 0.375, loc=-1.5, scale=3)),
    "uniform": (SymmetricBeta(1.0, 0.8), scipy.stats.uniform(-0.8, 1.6)),
    "arch": (SymmetricBeta(2.5, 1.0), scipy.stats.beta(2.5, 2.5, loc=-1, scale=2)),
}  # fmt: skip
KURTOSES = (1.05, 1.4, 1.6, 1.79, 1.8, 1.81, 2.4, 3.0, 6.0, 9.0, 30.0)

families = pytest.mark.parametrize(("ours", "theirs"), FAMILIES.values(), ids=FAMILIES)


@families
def test_moments_are_scipys(ours, theirs):
    assert ours.mean == pytest.approx(theirs.mean(), abs=1e-12)
    assert ours.variance == pytest.approx(theirs.var(), rel=1e-9)
    assert ours.kurtosis == pytest.approx(3 + float(theirs.stats("k")), rel=1e-6)


@families
def test_the_three_functions_are_scipys(ours, theirs):
    b = np.linspace(-3, 3, 61)[:, None] * np.ones(2)
    np.testing.assert_allclose(ours.tail(b), np.where(b > 0, theirs.sf(b), theirs.cdf(b)), rtol=1e-9, atol=1e-14)
    inside = np.abs(np.abs(b) - theirs.support()[1]) > 1e-9
    np.testing.assert_allclose(ours.density(b)[inside], theirs.pdf(b)[inside], rtol=1e-9, atol=1e-14)
    for point in (-1.1, -0.3, 0.0, 0.2, 0.77, 1.4):
        low, high = sorted([point, theirs.support()[0 if point <= 0 else 1]])
        area = quad(theirs.cdf if point <= 0 else theirs.sf, low, max(low, high), epsabs=1e-13, epsrel=1e-11)[0]
        assert float(ours.excess(point)) == pytest.approx(area, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("kurtosis", KURTOSES)
def test_the_family_has_the_kurtosis_it_is_asked_for_and_variance_one(kurtosis):
    dist = with_kurtosis(kurtosis)
    assert dist.variance == pytest.approx(1, rel=1e-9)
    assert getattr(dist, "kurtosis", 1.8) == pytest.approx(kurtosis, rel=1e-9)


@given(st.floats(1.01, 20), st.floats(-2.5, 2.5))
def test_the_family_is_continuous_and_contains_the_papers_three(kurtosis, b):
    near = with_kurtosis(kurtosis * (1 + 1e-7))
    assert float(with_kurtosis(kurtosis).excess(b)) == pytest.approx(float(near.excess(b)), abs=1e-6)
    for name, known in (("uniform", 1.8), ("normal", 3.0), ("laplace", 6.0)):
        wanted = float(UNIT_VARIANCE[name].excess(b))
        assert float(with_kurtosis(known).excess(b)) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kurtosis", [1.0, 0.5, -3.0, float("nan"), float("inf")])
def test_a_kurtosis_no_density_has_is_an_error(kurtosis):
    with pytest.raises(ValueError, match="above 1"):
        with_kurtosis(kurtosis)
