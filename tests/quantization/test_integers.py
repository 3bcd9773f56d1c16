"""An integer master: right codes, right when bits are dropped, and all that a network needs of its weights."""

import math

import pytest
import torch
from helpers import same_weights
from torch import nn

from kure_lib.networks import models
from kure_lib.paths import KureError
from kure_lib.quantization import integers as master
from kure_lib.quantization.integers import Integers
from kure_lib.quantization.spec import ROUNDINGS
from kure_lib.quantization.view import quantized
from kure_lib.tensors.grids import SIGNED_INT
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, best_step

ALL = torch.arange(-128, 128).to(torch.int8)  # every code there is


@pytest.fixture
def every() -> Integers:
    return Integers(ALL, torch.tensor(0.25), 8)


@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
def test_the_codes_are_those_of_torchs_own_quantizer(tiny_model, scope):
    stored = master.of(tiny_model, scope)
    assert list(stored) == ["2", "4", "5"]
    for name, each in stored.items():
        weight = tiny_model.get_submodule(name).weight.detach()
        scale = each.step.flatten().expand(len(weight)).contiguous()
        zero = torch.zeros(len(weight), dtype=torch.int32)
        oracle = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127)
        assert each.codes.dtype == torch.int8
        assert torch.allclose(each.values, oracle, rtol=0, atol=1e-6)
        assert each.step.shape == ((len(weight), 1, 1, 1) if scope == PER_CHANNEL else ())


@pytest.mark.parametrize("bits", range(1, 9))
def test_dropping_bits_agrees_with_python(every, bits):
    k = 2 ** (8 - bits)
    highest = 2 ** (bits - 1) - 1
    oracles = {
        "even": [min(round(code / k), highest) for code in ALL.tolist()],
        "half_up": [min(math.floor(code / k + 0.5), highest) for code in ALL.tolist()],
        "truncate": [code // k for code in ALL.tolist()],
        "middle": [code // k for code in ALL.tolist()],
    }
    for method, codes in oracles.items():
        made = every.to(bits, method)
        assert made.codes.tolist() == codes, method
        assert made.codes.dtype == torch.int8
        assert made.step.item() == 0.25 * k


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_middle_of_a_cell_is_the_mean_of_the_codes_in_it(every, bits):
    values = every.to(bits, "middle").values
    for code in every.to(bits, "truncate").codes.unique():
        inside = every.to(bits, "truncate").codes == code
        assert values[inside].unique().item() == pytest.approx(every.values[inside].mean().item())


def test_only_rounding_to_even_and_the_middle_leave_the_mean_where_it_was(every):
    inner = slice(16, -16)  # nothing is clipped there
    drift = {m: (every.to(4, m).values - every.values)[inner].mean().item() / 0.25 for m in ROUNDINGS if m != "step"}
    assert drift == pytest.approx({"even": 0, "half_up": 0.5, "truncate": -7.5, "middle": 0}, abs=1e-6)


@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
def test_a_new_step_is_chosen_for_the_values_of_the_codes(tiny_model, scope):
    each = master.of(tiny_model, scope)["4"]
    step = best_step(each.values, 3, SIGNED_INT, scope=scope)
    made = each.to(3)
    assert torch.equal(made.step, step)
    assert torch.allclose(made.values, quantize(each.values, step, 3, SIGNED_INT))
    assert set(made.codes.unique().tolist()) <= {-4, -3, -2, -1, 0, 1, 2, 3}


def test_bytes_are_those_of_packed_codes_and_of_float32(tiny_model):
    stored = master.of(tiny_model)
    assert [each.bytes for each in stored.values()] == [8 * 8 * 9 + 4, 8 * 9 + 4, 16 * 8 + 4]
    assert stored["4"].to(3, "even").bytes == 27 + 4
    parameters = sum(p.numel() for p in tiny_model.parameters())
    assert master.kept_bytes(tiny_model) == 4 * parameters
    assert master.kept_bytes(tiny_model, stored) == 4 * (parameters - 576 - 72 - 128) + 576 + 72 + 128 + 3 * 4
    assert master.kept_bytes(tiny_model, master.of(tiny_model, scope=PER_CHANNEL)) == (
        master.kept_bytes(tiny_model, stored) + 4 * (7 + 7 + 15)
    )


def test_statistics_of_batch_norms_are_counted_and_their_counters_are_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    assert master.kept_bytes(model) == 4 * (2 + 4 * 2)


def test_the_network_is_served_without_its_own_weights():
    torch.manual_seed(0)
    model = models.build("resnet20", 1, 10).eval()
    images, stored = torch.randn(4, 1, 28, 28), master.of(model, scope=PER_CHANNEL)
    with torch.no_grad(), quantized(model, weight_bits=8, grid=SIGNED_INT, scope=PER_CHANNEL):
        expected = model(images)
    for name in stored:
        model.get_submodule(name).weight.data.fill_(math.nan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), master.served(model, stored) as view:
        assert torch.allclose(view(images), expected, atol=1e-5)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) or after[name].isnan().all() for name in before)


def test_afterwards_the_model_is_what_it_was_also_after_an_error(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), master.served(tiny_model, master.of(tiny_model)):
        raise ZeroDivisionError
    assert same_weights(before, tiny_model.state_dict())


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_that_cannot_be_made_are_refused(every, bits):
    with pytest.raises(KureError, match=f"Cannot make {bits} bits of 8"):
        every.to(bits)


def test_an_unknown_method_is_refused(every):
    with pytest.raises(KureError, match=r"'floor'.*step, even, half_up, truncate, middle"):
        every.to(4, "floor")


def test_a_quantized_layer_is_not_served_again(tiny_model):
    stored = master.of(tiny_model)
    with (
        master.served(tiny_model, stored),
        pytest.raises(KureError, match="quantized already"),
        master.served(tiny_model, stored),
    ):
        pass
