"""Published weights: only the right file is read, nothing in it runs, and what is missing is one sentence."""

import hashlib
import os
import pickle
import socket
from urllib.error import URLError

import pytest
import torch
from helpers import same_weights
from torchvision.models import get_model_weights

from kure_lib.networks import models, published
from kure_lib.paths import KureError

FILE = "resnet18-f37072fd.pth"


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where torch keeps its downloads, on a machine without network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("KURE_WEIGHTS", raising=False)

    def unreachable(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Puts weights of one's own into the folder `KURE_WEIGHTS`, with their SHA-256 beside them."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("KURE_WEIGHTS", str(folder))

    def put(content):
        torch.save(content, folder / FILE)
        digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(f"{digest}  {FILE}\n")
        return folder / FILE

    return put


def test_the_digits_are_those_of_the_files_that_torchvision_downloads():
    for name, digits in published.DIGITS.items():
        assert get_model_weights(name).IMAGENET1K_V1.url.endswith(f"/{name}-{digits}.pth")


def test_a_pickle_is_not_run(hub, own, tmp_path, monkeypatch):
    mine = own(Bomb(tmp_path / "exploded"))  # with the right SHA-256
    with pytest.raises(KureError, match=rf"{mine} cannot be read \(UnpicklingError\)"):
        models.build("resnet18", 3, 1000, pretrained=True)
    monkeypatch.delenv("KURE_WEIGHTS")
    (hub / FILE).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(KureError, match=rf"{hub / FILE} are not what they should be .*begins with f37072fd"):
        models.build("resnet18", 3, 1000, pretrained=True)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((hub / FILE).read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb works"


def test_other_weights_under_the_name_are_refused_in_both_folders(hub, monkeypatch):
    torch.save(models.build("resnet18", 3, 1000).state_dict(), hub / FILE)
    for folder in ("", str(hub)):
        monkeypatch.setenv("KURE_WEIGHTS", folder)
        with pytest.raises(KureError, match="are not what they should be"):
            models.build("resnet18", 3, 1000, pretrained=True)


def test_the_published_digits_are_enough(hub, monkeypatch):
    weights = models.build("resnet18", 3, 1000).state_dict()
    torch.save(weights, hub / FILE)
    digest = hashlib.sha256((hub / FILE).read_bytes()).hexdigest()
    (hub / FILE).rename(hub / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setitem(published.DIGITS, "resnet18", digest[:8])
    assert same_weights(models.build("resnet18", 3, 1000, pretrained=True).state_dict(), weights)


def test_weights_of_ones_own_are_known_by_their_sha256sums(own):
    weights = models.build("resnet18", 3, 7).state_dict()
    path = own(weights)
    assert same_weights(models.build("resnet18", 3, 7, pretrained=True).state_dict(), weights)
    with pytest.raises(KureError, match=r"do not suit this resnet18 \(size mismatch for fc\.bias"):
        models.build("resnet18", 3, 1000, pretrained=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(KureError, match=rf"is not the one in {path.parent / 'SHA256SUMS'}"):
        models.build("resnet18", 3, 7, pretrained=True)
    (path.parent / "SHA256SUMS").write_text("")
    with pytest.raises(KureError, match="SHA256SUMS is damaged"):
        models.build("resnet18", 3, 7, pretrained=True)


@pytest.mark.parametrize("content", [[1, 2], {"fc.weight": 3}, torch.zeros(3)], ids=str)
def test_a_file_that_holds_no_weights_is_one_sentence(own, content):
    own(content)
    with pytest.raises(KureError, match="do not suit this resnet18") as error:
        models.build("resnet18", 3, 1000, pretrained=True)
    assert "\n" not in str(error.value)


def test_without_network_it_is_one_sentence(hub, monkeypatch):
    with pytest.raises(KureError, match=rf"{FILE} are not in .* cannot be downloaded .*KURE_WEIGHTS") as error:
        models.build("resnet18", 3, 1000, pretrained=True)
    assert "\n" not in str(error.value) and "name resolution" in str(error.value)
    monkeypatch.setenv("KURE_WEIGHTS", str(hub))
    with pytest.raises(KureError, match=rf"{FILE} is missing"):
        models.build("resnet18", 3, 1000, pretrained=True)


def test_a_download_that_is_not_the_published_file_is_refused(hub, monkeypatch):
    def download(url, target, digits):
        raise RuntimeError(f'invalid hash value (expected "{digits}", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(KureError, match=r"cannot be downloaded .*invalid hash value"):
        models.build("resnet18", 3, 1000, pretrained=True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *arguments: (_ for _ in ()).throw(URLError("off")))
    with pytest.raises(KureError, match="off"):
        models.build("resnet18", 3, 1000, pretrained=True)


def test_a_network_without_published_weights_says_which_have_them():
    with pytest.raises(KureError, match=r"'resnet20': choose one of resnet18, resnet50, mobilenet_v2"):
        models.build("resnet20", 3, 1000, pretrained=True)
