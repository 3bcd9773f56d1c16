"""Uses of ReLUs, or without any inputs of layers: found, watched and replaced, and nothing left behind."""

import pytest
import torch
from torch import nn

from kure_lib.networks import activations, models
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.tensors.grids import SIGNED_INT, UNSIGNED
from kure_lib.training.configs import QatConfig
from kure_lib.training.qat import QuantizationAwareTraining
from kure_lib.training.regularizers import ActivationKurtosisRegularizer


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


def test_without_relus_the_inputs_of_layers_are_the_activations(resnet):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    x, seen = torch.randn(3, 4), {}
    with activations.replaced(model, lambda site, value: seen.setdefault(site, value.clone())):
        model(x)
    wanted = {"0:0": x, "2:0": model[:2](x), "4:0": model[:4](x)}
    assert seen.keys() == wanted.keys() and all(torch.equal(seen[site], wanted[site]) for site in seen)
    assert activations.quantized_sites(model, x) == ["2:0"]
    with activations.replaced(model, lambda site, value: torch.zeros_like(value) if site == "4:0" else value):
        assert torch.equal(model(x), model[4].bias.expand(3, 2))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (activations.grid(model), activations.grid(resnet)) == (SIGNED_INT, UNSIGNED)


def test_the_activations_of_a_transformer_are_those_that_quantized_layers_read():
    model = models.build("vit_small_images", 1, 10).eval()
    sites = activations.quantized_sites(model, IMAGES)
    assert sites == [f"{name}:0" for name in quantized_layers(model)] and len(sites) == 4 * 6


@pytest.mark.parametrize("method", ["lsq", "dorefa", "activations"])
def test_what_is_trained_for_relus_is_refused_without_them(method):
    model = models.build("vit_small_images", 1, 10)
    with pytest.raises(KureError, match="VisionTransformer has no ReLUs"):
        if method == "activations":
            ActivationKurtosisRegularizer(model, IMAGES)
        else:
            QuantizationAwareTraining(model, QatConfig.named(f"{method} 4/4"), IMAGES)


def test_an_exception_leaves_no_hook_behind(resnet):
    with pytest.raises(RuntimeError, match="stop"), activations.replaced(resnet, lambda site, output: output):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())
