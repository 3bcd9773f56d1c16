"""The files of Tiny ImageNet as its authors ship it: which picture is of which class, and whether all are there."""

from collections import Counter
from pathlib import Path

from kure_lib.networks.pictures import interleaved
from kure_lib.paths import KureError

SIDE = 64  # pixels


def files(root: Path, train: bool) -> tuple[list[Path], list[int], int]:
    """The pictures of a split, interleaved by class; the class of each, by sorted names; the number of classes.

    Raises `KureError` where a folder, a class, a picture or an annotation is missing or one too many.
    """
    names = sorted(_lines(root, "wnids.txt"))
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise KureError(f"{root / 'wnids.txt'} must name two classes or more, each once: restore it.")
    of = {name: label for label, name in enumerate(names)}
    found = _training(root, of) if train else _validation(root, of)
    order = interleaved([label for _, label in found])
    return [found[i][0] for i in order], [found[i][1] for i in order], len(names)


def _lines(root: Path, name: str) -> list[str]:
    try:
        return [line for line in (root / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, NotADirectoryError):
        raise KureError(f"There is no Tiny ImageNet at {root} ({name} is missing): set KURE_TINY_IMAGENET to the "
                        "folder that holds train/, val/ and wnids.txt, as its authors ship it.") from None  # fmt: skip


def _training(root: Path, of: dict[str, int]) -> list[tuple[Path, int]]:
    pictures = {name: sorted((root / "train" / name / "images").glob("*.JPEG")) for name in of}
    usual, _ = Counter(map(len, pictures.values())).most_common(1)[0]
    for name, paths in pictures.items():
        if not paths:
            raise KureError(f"The class {name} of wnids.txt has no pictures in {root / 'train' / name}: restore it.")
        if len(paths) != usual:
            raise KureError(f"{root / 'train' / name} holds {len(paths)} pictures, the other classes {usual} each: "
                            "restore it.")  # fmt: skip
    for folder in sorted((root / "train").iterdir()):
        if folder.is_dir() and folder.name not in of:
            raise KureError(f"wnids.txt does not name the class of {folder}: restore the one or remove the other.")
    return [(path, of[name]) for name, paths in pictures.items() for path in paths]


def _validation(root: Path, of: dict[str, int]) -> list[tuple[Path, int]]:
    annotations = root / "val" / "val_annotations.txt"
    labels: dict[str, int] = {}
    for line in _lines(root, "val/val_annotations.txt"):
        name, kind = (*line.split("\t"), "")[:2]
        if kind not in of:
            raise KureError(
                f"{annotations} gives {name} the class {kind!r}, which wnids.txt does not name: restore it."
            )
        if name in labels:
            raise KureError(f"{annotations} names {name} twice: restore it.")
        labels[name] = of[kind]
    there = {path.name: path for path in (root / "val" / "images").glob("*.JPEG")}
    if absent := sorted(set(labels) - set(there)):
        raise KureError(f"{annotations} names {absent[0]}, which is not in {root / 'val' / 'images'}: restore it.")
    if unnamed := sorted(set(there) - set(labels)):
        raise KureError(f"{annotations} does not name the picture {there[unnamed[0]]}: restore it.")
    if absent := sorted(set(of) - {name for name in of if of[name] in labels.values()}):
        raise KureError(f"{annotations} names no picture of the class {absent[0]}: restore it.")
    return [(there[name], labels[name]) for name in sorted(labels)]
