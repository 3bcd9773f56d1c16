"""Rivals: each against its definition, written out on a small network; all of them in the training loop."""

import pytest
import torch
from helpers import TINY, same_weights
from torch import nn
from torch.nn.functional import cross_entropy

from kure_lib.networks import data, models
from kure_lib.paths import KureError
from kure_lib.training import loop as training
from kure_lib.training.configs import KureConfig, RivalConfig, RunConfig
from kure_lib.training.loop import fit
from kure_lib.training.protocol import TrainingMethod
from kure_lib.training.regularizers import KurtosisRegularizer
from kure_lib.training.rivals import RIVALS, STATISTICS

STRENGTHS = {"gradient_l1": 1e-3, "noise": 0.1, "sam": 0.05, "ema": 0.8}
EVERY_RIVAL = pytest.mark.parametrize("name", RIVALS)


def built(network: nn.Module, name: str) -> TrainingMethod:
    return RIVALS[name](network, STRENGTHS.get(name, 0.5))


def configured(name: str) -> RivalConfig:
    return RivalConfig(name=name, strength=STRENGTHS.get(name, 0.5))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh(),
              nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)]  # fmt: skip
    for layer in (layers[3], layers[6]):
        nn.init.normal_(layer.weight, std=0.2)  # torch's own is uniform: nothing to penalize
    return nn.Sequential(*layers).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (12,), generator=generator)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_penalty_is_the_mean_over_the_regularized_layers(network, name):
    penalty = built(network, name).penalty(torch.zeros(()))
    values = [STATISTICS[name](layer.weight) for layer in (network[3], network[6])]
    assert penalty.item() == pytest.approx(0.5 * (values[0] + values[1]).item() / 2)
    penalty.backward()
    assert network[0].weight.grad is None and network[3].weight.grad.abs().sum() > 0


def test_the_gradient_penalty_is_a_norm_whose_gradient_finite_differences_confirm(network, batch):
    images, labels = batch
    rival = built(network, "gradient_l1")

    def penalty() -> torch.Tensor:
        return rival.penalty(cross_entropy(network(images), labels))

    cross_entropy(network(images), labels).backward()
    by_hand = sum(layer.weight.grad.abs().sum() for layer in (network[3], network[6]))
    assert penalty().item() == pytest.approx(1e-3 * by_hand.item())

    network.zero_grad()
    penalty().backward()
    weight = network[3].weight
    for index in [(0, 0, 0, 0), (2, 1, 1, 2), (5, 3, 2, 0)]:
        with torch.no_grad():
            weight[index] += 1e-6
        above = penalty().item()
        with torch.no_grad():
            weight[index] -= 2e-6
        below = penalty().item()
        with torch.no_grad():
            weight[index] += 1e-6
        assert weight.grad[index].item() == pytest.approx((above - below) / 2e-6, rel=1e-3, abs=1e-9)


def test_a_network_that_cannot_be_differentiated_twice_is_named():
    with pytest.raises(KureError, match="leave gradient_l1 to networks without them"):
        built(models.build("mobilenet_v2_050", 1, 10), "gradient_l1")


def test_noise_is_uniform_of_its_strength_and_only_there_while_gradients_are_taken():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 512, 5))
    before, order = network[1].weight.detach().clone(), list(network.state_dict())
    with built(network, "noise").view():
        noise = ((network[1].weight - before) / before.std()).detach()
        with torch.no_grad():
            assert torch.equal(network[1].weight, before)
        assert not torch.equal(network[1].weight, network[1].weight)  # drawn anew
        assert "parametrizations" not in dict(network[0].named_children())  # the first layer is left alone
    assert torch.equal(network[1].weight, before) and list(network.state_dict()) == order
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)  # four times the error of 102,400 draws
    assert noise.abs().max().item() == pytest.approx(0.1 * 3**0.5, rel=1e-3)
    assert noise.mean().abs().item() < 4 * 0.1 / noise.numel() ** 0.5


def test_sam_takes_its_gradient_uphill_and_returns(network, batch):
    images, labels = batch
    cross_entropy(network(images), labels).backward()
    start = [p.detach().clone() for p in network.parameters()]
    uphill = [p.grad.clone() for p in network.parameters()]
    length = torch.cat([g.flatten() for g in uphill]).norm()
    seen = [m.running_mean.clone() for m in network if isinstance(m, nn.BatchNorm2d)]
    with built(network, "sam").elsewhere():
        for p, old, g in zip(network.parameters(), start, uphill, strict=True):
            torch.testing.assert_close(p.detach(), old + 0.05 * g / length)
        network.zero_grad()
        cross_entropy(network(images), labels).backward()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), start, strict=True))
    assert any(not torch.allclose(p.grad, g) for p, g in zip(network.parameters(), uphill, strict=True))
    norms = [m for m in network if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, seen, strict=True))
    assert [m.momentum for m in norms] == [0.1, 0.1]


def test_ema_is_the_recursion_written_out(network):
    rival = built(network, "ema")
    expected = None
    for step in range(5):
        with torch.no_grad():
            network[3].weight.add_(0.1 * (step + 1))
        rival.average.update_parameters(network)
        now = network[3].weight.detach().clone()
        expected = now if expected is None else 0.8 * expected + 0.2 * now
    torch.testing.assert_close(rival.average.module[3].weight.detach(), expected)


def test_an_average_that_never_forgets_is_refused(network):
    with pytest.raises(KureError, match="strength below 1, not 1"):
        RIVALS["ema"](network, 1)


# In the training loop


@pytest.fixture(scope="module")
def plain():
    return fit(RunConfig(model="resnet20", **TINY))[0].state_dict()


@EVERY_RIVAL
def test_a_rival_changes_what_is_learned_and_goes_on_after_an_interruption(name, plain, tmp_path):
    config = RunConfig(model="resnet20", **TINY, rival=configured(name), regularizer=KureConfig(coefficient=0.1))
    whole, history = fit(config)
    without, _ = fit(config.model_copy(update={"rival": None}))
    assert not same_weights(whole.state_dict(), without.state_dict())
    assert set(whole.state_dict()) == set(plain)
    assert all(value >= 0 for value in history.curves["penalty"])

    def stop(epoch, values):
        raise KeyboardInterrupt

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(config, checkpoint=checkpoint, on_epoch=stop)
    again, resumed = fit(config, checkpoint=checkpoint)
    assert same_weights(again.state_dict(), whole.state_dict())
    assert resumed.curves["train_loss"] == history.curves["train_loss"]


def test_images_held_out_are_the_last_and_not_trained_on():
    everything = data.load("fashion_mnist", "train")
    config = RunConfig(model="resnet20", **{**TINY, "train_size": None}, held_out=1000)
    train, test = training.splits(config)
    assert (len(train), len(test)) == (59_000, 1000)
    assert torch.equal(train.images, everything.images[:59_000])
    assert torch.equal(test.labels, everything.labels[59_000:])
    few, test = training.splits(config.model_copy(update={"train_size": 100}))
    assert len(few) == 100 and torch.equal(test.images, everything.images[59_000:])


@pytest.mark.parametrize("name", ["gradient_l1", *STATISTICS])
def test_the_layers_of_a_penalty_are_those_of_kure(network, name):
    of_kure = list(KurtosisRegularizer(network)._layers.values())
    assert list(built(network, name)._layers) == of_kure == [network[3], network[6]]
