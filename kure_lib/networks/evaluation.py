"""Accuracy and loss of a network on a split."""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from kure_lib.networks import data
from kure_lib.networks.device import autocast, precision

BATCH = 1000


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent and mean cross-entropy in nats; `precision` is that of `device.precision`.

    Evaluations of earlier versions do not say in which precision they were made.
    """

    top1: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    loss: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    precision: Literal["float32", "bfloat16"] | None = None


@torch.inference_mode()
def evaluate(model: nn.Module, split: data.Split) -> Evaluation:
    """Accuracy and loss of `model`, put into evaluation mode, over all images of the split."""
    model.eval()
    place = next(model.parameters()).device
    correct = loss = torch.zeros((), dtype=torch.float64, device=place)
    for images, labels in split.batches(BATCH, place=place):
        with autocast():
            scores = model(images)
        scores = scores.float()
        correct = correct + (scores.argmax(1) == labels).sum()
        loss = loss + nn.functional.cross_entropy(scores, labels, reduction="sum")
    return Evaluation(100 * correct.item() / len(split), loss.item() / len(split), precision())


def accuracy(model: nn.Module, split: data.Split) -> float:
    """Top-1 accuracy in percent."""
    return evaluate(model, split).top1
