"""The two sides of a comparison do the same work, and come to the same."""

from types import SimpleNamespace

import ours
import pytest
import rivals
import torch

from kure_lib.networks import data, evaluation, models
from kure_lib.networks.layers import quantized_layers
from kure_lib.quantization.view import quantized
from kure_lib.study import plans
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step

AGREEMENT = 1.0  # percentage points between bfloat16 and float32


@pytest.mark.parametrize("name", rivals.NETS)
def test_the_plain_net_is_the_same_net(name):
    split = ours.images(name, 1)
    plain, library = rivals.NETS[name](), models.build(name, split.channels, split.classes)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (plain, library)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gradients_of_the_kure_term_are_those_of_autograd(per_channel):
    found, expected = (side.kure_term(per_channel)() for side in (ours, rivals))
    assert len(found) == len(expected) == 19
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_the_best_steps_err_no_more_than_those_that_are_searched():
    weight = ours.tensor()
    found, tried = ours.steps_at_six_bits()(), rivals.steps_at_six_bits()()
    for bits, our_step, other in zip(ours.BITS, found, tried, strict=True):
        assert _error(weight, our_step, bits).sum() <= _error(weight, other, bits).sum() * (1 + 1e-6), f"{bits} bits"


def test_the_best_steps_of_channels_err_no_more_than_those_that_are_searched():
    """Together; of few weights the error is jagged, and a step that was tried may lie in a notch of its own."""
    weight = ours.tensor()
    found, tried = (_error(weight, side.steps_by_channel()().view(-1, 1, 1, 1), 4) for side in (ours, rivals))
    assert found.sum() < tried.sum() and (found < 1.001 * tried).all()


def test_as_many_layers_get_steps():
    assert len(ours.steps_of_a_network()()) == len(rivals.steps_of_a_network()()) == 19


def _error(weight: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Of every channel."""
    return (weight - quantize(weight, step, bits)).double().square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def trained():
    """The control of the committed study and three of its quantized variants, with their steps."""
    record = plans.open("study").records(model="resnet20", arm="control", seed=0)[0]
    model = record.network()
    layers = quantized_layers(model)
    steps = {b: {name: best_step(layer.weight.detach(), b) for name, layer in layers.items()} for b in (4, 3, 2)}
    return SimpleNamespace(model=model, steps=steps)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_accuracies_of_quantized_variants_agree(trained, bits):
    test, given = data.load("fashion_mnist", "test"), trained.steps[bits]
    with quantized(trained.model, weight_bits=bits) as view:
        found = evaluation.accuracy(view, test)
    images, labels, mean, std = rivals.in_memory("resnet20", train=False)
    images = images.float().sub_(mean).div_(std)
    usual = rivals.usual_accuracy(trained.model, given, bits, rivals.loader("resnet20", train=False))
    expert = rivals.expert_accuracy(trained.model, given, bits, images, labels)
    assert (usual, expert) == (pytest.approx(found, abs=AGREEMENT), pytest.approx(found, abs=AGREEMENT))
