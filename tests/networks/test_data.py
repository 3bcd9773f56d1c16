"""Data sets in their files' own formats, damaged files, and augmentation image by image."""

import dataclasses
import gzip
import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from kure_lib.networks import data
from kure_lib.networks import pictures as pictures_module
from kure_lib.networks.data import DATA, TensorSplit, augment
from kure_lib.networks.pictures import interleaved
from kure_lib.paths import KureError
from kure_lib.training.configs import RunConfig
from kure_lib.training.loop import fit


@pytest.fixture(scope="module")
def train():
    return data.load("fashion_mnist", "train")


@pytest.fixture(scope="module")
def test():
    return data.load("fashion_mnist", "test")


# Fashion-MNIST


def read_idx(name):
    """The numbers of an IDX file, read by hand: type and dimensions, big-endian, then bytes."""
    content = gzip.decompress((DATA / name).read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def test_fashion_mnist_holds_the_published_images_and_labels(train, test):
    for split, prefix, count in ((train, "train", 60_000), (test, "t10k", 10_000)):
        assert split.images.shape == (count, 1, 28, 28) and split.images.dtype == torch.uint8
        assert len(split) == count and split.classes == 10 and split.channels == 1
        assert np.array_equal(split.images[:, 0].numpy(), read_idx(f"{prefix}-images-idx3-ubyte.gz"))
        assert np.array_equal(split.labels.numpy(), read_idx(f"{prefix}-labels-idx1-ubyte.gz"))
        assert split.labels.bincount().tolist() == [count // 10] * 10
    assert test.labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]  # ankle boot, pullover, trousers, …


def test_both_splits_are_normalized_by_the_training_images(train, test):
    assert torch.equal(train.mean, test.mean) and torch.equal(train.std, test.std)
    assert train.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)  # the values everybody uses
    assert train.std.item() / 255 == pytest.approx(0.3530, abs=5e-5)
    images = torch.cat([images for images, _ in train.head(20_000).batches(5000)])
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for file in DATA.glob("*"):
        if "train-images" not in file.name:
            shutil.copy(file, folder)
    (folder / "train-images-idx3-ubyte.gz").symlink_to(DATA / "train-images-idx3-ubyte.gz")
    return folder


NAME = "t10k-images-idx3-ubyte.gz"


def test_the_files_are_unpacked_once(copied_data, tmp_path):
    folder = data.unpack_fashion_mnist(copied_data)
    unpacked = sorted((folder / "FashionMNIST" / "raw").iterdir())
    assert folder == tmp_path / "cache"
    assert [file.name for file in unpacked] == sorted(p.stem for p in DATA.glob("*.gz"))
    assert len(datasets.FashionMNIST(folder, train=False)) == 10_000
    times = [file.stat().st_mtime_ns for file in unpacked]
    data.unpack_fashion_mnist(copied_data)
    assert [file.stat().st_mtime_ns for file in unpacked] == times


def test_a_flipped_bit_is_found_and_the_file_named(copied_data):
    content = bytearray((copied_data / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_data / NAME).write_bytes(content)
    with pytest.raises(KureError, match=rf"{copied_data / NAME} is damaged"):
        data.unpack_fashion_mnist(copied_data)


def test_a_missing_file_is_named(copied_data):
    (copied_data / NAME).unlink()
    with pytest.raises(KureError, match=rf"{copied_data / NAME} is missing"):
        data.unpack_fashion_mnist(copied_data)


def test_missing_check_sums_are_named(copied_data):
    (copied_data / "SHA256SUMS").unlink()
    with pytest.raises(KureError, match=rf"{copied_data / 'SHA256SUMS'} is missing"):
        data.unpack_fashion_mnist(copied_data)


@pytest.mark.parametrize("kept", [0, 3])
def test_emptied_check_sums_let_no_tampered_data_in(copied_data, tmp_path, kept):
    folder = data.unpack_fashion_mnist(copied_data)
    (folder / "FashionMNIST" / "raw" / NAME.removesuffix(".gz")).write_bytes(b"tampered")
    lines = (copied_data / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copied_data / "SHA256SUMS").write_text("".join(line for line in lines[-kept:] if NAME not in line) * bool(kept))
    with pytest.raises(KureError, match="is damaged"):
        data.unpack_fashion_mnist(copied_data)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\1" + content[1:]])
def test_a_damaged_unpacked_file_is_unpacked_again(copied_data, damage):
    folder = data.unpack_fashion_mnist(copied_data)
    unpacked = folder / "FashionMNIST" / "raw" / NAME.removesuffix(".gz")
    whole = unpacked.read_bytes()
    unpacked.write_bytes(damage(whole))
    data.unpack_fashion_mnist(copied_data)
    assert unpacked.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [
        ("mnist", "train", "'mnist'.*fashion_mnist, cifar10, tiny_imagenet, imagenet"),
        ("fashion_mnist", "val", "'val'.*train, test"),
    ],
)
def test_unknown_names_are_told_the_known_ones(name, split, said):
    with pytest.raises(KureError, match=said):
        data.load(name, split)


# CIFAR-10


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """Twenty images in each file of CIFAR-10's own format, with their check sums; returns images and labels."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums, parts = {}, {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [*range(10), *range(10)]
        write(name, {"data": rows, "labels": labels, "batch_label": name, "filenames": [f"{i}.png" for i in range(20)]})
        parts[name] = rows, labels
    write("batches.meta", {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072})
    cifar10 = datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [[name, sums[name]] for name in list(parts)[:5]])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(cifar10, "meta", meta)
    monkeypatch.setenv("KURE_CIFAR10", str(tmp_path))
    data._cifar10.cache_clear()
    yield parts
    data._cifar10.cache_clear()


def test_cifar10_is_read_in_its_own_format(tiny_cifar10):
    train, test = data.load("cifar10", "train"), data.load("cifar10", "test")
    rows = np.concatenate([rows for rows, _ in list(tiny_cifar10.values())[:5]])
    assert (len(train), len(test), train.classes, train.channels) == (100, 20, 10, 3)
    assert np.array_equal(train.images.numpy(), rows.reshape(-1, 3, 32, 32))  # red, green, blue planes
    assert np.array_equal(test.images.numpy(), tiny_cifar10["test_batch"][0].reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == tiny_cifar10["test_batch"][1]
    assert train.labels.dtype == torch.int64
    planes = rows.reshape(-1, 3, 1024).astype(float)
    np.testing.assert_allclose(test.mean.flatten(), planes.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(test.std.flatten(), planes.std((0, 2), ddof=1), rtol=1e-4)


def test_damaged_or_missing_cifar10_is_one_sentence(tiny_cifar10, tmp_path, monkeypatch):
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(KureError, match=rf"CIFAR-10 is missing or damaged in {tmp_path}: set KURE_CIFAR10"):
        data.load("cifar10", "train")
    monkeypatch.setenv("KURE_CIFAR10", str(tmp_path / "elsewhere"))
    with pytest.raises(KureError, match="elsewhere"):
        data.load("cifar10", "train")


# ImageNet


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                picture.save(folder / f"{name}_{i}.JPEG")
    monkeypatch.setenv("KURE_IMAGENET", str(tmp_path))
    monkeypatch.setattr(data.device, "cores", lambda: 1)
    return tmp_path


def test_imagenet_is_read_from_its_folders(tiny_imagenet):
    split = data.load("imagenet", "test")
    assert (len(split), split.classes, split.channels) == (6, 2, 3)
    (first, labels), (second, more) = split.batches(4)
    assert first.shape == (4, 3, 224, 224) and second.shape == (2, 3, 224, 224)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert [*labels.tolist(), *more.tolist()] == [0, 1, 0, 1, 0, 1]
    # torchvision's evaluation: the shorter side to 256, the middle 224, normalized
    picture = Image.open(tiny_imagenet / "val" / "n01440764" / "n01440764_0.JPEG").resize((320, 256), Image.BILINEAR)
    middle = np.asarray(picture, dtype=np.float32)[16:240, 48:272] / 255
    wanted = (middle - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(first[0].permute(1, 2, 0), wanted, atol=0.03)  # of a range of about 4.5


def test_imagenet_training_batches_are_full_and_follow_the_generator(tiny_imagenet):
    split = data.load("imagenet", "train")
    one, other = (list(split.batches(4, torch.Generator().manual_seed(3))) for _ in range(2))
    assert [len(labels) for _, labels in one] == [4]
    assert torch.equal(one[0][0], other[0][0]) and torch.equal(one[0][1], other[0][1])


def test_head_and_tail_of_imagenet_hold_every_class_and_are_not_augmented(tiny_imagenet):
    split = data.load("imagenet", "train")
    rest, last = split.parted(2)
    for part, size in ((split.head(4), 4), (rest, 4), (last, 2)):
        assert len(part) == size
        assert torch.cat([labels for _, labels in part.batches(3)]).tolist() == [0, 1] * (size // 2)
    assert len(split) == len(split.head(None)) == 6, "the split itself stays"
    one, other = (next(split.head(4).batches(4))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(next(split.batches(6))[0][:4], one)


@pytest.mark.parametrize("held", [data.HELD, 0])
def test_images_that_do_not_fit_are_streamed_to_the_same_batches(tiny_imagenet, monkeypatch, held):
    split = data.load("imagenet", "test")
    wanted = list(split.batches(4))
    monkeypatch.setattr(data, "HELD", held)
    for (images, labels), (others, more) in zip(wanted, split.batches(4), strict=True):
        assert torch.equal(images, others) and torch.equal(labels, more)


def test_augmentation_does_not_depend_on_the_number_of_workers(tiny_imagenet, monkeypatch):
    split, batches = data.load("imagenet", "train"), []
    for workers in (0, 1, 3):
        monkeypatch.setattr(data, "_readers", lambda parts, count=workers: count)
        torch.manual_seed(workers)
        batches.append(list(split.batches(2, torch.Generator().manual_seed(5))))
    for other in batches[1:]:
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(batches[0], other, strict=True))
    again = next(split.batches(2, torch.Generator().manual_seed(6)))[0]
    assert not torch.equal(again, batches[0][0][0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_cannot_be_read_is_named_and_no_divergence(tiny_imagenet, monkeypatch, workers, split):
    monkeypatch.setattr(data, "_readers", lambda parts: workers)
    damaged = tiny_imagenet / split / "n01443537" / "n01443537_1.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])
    config = RunConfig(
        model="resnet18", data="imagenet", epochs=1, batch_size=2, learning_rate=0.1, weight_decay=0, kept="float16"
    )
    with pytest.raises(KureError, match=rf"^The picture {damaged} cannot be read \(.*\): restore it\.$"):
        fit(config)


@pytest.mark.parametrize("size", [4, 8])  # 8: more than there are
def test_the_pictures_of_a_step_do_not_depend_on_the_number_of_processes(tiny_imagenet, size):
    split = data.load("imagenet", "train")

    def batches(part):
        return split.batches(size, torch.Generator().manual_seed(5), part=part)

    for whole, *halves in zip(batches((0, 1)), batches((0, 2)), batches((1, 2)), strict=True):
        for all_of_them, *both in zip(whole, *halves, strict=True):
            assert len(both[0]) == len(both[1])
            assert torch.equal(torch.cat(both), all_of_them)


def test_the_fingerprint_of_a_folder_is_of_paths_and_sizes(tiny_imagenet):
    split = data.load("imagenet", "test")
    files = sorted((tiny_imagenet / "val").rglob("*.JPEG"))
    lines = [f"{file.relative_to(tiny_imagenet / 'val')}\t{file.stat().st_size}" for file in files]
    assert split.fingerprint == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert split.head(4).fingerprint != split.fingerprint


def test_classes_of_unequal_size_are_spread_over_the_whole_order():
    labels = [0] * 10 + [1] * 30
    order = interleaved(labels)
    assert sorted(order) == list(range(40))
    for part in (order[:20], order[20:], order[-8:]):
        assert sum(labels[i] == 0 for i in part) == len(part) / 4


# Tiny ImageNet


NAMES = ("n02", "n01", "n03")  # not sorted, as in the published file


def write_tiny_imagenet(root, each=4, names=NAMES):
    """A folder as its authors ship it, with a few pictures; the first of a class is grey."""
    rng = np.random.default_rng(len(names))
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    lines = []
    for name in names:
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(each):
            shape = (64, 64) if i == 0 else (64, 64, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}_{i}.JPEG")
        for i in range(2):
            file = f"val_{2 * names.index(name) + i}.JPEG"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / "val" / "images" / file)
            lines.append(f"{file}\t{name}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))


@pytest.fixture
def small(tmp_path, monkeypatch):
    root = tmp_path / "tiny"
    write_tiny_imagenet(root)
    monkeypatch.setenv("KURE_TINY_IMAGENET", str(root))
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))
    data._read_tiny_imagenet.cache_clear()
    return root


def by_hand(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_tiny_imagenet_is_read_as_its_authors_ship_it(small):
    train, test = data.load("tiny_imagenet", "train"), data.load("tiny_imagenet", "test")
    assert (train.classes, train.channels, len(train), len(test), train.shift) == (3, 3, 12, 6, 4)
    assert train.labels.tolist() == [0, 1, 2] * 4, "the first image of each class, then the second"
    pictures = [by_hand(small / "train" / n / "images" / f"{n}_{i}.JPEG") for i in range(4) for n in sorted(NAMES)]
    assert np.array_equal(train.images.permute(0, 2, 3, 1), pictures)
    assert train.images.is_contiguous(memory_format=torch.channels_last)
    kinds = dict(line.split("\t")[:2] for line in (small / "val" / "val_annotations.txt").read_text().splitlines())
    shown = [by_hand(small / "val" / "images" / name) for name in kinds]
    seen = {image.numpy().tobytes(): sorted(NAMES)[label] for image, label in
            zip(test.images.permute(0, 2, 3, 1).contiguous(), test.labels, strict=True)}  # fmt: skip
    assert [seen[image.tobytes()] for image in shown] == list(kinds.values())
    numbers = np.stack(pictures).astype(float)
    for split in (train, test):
        np.testing.assert_allclose(split.mean.flatten(), numbers.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(split.std.flatten(), numbers.reshape(-1, 3).std(0, ddof=1), rtol=1e-6)
    digest = hashlib.sha256(np.stack(pictures).tobytes() + train.labels.numpy().tobytes())
    assert train.fingerprint == digest.hexdigest()


def test_statistics_from_counts_are_those_of_sums_over_all_pixels_bit_for_bit():
    """Records were made on images normalized by sums in float64, which are exact: all squares are whole."""
    images = torch.randint(256, (37, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 1].clamp(max=200)
    pixels = images.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = pixels.sum(0) / len(pixels)
    std = ((pixels.square().sum(0) / len(pixels) - mean**2) * len(pixels) / (len(pixels) - 1)).sqrt()
    for chunk in (1000, 2**20):
        found = data._statistics(images.contiguous(memory_format=torch.channels_last), chunk)
        for wanted, got in zip((mean, std), found, strict=True):
            assert got.shape == (1, 3, 1, 1) and torch.equal(got.flatten(), wanted.float())


def test_a_cached_tensor_is_used_again_and_a_damaged_one_is_not(small, tmp_path, monkeypatch):
    wanted = data.load("tiny_imagenet", "train").images.clone()
    opened = []
    read = pictures_module.picture
    monkeypatch.setattr(pictures_module, "picture", lambda path: opened.append(path) or read(path))

    def load():
        opened.clear()
        data._read_tiny_imagenet.cache_clear()
        return data.load("tiny_imagenet", "train").images

    assert torch.equal(load(), wanted) and not opened
    (kept,) = (tmp_path / "cache").glob("tiny_imagenet-train-*.bin")
    whole = kept.read_bytes()
    for damage in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        kept.write_bytes(damage)
        assert torch.equal(load(), wanted) and len(opened) == 12
        assert kept.read_bytes() == whole
    one = small / "train" / "n01" / "images" / "n01_1.JPEG"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(one)
    assert not torch.equal(load(), wanted) and len(opened) == 12, "another picture is another folder"


def resized(root):
    Image.new("RGB", (64, 32)).save(root / "train" / "n01" / "images" / "n01_0.JPEG")


def annotate(old, new):
    def change(root):
        file = root / "val" / "val_annotations.txt"
        file.write_text(file.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda root: shutil.rmtree(root), "There is no Tiny ImageNet at .*: set KURE_TINY_IMAGENET"),
        (lambda root: (root / "wnids.txt").write_text("n01\n"), "wnids.txt must name two classes or more"),
        (lambda root: shutil.rmtree(root / "train" / "n02"), "The class n02 of wnids.txt has no pictures"),
        (lambda root: (root / "train" / "n04").mkdir(), "does not name the class of .*n04"),
        (lambda root: (root / "train/n02/images/n02_3.JPEG").unlink(), "n02 holds 3 pictures, the other classes 4"),
        (lambda root: (root / "train/n02/images/n02_3.JPEG").write_bytes(b"no"), "n02_3.JPEG cannot be read"),
        (resized, "n01_0.JPEG has 64×32 pixels, not 64×64"),
        (annotate("\tn03\t", "\tn99\t"), "gives val_5.JPEG the class 'n99', which wnids.txt does not name"),
        (annotate("val_5.JPEG", "val_77.JPEG"), "names val_77.JPEG, which is not in"),
        (annotate("val_5.JPEG\tn03\t0\t0\t9\t9\n", ""), "does not name the picture .*val_5.JPEG"),
        (annotate("val_5.JPEG", "val_4.JPEG"), "names val_4.JPEG twice"),
    ],
)  # fmt: skip
def test_a_fault_of_tiny_imagenet_is_one_sentence(small, fault, said):
    fault(small)
    with pytest.raises(KureError, match=said) as raised:
        data.load("tiny_imagenet", "test")
    assert "\n" not in str(raised.value)


def test_the_published_folder_must_be_whole(small, monkeypatch):
    published = dataclasses.replace(data.SOURCES["tiny_imagenet"], classes=3, training_images=15)
    monkeypatch.setitem(data.SOURCES, "tiny_imagenet", published)
    with pytest.raises(KureError, match="train holds 12 pictures of 3 classes, not the 15 that were published"):
        data.load("tiny_imagenet", "train")


def test_training_images_of_tiny_imagenet_move_by_four_pixels():
    images = numbered(100, size=12).images
    shifts = set()
    for image, new in zip(images.numpy(), augment(images, torch.Generator().manual_seed(0), 4).numpy(), strict=True):
        ways = [(flip, y, x) for flip in (False, True) for y in range(-4, 5) for x in range(-4, 5)]
        (way,) = [way for way in ways if np.array_equal(moved(image, *way), new)]
        shifts |= {way[1], way[2]}
    assert shifts == set(range(-4, 5))


def test_the_fingerprint_of_fashion_mnist_is_of_its_bytes(train):
    digest = hashlib.sha256(read_idx("train-images-idx3-ubyte.gz").tobytes())
    digest.update(read_idx("train-labels-idx1-ubyte.gz").astype(np.int64).tobytes())
    assert train.fingerprint == digest.hexdigest()
    identity = data.identity("fashion_mnist")
    assert (identity["data"], identity["classes"], identity["train_sha256"]) == ("fashion_mnist", 10, train.fingerprint)


def test_missing_imagenet_names_the_folder_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_IMAGENET", str(tmp_path))
    with pytest.raises(KureError, match=rf"{tmp_path / 'val'}: set KURE_IMAGENET"):
        data.load("imagenet", "test")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(KureError, match=rf"{tmp_path / 'train'} does not hold images"):
        data.load("imagenet", "train")


# Augmentation and batches


def numbered(count, channels=1, size=6):
    """A split whose images tell their number in their first pixel, and their label too."""
    images = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    images[:, :, 0, 0] = torch.arange(count)[:, None]
    return TensorSplit(
        images.to(torch.uint8), torch.arange(count), 10, torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
    )


def moved(image, flip, dy, dx):
    """One image flipped and moved by hand; zeros come in."""
    image = np.flip(image, -1) if flip else image
    result = np.zeros_like(image)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                result[:, y, x] = image[:, y + dy, x + dx]
    return result


@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmented_image_is_a_flip_and_a_shift_of_its_own(channels):
    images = numbered(200, channels).images
    result = augment(images, torch.Generator().manual_seed(1)).numpy()
    assert result.shape == images.shape and result.dtype == np.uint8
    seen = {}
    for image, new in zip(images.numpy(), result, strict=True):
        ways = [(flip, dy, dx) for flip in (False, True) for dy in range(-2, 3) for dx in range(-2, 3)]
        fitting = [way for way in ways if np.array_equal(moved(image, *way), new)]
        assert len(fitting) == 1
        seen[fitting[0]] = seen.get(fitting[0], 0) + 1
    assert len(seen) > 45  # of 50 ways, each with probability 1/50
    assert max(seen.values()) < 16


def test_augmentation_follows_the_generator_alone_and_leaves_its_input():
    images = numbered(50).images
    before = images.clone()
    torch.manual_seed(0)
    one = augment(images, torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    assert torch.equal(augment(images, torch.Generator().manual_seed(1)), one)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(2)), one)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("count", "size", "batches"), [(10, 3, 4), (9, 3, 3), (2, 5, 1), (1, 1, 1)])
def test_evaluation_batches_hold_every_image_once_in_order(count, size, batches):
    split = numbered(count)
    images, labels = zip(*split.batches(size), strict=True)
    assert len(images) == batches
    assert torch.cat(labels).tolist() == list(range(count))
    assert torch.equal(torch.cat(images), split.images.float())


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 3, [3, 3, 3]), (9, 3, [3, 3, 3]), (2, 5, [2])])
def test_training_batches_are_full_shuffled_and_each_image_comes_at_most_once(count, size, sizes):
    split = numbered(count)
    labels = [labels for _, labels in split.batches(size, torch.Generator().manual_seed(0))]
    assert [len(part) for part in labels] == sizes
    assert len(labels) == max(count // size, 1)
    assert len(set(torch.cat(labels).tolist())) == sum(sizes)
    orders = {tuple(next(numbered(50).batches(50, torch.Generator().manual_seed(i)))[1].tolist()) for i in range(5)}
    assert len(orders) == 5


def test_labels_stay_with_their_images_in_training():
    split = numbered(40, size=20)
    split.images[:] = torch.arange(40, dtype=torch.uint8)[:, None, None, None]  # survives every flip and shift
    for images, labels in split.batches(8, torch.Generator().manual_seed(0)):
        assert images[:, 0, 10, 10].tolist() == labels.tolist()


def test_the_head_is_the_first_images_and_normalization_stays():
    mean, std = torch.full((1, 1, 1, 1), 7.0), torch.full((1, 1, 1, 1), 2.0)
    split = TensorSplit(numbered(20).images, torch.arange(20), 10, mean, std)
    head = split.head(5)
    assert len(head) == 5 and len(split.head(None)) == 20 and len(split.head(100)) == 20
    ((images, labels),) = head.batches(10)
    assert torch.equal(images, (split.images[:5].float() - 7) / 2)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images.is_contiguous(memory_format=torch.channels_last)
