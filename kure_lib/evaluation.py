"""Accuracy and loss of a network on a split, and the arithmetic in which networks are run."""

from typing import NamedTuple

import torch
from torch import nn

from kure_lib import data

BATCH = 1000


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent and mean cross-entropy in nats."""

    top1: float
    loss: float


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> str:
    """`bfloat16` where the machine multiplies it natively, else `float32`."""
    on_gpu = torch.cuda.is_available()
    native = torch.cuda.is_bf16_supported() if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native else "float32"


def autocast() -> torch.autocast:
    """Matrix products in `precision()`, everything else in float32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision() == "bfloat16")


@torch.inference_mode()
def evaluate(model: nn.Module, split: data.Split) -> Evaluation:
    """Accuracy and loss of `model`, put into evaluation mode, over all images of the split."""
    model.eval()
    place = next(model.parameters()).device
    correct, loss = 0, 0.0
    for images, labels in split.batches(BATCH):
        with autocast():
            scores = model(images.to(place))
        scores, labels = scores.float(), labels.to(place)
        correct += (scores.argmax(1) == labels).sum().item()
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
    return Evaluation(100 * correct / len(split), loss / len(split))


def accuracy(model: nn.Module, split: data.Split) -> float:
    """Top-1 accuracy in percent."""
    return evaluate(model, split).top1
