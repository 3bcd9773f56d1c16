"""Files that changed on the disk: each change is noticed, mended, or means nothing, as what is read back tells."""

import gzip
import hashlib

import numpy as np
import pytest
import torch
from children import answered, decode, unpack
from PIL import Image

from kure_lib.networks import published
from kure_lib.paths import ROOT, KureError
from kure_lib.study import manifest, records, runs
from kure_lib.training import loop


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    """The content of a checkpoint of that run."""
    path = tmp_path_factory.mktemp("checkpoint") / "run.pt"
    loop.fit(trained[0], checkpoint=path)
    return path.read_bytes()


@pytest.fixture
def of_checkpoint(trained, checkpoint, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(checkpoint)
    return [path], lambda: loop.read_checkpoint(path, trained[0]) and path.read_bytes()


@pytest.fixture
def of_record(finished):
    return [records.record_path(finished)], lambda: runs.find(finished).model_dump()


@pytest.fixture
def of_weights(finished):
    def read():
        return {name: value.numpy().tobytes() for name, value in runs.find(finished).weights.items()}

    return [records.weights_path(finished)], read


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A data set in the form of Fashion-MNIST, of a few bytes, with an empty cache."""
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    sums = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / f"{name}-ubyte.gz"
        path.write_bytes(gzip.compress(name.encode() * 50))
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@pytest.fixture
def of_archive(source):
    return sorted(source.glob("*.gz")), lambda: unpack(source)


@pytest.fixture
def of_sums(source):
    return [source / "SHA256SUMS"], lambda: unpack(source)


@pytest.fixture
def of_unpacked(source, tmp_path):
    unpack(source)
    return sorted((tmp_path / "cache").rglob("*ubyte")), lambda: unpack(source)


@pytest.fixture
def of_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))
    paths, random = [tmp_path / f"{i}.png" for i in range(4)], np.random.default_rng(0)
    for path in paths:
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    decode(paths)
    return list((tmp_path / "cache").glob("*.bin")), lambda: decode(paths)


@pytest.fixture
def of_committed(tmp_path):
    """Some of the committed results and their manifest."""
    study = ROOT / "results" / "study"
    for part in manifest.CONTENTS[:-1]:
        for file in sorted(study.glob(part))[:3]:
            copy = tmp_path / file.relative_to(study)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    manifest.write(tmp_path)

    def read():
        if changed := manifest.differences(tmp_path):
            raise KureError(changed[0])

    return [file for file in sorted(tmp_path.rglob("*")) if file.is_file()], read


@pytest.fixture
def of_published(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_WEIGHTS", str(tmp_path))
    path = tmp_path / f"resnet18-{published.DIGITS['resnet18']}.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")

    def read():
        model = torch.nn.Linear(3, 2)
        published.load(model, "resnet18")
        return {name: value.tolist() for name, value in model.state_dict().items()}

    return [path, tmp_path / "SHA256SUMS"], read


def one_bit(content: bytearray, chance) -> None:
    content[chance.integers(len(content))] ^= 1 << chance.integers(8)


def cut(content: bytearray, chance) -> None:
    del content[chance.integers(len(content)) :]


def zeros(content: bytearray, chance) -> None:
    place = chance.integers(len(content))
    content[place : place + 512] = bytes(len(content[place : place + 512]))


def more(content: bytearray, chance) -> None:
    content += chance.bytes(chance.integers(1, 9))


FILES = [name for name in dict(globals()) if name.startswith("of_")]


@pytest.mark.draws(5)
@pytest.mark.parametrize("damage", [one_bit, cut, zeros, more], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_change_is_noticed_or_means_nothing(file, damage, chance, request):
    paths, read = request.getfixturevalue(file)
    meant = read()
    path = paths[chance.integers(len(paths))]
    content = bytearray(path.read_bytes())
    damage(content, chance)
    unchanged = content == path.read_bytes()
    path.write_bytes(content)
    if file == "of_committed":
        assert unchanged or answered(lambda: read() or "unnoticed") is None
    else:
        assert answered(read) in (None, meant)


def test_a_run_whose_checkpoint_is_damaged_ends_in_the_same_bits(chance, trained, checkpoint, results_folder, capsys):
    config, contents = trained
    path, content = records.checkpoint_path(config), bytearray(checkpoint)
    one_bit(content, chance)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    runs.get(config)
    assert records.weights_path(config).read_bytes() in contents.values()
    assert capsys.readouterr().err.count("cannot be used") == 1
