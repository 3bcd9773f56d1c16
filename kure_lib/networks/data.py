"""Images: small sets as one tensor in memory, large ones streamed from a folder.

A split hands out batches of normalized images, channels-last; with a generator it shuffles and augments.
Fashion-MNIST is embedded in `data/`; CIFAR-10, Tiny ImageNet and ImageNet are read from where the user keeps them.
torchvision, which takes two seconds to import, is imported where images are read.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from kure_lib import paths
from kure_lib.files import make_folder, read_sums, write_atomically
from kure_lib.networks import device, pictures, tiny_imagenet
from kure_lib.paths import DATA, KureError, check_known

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

SHIFT = 2  # pixels by which a training image of up to 32 × 32 is moved at most, in each direction
LARGE_SHIFT = 4  # and one of 64 × 64
PROCESSOR = torch.device("cpu")
Part = tuple[int, int]  # of every batch: (1, 4) is the second quarter
WHOLE: Part = (0, 1)
RESIDENT = 2**31  # bytes of images that a GPU holds throughout: Tiny ImageNet's are 1.2 GB
CROP = 224  # pixels a side of the images of a folder
HELD = 2**33  # bytes of decoded images that are kept: ImageNet's validation images are 7.5 GB


class TensorSplit:
    """A split that is one tensor: `images` uint8 [N, C, H, W], `labels` int64 [N], `classes` their number.

    `mean` and `std` [1, C, 1, 1], on the scale of the bytes, normalize the batches; `shift` is by how many pixels
    training images are moved at most.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, mean: Tensor, std: Tensor, shift: int = SHIFT):
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels, self.classes, self.mean, self.std, self.shift = labels, classes, mean, std, shift
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images and labels."""
        return pictures.fingerprint(self.images, self.labels)

    def head(self, size: int | None) -> "TensorSplit":
        """The first `size` images, or all of them."""
        return self if size is None else self._part(slice(size))  # all of them may lie on a GPU already

    def parted(self, last: int) -> tuple["TensorSplit", "TensorSplit"]:
        """All but the `last` images, and these."""
        cut = len(self) - last
        return self.head(cut), self._part(slice(cut, None))

    def _part(self, part: slice) -> "TensorSplit":
        return TensorSplit(self.images[part], self.labels[part], self.classes, self.mean, self.std, self.shift)

    def batches(
        self, size: int, generator: torch.Generator | None = None, place: torch.device = PROCESSOR, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float32 images and their labels; with a generator in random order, flipped and shifted.

        Only full batches are used for training, so that every batch norm sees as many images. On a GPU, `place`, all
        images lie where they fit, and are augmented and normalized there, by the same random numbers. Of every batch
        the `part` is handed out.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        end = len(self) if generator is None else len(self) - len(self) % size
        images, labels = self._on(place if self.images.numel() <= RESIDENT else PROCESSOR)
        order, mean, std = order.to(images.device), self.mean.to(place), self.std.to(place)
        for start in range(0, max(end, min(size, len(self))), size):
            index = order[start : start + size]
            batch = images[index].to(place, non_blocking=True)
            batch = batch if generator is None else augment(batch, generator, self.shift)
            batch, index = _own(batch, part), _own(index, part)
            yield batch.float().sub_(mean).div_(std), labels[index].to(place, non_blocking=True)

    def _on(self, place: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on a device, which keeps its copy for the epochs to come."""
        if place not in self._copies:
            self._copies[place] = self.images.to(place), self.labels.to(place)
        return self._copies[place]


def augment(images: Tensor, generator: torch.Generator, shift: int = SHIFT) -> Tensor:
    """Each image of a batch [B, C, H, W] flipped left to right or not and moved by up to `shift` pixels, all at once.

    What moves in from outside is zero: black.
    """
    count, _, height, width = images.shape
    place = images.device
    dy, dx = torch.randint(-shift, shift + 1, (2, count), generator=generator).to(place, non_blocking=True)
    flip = (torch.rand(count, generator=generator) < 0.5).to(place, non_blocking=True)
    column = torch.arange(width, device=place).expand(count, width)
    column = torch.where(flip[:, None], width - 1 - column, column) + dx[:, None]
    row = torch.arange(height, device=place)[None] + dy[:, None]
    padded = torch.nn.functional.pad(images, (shift,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=place)[:, None, None]
    moved = padded[image, (row + shift)[:, :, None], (column + shift)[:, None, :]]
    return moved.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class FolderSplit:
    """A split of images in one folder a class, as ImageNet is kept, read by worker processes.

    The `samples`, paths and labels, are interleaved by class, so that every head and tail holds the classes in
    proportion. Training images are cropped and flipped by a seed of their own; other batches hold the middle of each
    image, and where all of these take no more than `HELD` bytes they are decoded once and kept in the cache.
    """

    folder: Path
    samples: tuple[tuple[str, int], ...]
    classes: int
    channels = 3
    mean = 255 * torch.tensor([0.485, 0.456, 0.406])[None, :, None, None]  # those of torchvision's networks
    std = 255 * torch.tensor([0.229, 0.224, 0.225])[None, :, None, None]

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted paths within the folder and the sizes of the files."""
        return pictures.listing(self.folder, [Path(path) for path, _ in self.samples])

    def head(self, size: int | None) -> "FolderSplit":
        """The first `size` images, or all of them."""
        return replace(self, samples=self.samples[:size])

    def parted(self, last: int) -> tuple["FolderSplit", "FolderSplit"]:
        """All but the `last` images, and these."""
        cut = len(self) - last
        return self.head(cut), replace(self, samples=self.samples[cut:])

    def batches(
        self, size: int, generator: torch.Generator | None = None, place: torch.device = PROCESSOR, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float32 images and their labels; with a generator in random order, cropped and flipped.

        They do not depend on the number of worker processes. Only full batches are used for training. A GPU, `place`,
        is sent bytes, and normalizes them itself. Of every training batch the `part` is read and handed out.
        """
        if generator is None and len(self) * self.channels * CROP**2 <= HELD:
            yield from self._decoded.batches(size, place=place)
            return
        mean, std = self.mean.to(place), self.std.to(place)
        order, seeds = list(range(len(self))), [None] * len(self)
        if generator is not None:
            order = torch.randperm(len(self), generator=generator).tolist()
            seeds = torch.randint(2**62, (len(self),), generator=generator).tolist()
        wanted = list(zip(order, seeds, strict=True))
        end = len(self) if generator is None else len(self) - len(self) % size
        batches = [wanted[start : start + size] for start in range(0, max(end, min(size, len(self))), size)]
        loader = torch.utils.data.DataLoader(
            _Pictures(self.samples), batch_sampler=[_own(batch, part) for batch in batches],
            num_workers=_readers(part[1]), generator=torch.Generator(), pin_memory=place.type == "cuda",
        )  # fmt: skip
        try:
            for images, labels in loader:
                images = images.to(place, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
                yield images.sub_(mean).div_(std), labels.to(place, non_blocking=True)
        except pictures.Unreadable as error:  # a worker's has its traceback before the sentence
            raise pictures.Unreadable(str(error).strip().rpartition(f"{pictures.Unreadable.__name__}: ")[2]) from None

    @cached_property
    def _decoded(self) -> TensorSplit:
        paths, labels = [Path(path) for path, _ in self.samples], [label for _, label in self.samples]
        images = pictures.decoded(self.folder.name, paths, labels, CROP, _middle)
        return TensorSplit(images, torch.tensor(labels), self.classes, self.mean, self.std)


def _own(batch: Any, part: Part) -> Any:
    """The part of a batch, a tensor or a list."""
    which, parts = part
    return batch[len(batch) * which // parts : len(batch) * (which + 1) // parts]


def _middle(image: Image) -> Image:
    from torchvision.transforms import v2

    return v2.functional.center_crop(v2.functional.resize(image, [256]), [CROP])


def _augmented(image: Image) -> Image:
    from torchvision.transforms import v2

    return v2.RandomHorizontalFlip()(v2.RandomResizedCrop(CROP)(image))


def _readers(parts: int) -> int:
    """The number of processes that read pictures for one of so many parts."""
    return max(min(device.cores() // parts, 16), 1)


class _Pictures(torch.utils.data.Dataset):
    """Pictures uint8 [3, H, W] and their labels: the middle, or with a seed what the augmentation makes of it."""

    def __init__(self, samples: tuple[tuple[str, int], ...]):
        self.samples = samples

    def __getitem__(self, wanted: tuple[int, int | None]) -> tuple[Tensor, int]:
        index, seed = wanted
        path, label = self.samples[index]
        from torchvision.transforms import v2

        image = pictures.picture(Path(path))
        if seed is None:
            return v2.functional.pil_to_tensor(_middle(image)), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return v2.functional.pil_to_tensor(_augmented(image)), label


Split = TensorSplit | FolderSplit


def load(name: str, split: str) -> Split:
    """The `train` or `test` split of a data set, a name in `SOURCES`.

    Raises `KureError` for an unknown name and for data that are missing or damaged.
    """
    check_known("data set", name, SOURCES)
    check_known("split", split, ("train", "test"))
    return SOURCES[name].read(split == "train")


def identity(name: str) -> dict[str, Any]:
    """What a record keeps of the data it is made on: name, number of classes, and the fingerprint of both splits."""
    train, test = load(name, "train"), load(name, "test")
    return {"data": name, "classes": train.classes,
            "train_sha256": train.fingerprint, "test_sha256": test.fingerprint}  # fmt: skip


def _normalized(train: "VisionDataset", wanted: "VisionDataset") -> TensorSplit:
    """A split of a torchvision data set, normalized by the statistics of the training images."""
    reference = _bytes(train).float()
    mean, std = reference.mean((0, 2, 3), keepdim=True), reference.std((0, 2, 3), keepdim=True)
    return TensorSplit(_bytes(wanted), torch.as_tensor(wanted.targets), len(wanted.classes), mean, std)


def _bytes(dataset: "VisionDataset") -> Tensor:
    images = torch.as_tensor(dataset.data)
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


@cache
def _fashion_mnist(train: bool) -> TensorSplit:
    from torchvision import datasets

    root = unpack_fashion_mnist()
    return _normalized(datasets.FashionMNIST(root, train=True), datasets.FashionMNIST(root, train=train))


@cache
def _cifar10(train: bool) -> TensorSplit:
    from torchvision import datasets

    root = Path(os.environ.get("KURE_CIFAR10", DATA))
    try:
        return _normalized(datasets.CIFAR10(root, train=True), datasets.CIFAR10(root, train=train))
    except RuntimeError as error:
        raise KureError(f"CIFAR-10 is missing or damaged in {root}: set KURE_CIFAR10 to the folder that holds "
                        "cifar-10-batches-py/, as its authors ship it.") from error  # fmt: skip


def _tiny_imagenet(train: bool) -> TensorSplit:
    return _read_tiny_imagenet(Path(os.environ.get("KURE_TINY_IMAGENET", DATA / "tiny-imagenet-200")), train)


@cache
def _read_tiny_imagenet(root: Path, train: bool) -> TensorSplit:
    paths, labels, classes = tiny_imagenet.files(root, train)
    published = SOURCES["tiny_imagenet"]
    wanted = published.training_images if train else published.test_images
    if classes == published.classes and len(paths) != wanted:
        raise KureError(f"{root / ('train' if train else 'val')} holds {len(paths):,} pictures of {classes} classes, "
                        f"not the {wanted:,} that were published: restore it.")  # fmt: skip
    images = pictures.decoded(f"tiny_imagenet-{'train' if train else 'test'}", paths, labels, tiny_imagenet.SIDE)
    if train:
        mean, std = _statistics(images)
    else:
        reference = _read_tiny_imagenet(root, True)
        mean, std = reference.mean, reference.std
    return TensorSplit(images, torch.tensor(labels), classes, mean, std, LARGE_SHIFT)


def _statistics(images: Tensor, chunk: int = 2**20) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of the bytes of every channel, from counts of their values by chunks."""
    pixels = images.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C], as they lie in memory
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in pixels.split(chunk):
        counts += torch.stack([torch.bincount(channel, minlength=256) for channel in part.unbind(1)])
    values = torch.arange(256)
    total, squares = (counts * values).sum(1).double(), (counts * values**2).sum(1).double()
    mean = total / len(pixels)
    std = ((squares / len(pixels) - mean**2) * len(pixels) / (len(pixels) - 1)).sqrt()
    return mean.float()[None, :, None, None], std.float()[None, :, None, None]


def _imagenet(train: bool) -> FolderSplit:
    root = Path(os.environ.get("KURE_IMAGENET", DATA / "imagenet"))
    return _read_folder(root / ("train" if train else "val"))


@cache
def _read_folder(folder: Path) -> FolderSplit:
    """All images of a folder; `KureError` if it is missing or has no classes."""
    if not folder.is_dir():
        raise KureError(f"There is no ImageNet split at {folder}: set KURE_IMAGENET to the folder that holds train/ "
                        "and val/, each with one folder a class.")  # fmt: skip
    from torchvision import datasets

    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise KureError(f"{folder} does not hold images in one folder a class ({error}).") from error
    order = pictures.interleaved(found.targets)
    return FolderSplit(folder, tuple(found.samples[i] for i in order), len(found.classes))


@dataclass(frozen=True)
class Source:
    """A data set: what reads its training or its test images, how many were published, and their color channels."""

    read: Callable[[bool], Split]
    training_images: int
    test_images: int
    classes: int
    channels: int


SOURCES = {
    "fashion_mnist": Source(_fashion_mnist, 60_000, 10_000, 10, 1),
    "cifar10": Source(_cifar10, 50_000, 10_000, 10, 3),
    "tiny_imagenet": Source(_tiny_imagenet, 100_000, 10_000, 200, 3),
    "imagenet": Source(_imagenet, 1_281_167, 50_000, 1000, 3),
}


def unpack_fashion_mnist(source: Path = DATA) -> Path:
    """The folder torchvision reads Fashion-MNIST from: the embedded files, checked and unpacked once.

    Raises `KureError` naming the file if one is missing or is not the published one.
    """
    folder, sums = paths.cache(), read_sums(source / "SHA256SUMS")
    raw = folder / "FashionMNIST" / "raw"
    make_folder(raw)
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
