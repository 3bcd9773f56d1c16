"""Accuracy and loss of a network on a split, and the arithmetic in which networks are run."""

import timeit
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from kure_lib import data

BATCH = 1000
CLEARLY = 1.3  # times as fast: what bfloat16 must be to be worth its rounding


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent and mean cross-entropy in nats."""

    top1: float
    loss: float


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def precision() -> str:
    """`bfloat16` where the machine multiplies it natively and clearly faster than `float32`, else the latter."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native and _product_speedup(torch.bfloat16) > CLEARLY else "float32"


def _product_speedup(dtype: torch.dtype, size: int = 512, rounds: int = 5) -> float:
    """How many times as fast as in float32 a matrix product is: some processors have slow bfloat16 units."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=2, repeat=rounds))

    return seconds(torch.float32) / seconds(dtype)


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
