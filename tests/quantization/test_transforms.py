"""Transformed networks compute what they did; what changes is what quantization sees."""

import pytest
import torch
from scipy.linalg import block_diag, hadamard
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn

from kure_lib.networks import models
from kure_lib.networks.device import in_float32
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.transforms import channel_ranges, transformed
from kure_lib.quantization.view import quantized
from kure_lib.tensors.quantizers import quantize


@pytest.fixture
def network():
    """Three linear layers of which the middle one is quantized, and channels of its input that stand out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[0].weight[::16] *= 8
    return model


IMAGES = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["smoothed", "rotated"])
@torch.no_grad()
def test_a_transformed_network_computes_what_it_did(network, kind):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other = transformed(network, kind, IMAGES)
    wanted = network(IMAGES)
    assert (other(IMAGES) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.allclose(other[2].weight, network[2].weight, atol=0.01)
    assert torch.equal(other[0].weight, network[0].weight) and torch.equal(other[4].weight, network[4].weight)


@pytest.mark.parametrize("kind", ["smoothed", "rotated"])
@torch.no_grad()
def test_layers_that_share_their_weights_are_transformed_each_by_itself(kind):
    torch.manual_seed(0)
    linear = [nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)]
    linear[2].weight = linear[1].weight
    model = nn.Sequential(*(module for layer in linear for module in (layer, nn.Tanh()))).eval()
    wanted = model(IMAGES)
    assert (transformed(model, kind, IMAGES)(IMAGES) - wanted).abs().max() < 1e-5
    assert torch.equal(model(IMAGES), wanted)


@pytest.mark.parametrize("kind", ["smoothed", "rotated"])
@torch.no_grad()
def test_a_transformed_transformer_computes_what_it_did(kind):
    torch.manual_seed(0)
    model, images = models.build("vit_small_images", 1, 10).eval(), torch.randn(8, 1, 28, 28)
    nn.init.normal_(model.heads.head.weight)
    wanted = model(images)
    other = transformed(model, kind, images)
    assert (other(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not any(torch.equal(a.weight, b.weight) for a, b in
                   zip(quantized_layers(model).values(), quantized_layers(other).values(), strict=True))  # fmt: skip


def test_smoothing_is_equation_4_of_smoothquant(network):
    other = transformed(network, "smoothed", IMAGES)
    seen = network[:2](IMAGES).abs().amax(0).detach().double()
    scale = seen.sqrt() / network[2].weight.detach().double().abs().amax(0).sqrt()
    assert torch.allclose(other[2].weight.double(), network[2].weight.double() * scale)
    ranges = channel_ranges(other, IMAGES, ["2"])["2"].double()
    assert torch.allclose(ranges, seen / scale)
    assert torch.allclose(ranges, other[2].weight.detach().double().abs().amax(0)), "both sides range alike"


def test_a_channel_that_is_never_seen_keeps_its_weights(network):
    with torch.no_grad():
        network[0].weight[7], network[0].bias[7] = 0, 0
    other = transformed(network, "smoothed", IMAGES)
    assert torch.equal(other[2].weight[:, 7], network[2].weight[:, 7]) and other(IMAGES).isfinite().all()


def test_rotation_multiplies_by_scipys_hadamard_matrix(network):
    rotation = torch.from_numpy(block_diag(hadamard(64), hadamard(64)) / 8.0)
    other = transformed(network, "rotated")
    assert torch.allclose(other[2].weight.double(), network[2].weight.double() @ rotation, atol=1e-6)


def test_rotation_makes_uniform_weights_normal():
    """Sums of 64 independent values: excess kurtosis −1.2 shrinks to −1.2/64. The error of the estimate is √(24/N)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2000), nn.Linear(2000, 3))
    nn.init.uniform_(model[1].weight)
    model[1].weight.data -= 0.5
    excess = scipy_kurtosis(transformed(model, "rotated")[1].weight.detach().flatten().numpy())
    assert abs(excess + 1.2 / 64) < 4 * (24 / 128_000) ** 0.5


@pytest.mark.parametrize("kind", ["smoothed", "rotated"])
@torch.no_grad()
def test_channels_that_stand_out_cost_less(network, kind):
    wanted, error = network(IMAGES), {}
    for transform in (None, kind):
        with quantized(network, weight_bits=8, activation_bits=8, transform=transform, images=IMAGES) as view:
            error[transform] = (view(IMAGES) - wanted).square().mean().item()
    assert error[kind] < 0.5 * error[None]


@torch.no_grad()
def test_the_view_quantizes_what_is_rotated_on_both_sides(network):
    steps = {"2": torch.tensor(0.01), "2:0": torch.tensor(0.5)}
    spec = QuantizationSpec(weight_bits=4, activation_bits=5, transform="rotated", grid="signed_int")
    with quantized(network, spec, IMAGES, steps=steps) as view:
        found = view(IMAGES)
    rotation = torch.from_numpy(block_diag(hadamard(64), hadamard(64)) / 8.0).float()
    x = (network[:2](IMAGES) @ rotation / 0.5).round().clamp(-16, 15) * 0.5
    weight = quantize(network[2].weight @ rotation, steps["2"], 4, spec.grid)
    wanted = network[3:](nn.functional.linear(x, weight, network[2].bias))
    assert ((found - wanted).abs() > 1e-3 * wanted.abs().max()).float().mean() < 0.01  # but for ties


def test_the_view_of_a_transformed_network_leaves_it_as_it_was(network):
    wanted = network(IMAGES)
    with in_float32(), quantized(network, weight_bits=2, activation_bits=4, transform="smoothed", images=IMAGES):
        assert torch.equal(network(IMAGES), wanted), "the view is of a copy"
    assert torch.equal(network(IMAGES), wanted)


def test_a_network_that_cannot_be_transformed_is_told_why():
    with pytest.raises(KureError, match=r"'3' is no linear layer, and only those can be rotated"):
        transformed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.GELU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)),
                    "rotated")  # fmt: skip
    odd = nn.Sequential(nn.Linear(8, 65), nn.Linear(65, 8), nn.Linear(8, 2))
    with pytest.raises(KureError, match=r"'1' has 65 input channels, which are no whole number of blocks of 64"):
        transformed(odd, "rotated")
    with pytest.raises(
        KureError, match="Sequential has ReLUs, whose outputs would be quantized before they are rotated"
    ):
        transformed(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2)), "rotated")
    unused = nn.Sequential(nn.Linear(8, 64), nn.Identity(), nn.Linear(64, 2))
    unused[1].spare = nn.Linear(64, 64)
    with pytest.raises(KureError, match=r"The images do not reach layer '1\.spare'"):
        transformed(unused, "smoothed", IMAGES)
    for images in (None, IMAGES[:0]):
        with pytest.raises(KureError, match="give at least one image"):
            transformed(odd, "smoothed", images)
