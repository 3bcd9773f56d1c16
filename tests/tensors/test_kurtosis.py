"""Kurtosis against SciPy, and its gradient against automatic and numerical differentiation."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis as scipy_kurtosis
from scipy.stats import skew
from torch.utils._python_dispatch import TorchDispatchMode

from kure_lib.paths import KureError
from kure_lib.tensors.kurtosis import _OfRows, kurtoses, kurtosis


def sample(size, dtype=torch.float64, seed=0, mean=0.0):
    """Values of a skewed distribution, so that every moment takes part."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return (values + 0.3 * values**2 + mean).to(dtype)


def expected(x, **options):
    """SciPy's kurtosis of exactly the numbers in `x`, in double precision."""
    return scipy_kurtosis(x.detach().double().numpy(), fisher=False, **options)


def plain(x):
    """Kurtosis as it is written on paper, differentiable by autograd."""
    deviation = x - x.mean()
    return (deviation**4).mean() / (deviation**2).mean() ** 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("size", [10, 127, 4096, 16_383, 16_385, 100_001, 10_000_000])
def test_kurtosis_is_scipys(size, dtype, tolerance):
    x = sample(size, dtype)
    value = kurtosis(x)
    assert value.dtype == dtype and value.shape == ()
    assert value.item() == pytest.approx(expected(x, axis=None), rel=tolerance)


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (torch.tensor([-1.0, 1.0]), 1.0),  # the least any distribution can have
        (torch.arange(1_000_001, dtype=torch.float64), 1.8),
        (torch.tensor([0.0] * 99 + [1.0]), 98 + 1 / 99),  # Bernoulli of p: 1/p + 1/(1 − p) − 3
    ],
)
def test_kurtosis_of_known_distributions(x, value):
    assert kurtosis(x).item() == pytest.approx(value, rel=1e-5)


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=60).filter(lambda v: np.std(v) > 1e-3),
    scale=st.sampled_from([-3.0, 0.125, 700.0]),
    shift=st.floats(-10, 10),
)
def test_kurtosis_does_not_see_scale_or_shift_and_is_above_its_bound(values, scale, shift):
    x = torch.tensor(values, dtype=torch.float64)
    value = kurtosis(x).item()
    assert value >= (1 + skew(x.numpy()) ** 2) * (1 - 1e-6)  # Pearson's inequality
    assert value <= len(values) * (1 + 1e-6)
    assert kurtosis(scale * x + shift).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (10, 64), (3, 20_000), (1, 50)])
def test_kurtosis_per_channel_is_scipys_of_each_row(shape, dtype, tolerance):
    x = sample(shape, dtype)
    value = kurtosis(x, per_channel=True)
    assert value.shape == shape[:1]
    np.testing.assert_allclose(value, expected(x.reshape(shape[0], -1), axis=1), rtol=tolerance)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(3, 2, 1, 0),
    "every_second_channel": lambda x: x[::2],
    "sliced_inside": lambda x: x[:, 1:5, :, 1:],
    "reversed_twice_strided": lambda x: x.flip(0)[:, ::3],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "one_channel": lambda x: x[:1],
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_in_memory_changes_neither_value_nor_gradient(layout, per_channel):
    base = sample((12, 10, 3, 3)).requires_grad_()
    x = LAYOUTS[layout](base)
    rows = list(x) if per_channel else [x]
    weights = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    wanted = torch.stack([plain(row) for row in rows])
    (wanted_gradient,) = torch.autograd.grad(wanted @ weights, base)

    value = kurtosis(x, per_channel=per_channel)
    (gradient,) = torch.autograd.grad(value.reshape(-1) @ weights, base)
    torch.testing.assert_close(value.reshape(-1), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_tensors_at_once_have_the_kurtoses_and_gradients_of_each(dtype):
    shapes = [(12, 10, 3, 3), (7,), (40, 500)]
    tensors = [sample(shape, dtype, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    apart = [kurtosis(x) for x in tensors]
    values = kurtoses(tensors)
    assert torch.equal(values, torch.stack(apart))
    assert kurtoses([tensors[0], torch.ones(5, dtype=dtype)]).isnan().tolist() == [False, True]
    weights = torch.tensor([1.0, -2.0, 3.0]).to(values.dtype)
    together = torch.autograd.grad(values @ weights, tensors)
    for gradient, value, weight, x in zip(together, apart, weights, tensors, strict=True):
        assert torch.equal(gradient, torch.autograd.grad(value * weight, x)[0])


BITS = """
import torch
from kure_lib.tensors.kurtosis import kurtoses
generator = torch.Generator().manual_seed(0)
tensors = [torch.randn(size, generator=generator).requires_grad_() for size in (17, 2_304, 36_864, 204_800)]
values = kurtoses(tensors)
values.square().sum().backward()
print([x.view(torch.int32).sum().item() for x in (values.detach(), *(x.grad for x in tensors))])
"""


def test_just_compiled_and_from_the_compilers_cache_it_is_the_same_bits(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        child = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, check=True)
        said.append(child.stdout)
        assert list(tmp_path.rglob("*.nbc"))
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"unbiased": True}])
def test_gradient_is_the_numerical_one(options):
    x = sample((3, 5, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kurtosis(x, **options), x)


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_float32_gradient_is_autograds_of_the_plain_formula(mean):
    x = sample(50_000, torch.float32, mean=mean).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(kurtosis(x), x)
    (wanted,) = torch.autograd.grad(plain(exact), exact)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


def test_the_gradient_has_no_component_along_scale_or_shift():
    x = sample(1000).requires_grad_()
    (gradient,) = torch.autograd.grad(kurtosis(x), x)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-14)
    assert (gradient @ x).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ratio", [1e3, 1e4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_mean_far_from_zero_costs_no_digits(ratio, per_channel):
    """Of the numbers float32 holds; at mean/σ = 10⁴ their own spacing is already 10⁻³ σ."""
    x = sample((4, 30_000), torch.float32, mean=ratio)
    wanted = expected(x, axis=1 if per_channel else None)
    np.testing.assert_allclose(kurtosis(x, per_channel=per_channel), wanted, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 10, 1000])
def test_unbiased_divides_by_the_standard_deviation_with_n_minus_one(size):
    x = sample(size)
    wanted = ((x - x.mean()) ** 4).mean() / x.std(unbiased=True) ** 4
    assert kurtosis(x, unbiased=True).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = sample(1000, dtype)
    assert kurtosis(x).item() == pytest.approx(expected(x), rel=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0), torch.empty(0, 3), torch.tensor(1.0), torch.ones(1), torch.ones(3, 0), torch.zeros(5),
        torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, math.inf, 2.0]), torch.tensor([-math.inf, 1.0, 2.0]),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_has_no_kurtosis_is_an_error(x, per_channel):
    with pytest.raises(KureError, match="Kurtosis"):
        kurtosis(x, per_channel=per_channel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 10, 1000, 100_000])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3, 1e4 / 3])
def test_equal_values_have_no_kurtosis_though_rounding_gives_them_a_variance(value, size, dtype):
    with pytest.raises(KureError, match="variance"):
        kurtosis(torch.full((size,), value, dtype=dtype))


def test_one_constant_channel_is_an_error():
    x = sample((4, 100))
    x[2] = 0.1
    kurtosis(x)
    with pytest.raises(KureError, match="variance"):
        kurtosis(x, per_channel=True)


@pytest.mark.parametrize("exponent", range(-40, 31, 2))
def test_a_value_too_small_or_large_for_its_fourth_power_is_right_or_an_error(exponent):
    x = sample(1000, torch.float32) * 10.0**exponent
    try:
        value = kurtosis(x).item()
    except KureError:
        assert not -8 <= exponent <= 8, "weights of ordinary size have a kurtosis"
    else:
        assert value == pytest.approx(expected(x), rel=1e-4)


def networks_weights(layers, dtype):
    """Weights of several layers: of sizes that fill rows and that do not, channels-last, and far from zero."""
    shapes = [(64, 3, 7, 7), (5,), (8, 16, 8, 1), (96, 1, 3, 3), (32, 64)] * layers
    weights = [sample(shape, dtype, seed=i) * 2.0 ** (i % 7 - 3) + (i % 3) for i, shape in enumerate(shapes)]
    return [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_rows_of_a_gpu_give_the_kurtosis_and_the_gradient_of_the_definition(dtype, rtol):
    weights = [w.requires_grad_() for w in networks_weights(2, dtype)]
    factors = torch.linspace(0.5, 2, len(weights), dtype=torch.float64)
    values = _OfRows.apply(*weights)
    assert values.tolist() == pytest.approx([expected(w.flatten()) for w in weights], rel=rtol)
    (values.double() * factors).sum().backward()
    for weight, factor in zip(weights, factors, strict=True):
        exact = weight.detach().double().requires_grad_()
        (factor * plain(exact)).backward()
        assert weight.grad.stride() == weight.stride()
        assert (weight.grad - exact.grad).norm() < 10 * rtol * exact.grad.norm()
    assert _OfRows.apply(torch.ones(2000), sample(2000, torch.float32)).isnan().tolist() == [True, False]


def test_the_number_of_kernels_on_a_gpu_does_not_grow_with_the_number_of_layers():
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            view = any(name in str(function) for name in ("view", "strided", "detach", "slice", "unbind", "unsqueeze"))
            self.count += not view
            return function(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 10):
        weights = [w.requires_grad_() for w in networks_weights(layers, torch.float32)]
        _OfRows.apply(*weights)  # where the rows lie is found once
        with Counting() as counting:
            torch.autograd.grad(_OfRows.apply(*weights).sum(), weights)
        counts.append(counting.count)
    assert counts[0] == counts[1] < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("per_channel", [False, True])
def test_gpu_gives_the_processors_kurtosis(per_channel):
    x = sample((8, 4000), torch.float32)
    there = kurtosis(x.cuda(), per_channel=per_channel).cpu()
    torch.testing.assert_close(there, kurtosis(x, per_channel=per_channel), rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_per_channel_equals_one_row_after_the_other(rows, columns, seed):
    x = sample((rows, columns), seed=seed)
    together = kurtosis(x, per_channel=True)
    torch.testing.assert_close(together, torch.stack([kurtosis(row) for row in x]), rtol=1e-9, atol=0)
