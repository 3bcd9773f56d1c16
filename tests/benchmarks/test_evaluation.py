"""Accuracy of many quantized variants of one net, against copies evaluated in float32 with a `DataLoader`."""

from itertools import product

import pytest
import rivals
import torch
from measuring import THREADS
from ours import flops as operations

from kure_lib.networks import data, evaluation
from kure_lib.networks.layers import quantized_layers
from kure_lib.quantization.view import quantized
from kure_lib.tensors.steps import best_step
from kure_lib.training import loop
from kure_lib.training.configs import RunConfig

VARIANTS = list(product((2, 3, 4, 5, 6, 8), (0.75, 0.9, 1.0, 1.25)))  # bits, Δ/Δ̃
TIMED = (0, 10)  # the rival's: 2 bits at 0.75 and 4 bits at 1.0
AGREEMENT = 1.0  # percentage points between bfloat16 and float32


@pytest.fixture(scope="module")
def trained():
    """A ResNet-20 after a few epochs on a tenth of the images: some 80 % right."""
    config = RunConfig(
        model="resnet20", train_size=6_000, epochs=4, learning_rate=0.1, weight_decay=5e-4, batch_size=128
    )
    model, _ = loop.fit(config)
    return model


@pytest.fixture
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_accuracy_of_quantized_variants(compare, trained, all_threads):
    test, test_loader = data.load("fashion_mnist", "test"), rivals.loader(train=False)
    layers = quantized_layers(trained)
    steps = {
        (bits, ratio): [best_step(layer.weight, bits) * ratio for layer in layers.values()]
        for bits, ratio in (VARIANTS[i] for i in TIMED)
    }
    found, expected = {}, {}

    def ours():
        for bits, ratio in VARIANTS:
            with quantized(trained, weight_bits=bits, step_ratio=ratio) as model:
                found[bits, ratio] = evaluation.accuracy(model, test)

    def rival():
        for (bits, ratio), given in steps.items():
            expected[bits, ratio] = rivals.quantized_accuracy(trained, list(layers), given, bits, test_loader)

    flops = len(VARIANTS) * len(test) * operations("resnet20", backward=False)
    compare("variants", rival, ours, rounds=3, rival_amount=len(TIMED) / len(VARIANTS), flops=flops)
    for variant, accuracy in expected.items():
        assert found[variant] == pytest.approx(accuracy, abs=AGREEMENT), variant
