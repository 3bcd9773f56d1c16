"""Architectures by their counts, and the depthwise layer against PyTorch's own in float32."""

import hashlib

import pytest
import torch
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn
from torchvision import models as torchvision_models

from kure_lib.networks import activations, models, published
from kure_lib.networks.layers import quantized_layers, regularized_layers
from kure_lib.networks.models import DenseGradient, DepthwiseConv2d
from kure_lib.paths import KureError


def count(model, kind=None):
    if kind:
        return sum(isinstance(m, kind) for m in model.modules())
    return sum(p.numel() for p in model.parameters())


def maps_before_pooling(model, image):
    """Shape of the last feature maps."""
    shapes = []
    hook = next(m for m in model.modules() if isinstance(m, DenseGradient)).register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    with torch.no_grad():
        model.eval()(image)
    hook.remove()
    return shapes[0]


def test_resnet20_is_he_et_als_with_projections():
    model = models.build("resnet20", 1, 10)
    # stem, three stages of six 3 × 3 convolutions, two projections; batch norms with two numbers a channel
    wanted = 9 * 16 + 6 * 9 * 16**2 + 9 * 16 * 32 + 5 * 9 * 32**2 + 9 * 32 * 64 + 5 * 9 * 64**2 + 16 * 32 + 32 * 64
    wanted += 2 * (7 * 16 + 7 * 32 + 7 * 64) + 64 * 10 + 10
    assert count(model) == wanted
    assert round(count(model) / 1e6, 2) == 0.27
    assert count(model, nn.Conv2d) == 21 and count(model, nn.Linear) == 1
    assert maps_before_pooling(model, torch.zeros(2, 1, 28, 28)) == (2, 64, 4, 4)


def test_the_small_mobilenet_is_torchvisions_with_one_downsampling_less():
    model = models.build("mobilenet_v2_050", 1, 10)
    original = torchvision_models.mobilenet_v2(width_mult=0.5, num_classes=10)
    assert count(model) == count(original) - 2 * 9 * 16  # a stem for one channel, not three
    assert round(count(model) / 1e6, 1) == 0.7
    assert count(model, nn.Conv2d) == count(original, nn.Conv2d) == 52
    assert count(model, DepthwiseConv2d) == 17
    strides = [[m.stride for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, original)]
    changed = [i for i, pair in enumerate(zip(*strides, strict=True)) if pair[0] != pair[1]]
    assert len(changed) == 1
    assert (strides[0][changed[0]], strides[1][changed[0]]) == ((1, 1), (2, 2))
    assert [s for s in strides[0][changed[0] :] if s != (1, 1)] == []  # it was the last of them
    assert maps_before_pooling(model, torch.zeros(2, 1, 28, 28))[2:] == (2, 2)


def test_the_small_mobilenet_computes_what_torchvisions_would_with_its_strides():
    torch.manual_seed(0)
    model = models.build("mobilenet_v2_050", 3, 10).eval()
    original = torchvision_models.mobilenet_v2(width_mult=0.5, num_classes=10).eval()
    original.load_state_dict(model.state_dict())
    for ours, theirs in zip(
        [m for m in model.modules() if isinstance(m, nn.Conv2d)],
        [m for m in original.modules() if isinstance(m, nn.Conv2d)],
        strict=True,
    ):
        theirs.stride = ours.stride
    image = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model(image), original(image))


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions"),
    [("resnet18", 11_689_512, 20), ("resnet50", 25_557_032, 53), ("mobilenet_v2", 3_504_872, 52)],
)
def test_the_imagenet_networks_are_torchvisions(name, parameters, convolutions):
    model = models.build(name, 3, 1000)
    assert count(model) == parameters
    assert count(model, nn.Conv2d) == convolutions
    assert type(model) is type(torchvision_models.get_model(name, weights=None))


@pytest.mark.parametrize("name", models.IMAGENET)
def test_the_imagenet_networks_compute_what_torchvisions_compute(name):
    """Names, results, statistics of batch norms, gradients and activation sites, at 64 × 64.

    Gradients are compared with fixed batch norms: through those of 32 numbers a channel rounding errors grow.
    """
    torch.manual_seed(0)
    ours, theirs = models.build(name, 3, 200), torchvision_models.get_model(name, num_classes=200)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert count(ours, DenseGradient) == 1
    depthwise = [m for m in theirs.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert count(ours, DepthwiseConv2d) == len(depthwise) == (17 if name == "mobilenet_v2" else 0)
    images = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    for model in (ours, theirs):
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-5)
    scores = [model.eval()(images) for model in (ours, theirs)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    for each in scores:
        nn.functional.cross_entropy(each, labels).backward()
    for (parameter, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert relative(one.grad, other.grad) < 1e-5, parameter
    assert activations.quantized_sites(ours, images[:1]) == activations.quantized_sites(theirs, images[:1])


@pytest.mark.parametrize("name", models.IMAGENET)
def test_published_weights_are_loaded_by_their_names(name, tmp_path, monkeypatch):
    """Without a download: weights of one's own stand in the named folder, with their SHA-256 beside them."""
    torch.manual_seed(1)
    wanted = torchvision_models.get_model(name, weights=None).state_dict()
    file = tmp_path / f"{name}-{published.DIGITS[name]}.pth"
    torch.save(wanted, file)
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    monkeypatch.setenv("KURE_WEIGHTS", str(tmp_path))
    found = models.build(name, 3, 1000, pretrained=True).state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ("resnet20", "mobilenet_v2_050"))
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_the_small_networks_take_both_data_sets(name, channels, size):
    model = models.build(name, channels, 7)
    assert model.training
    scores = model(torch.randn(4, channels, size, size))
    assert scores.shape == (4, 7)
    scores.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("name", ("resnet20", "mobilenet_v2_050"))
def test_the_seed_decides_the_initial_weights(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in models.build(name, 1, 10).parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(KureError, match=r"'vgg16'.*resnet20, resnet20_group_norm, mobilenet_v2_050, .*mobilenet_v2"):
        models.build("vgg16", 3, 10)


def relative(value, wanted):
    return ((value.double() - wanted.double()).norm() / wanted.double().norm()).item()


def both(channels, stride, size, batch=16):
    """A depthwise layer of ours in bfloat16 and PyTorch's in float32, each with its result and gradients."""
    torch.manual_seed(size + stride)
    plain = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    ours = DepthwiseConv2d(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False))
    ours.load_state_dict(plain.state_dict())
    image = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    one, other = image.clone().requires_grad_(), image.clone().requires_grad_()
    result = plain(one)
    upstream = torch.randn_like(result)
    result.backward(upstream)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(other)
    half.backward(upstream.to(half.dtype))
    return (result.detach(), one.grad, plain.weight.grad), (half.detach(), other.grad, ours.weight.grad)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 14])
def test_the_depthwise_layer_in_bfloat16_is_pytorchs_in_float32(stride, size):
    """bfloat16 has 8 bits: its numbers are off by up to 2⁻⁹, sums of a few of them by a little more."""
    wanted, found = both(24, stride, size)
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for name, value, reference in zip(("result", "input", "weights"), found, wanted, strict=True):
        assert value.shape == reference.shape
        assert relative(value, reference) < 8e-3, name


def test_the_gradient_of_a_small_map_is_right_for_every_tap():
    """Each of the nine taps apart: a tap moved by one would hide in a mean over all."""
    wanted, found = both(8, 1, 2, batch=512)
    for i in range(3):
        for j in range(3):
            assert relative(found[2][:, 0, i, j], wanted[2][:, 0, i, j]) < 1e-2


def test_the_depthwise_layer_in_float32_is_pytorchs():
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
    ours = DepthwiseConv2d(plain)
    image = torch.randn(2, 8, 7, 7)
    assert ours.weight is plain.weight
    assert torch.equal(ours(image), plain(image))


def test_dense_gradient_is_the_identity_with_the_same_gradient_laid_out_like_images():
    torch.manual_seed(0)
    layer = DenseGradient()
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    inner = 2 * x
    seen = []
    inner.register_hook(lambda grad: seen.append(grad))
    weights = torch.randn(3, 8)
    (layer(inner).mean((2, 3)) * weights).sum().backward()
    assert torch.equal(layer(inner), inner)
    assert torch.equal(x.grad, (2 * weights / 16)[:, :, None, None].expand(3, 8, 4, 4))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and 0 not in seen[0].stride()
    assert layer(x.detach()).grad_fn is None
    assert not list(layer.parameters()) and not layer.state_dict()


def test_a_network_with_group_norms_does_not_feel_how_long_its_weights_are():
    """What quantization takes from the variance of a channel a group norm gives back, as it divides by it."""
    torch.manual_seed(0)
    model, x = models.build("resnet20_group_norm", 1, 10).eval(), torch.randn(4, 1, 28, 28)
    before = model(x)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_channels // norm.num_groups for norm in norms} == {8}
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(3)
    assert torch.allclose(model(x), before, atol=1e-3)


def test_attention_with_linear_layers_is_pytorchs_own():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours, x = models.Attention(theirs), torch.randn(2, 5, 12)
    (mixed, none), (wanted, _) = ours(x, x, x, need_weights=False), theirs(x, x, x, need_weights=False)
    assert none is None and torch.allclose(mixed, wanted, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), [theirs.in_proj_weight, theirs.out_proj.weight])
                 for out in (mixed, wanted)]  # fmt: skip
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


def test_the_transformer_is_torchvisions():
    torch.manual_seed(0)
    ours = models.build("vit_small_images", 3, 10).eval()
    theirs = torchvision_models.VisionTransformer(
        image_size=28, patch_size=7, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    ).eval()
    named = {name.replace("in_proj.", "in_proj_"): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(named)
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-4) and ours(images).std() > 0.01
    layers = quantized_layers(ours)
    assert len(layers) == 4 * 6 and layers.keys() == regularized_layers(ours).keys()
    share = sum(layer.weight.numel() for layer in layers.values()) / count(ours)
    assert share > 0.98, "nearly all weights are quantized"
    assert not any(isinstance(m, nn.BatchNorm2d | nn.ReLU) for m in ours.modules())


def test_the_transformers_weights_begin_normal_and_torchvisions_uniform():
    torch.manual_seed(0)
    ours = models.build("vit_small_images", 1, 10)
    theirs = torchvision_models.VisionTransformer(
        image_size=28, patch_size=7, num_layers=1, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
    first = theirs.encoder.layers[0]
    uniform = [first.self_attention.in_proj_weight, first.mlp[0].weight, first.mlp[3].weight]
    normal = [layer.weight for layer in quantized_layers(ours).values()]
    for weights, wanted in ((normal, 0.0), (uniform, -1.2)):
        for weight in weights:
            found = scipy_kurtosis(weight.detach().flatten().numpy())
            assert (
                abs(found - wanted) < 5 * (24 / weight.numel()) ** 0.5
            )  # the error of a normal sample; of a uniform one it is less
