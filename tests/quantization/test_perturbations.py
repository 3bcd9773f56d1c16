"""What devices do to weights: each error is what its name says, by oracles from outside, and gone after the view."""

import math

import numpy as np
import pytest
import torch
from helpers import same_weights
from scipy import stats
from torch.nn import functional

from kure_lib.paths import KureError
from kure_lib.quantization import perturbations
from kure_lib.quantization.perturbations import generator
from kure_lib.quantization.spec import PIPELINES, QuantizationSpec
from kure_lib.quantization.view import corrected, quantized
from kure_lib.tensors.grids import FP4_E2M1, MID_RISE, SIGNED_INT
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, best_step

IMAGES = torch.randn(16, 1, 10, 10, generator=torch.Generator().manual_seed(1))
LAYERS = ("2", "4", "5")  # those of `tiny_model` that are quantized
KINDS = ["steps 1.25", "flips 0.01", "stochastic"]
ONE = torch.tensor(1.0)


def weights(view):
    return {name: view.get_submodule(name).weight.detach().clone() for name in LAYERS}


def seen(model, **fields):
    """The weights that a view of the model computes with."""
    with quantized(model, images=IMAGES, **fields) as view:
        return weights(view)


# The errors, one by one


def test_flips_are_those_of_the_bytes_in_memory():
    """numpy's bits of int8, two's complement: which bits differ is what was drawn, and each differs where it was."""
    codes = torch.randint(-128, 128, (64, 32), generator=torch.Generator().manual_seed(0)).float()
    wrong = perturbations.flipped(codes * 0.25, torch.tensor(0.25), 8, SIGNED_INT, 0.1, generator(3, "conv")) / 0.25
    before, after = (np.unpackbits(each.numpy().astype(np.int8).view(np.uint8)) for each in (codes, wrong))
    drawn = np.random.Generator(np.random.PCG64([3, *b"conv"])).random((codes.numel(), 8)) < 0.1
    assert np.array_equal((before ^ after).reshape(-1, 8), drawn[:, ::-1])  # the first of numpy's bits is the highest


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_that_count_from_the_lowest_level_flip_as_two_s_complement_does(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float().repeat(50)
    signed, counted = (
        perturbations.flipped(codes + grid.offset, ONE, bits, grid, 0.3, generator(0, "conv"))
        for grid in (SIGNED_INT, MID_RISE)
    )
    assert torch.equal(signed + 0.5, counted) and not torch.equal(signed, codes)
    assert set(signed.tolist()) == set(codes.tolist())


@pytest.mark.parametrize(("bits", "rate"), [(8, 1e-3), (4, 1e-2)])
def test_as_many_bits_flip_as_the_rate_says(bits, rate):
    """Binomial counts of each bit in 200,000 codes, seen through the distance of a single flip: within 4 deviations."""
    count = 200_000
    moved = perturbations.flipped(torch.zeros(count), ONE, bits, SIGNED_INT, rate, generator(1, "conv")).abs()
    alone = rate * (1 - rate) ** (bits - 1)
    found = [int((moved == 2**bit).sum()) for bit in range(bits)]
    assert found == pytest.approx([count * alone] * bits, abs=4 * math.sqrt(count * alone))


def test_what_flips_at_a_low_rate_flips_at_a_higher_one():
    levels = torch.zeros(50_000)
    low, high = (perturbations.flipped(levels, ONE, 4, SIGNED_INT, rate, generator(0, "conv")) for rate in (1e-3, 1e-2))
    assert 0 < (low != 0).sum() < (high != 0).sum() and ((high != 0) | (low == 0)).all()


@pytest.mark.parametrize("grid", [MID_RISE, SIGNED_INT], ids=lambda grid: grid.name)
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbouring_level(grid):
    """Monte Carlo: 40,000 draws of each of eleven weights, standard error √(p(1 − p)/40,000) steps, 4 of them."""
    weight = torch.linspace(-1.3, 0.7, 11)
    rounded = torch.stack([weight] * 40_000)
    rounded = perturbations.stochastic(rounded, torch.tensor(0.5), 3, grid, generator(0, "conv")) / 0.5
    part = (weight / 0.5 - grid.offset) % 1
    error = (rounded.double().mean(0) - weight / 0.5).abs()
    assert (error <= 4 * (part * (1 - part) / 40_000).sqrt() + 1e-6).all()
    assert ((rounded - weight / 0.5).abs() < 1 + 1e-5).all() and (((rounded - grid.offset) % 1) == 0).all()


def test_stochastic_rounding_clips_and_leaves_levels_where_they_are():
    weight = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 9.0])
    rounded = perturbations.stochastic(weight, ONE, 2, MID_RISE, generator(0, "conv"))
    assert rounded.tolist() == [-1.5, -1.5, -0.5, 0.5, 1.5, 1.5]


def test_step_factors_are_log_uniform():
    """Kolmogorov and Smirnov's test against scipy's distribution, one layer each, 2,000 of them: fails once in 10^4."""
    factors = [perturbations.step_factor(1.25, generator(0, f"layer{i}.conv")) for i in range(2000)]
    assert 1 / 1.25 < min(factors) < 0.81 and 1.24 < max(factors) < 1.25
    assert stats.kstest(factors, stats.loguniform(1 / 1.25, 1.25).cdf).pvalue > 1e-4


def test_random_numbers_are_those_of_the_draw_and_the_layer():
    """The last number is the one by which the records were made: another would make other accuracies."""
    assert generator(0, "conv1").random(3).tolist() == generator(0, "conv1").random(3).tolist()
    first = {generator(draw, name).random() for draw in range(3) for name in ("conv1", "conv2", "1conv")}
    assert len(first) == 9
    assert generator(2, "layer1.0.conv1").random() == 0.3283181376872987


# In a network


@pytest.mark.parametrize("scope", ["tensor", "channel"])
def test_every_layer_has_a_step_of_its_own_that_is_off(tiny_model, scope):
    fields = {"weight_bits": 3} | ({"scope": PER_CHANNEL} if scope == "channel" else {})
    found = seen(tiny_model, **fields, perturbation="steps 1.25", draw=5)
    for name in LAYERS:
        factor = perturbations.step_factor(1.25, generator(5, name))
        weight = tiny_model.get_submodule(name).weight.detach()
        step = best_step(weight, 3, scope=QuantizationSpec(**fields).scope) * factor
        assert torch.equal(found[name], quantize(weight, step, 3))


def test_flips_come_after_correction_and_new_statistics(tiny_model):
    """A batch norm learns from the weights that were right, and a channel keeps their scale and shift."""
    model = torch.nn.Sequential(tiny_model[:3], torch.nn.BatchNorm2d(8), tiny_model[3:]).eval()
    fields = {"weight_bits": 4, **PIPELINES["practice"]}
    with quantized(model, images=IMAGES, **fields) as view:
        norm = view[1].running_mean.clone(), view[1].running_var.clone()
    with quantized(model, images=IMAGES, **fields, perturbation="flips 0.05", draw=1) as view:
        assert torch.equal(view[1].running_mean, norm[0]) and torch.equal(view[1].running_var, norm[1])
        found = view[0][2].weight.detach().clone()
    weight = model[0][2].weight.detach()
    levels = quantize(weight, step := best_step(weight, 4, scope=PER_CHANNEL), 4)
    wrong = perturbations.flipped(levels, step, 4, MID_RISE, 0.05, generator(1, "0.2"))
    for channel in range(8):
        scale, shift = np.polyfit(levels[channel].flatten(), corrected(levels, weight)[channel].flatten(), 1)
        assert torch.allclose(found[channel], scale * wrong[channel] + shift, atol=1e-5)
        assert not torch.allclose(found[channel], scale * levels[channel] + shift, atol=1e-3)


@pytest.mark.parametrize("perturbation", KINDS)
@pytest.mark.parametrize("pipeline", ["plain", "practice"])
def test_two_networks_meet_the_same_errors_and_afterwards_none(tiny_model, perturbation, pipeline):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    fields = {"weight_bits": 4, "perturbation": perturbation, **PIPELINES[pipeline]}
    first, again, other = (seen(tiny_model, **fields, draw=draw) for draw in (0, 0, 1))
    usual = seen(tiny_model, weight_bits=4, **PIPELINES[pipeline])
    assert same_weights(before, tiny_model.state_dict())
    assert [name for name in LAYERS if not torch.equal(first[name], again[name])] == []
    assert [name for name in LAYERS if torch.equal(first[name], other[name])] == []
    assert [name for name in LAYERS if torch.equal(first[name], usual[name])] == []


def test_the_network_computes_with_the_flipped_weights(tiny_model):
    with quantized(tiny_model, weight_bits=4, perturbation="flips 0.2") as view, torch.inference_mode():
        scores, found = view(IMAGES), weights(view)
        x = functional.relu(functional.conv2d(IMAGES, view[0].weight))
        x = functional.relu(functional.conv2d(x, found["2"], view[2].bias))
        x = functional.conv2d(functional.conv2d(x, found["4"], view[4].bias, groups=8), found["5"])
        assert torch.allclose(scores, view[7](x.flatten(1)), atol=1e-6)


# The specification


def test_a_perturbation_has_one_name_and_a_draw():
    spec = QuantizationSpec(weight_bits=4, perturbation="flips 1e-4")
    assert spec.perturbation == "flips 0.0001" and spec.draw == 0
    assert spec.key == '{"draw": 0, "perturbation": "flips 0.0001", "weight_bits": 4}'
    assert QuantizationSpec.named(spec.key) == spec
    assert QuantizationSpec(weight_bits=4).draw is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"perturbation": "noise 0.1"}, "perturbation 'noise': choose one of steps, flips, stochastic"),
        ({"perturbation": ""}, "perturbation ''"),
        ({"perturbation": "steps"}, "'steps' cannot be read"),
        ({"perturbation": "flips often"}, "'flips often' cannot be read"),
        ({"perturbation": "stochastic 2"}, "'stochastic 2' cannot be read"),
        ({"perturbation": "steps 1.0"}, "give steps a number between 1 and inf"),
        ({"perturbation": "steps nan"}, "give steps a number"),
        ({"perturbation": "flips 1"}, "give flips a number between 0 and 1"),
        ({"draw": 1}, "Only a perturbation is drawn: leave draw=1 out"),
        ({"perturbation": "stochastic", "draw": -1}, "draw=-1"),
        ({"perturbation": "stochastic", "weight_bits": None}, "no quantized weights for 'stochastic'"),
        ({"perturbation": "stochastic", "reconstruction": "gptq"}, "gptq does not round as 'stochastic' says"),
        ({"perturbation": "flips 1e-3", "grid": FP4_E2M1}, "which fp4_e2m1 has not"),
        ({"perturbation": "stochastic", "grid": "mid_tread"}, "which mid_tread has not"),
        ({"perturbation": "steps 1.1", "rounding": "even", "grid": SIGNED_INT}, "8-bit copy cannot take perturbation"),
        ({"perturbation": "steps 1.1", "step_rule": "lsq"}, "by lsq cannot take perturbation"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields, said):
    with pytest.raises(KureError, match=said) as error:
        QuantizationSpec(**{"weight_bits": 4} | fields)
    assert "\n" not in str(error.value)
