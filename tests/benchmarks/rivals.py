"""The same work as a user of PyTorch would write it, by the book: what the library is measured against."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models.resnet import BasicBlock

from kure_lib.networks.data import unpack_fashion_mnist


def kure_term(layers: list[nn.Conv2d], target: float = 1.8) -> Tensor:
    """Mean over layers of (Kurt[W] − K_T)²."""
    total = 0.0
    for layer in layers:
        w = layer.weight
        kurtosis = (((w - w.mean()) / w.std()) ** 4).mean()
        total = total + (kurtosis - target) ** 2
    return total / len(layers)


def searched_step(w: Tensor, bits: int, points: int = 200) -> Tensor:
    """The best of 200 steps, each tried by quantizing the whole tensor."""
    largest = w.abs().max() / 2 ** (bits - 1)
    best_error, best_step = float("inf"), largest
    for k in range(1, points + 1):
        step = largest * k / points
        error = ((w - quantize(w, step, bits)) ** 2).mean().item()
        if error < best_error:
            best_error, best_step = error, step
    return best_step


def quantize(w: Tensor, step: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (torch.clamp(torch.round(w / step - 0.5), -half, half - 1) + 0.5) * step


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


NETS: dict[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "mobilenet_v2_050": mobilenet_v2_050}

NORMALIZED = [transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))]
AUGMENTED = [transforms.RandomCrop(28, padding=2), transforms.RandomHorizontalFlip(), *NORMALIZED]


def loader(train: bool, workers: int = 2) -> DataLoader:
    transform = transforms.Compose(AUGMENTED if train else NORMALIZED)
    dataset = torchvision.datasets.FashionMNIST(unpack_fashion_mnist(), train=train, transform=transform)
    return DataLoader(dataset, batch_size=256, shuffle=train, drop_last=train, num_workers=workers)


def training(name: str, steps: int) -> Callable[[], None]:
    """A round: so many steps of a training that otherwise runs on, epoch after epoch."""
    model = NETS[name]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    batches = _endless(loader(train=True))

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


def quantized_accuracy(model: nn.Module, layers: list[str], steps: list[Tensor], bits: int, test: DataLoader) -> float:
    """Accuracy in percent of a quantized copy; the steps are given, one for each layer."""
    model = deepcopy(model).eval()
    correct = 0
    with torch.no_grad():
        for name, step in zip(layers, steps, strict=True):
            weight = model.get_submodule(name).weight
            weight.copy_(quantize(weight, step, bits))
        for images, labels in test:
            correct += (model(images).argmax(1) == labels).sum().item()
    return 100 * correct / len(test.dataset)
