"""Images: small sets as one tensor in memory, large ones streamed from a folder.

A split hands out batches of normalized images, channels-last; with a generator it shuffles and augments.
Fashion-MNIST is embedded in `data/`; CIFAR-10 and ImageNet are read from where the user keeps them.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from kure_lib import paths
from kure_lib.files import read_sums, write_atomically
from kure_lib.paths import DATA, KureError, check_known

SHIFT = 2  # pixels by which a training image is moved at most, in each direction


class TensorSplit:
    """A split that is one tensor: `images` uint8 [N, C, H, W], `labels` int64 [N], `classes` their number.

    `mean` and `std` [1, C, 1, 1], on the scale of the bytes, normalize the batches.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, mean: Tensor, std: Tensor):
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels, self.classes, self.mean, self.std = labels, classes, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def head(self, size: int | None) -> "TensorSplit":
        """The first `size` images, or all of them."""
        return TensorSplit(self.images[:size], self.labels[:size], self.classes, self.mean, self.std)

    def parted(self, last: int) -> tuple["TensorSplit", "TensorSplit"]:
        """All but the `last` images, and these."""
        cut = len(self) - last
        rest = TensorSplit(self.images[cut:], self.labels[cut:], self.classes, self.mean, self.std)
        return self.head(cut), rest

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float32 images and their labels; with a generator in random order, flipped and shifted.

        Only full batches are used for training, so that every batch norm sees as many images.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        end = len(self) if generator is None else len(self) - len(self) % size
        for start in range(0, max(end, min(size, len(self))), size):
            index = order[start : start + size]
            images = self.images[index] if generator is None else augment(self.images[index], generator)
            yield images.float().sub_(self.mean).div_(self.std), self.labels[index]

    def steps_per_epoch(self, size: int) -> int:
        return max(len(self) // size, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of a batch [B, C, H, W] flipped left to right or not and moved by up to 2 pixels, all at once.

    What moves in from outside is zero: black.
    """
    count, _, height, width = images.shape
    dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    column = torch.arange(width).expand(count, width)
    column = torch.where(flip[:, None], width - 1 - column, column) + dx[:, None]
    row = torch.arange(height)[None] + dy[:, None]
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count)[:, None, None]
    moved = padded[image, (row + SHIFT)[:, :, None], (column + SHIFT)[:, None, :]]
    return moved.permute(0, 3, 1, 2)


class FolderSplit:
    """A split of images in one folder a class, as ImageNet is kept, read by worker processes."""

    def __init__(self, folder: Path, train: bool, size: int = 224):
        if not folder.is_dir():
            raise KureError(f"There is no ImageNet split at {folder}: set KURE_IMAGENET to the folder that "
                            "holds train/ and val/, each with one folder a class.")  # fmt: skip
        augmented = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        central = [v2.Resize(256), v2.CenterCrop(size)]
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        normalize = v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        try:
            transform = v2.Compose([*(augmented if train else central), *to_tensor, normalize])
            self.dataset = datasets.ImageFolder(folder, transform)
        except FileNotFoundError as error:
            raise KureError(f"{folder} does not hold images in one folder a class ({error}).") from error
        self.classes, self.channels = len(self.dataset.classes), 3

    def __len__(self) -> int:
        return len(self.dataset)

    def head(self, size: int | None) -> "FolderSplit":
        """The first `size` images of the folder, or all of them."""
        if size is not None:
            self.dataset.samples = self.dataset.imgs = self.dataset.samples[:size]
        return self

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self.dataset, size, shuffle=generator is not None, generator=generator,
            drop_last=generator is not None and len(self) >= size,
            num_workers=min(os.cpu_count() or 1, 16), pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for images, labels in loader:
            yield images.contiguous(memory_format=torch.channels_last), labels

    def steps_per_epoch(self, size: int) -> int:
        return max(len(self) // size, 1)


Split = TensorSplit | FolderSplit


def load(name: str, split: str) -> Split:
    """The `train` or `test` split of `fashion_mnist`, `cifar10` or `imagenet`.

    Raises `KureError` for an unknown name and for data that are missing or damaged.
    """
    check_known("data set", name, SOURCES)
    check_known("split", split, ("train", "test"))
    return SOURCES[name](split == "train")


def _normalized(train: datasets.VisionDataset, wanted: datasets.VisionDataset) -> TensorSplit:
    """A split of a torchvision data set, normalized by the statistics of the training images."""
    reference = _bytes(train).float()
    mean, std = reference.mean((0, 2, 3), keepdim=True), reference.std((0, 2, 3), keepdim=True)
    return TensorSplit(_bytes(wanted), torch.as_tensor(wanted.targets), len(wanted.classes), mean, std)


def _bytes(dataset: datasets.VisionDataset) -> Tensor:
    images = torch.as_tensor(dataset.data)
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


@cache
def _fashion_mnist(train: bool) -> TensorSplit:
    root = unpack_fashion_mnist()
    return _normalized(datasets.FashionMNIST(root, train=True), datasets.FashionMNIST(root, train=train))


@cache
def _cifar10(train: bool) -> TensorSplit:
    root = Path(os.environ.get("KURE_CIFAR10", DATA))
    try:
        return _normalized(datasets.CIFAR10(root, train=True), datasets.CIFAR10(root, train=train))
    except RuntimeError as error:
        raise KureError(f"CIFAR-10 is missing or damaged in {root}: set KURE_CIFAR10 to the folder that holds "
                        "cifar-10-batches-py/, as its authors ship it.") from error  # fmt: skip


def _imagenet(train: bool) -> FolderSplit:
    root = Path(os.environ.get("KURE_IMAGENET", DATA / "imagenet"))
    return FolderSplit(root / ("train" if train else "val"), train)


#: Data sets by name, each giving its training or its test images.
SOURCES: dict[str, Callable[[bool], Split]] = {
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "imagenet": _imagenet,
}


def unpack_fashion_mnist(source: Path = DATA) -> Path:
    """The folder torchvision reads Fashion-MNIST from: the embedded files, checked and unpacked once.

    Raises `KureError` naming the file if one is missing or is not the published one.
    """
    folder, sums = paths.cache(), read_sums(source / "SHA256SUMS")
    raw = folder / "FashionMNIST" / "raw"
    for part, kind in product(("train", "t10k"), ("images-idx3", "labels-idx1")):
        name = f"{part}-{kind}-ubyte.gz"
        content, unpacked = _read(source / name), raw / name.removesuffix(".gz")
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise KureError(f"{source / name} is damaged (its SHA-256 is not the one in SHA256SUMS): restore it.")
        check_sum = int.from_bytes(content[-8:-4], "little")  # of what a gzip file holds
        if not unpacked.is_file() or zlib.crc32(unpacked.read_bytes()) != check_sum:
            write_atomically(unpacked, gzip.decompress(content))
    return folder


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KureError(f"{path} is missing ({error.strerror}): restore it from the repository.") from None
