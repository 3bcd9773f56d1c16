"""Uses of ReLUs: found, watched and replaced, and nothing left behind."""

import pytest
import torch
from torch import nn

from kure_lib.networks import activations, models


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return models.build("resnet20", 1, 10).eval()


IMAGES = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


def test_every_use_of_a_relu_is_a_site_of_its_own(resnet):
    found = activations.sites(resnet, IMAGES)
    assert found[:3] == ["relu:0", "layer1.0.relu:0", "layer1.0.relu:1"]
    assert len(found) == len(set(found)) == 1 + 2 * 9  # the stem and two in each block
    assert activations.quantized_sites(resnet, IMAGES) == found[1:-1]
    mobilenet = models.build("mobilenet_v2_050", 1, 10)
    relus = [module for module in mobilenet.modules() if isinstance(module, nn.ReLU6)]
    assert len(activations.sites(mobilenet, IMAGES)) == len(relus) == 35


def test_looking_for_sites_changes_nothing(resnet):
    resnet.train()
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    activations.sites(resnet, IMAGES)
    assert resnet.training
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_what_is_replaced_is_what_the_next_layer_sees(resnet):
    expected = resnet(IMAGES)
    seen = []
    with activations.replaced(resnet, lambda site, output: seen.append(site) or torch.zeros_like(output)):
        zeroed = resnet(IMAGES)
    assert seen == activations.sites(resnet, IMAGES)
    assert torch.allclose(zeroed, resnet.fc.bias.expand_as(zeroed))  # nothing but the last bias is left
    assert torch.equal(resnet(IMAGES), expected)


def test_uses_are_counted_anew_in_every_forward_pass(resnet):
    seen = []
    with activations.replaced(resnet, lambda site, output: seen.append(site) or output):
        resnet(IMAGES)
        resnet(IMAGES)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_an_exception_leaves_no_hook_behind(resnet):
    with pytest.raises(RuntimeError, match="stop"), activations.replaced(resnet, lambda site, output: output):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())
