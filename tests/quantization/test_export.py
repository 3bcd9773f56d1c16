"""An exported network says what ours says, in a file that others accept."""

import re

import onnx
import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from kure_lib.networks import models
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration, equalization, export
from kure_lib.quantization import integers as master
from kure_lib.quantization.view import quantized
from kure_lib.tensors.grids import SIGNED_INT
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, best_step

SHAPE = {"tiny": (1, 10, 10), "resnet18": (3, 32, 32)}


@pytest.fixture(params=["tiny", "resnet20", "mobilenet_v2_050"])
def network(request, tiny_model):
    """A network with batch norms that do something, one scale of them negative, and images for it."""
    torch.manual_seed(0)
    name = request.param
    shape = SHAPE.get(name, (1, 28, 28))
    if name == "tiny":
        tiny_model[6] = nn.Sequential(nn.ReLU(), nn.Flatten())  # a third, so that one lies between two
        return tiny_model, torch.randn(64, *shape)
    model = torchvision_models.resnet18(num_classes=10) if name == "resnet18" else models.build(name, 1, 10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
        norms[3].weight[0] = -0.7
    return model.eval(), torch.randn(64, *shape)


def run(onnx_model: onnx.ModelProto, images: torch.Tensor, tmp_path, fused: bool = False) -> torch.Tensor:
    onnx.checker.check_model(onnx_model, full_check=True)
    export.save(onnx_model, tmp_path / "network.onnx")
    return export.scores(export.session(tmp_path / "network.onnx", fused), images)


@torch.no_grad()
@pytest.mark.parametrize("network", ["tiny", "resnet20", "mobilenet_v2_050", "resnet18"], indirect=True)
@pytest.mark.parametrize("fused", [False, True])
def test_in_float32_the_scores_are_ours(network, tmp_path, fused):
    model, images = network
    expected = model(images)
    made = run(export.to_onnx(model, images.shape[1:]), images, tmp_path, fused)
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("network", ["tiny"], indirect=True)
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_an_equalized_network_ends_at_its_limits(network, tmp_path, activation_bits):
    model, images = network[0], 30 * network[1]  # so large that many activations are beyond six
    model[1], model[3] = nn.ReLU6(), nn.ReLU6()
    model = equalization.equalized(model)
    steps = calibration.activation_steps(calibration.observe(model, images), activation_bits) if activation_bits else {}
    with quantized(model, activation_bits=activation_bits, images=images, steps=steps):
        expected = model(images)
    made = run(export.to_onnx(model, images.shape[1:], activation_steps=steps), images, tmp_path)
    assert (made - expected).abs().mean() < 1e-4 * expected.abs().max()  # a few codes may be the next


@torch.no_grad()
@pytest.mark.parametrize("pool", [nn.MaxPool2d((2, 1)), nn.MaxPool2d((3, 2), (1, 2), (1, 0)), nn.MaxPool2d(3, 2, 1)])
def test_pools_are_of_any_shape(pool, tmp_path):
    model, images = nn.Sequential(pool, nn.Flatten()), torch.randn(4, 2, 9, 8)
    assert run(export.to_onnx(model, images.shape[1:]), images, tmp_path).equal(model(images))


@torch.no_grad()
@pytest.mark.parametrize(("scope", "bits"), [(PER_TENSOR, 8), (PER_CHANNEL, 8), (PER_TENSOR, 4)])
def test_with_integer_weights_and_activations_the_scores_are_ours(network, tmp_path, scope, bits):
    model, images = network
    stored = {}
    for name, layer in quantized_layers(model).items():
        step = best_step(layer.weight, 8, SIGNED_INT, "max_abs", scope)  # chosen in no time
        stored[name] = master.integers(layer.weight, 8, step).to(bits, "even")
    steps = calibration.activation_steps(calibration.observe(model, images), 8)
    with master.served(model, stored), quantized(model, activation_bits=8, images=images, steps=steps):
        expected = model(images)
    full = model(images)
    made = run(export.to_onnx(model, images.shape[1:], stored, steps), images, tmp_path)
    # sums in another order move a few activations across the border between two codes
    assert (made - expected).abs().mean() < 0.1 * (full - expected).abs().mean() + 1e-5
    assert (made.argmax(1) == expected.argmax(1)).double().mean() >= 0.98


def test_batch_norms_are_folded_unless_a_scale_is_not_positive():
    torch.manual_seed(0)
    model = models.build("resnet20", 1, 10).eval()
    stored = master.of(model)
    nodes = export.to_onnx(model, (1, 28, 28), stored).graph.node
    assert not [node for node in nodes if node.op_type == "BatchNormalization"]
    model.layer1[0].bn1.weight.data[2] = 0
    model.layer1[0].bn2.weight.data[0] = -1
    nodes = export.to_onnx(model, (1, 28, 28), stored).graph.node
    assert [n.name for n in nodes if n.op_type == "BatchNormalization"] == ["layer1.0.bn1", "layer1.0.bn2"]


def test_the_activations_that_are_quantized_are_those_of_ours(network):
    model, images = network
    steps = calibration.activation_steps(calibration.observe(model, images), 8)
    graph = export.to_onnx(model, images.shape[1:], activation_steps=steps).graph
    assert [node.name.removesuffix(".codes") for node in graph.node if node.op_type == "QuantizeLinear"] == list(steps)
    zeros = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".zero")}
    assert zeros == {f"{site}.zero": onnx.TensorProto.UINT8 for site in steps}


def test_files_are_as_small_as_their_integers(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet20", 1, 10).eval()
    stored = master.of(model)
    files = {"float": None, 8: stored, 4: {name: each.to(4) for name, each in stored.items()}}
    size = {k: export.save(export.to_onnx(model, (1, 28, 28), v), tmp_path / f"{k}.onnx") for k, v in files.items()}
    assert size[8] == (tmp_path / "8.onnx").stat().st_size
    codes = sum(each.codes.numel() for each in stored.values())
    assert size["float"] - size[8] == pytest.approx(3 * codes, rel=0.02)
    assert size[8] - size[4] == pytest.approx(codes / 2, rel=0.02)


def test_levels_between_the_integers_cannot_be_written(tiny_model):
    stored = {name: each.to(4, "middle") for name, each in master.of(tiny_model).items()}
    with pytest.raises(KureError, match=r"levels of '2' lie 0\.46875 steps off the whole numbers"):
        export.to_onnx(tiny_model, (1, 10, 10), stored)


@pytest.mark.parametrize("name", ["1", "9", "fc"])  # the first is a ReLU
def test_integers_of_no_layer_are_named(tiny_model, name):
    stored = master.of(tiny_model)
    stored[name] = stored["2"]
    with pytest.raises(KureError, match=f"Unknown layer '{name}': choose one of 0, 2, 4, 5, 7"):
        export.to_onnx(tiny_model, (1, 10, 10), stored)


@pytest.mark.parametrize("layer", [
    nn.GELU(), nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2),
    nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 2, 3, padding="same"),
    nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, bias=False), nn.BatchNorm2d(2, track_running_stats=False),
])  # fmt: skip
def test_an_unknown_layer_is_named(layer):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer)
    with pytest.raises(KureError, match=re.escape(f"'1' ({layer}) cannot be written as ONNX")):
        export.to_onnx(model.eval(), (1, 8, 8))


class Applied(nn.Module):
    """A function of the images and of their ReLU."""

    def __init__(self, function):
        super().__init__()
        self.function, self.relu = function, nn.ReLU()

    def forward(self, x):
        return self.function(x, self.relu(x))


@pytest.mark.parametrize(("function", "named"), [
    (lambda x, y: torch.sin(x), "'sin' .*"),
    (lambda x, y: torch.add(x, y, alpha=2), "'add' .*, alpha=2"),
    (lambda x, y: y.mean((2, 3), keepdim=True), r"'mean' \(mean, keepdim=True"),
])  # fmt: skip
def test_an_unknown_operation_is_named(function, named):
    with pytest.raises(KureError, match=rf"{named}\) cannot be written as ONNX"):
        export.to_onnx(Applied(function), (1, 8, 8))


@pytest.mark.parametrize("function", [lambda x, y: x if x.sum() > 0 else y, lambda x, y: sum(x)])
def test_control_flow_cannot_be_written(function):
    with pytest.raises(KureError, match=r"Applied cannot be followed from layer to layer \(TraceError\)"):
        export.to_onnx(Applied(function), (1, 8, 8))


def test_a_file_that_cannot_be_written_is_named(tmp_path, tiny_model):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KureError, match=r"Cannot write .*network\.onnx"):
        export.save(export.to_onnx(tiny_model, (1, 10, 10)), tmp_path / "file" / "network.onnx")


@pytest.mark.parametrize("content", [None, b"not a network"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "network.onnx"
    if content:
        file.write_bytes(content)
    with pytest.raises(KureError, match=r"cannot load .*network\.onnx"):
        export.session(file)
