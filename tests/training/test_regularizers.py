"""The KURE term against SciPy, and what gradient descent on it alone does to weights."""

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn
from torchvision import models as torchvision_models

from kure_lib.networks import activations, models
from kure_lib.networks.layers import regularized_layers
from kure_lib.paths import KureError
from kure_lib.training.regularizers import ActivationKurtosisRegularizer, KurtosisRegularizer, rectified_kurtosis


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
    with pytest.raises(KureError, match="in a convolution but the first or a linear layer but the last"):
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


# The same penalty on activations


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [(scipy_stats.uniform(), 9 / 5), (scipy_stats.halfnorm(), 3), (scipy_stats.expon(), 6)],
    ids=["uniform", "normal", "Laplace"],
)
def test_what_a_relu_lets_through_has_the_kurtosis_of_the_symmetric_distribution(draw, wanted):
    x = torch.from_numpy(draw.rvs(200_000, random_state=0))
    symmetric = torch.cat([x, -x])
    assert rectified_kurtosis(x).item() == pytest.approx(wanted, rel=0.03)  # ten times the error of a sample
    assert rectified_kurtosis(x).item() == pytest.approx(scipy_kurtosis(symmetric.numpy(), fisher=False), rel=1e-4)
    assert rectified_kurtosis(symmetric.relu()).item() == pytest.approx(rectified_kurtosis(x).item(), rel=1e-6)


def test_the_gradient_through_activations_is_autograds():
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)

    def plainly(x):
        positive = x[x > 0]
        return positive.pow(4).mean() / positive.pow(2).mean() ** 2

    (wanted,) = torch.autograd.grad(plainly(x), x)
    (found,) = torch.autograd.grad(rectified_kurtosis(x.relu()), x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_term_of_activations_is_scipys_over_the_quantized_sites():
    torch.manual_seed(0)
    model = models.build("resnet20", 1, 10).train()
    images = torch.randn(8, 1, 28, 28)
    term = ActivationKurtosisRegularizer(model, images[:1], target=2.2, coefficient=0.5)
    seen = {}
    with activations.replaced(model, lambda site, output: seen.setdefault(site, output.detach().clone())):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model(images)
    model.load_state_dict(state)
    with term.view():
        found = term.penalty(model(images).sum())
        with torch.no_grad():
            model(images)
        assert term._terms == []  # an evaluation leaves nothing
    values = [site.flatten().numpy() for site in list(seen.values())[1:-1]]
    symmetric = [np.concatenate([x[x > 0], -x[x > 0]]) for x in values]
    distances = [(scipy_kurtosis(x.astype(np.float64), fisher=False) - 2.2) ** 2 for x in symmetric]
    assert len(distances) == 17 and found.item() == pytest.approx(0.5 * np.mean(distances), rel=1e-4)


def test_an_orthogonal_layer_is_regularized_as_it_is_used(tiny_model):
    """Every 3 × 3 filter becomes an orthogonal matrix: what the layer computes with is not what it stores."""
    layer = torch.nn.utils.parametrizations.orthogonal(tiny_model[2])
    latent = layer.parametrizations.weight.original
    nn.init.normal_(latent)
    used = scipy_kurtosis(layer.weight.detach().numpy(), axis=None, fisher=False)
    assert abs(scipy_kurtosis(latent.detach().numpy(), axis=None, fisher=False) - used) > 0.01
    penalty = KurtosisRegularizer(tiny_model, target=1.5, layers=["2"])
    assert penalty().item() == pytest.approx((used - 1.5) ** 2, rel=1e-4)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(penalty(), latent)
        latent.data -= 5 * gradient
    used = scipy_kurtosis(layer.weight.detach().numpy(), axis=None, fisher=False)
    assert used == pytest.approx(1.5, abs=0.01)
