"""Training as a study does it, in rounds of a few steps."""

from collections.abc import Callable
from itertools import count

import torch
from torch.utils.flop_counter import FlopCounterMode

from kure_lib.networks import data, models
from kure_lib.training.configs import RunConfig
from kure_lib.training.loop import train_epoch
from kure_lib.training.protocol import TrainingMethod
from kure_lib.training.regularizers import KurtosisRegularizer


def training(name: str, steps: int, kure: bool = False) -> Callable[[], None]:
    """A round: one call of the library's `train_epoch` on as many images as make so many steps."""
    config = RunConfig(model=name, epochs=1, learning_rate=0.02, weight_decay=5e-4)
    split = data.load("fashion_mnist", "train").head(steps * config.batch_size)
    torch.manual_seed(0)
    model = models.build(name, split.channels, split.classes)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, nesterov=True,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    method = KurtosisRegularizer(model) if kure else TrainingMethod()
    epochs = count()

    def work() -> None:
        batches = split.batches(config.batch_size, torch.Generator().manual_seed(next(epochs)))
        train_epoch(model, batches, method, optimizer, schedule)

    return work


def flops(name: str, backward: bool) -> int:
    """Operations of the convolutions and products of a network for one Fashion-MNIST image."""
    model = models.build(name, 1, 10).eval()
    with FlopCounterMode(display=False) as counter:
        scores = model(torch.zeros(1, 1, 28, 28))
        if backward:
            scores.sum().backward()
    return counter.get_total_flops()
