"""The KURE term against SciPy, and what gradient descent on it alone does to weights."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn
from torchvision import models as torchvision_models

from kure_lib.paths import KureError
from kure_lib.regularizers import KurtosisRegularizer, regularized_layers


def distances(model, names, target=1.8, axis=None):
    """(K − K_T)² of each named layer, or the mean of it over the layer's channels, by SciPy."""
    weights = [model.get_submodule(name).weight.detach().double().numpy() for name in names]
    if axis is not None:
        weights = [w.reshape(len(w), -1) for w in weights]
    return [np.mean((scipy_kurtosis(w, axis=axis, fisher=False) - target) ** 2) for w in weights]


@pytest.mark.parametrize(("architecture", "count"), [("resnet18", 19), ("mobilenet_v2", 51), ("resnet50", 52)])
def test_the_regularized_layers_are_those_the_authors_divide_by(architecture, count):
    with torch.device("meta"):
        model = torchvision_models.get_model(architecture, weights=None)
    layers = regularized_layers(model)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == count
    assert list(layers) == convolutions[1:]
    assert len(KurtosisRegularizer(model).layers) == count


@pytest.mark.parametrize(("reduction", "reduce"), [("mean", np.mean), ("sum", np.sum), ("max", np.max)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_term_is_scipys(tiny_model, reduction, reduce, per_channel):
    term = KurtosisRegularizer(tiny_model, 2.5, 0.3, reduction=reduction, per_channel=per_channel)
    names = ["2", "4", "5"]
    assert list(term.layers) == names
    wanted = 0.3 * reduce(distances(tiny_model, names, 2.5, axis=1 if per_channel else None))
    assert term().shape == ()
    assert term().item() == pytest.approx(wanted, rel=1e-5)


def test_the_defaults_are_the_papers(tiny_model):
    wanted = np.mean(distances(tiny_model, ["2", "4", "5"], target=1.8))
    assert KurtosisRegularizer(tiny_model)().item() == pytest.approx(wanted, rel=1e-5)


def test_named_layers_alone_are_regularized(tiny_model):
    term = KurtosisRegularizer(tiny_model, layers=["0", "7"])
    assert term.layers == {"0": (8, 1, 3, 3), "7": tuple(tiny_model[7].weight.shape)}
    assert term().item() == pytest.approx(np.mean(distances(tiny_model, ["0", "7"])), rel=1e-5)
    term().backward()
    assert [name for name, p in tiny_model.named_parameters() if p.grad is not None] == ["0.weight", "7.weight"]


def test_the_term_follows_the_weights(tiny_model):
    term = KurtosisRegularizer(tiny_model)
    before = term().item()
    with torch.no_grad():
        tiny_model[2].weight.copy_(torch.linspace(-1, 1, tiny_model[2].weight.numel()).view_as(tiny_model[2].weight))
    assert term().item() == pytest.approx(np.mean(distances(tiny_model, ["2", "4", "5"])), rel=1e-5)
    assert term().item() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": "median"}, ["median", "mean, sum, max"]),
        ({"layers": ["2", "nine"]}, ["nine", "2, 4, 5"]),
        ({"layers": ["1"]}, ["'1'"]),  # a ReLU has no weights
        ({"layers": []}, ["no layer"]),
    ],
)
def test_a_wrong_option_names_itself_and_the_allowed_ones(tiny_model, options, said):
    with pytest.raises(KureError) as error:
        KurtosisRegularizer(tiny_model, **options)
    assert all(words in str(error.value) for words in said)


def test_a_model_with_one_convolution_has_nothing_to_regularize():
    with pytest.raises(KureError, match="at least two convolutions"):
        KurtosisRegularizer(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(8, 8)))


@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_an_error_names_the_layer(tiny_model, value):
    nn.init.constant_(tiny_model[4].weight, value)
    with pytest.raises(KureError, match="Layer '4' cannot be regularized"):
        KurtosisRegularizer(tiny_model)()


@pytest.mark.parametrize("target", [1.8, 3.0, 5.0])
def test_gradient_descent_on_the_term_alone_reaches_the_target(target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3))
    term = KurtosisRegularizer(model, target)
    first = model[0].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        term().backward()
        optimizer.step()
    for layer in model[1:]:
        assert scipy_kurtosis(layer.weight.detach().numpy(), axis=None, fisher=False) == pytest.approx(target, abs=0.02)
    assert torch.equal(model[0].weight, first)
