"""Picture files decoded once: into one tensor, in parallel, kept in the cache with a checksum."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from kure_lib.files import make_folder, write_atomically
from kure_lib.paths import KureError, cache

DIGEST = hashlib.sha256().digest_size  # bytes at the end of a cached file


class Unreadable(KureError):
    """A picture that cannot be read, which says nothing about the network that it was for."""


def picture(path: Path) -> Image.Image:
    """A picture in red, green and blue, also where the file is grey; `Unreadable` names a file that cannot be read."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(f"The picture {path} cannot be read ({error}): restore it.") from error


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """SHA-256 over the bytes of the images uint8 [N, C, H, W], channels last, then of the labels int64 [N]."""
    digest = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy())
    digest.update(labels.contiguous().numpy())
    return digest.hexdigest()


def listing(root: Path, paths: Sequence[Path]) -> str:
    """SHA-256 over the sorted paths within `root`, each with the size of the file."""
    lines = sorted(f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def interleaved(labels: Sequence[int]) -> list[int]:
    """An order in which every head and every tail holds the classes in proportion.

    Of equally large classes it takes the first image of each, then the second of each, and so on.

    >>> interleaved([0, 0, 0, 1, 1, 1])
    [0, 3, 1, 4, 2, 5]
    """
    total, seen, place = Counter(labels), Counter[int](), []
    for label in labels:
        place.append(((seen[label] + 0.5) / total[label], label))
        seen[label] += 1
    return sorted(range(len(labels)), key=place.__getitem__)


def decoded(
    name: str,
    paths: Sequence[Path],
    labels: Sequence[int],
    side: int,
    prepare: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Tensor:
    """Pictures as one tensor uint8 [N, 3, side, side], channels-last, which lies in the cache and is mapped from there.

    The file's name holds the digest of the paths, sizes and labels, and its end the fingerprint of what it holds; if
    that is not what was read, the pictures are decoded again.

    Args:
        name: Begins the name of the file in the cache.
        paths: The pictures, in their order in the tensor.
        labels: Their classes.
        side: Pixels a side.
        prepare: What makes a picture that large.

    Raises:
        KureError: A picture cannot be read or has another size, or the cache cannot be written.
    """
    files = (f"{path.absolute()}\t{path.stat().st_size}\t{label}" for path, label in zip(paths, labels, strict=True))
    key = hashlib.sha256("\n".join([str(side), *files]).encode()).hexdigest()
    kept, classes = cache() / f"{name}-{key[:20]}.bin", torch.tensor(labels)
    shape = (len(paths), side, side, 3)
    make_folder(kept.parent)
    with FileLock(kept.with_suffix(".lock")):  # several runs may begin at once
        images = _mapped(kept, shape, classes)
        if images is None:
            _decode(kept, paths, shape, classes, prepare)
            images = _mapped(kept, shape, classes)
    if images is None:
        raise KureError(f"{kept} does not hold what was written to it: check the disk, or set KURE_CACHE elsewhere.")
    return images


def _mapped(kept: Path, shape: tuple[int, ...], labels: Tensor) -> Tensor | None:
    """The tensor in a cached file, or None if there is none or its fingerprint is not the one at its end."""
    size = int(np.prod(shape))
    if not kept.is_file() or kept.stat().st_size != size + DIGEST:
        return None
    content = torch.from_file(str(kept), shared=False, size=size + DIGEST, dtype=torch.uint8)
    images = content[:size].view(shape).permute(0, 3, 1, 2)
    whole = bytes(content[size:].tolist()).hex() == fingerprint(images, labels)
    return images if whole else None


def _decode(
    kept: Path,
    paths: Sequence[Path],
    shape: tuple[int, ...],
    labels: Tensor,
    prepare: Callable[[Image.Image], Image.Image],
) -> None:
    content = np.empty(int(np.prod(shape)) + DIGEST, np.uint8)
    images = content[:-DIGEST].reshape(shape)

    def fill(i: int) -> None:
        image = prepare(picture(paths[i]))
        if image.size != (side := shape[1], side):
            width, height = image.size
            raise KureError(f"The picture {paths[i]} has {width}×{height} pixels, not {side}×{side}: restore it.")
        images[i] = np.asarray(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a decoder lets other threads go on
        for _ in pool.map(fill, range(len(paths))):
            pass
    digest = fingerprint(torch.from_numpy(images).permute(0, 3, 1, 2), labels)
    content[-DIGEST:] = np.frombuffer(bytes.fromhex(digest), np.uint8)
    write_atomically(kept, memoryview(content))  # type: ignore[arg-type]
