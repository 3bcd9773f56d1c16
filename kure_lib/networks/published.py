"""The ImageNet weights that torchvision publishes: where they are found, and how it is known that they are these.

A file is looked for in the folder that `KURE_WEIGHTS` names, else where torch keeps its downloads, and downloaded there
if it is missing. It is checked whenever it is read, before anything of it is unpacked: its SHA-256 must be the one that
a file `SHA256SUMS` beside it gives (for weights of your own, as `sha256sum *.pth > SHA256SUMS` writes it), else begin
with the eight digits of the published file's name, which is all that torchvision publishes of it.
"""

import hashlib
import io
import os
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from kure_lib.files import read_sums
from kure_lib.paths import KureError, check_known

#: The first eight digits of the SHA-256 of the weights, by network, as in the names of torchvision's files.
DIGITS = {"resnet18": "f37072fd", "resnet50": "0676ba61", "mobilenet_v2": "b0353104"}
SUMS = "SHA256SUMS"


def load(model: nn.Module, name: str) -> None:
    """Load the published weights of a network into it.

    Raises `KureError` if they are missing and cannot be downloaded, if they are not the published ones, and if the
    network has other layers, channels or classes.
    """
    check_known("network with published weights", name, DIGITS)
    path = _path(name)
    weights = _weights(path, DIGITS[name])
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise KureError(f"The weights {path} do not suit this {name} ({reason.rstrip('.')}): the published ones are "
                        "for color images and 1000 classes; take data that have as many.") from None  # fmt: skip


def _path(name: str) -> Path:
    """Where the file lies; it is there."""
    file = f"{name}-{DIGITS[name]}.pth"
    if folder := os.environ.get("KURE_WEIGHTS"):
        path = Path(folder) / file
        if not path.is_file():
            raise KureError(f"{path} is missing: put the weights there, or point KURE_WEIGHTS at their folder.")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        from torchvision import models  # as slow as it is rarely needed here

        url = models.get_model_weights(name).IMAGENET1K_V1.url
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), DIGITS[name])
        except (OSError, HTTPException, RuntimeError) as error:
            raise KureError(f"The weights {file} are not in {path.parent} and cannot be downloaded from {url} "
                            f"({error}): connect to the network, or put the file there or into a folder that "
                            "KURE_WEIGHTS names.") from None  # fmt: skip
    return path


def _weights(path: Path, digits: str) -> dict[str, Tensor]:
    """What a file holds, once it is known to be the right one; nothing in it is executed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KureError(f"The weights {path} cannot be read ({error.strerror}): give access to them.") from None
    digest, sums = hashlib.sha256(content).hexdigest(), path.with_name(SUMS)
    own = read_sums(sums) if sums.is_file() else {}
    if not digest.startswith(own.get(path.name, digits)):
        wanted = f"the one in {sums}" if path.name in own else f"that of the published file, which begins with {digits}"
        raise KureError(f"The weights {path} are not what they should be (their SHA-256 begins with {digest[:8]} and "
                        f"is not {wanted}): delete the file to download it again, or restore it.")  # fmt: skip
    try:
        return torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # the unpickler has no common class of errors
        raise KureError(f"The weights {path} cannot be read ({type(error).__name__}): write them with "
                        "torch.save(model.state_dict(), path).") from None  # fmt: skip
