"""What runs on a GPU: the same numbers as on the processor, from few kernels, without waiting in a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kure_lib.networks import data, device, evaluation, models
from kure_lib.networks.layers import regularized_layers
from kure_lib.quantization.lapq import loss_aware_steps
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.kurtosis import kurtoses
from kure_lib.training import loop
from kure_lib.training.configs import KureConfig, RunConfig
from kure_lib.training.protocol import TrainingMethod
from kure_lib.training.qat import LearnedStepQuantize
from kure_lib.training.regularizers import KurtosisRegularizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def never_waiting() -> Iterator[None]:
    """A block in which PyTorch raises where the processor would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(run) -> int:
    """How many kernels a call launches, each counted twice: as it is launched and as it runs."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "mem" not in event.key.lower())


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mean, std = torch.full((2, 1, 3, 1, 1), 80.0)
    return data.TensorSplit(images, torch.arange(600) % 10, 10, mean, std)


def test_batches_made_on_the_gpu_are_those_of_the_processor(split):
    for seed in (None, 3):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        here, there = split.batches(128, generators[0]), split.batches(128, generators[1], device.device())
        for (images, labels), (others, more) in zip(here, there, strict=True):
            assert others.is_cuda and torch.equal(images, others.cpu()) and torch.equal(labels, more.cpu())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_term_is_that_of_the_processor_in_few_kernels_without_waiting(name):
    torch.manual_seed(0)
    model = models.build(name, 3, 10)
    KurtosisRegularizer(model)().backward()
    wanted = {name: layer.weight.grad.clone() for name, layer in regularized_layers(model).items()}
    expected = KurtosisRegularizer(model)().item()
    model.zero_grad()
    term = KurtosisRegularizer(model.cuda())
    term()  # lays the rows out once
    with never_waiting():
        value = term()
        value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    for name, layer in regularized_layers(model).items():
        torch.testing.assert_close(layer.weight.grad.cpu(), wanted[name], rtol=1e-4, atol=1e-7)
    assert launches(lambda: term().backward()) < 400  # autograd takes 853 kernels and 2,305, of these networks


def test_where_kurtosis_is_not_defined_it_is_nan():
    found = kurtoses([torch.ones(300, device="cuda"), torch.randn(300, device="cuda")])
    assert found.isnan().tolist() == [True, False]


def test_a_step_never_waits(split):
    torch.manual_seed(0)
    model = models.build("resnet18", 3, 10).cuda()
    config = RunConfig(model="resnet18", data="cifar10", epochs=1, learning_rate=0.01, weight_decay=0, batch_size=128,
                       regularizer=KureConfig())  # fmt: skip
    method = KurtosisRegularizer(model)
    optimizer = loop._optimizer(config, model, method)
    schedule = loop._schedule(config, optimizer, 4)
    batches = list(split.batches(128, torch.Generator().manual_seed(0), device.device()))
    loop.train_epoch(model, batches[:1], method, optimizer, schedule)

    def unwatched_after() -> Iterator:
        yield from batches[1:]
        torch.cuda.set_sync_debug_mode("default")  # the means of the epoch are waited for

    with never_waiting():
        values = loop.train_epoch(model, unwatched_after(), method, optimizer, schedule)
    assert values["penalty"] > 0 and values["train_loss"] > 0


def test_training_and_evaluation_agree_with_the_processor_in_float32(split, monkeypatch, float32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for place in ("cpu", "cuda"):
        monkeypatch.setattr(device, "device", lambda place=place: torch.device(place))
        torch.manual_seed(0)
        model = models.build("resnet20", 3, 10).to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        batches = split.batches(100, torch.Generator().manual_seed(0), torch.device(place))
        values = loop.train_epoch(model, batches, TrainingMethod(), optimizer, schedule)
        with quantized(model.eval(), weight_bits=4) as view:
            results.append((values["train_loss"], evaluation.evaluate(view, split).loss))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_learned_steps_have_the_gradients_of_the_processor():
    torch.manual_seed(0)
    x, step = torch.randn(4000), torch.tensor(0.3)
    found = []
    for place in ("cpu", "cuda"):
        weight, learned = (each.clone().to(place).requires_grad_() for each in (x, step))
        LearnedStepQuantize.apply(weight, learned, -4, 3, 0.01).square().sum().backward()
        found.append((weight.grad.cpu(), learned.grad.cpu()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_loss_aware_steps_find_a_lower_loss(split):
    torch.manual_seed(0)
    model = models.build("resnet20", 3, 10).cuda().eval()
    images, labels = next(split.batches(128, place=device.device()))
    spec = QuantizationSpec(weight_bits=2, step_rule="lapq", calibration=128, search=60)
    found = loss_aware_steps(model, images, labels, spec)
    losses = []
    for steps in (None, found):
        with quantized(model, weight_bits=2, steps=steps) as view, torch.no_grad():
            losses.append(nn.functional.cross_entropy(view(images), labels).item())
    assert losses[1] < losses[0]


def test_a_quantized_network_with_new_statistics(split):
    torch.manual_seed(0)
    model = models.build("mobilenet_v2", 3, 10).cuda().eval()
    images = next(split.batches(64, place=device.device()))[0]
    options = {"weight_bits": 4, "activation_bits": 8, "reestimate_batch_norm": True}
    before = [parameter.clone() for parameter in model.parameters()]
    with quantized(model, images=images, **options) as view:
        assert 0 <= evaluation.evaluate(view, split).top1 <= 100
    assert all(map(torch.equal, before, model.parameters()))
