"""The same work as others would write it: what the library is measured against.

A *usual* script is by the book: float32, torchvision's transforms in a `DataLoader`, a copy of the network for every
quantized variant. An *expert* one has its images in memory as bytes, augments a batch at a time, is laid out
channels-last, computes in bfloat16 where the processor does, and waits for nothing within a step.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import torch
import torchvision
from ours import BATCH, BITS, SMALL, calibration_images, large_network, noise, tensor
from PIL import Image
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock

from kure_lib.networks import data, device

Round = Callable[[], object]


# Networks


def resnet20() -> nn.Module:
    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        shortcut = None
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return [first, BasicBlock(outputs, outputs), BasicBlock(outputs, outputs)]

    stem = [nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [*stage(16, 16, 1), *stage(16, 32, 2), *stage(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet_v2_050() -> nn.Module:
    model = torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=10)
    model.features[0][0] = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    model.features[14].conv[1][0].stride = (1, 1)  # the last downsampling
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "mobilenet_v2_050": mobilenet_v2_050,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=200),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=200),
}


# Training

MOVED = {28: 2, 64: 4}  # pixels by which images of a side are moved at most
ON_CLOTHES, ON_NOISE = ((0.2860,), (0.3530,)), ((0.5,) * 3, (0.5,) * 3)  # mean and deviation


class Pictures(Dataset):
    """Noise as pictures, as if they had been read and decoded already."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        images, labels = noise()
        self.pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def loader(name: str, train: bool, workers: int = 2) -> DataLoader:
    side, about = (28, ON_CLOTHES) if name in SMALL else (64, ON_NOISE)
    changed = [transforms.RandomCrop(side, padding=MOVED[side]), transforms.RandomHorizontalFlip()] if train else []
    transform = transforms.Compose([*changed, transforms.ToTensor(), transforms.Normalize(*about)])
    dataset: Dataset = Pictures(transform)
    if name in SMALL:
        dataset = torchvision.datasets.FashionMNIST(data.unpack_fashion_mnist(), train=train, transform=transform)
    return DataLoader(dataset, batch_size=BATCH, shuffle=train, drop_last=train, num_workers=workers)


def usual_training(name: str, steps: int) -> Round:
    """So many steps of a training that otherwise runs on, epoch after epoch."""
    model = NETS[name]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    batches = _endless(loader(name, train=True))

    def work() -> None:
        for _ in range(steps):
            images, labels = next(batches)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return work


def _endless(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def expert_training(name: str, steps: int) -> Round:
    """So many steps."""
    images, labels, mean, std = in_memory(name, train=True)
    model = NETS[name]().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    moved = MOVED[images.shape[-1]]

    def work() -> None:
        chosen = torch.randperm(len(images))[: steps * BATCH]
        for index in chosen.split(BATCH):
            x = _augmented(images[index], moved).float().sub_(mean).div_(std)
            with _autocast():
                loss = nn.functional.cross_entropy(
                    model(x.contiguous(memory_format=torch.channels_last)), labels[index]
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return work


def in_memory(name: str, train: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as bytes, labels, and mean and deviation on the scale of bytes."""
    (images, labels), about = noise(), ON_NOISE
    if name in SMALL:
        clothes = torchvision.datasets.FashionMNIST(data.unpack_fashion_mnist(), train=train)
        images, labels, about = clothes.data[:, None], clothes.targets, ON_CLOTHES
    mean, std = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in about)
    return images, labels, mean, std


def _augmented(images: Tensor, moved: int) -> Tensor:
    """Each image [C, H, W] of a batch flipped or not, and moved by up to so many pixels, all at once."""
    count, _, side, _ = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    windows = nn.functional.pad(images, (moved,) * 4).unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(0, 2 * moved + 1, (2, count))
    return windows[torch.arange(count), :, top, left]


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=device.precision() == "bfloat16")


# The KURE term


def kure_term(per_channel: bool) -> Round:
    """As the formula says it; the round returns the gradients."""
    model = large_network()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)][1:]

    def work() -> list[Tensor]:
        model.zero_grad()
        total = 0.0
        for layer in layers:
            w = layer.weight.flatten(1) if per_channel else layer.weight.flatten()[None]
            z = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True, correction=0)
            total = total + (((z**4).mean(1) - 1.8) ** 2).mean()
        (total / len(layers)).backward()
        return [layer.weight.grad for layer in layers]

    return work


# Steps

POINTS = 200  # steps that are tried, or the first of them: each takes as long


def quantize(w: Tensor, step: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (torch.clamp(torch.round(w / step - 0.5), -half, half - 1) + 0.5) * step


def searched_step(w: Tensor, bits: int, tried: int = POINTS) -> Tensor:
    """The best of 200 steps, each tried by quantizing the whole tensor."""
    largest = w.abs().max() / 2 ** (bits - 1)
    best_error, best_step = float("inf"), largest
    for k in range(1, tried + 1):
        step = largest * k / POINTS
        error = ((w - quantize(w, step, bits)) ** 2).mean().item()
        if error < best_error:
            best_error, best_step = error, step
    return best_step


def searched_steps(w: Tensor, bits: int, tried: int = POINTS) -> Tensor:
    """For every channel [C, …] the best of 200 steps, which are tried for all channels at once: [C]."""
    flat = w.flatten(1)
    largest = flat.abs().amax(1) / 2 ** (bits - 1)
    best_error, best_step = torch.full_like(largest, float("inf")), largest
    for k in range(1, tried + 1):
        step = largest * k / POINTS
        error = ((flat - quantize(flat, step[:, None], bits)) ** 2).mean(1)
        best_step = torch.where(error < best_error, step, best_step)
        best_error = torch.minimum(error, best_error)
    return best_step


def steps_at_six_bits(tried: int = POINTS) -> Round:
    weight = tensor()
    return lambda: [searched_step(weight, bits, tried) for bits in BITS]


def steps_of_a_network(tried: int = POINTS) -> Round:
    weights = [m.weight.detach() for m in large_network().modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:-1]
    return lambda: [searched_step(weight, 4, tried) for weight in weights]


def steps_by_channel(tried: int = POINTS) -> Round:
    weight = tensor()
    return lambda: searched_steps(weight, 4, tried)


# Accuracy of quantized variants: the steps are given


def usual_variants(count: int) -> Round:
    """A copy for every variant, evaluated with a `DataLoader`."""
    model, test = resnet20(), loader("resnet20", train=False)
    steps = _given_steps(model)
    return lambda: [usual_accuracy(model, steps, 4, test) for _ in range(count)]


def usual_accuracy(model: nn.Module, steps: dict[str, Tensor], bits: int, test: DataLoader) -> float:
    """Accuracy in percent of a copy with these layers quantized."""
    model = deepcopy(model).eval()
    correct = 0
    with torch.no_grad():
        for name, step in steps.items():
            weight = model.get_submodule(name).weight
            weight.copy_(quantize(weight, step, bits))
        for images, labels in test:
            correct += (model(images).argmax(1) == labels).sum().item()
    return 100 * correct / len(test.dataset)


def expert_variants(count: int) -> Round:
    """Weights are quantized in place and put back; images lie normalized in memory."""
    model = resnet20().to(memory_format=torch.channels_last).eval()
    steps = _given_steps(model)
    images, labels, mean, std = in_memory("resnet20", train=False)
    images = images.float().sub_(mean).div_(std)
    return lambda: [expert_accuracy(model, steps, 4, images, labels) for _ in range(count)]


@torch.inference_mode()
def expert_accuracy(model: nn.Module, steps: dict[str, Tensor], bits: int, images: Tensor, labels: Tensor) -> float:
    kept = {name: model.get_submodule(name).weight.clone() for name in steps}
    for name, step in steps.items():
        model.get_submodule(name).weight.copy_(quantize(kept[name], step, bits))
    with _autocast():
        scores = torch.cat([model(batch) for batch in images.split(1000)])
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def _given_steps(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: layer.weight.detach().std() / 2 for name, layer in list(layers.items())[1:]}


# LAPQ


def loss_aware_steps(losses: int, weight_bits: int, activation_bits: int) -> Round:
    """Powell's method over all steps, with a whole pass of the network for every loss."""
    torch.manual_seed(0)
    model, (images, labels) = resnet20().eval(), calibration_images()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    weights = [layer.weight.detach().clone() for layer in convolutions]
    half = 2**activation_bits - 1
    steps = [w.abs().max().item() / 2 ** (weight_bits - 1) for w in weights] + len(weights) * [4 / half]
    octaves = dict.fromkeys(convolutions, 0.0)

    def quantized_input(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        step = steps[len(weights) + convolutions.index(layer)] * 2 ** octaves[layer]
        return torch.clamp(torch.round(inputs[0] / step), 0, half) * step

    @torch.no_grad()
    def loss(moved: np.ndarray) -> float:
        for layer, w, step, by in zip(convolutions, weights, steps, moved, strict=False):
            layer.weight.copy_(quantize(w, torch.tensor(step * 2**by), weight_bits))
        octaves.update(zip(convolutions, moved[len(weights) :], strict=True))
        return nn.functional.cross_entropy(model(images), labels).item()

    def work() -> None:
        hooks = [layer.register_forward_pre_hook(quantized_input) for layer in convolutions]
        minimize(loss, np.zeros(len(steps)), method="Powell", bounds=len(steps) * [(-1, 1)], options={"maxfev": losses})
        for hook in hooks:
            hook.remove()

    return work
