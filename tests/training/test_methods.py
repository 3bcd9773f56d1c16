"""The protocol of training methods: idle hooks leave training as it is, methods act together, names reach them."""

from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from helpers import TINY, same_weights
from torch import nn
from torch.nn.functional import cross_entropy

from kure_lib.networks import data, models
from kure_lib.quantization.spec import TRAINED_RULES
from kure_lib.training import loop, methods, rivals
from kure_lib.training.configs import KureConfig, RunConfig
from kure_lib.training.loop import train_epoch
from kure_lib.training.protocol import Steps, Together, TrainingMethod
from kure_lib.training.qat import QuantizationAwareTraining
from kure_lib.training.regularizers import ActivationKurtosisRegularizer, KurtosisRegularizer

CONFIG = RunConfig(model="resnet20", **TINY)
IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def trained(work):
    """Weights after `work(model, batches, optimizer, schedule)`, always from the same network and images."""
    torch.manual_seed(0)
    model = models.build("resnet20", 1, 10)
    batches = list(data.load("fashion_mnist", "train").head(96).batches(32))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, fused=True)
    work(model, batches, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))
    return model.state_dict()


def by_hand(penalty_of=lambda model: lambda: 0.0):
    """The loop that a reader would write."""

    def work(model, batches, optimizer, schedule):
        penalty = penalty_of(model.train())
        for x, y in batches:
            loss = cross_entropy(model(x), y) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    return trained(work)


def by_library(method_of):
    return trained(lambda model, batches, optimizer, schedule: train_epoch(
        model, batches, method_of(model), optimizer, schedule))  # fmt: skip


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr("kure_lib.networks.device.precision", lambda: "float32")


IDLE = {"a method": TrainingMethod(), "none": Together([]), "two": Together([TrainingMethod(), TrainingMethod()])}


@pytest.mark.parametrize("method", IDLE.values(), ids=IDLE)
def test_a_method_with_nothing_overridden_trains_as_no_method(method):
    assert same_weights(by_library(lambda model: method), by_hand())
    assert method.state() == {}


def test_kure_trains_the_same_in_the_library_and_in_anybodys_loop():
    alone = by_hand(KurtosisRegularizer)
    assert same_weights(by_library(KurtosisRegularizer), alone)
    assert not same_weights(alone, by_hand())


class Noted(TrainingMethod):
    """Notes when its hooks are used; its penalty is a share of a parameter."""

    def __init__(self, name, share, log, steps=()):
        self.name, self.share, self.log = name, share, log
        self.steps = Steps.of(dict.fromkeys(steps, 1.0))

    def penalty(self, loss):
        self.log.append(self.name)
        return self.share * loss

    @contextmanager
    def view(self):
        self.log.append(f"into {self.name}")
        yield
        self.log.append(f"out of {self.name}")


def test_two_penalties_add_and_two_views_nest_in_their_order():
    log, loss = [], torch.tensor(2.0, requires_grad=True)
    together = Together([Noted("a", 0.5, log, ["x"]), Noted("b", 3.0, log, ["y", "z"])])
    with together.view():
        penalty = together.penalty(loss)
    assert log == ["into a", "into b", "a", "b", "out of b", "out of a"]
    penalty.backward()
    assert (penalty.item(), loss.grad.item()) == (7.0, 3.5)
    assert list(together.steps) == ["x", "y", "z"] and together.state() == {"steps": together.steps}


def test_the_final_gradient_and_the_average_are_those_of_the_method_that_has_them():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    sam, ema = rivals.Sam(model, 0.5), rivals.Ema(model, 0.5)
    together = Together([TrainingMethod(), sam, ema])
    assert together.average is ema.average and together.state() == {"average": ema.average}
    model(torch.ones(1, 1, 5, 5)).sum().backward()
    before = model[1].weight.detach().clone()
    with together.elsewhere():
        assert not torch.equal(model[1].weight, before)
    assert torch.equal(model[1].weight, before)


def test_learned_steps_do_not_decay():
    model, method = nn.Linear(2, 2), Noted("a", 0, [], ["x"])
    weights, steps = loop._optimizer(CONFIG, model, method).param_groups
    assert (weights["params"], weights["weight_decay"]) == (list(model.parameters()), TINY["weight_decay"])
    assert (steps["params"], steps["weight_decay"]) == ([method.steps["x"]], 0)


def configurations():
    """By the name of its method, a run for each choice that a configuration has."""
    fields = [{"regularizer": {"of": of}} for of in get_args(KureConfig.model_fields["of"].annotation)]
    fields += [{"quantization": {"quantizer": q, "weight_bits": 4, "activation_bits": 4}} for q in TRAINED_RULES]
    fields += [{"rival": {"name": name, "strength": 0.5}} for name in rivals.RIVALS]
    runs = [RunConfig(model="resnet20", **TINY, **field) for field in fields]
    return {name: run for run in runs for name in run.methods}


def test_a_configuration_reaches_every_method_and_no_other():
    assert set(configurations()) == set(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_configuration_builds_the_method_it_names(name):
    model = models.build("resnet20", 1, 10)
    (method,) = methods.build(model, configurations()[name], IMAGES).methods
    kinds = {"kure": KurtosisRegularizer, "kure_of_activations": ActivationKurtosisRegularizer,
             "dorefa": QuantizationAwareTraining, "lsq": QuantizationAwareTraining}  # fmt: skip
    assert type(method) is kinds.get(name, type(rivals.RIVALS[name](model, 0.5)) if name in rivals.RIVALS else None)
    if name in rivals.STATISTICS:
        assert method._statistic is rivals.STATISTICS[name]


def test_methods_act_in_one_order():
    kure, qat = KureConfig(), {"quantizer": "lsq", "weight_bits": 4, "activation_bits": 4}
    run = RunConfig(model="resnet20", **TINY, regularizer=kure, rival={"name": "outliers", "strength": 1})
    assert list(run.methods) == ["kure", "outliers"]
    run = RunConfig(model="resnet20", **TINY, regularizer=kure, quantization=qat)
    assert list(run.methods) == ["lsq", "kure"]
    assert CONFIG.methods == {}
