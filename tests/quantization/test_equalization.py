"""Equalized networks compute what they did, with ranges that closed forms know."""

import copy

import pytest
import torch
from helpers import same_weights
from torch import nn

from kure_lib.networks import models
from kure_lib.paths import KureError
from kure_lib.quantization import equalization
from kure_lib.quantization.equalization import equalized, pairs, ranges
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import folded, quantized
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step


def network(name):
    """One of the library's networks whose batch norms have seen images, and channels of very different size."""
    torch.manual_seed(0)
    model = models.build(name, 1, 10)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.mul_(torch.rand_like(norm.weight) * 3 + 0.1)
                norm.bias.add_(torch.randn_like(norm.bias))
        for _ in range(5):
            model(torch.randn(16, 1, 28, 28))
    return model.eval()


def chain(activation=nn.ReLU, groups=1):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), activation(), nn.Conv2d(8, 8, 3, groups=groups), activation(),
        nn.Conv2d(8, 4, 1, bias=False),
    ).eval()  # fmt: skip


@torch.no_grad()
def distance(one, other, images):
    """The largest difference of the outputs, relative to the largest output."""
    return ((one(images) - other(images)).abs().max() / one(images).abs().max()).item()


IMAGES = torch.randn(8, 2, 12, 12, generator=torch.Generator().manual_seed(2)) * 20


@pytest.mark.parametrize(("name", "count"), [("resnet20", 9), ("mobilenet_v2_050", 36)])
def test_an_equalized_network_computes_what_it_did(name, count):
    model = folded(network(name))
    other, images = equalized(model), torch.randn(8, 1, 28, 28)
    assert distance(model, other, images) < 1e-5
    assert len(pairs(other)) == len(pairs(model)) == count
    for pair in pairs(model):
        before, after = ranges(model, pair), ranges(other, pair)
        assert torch.allclose(*after, rtol=1e-4) and not torch.allclose(*before, rtol=0.1)


def test_convolutions_that_share_their_weights_are_equalized_each_by_itself():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()  # fmt: skip
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    before = copy.deepcopy(model)
    other = equalized(model)
    assert distance(model, other, IMAGES) < 1e-5 and same_weights(model.state_dict(), before.state_dict())
    assert all(torch.allclose(*ranges(other, pair), rtol=1e-4) for pair in pairs(model))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_ranges_of_a_chain_are_geometric_means(activation, groups):
    """Depthwise in the middle, a channel's three ranges become their cube root; of other chains each pair is equal."""
    model = chain(activation, groups)
    other = equalized(model)
    assert distance(model, other, IMAGES) < 1e-5
    found = [ranges(other, pair) for pair in pairs(model)]
    assert len(found) == 2 and all(torch.allclose(*each, rtol=1e-4) for each in found)
    if groups == 8:
        (first, middle), (_, last) = (ranges(model, pair) for pair in pairs(model))
        for each in (found[0][0], found[0][1], found[1][1]):
            assert torch.allclose(each, (first * middle * last) ** (1 / 3), rtol=1e-4)


def test_one_pair_has_the_root_of_the_product():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    (pair,) = pairs(model)
    first, second = ranges(model, pair)
    assert torch.allclose(ranges(equalized(model), pair)[0], (first * second).sqrt(), rtol=1e-5)
    assert torch.equal(first, model[0].weight.flatten(1).abs().max(1).values)
    assert torch.equal(second, model[2].weight.transpose(0, 1).flatten(1).abs().max(1).values)


def test_a_relu6_ends_where_its_channels_do_and_not_nowhere():
    """With the clip of ReLU6 taken away, as Nagel et al. do, or left at six, the outputs are others."""
    model = chain(nn.ReLU6)
    other = equalized(model)
    for wrong in (nn.ReLU(), nn.ReLU6()):
        spoiled = copy.deepcopy(other)
        spoiled[1] = spoiled[3] = wrong
        assert distance(model, spoiled, IMAGES) > 0.01
    assert distance(model, equalized(other), IMAGES) < 1e-5  # once more changes nothing
    assert all(torch.allclose(one.limits, two.limits, rtol=1e-4) for one, two in
               zip(other[1::2], equalized(other)[1::2], strict=True))  # fmt: skip


def test_a_channel_that_is_zero_on_one_side_stays():
    model = chain()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[4].weight[:, 5] = 0
    other = equalized(model)
    assert distance(model, other, IMAGES) < 1e-5
    assert all(value.isfinite().all() for value in other.state_dict().values())
    assert torch.equal(other[0].weight[3], model[0].weight[3]) and torch.equal(other[0].bias[3], model[0].bias[3])


def test_a_convolution_that_something_else_reads_is_left_alone():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.relu = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

        def forward(self, x):
            x = self.relu(self.one(x))
            return self.two(x) + x

    with pytest.raises(KureError, match="no two convolutions in a row"):
        equalized(Branched())


def test_the_view_quantizes_the_equalized_copy_and_leaves_the_network():
    model = network("mobilenet_v2_050")
    before = copy.deepcopy(model.state_dict())
    expected = equalized(folded(model))
    with quantized(model, weight_bits=6, fold_batch_norm=True, equalized=True) as view:
        name = "features.3.conv.0.0"
        weight = expected.get_submodule(name).weight.detach()
        assert torch.equal(view.get_submodule(name).weight, quantize(weight, best_step(weight, 6), 6))
    assert same_weights(before, model.state_dict())


def test_what_cannot_be_equalized_is_said():
    with pytest.raises(KureError, match="once batch norms are folded: give fold_batch_norm=True"):
        QuantizationSpec(weight_bits=4, equalized=True)
    with pytest.raises(KureError, match="no two convolutions in a row to equalize: fold the batch norms first"):
        equalized(network("mobilenet_v2_050"))

    class Wayward(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(KureError, match="cannot be followed from layer to layer"):
        equalization.pairs(Wayward())


def test_its_key_names_it():
    spec = QuantizationSpec(weight_bits=6, fold_batch_norm=True, equalized=True)
    assert spec.key == '{"equalized": true, "fold_batch_norm": true, "weight_bits": 6}'
    assert QuantizationSpec.named(spec.key) == spec
