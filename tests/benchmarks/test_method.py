"""The KURE term and the search for steps, against autograd, memory speed and search by trying."""

from types import SimpleNamespace

import ours
import pytest
import rivals
import torch
from torch import nn
from torchvision.models import resnet18

from kure_lib.networks import device
from kure_lib.networks.layers import regularized_layers
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import best_step
from kure_lib.training.regularizers import KurtosisRegularizer

BITS = (2, 3, 4, 5, 6, 8)


@pytest.fixture
def single_thread():
    """One thread, as every run of a study has."""
    with device.single_thread():
        yield


@pytest.fixture(scope="module")
def kure():
    """Forward and backward of the KURE term of torchvision's ResNet-18, by the library and by autograd."""
    torch.manual_seed(0)
    model = resnet18()
    layers = list(regularized_layers(model).values())
    regularizer = KurtosisRegularizer(model)

    def gradients(term) -> list[torch.Tensor]:
        model.zero_grad()
        term().backward()
        return [layer.weight.grad for layer in layers]

    return SimpleNamespace(
        weights=[layer.weight.detach() for layer in layers],
        ours=lambda: gradients(regularizer),
        rival=lambda: gradients(lambda: rivals.kure_term(layers)),
    )


def test_kure_term_against_autograd(compare, kure, single_thread):
    assert len(kure.weights) == 19
    for gradient, expected in zip(kure.ours(), kure.rival(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())
    compare("kure", kure.rival, kure.ours, rounds=25)


def test_kure_term_against_memory(compare, kure, single_thread):
    """Copies go, as gradients do, to memory that was freed after the round before."""
    copies = []

    def copy():
        copies.clear()
        copies.extend(weight.clone() for weight in kure.weights)

    compare("kure_memory", copy, kure.ours, rounds=50, rival_amount=1 / 1.5)


def test_kure_in_a_training_step(compare, single_thread):
    steps = 4
    without, with_kure = (ours.training("resnet20", steps, kure=kure) for kure in (False, True))
    compare("kure_step", without, with_kure, rounds=25, rival_amount=steps, ours_amount=steps)


def test_best_step_against_search(compare, single_thread):
    torch.manual_seed(0)
    weight = nn.init.kaiming_normal_(torch.empty(512, 512, 3, 3), mode="fan_out")

    def exact():
        distribution = EmpiricalDistribution(weight)
        return [best_step(distribution, bits) for bits in BITS]

    def by_search():
        return [rivals.searched_step(weight, bits) for bits in BITS]

    found = {}
    compare("mse_step", lambda: found.update(rival=by_search()), lambda: found.update(ours=exact()), rounds=3)
    for bits, our_step, rival_step in zip(BITS, found["ours"], found["rival"], strict=True):
        our_error, rival_error = (_error(weight, step, bits) for step in (our_step, rival_step))
        assert our_error <= rival_error * (1 + 1e-6), f"{bits} bits"


def _error(weight: torch.Tensor, step: torch.Tensor, bits: int) -> float:
    return (weight - quantize(weight, step, bits)).double().square().mean().item()
