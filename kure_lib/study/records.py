"""Records on disk: a JSON file for each finished run, its weights beside it, a lock that keeps two processes apart."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from pydantic import Field, FiniteFloat, PlainSerializer, model_validator
from torch import nn

from kure_lib import progress
from kure_lib.files import make_folder, write_atomically
from kure_lib.networks import data, device, models
from kure_lib.networks.evaluation import Evaluation
from kure_lib.paths import KureError, in_words, results
from kure_lib.quantization import equalization
from kure_lib.quantization.view import folded as fold
from kure_lib.training.configs import Frozen, RunConfig
from kure_lib.training.loop import Curves, Steps


class LayerSummary(Frozen):
    """One layer after training; the histogram counts its weights in equal bins from `low` to `high`."""

    name: str
    shape: tuple[int, ...]
    regularized: bool
    quantized: bool
    kurtosis: float = Field(gt=0, allow_inf_nan=False)
    low: FiniteFloat
    high: FiniteFloat
    counts: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> "LayerSummary":
        if self.low > self.high or sum(self.counts) != math.prod(self.shape):
            raise ValueError(f"the histogram of {self.name} is not one of {math.prod(self.shape)} weights")
        return self

    @property
    def reach(self) -> float:
        """The largest magnitude in standard deviations, which are those of the histogram."""
        width = (self.high - self.low) / len(self.counts)
        centers = self.low + width * (np.arange(len(self.counts)) + 0.5)
        mean = np.average(centers, weights=self.counts)
        return max(-self.low, self.high) / float(np.average((centers - mean) ** 2, weights=self.counts)) ** 0.5

    def quantiles(self, count: int = 2**13) -> torch.Tensor:
        """As many values in ascending order, spread as the weights are and evenly within each bin: float64 of [count].

        Their distortion at 2 to 4 bits is that of the weights to within a few per cent.
        """
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        below = np.concatenate([[0], np.cumsum(self.counts)]) / sum(self.counts)
        return torch.from_numpy(np.interp((np.arange(count) + 0.5) / count, below, edges))


def _known(evaluation: Evaluation) -> list:
    return [value for value in evaluation if value is not None]


class Record(Frozen):
    """A finished run; `steps` are those that LSQ learned, by layer and activation site.

    In its file `digest` is the SHA-256 of all else, as `_digest` writes it; records of earlier versions have none.
    """

    key: str
    config: RunConfig
    curves: Curves
    layer_kurtosis: Curves
    layers: list[LayerSummary]
    steps: Steps = {}
    weights_sha256: str
    provenance: dict[str, Any]
    evaluations: dict[str, Annotated[Evaluation, PlainSerializer(_known)]] = {}
    digest: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Record":
        for name, values in {**self.curves, **self.layer_kurtosis}.items():
            if len(values) != self.config.epochs:
                raise ValueError(f"{name} has {len(values)} values for {self.config.epochs} epochs")
        return self

    @property
    def mean_kurtosis(self) -> float:
        """The mean over the regularized layers, as in L_K."""
        return float(np.mean([layer.kurtosis for layer in self.layers if layer.regularized]))

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters and buffers in float32; `KureError` if their file is missing or damaged."""
        return self.unpacked(self.packed())

    def packed(self) -> bytes:
        """The weights as their file holds them; `KureError` if it is missing or damaged."""
        path = weights_path(self.config)
        if not path.is_file():
            raise KureError(f"The weights {path} are missing: restore them, or delete the record of the same "
                            "name to train the run again.")  # fmt: skip
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KureError(f"The weights {path} cannot be read ({error.strerror}): give access to them.") from None
        if hashlib.sha256(content).hexdigest() != self.weights_sha256:
            raise KureError(f"The weights {path} are damaged (their SHA-256 is not the record's): restore them, "
                            "or delete the record of the same name to train the run again.")  # fmt: skip
        return content

    def unpacked(self, content: bytes) -> dict[str, torch.Tensor]:
        """The weights in float32; `KureError` if `content` is no safetensors file."""
        try:
            kept = safetensors.torch.load(content)
            return {name: v.float() if v.dtype == torch.float16 else v for name, v in kept.items()}
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            path = weights_path(self.config)
            raise KureError(f"The weights {path} are no safetensors file ({in_words(error)}): delete them and the "
                            "record of the same name to train the run again.") from None  # fmt: skip

    def network(self, folded: bool = False, equalized: bool = False) -> nn.Module:
        """The trained network in evaluation mode, with `folded` batch norms and then `equalized` ranges if asked.

        The same object every time.
        """
        return _network(self, folded, equalized)

    def check_data(self) -> None:
        """Raise `KureError` if the data that are here are not those that the record names; old records name none."""
        here = data.identity(self.config.data)
        made = {name: self.provenance.get(name) for name in here}
        if made != here and any(made.values()):
            raise KureError(f"The record {record_path(self.config)} was made on {_said(made)}, and here is "
                            f"{_said(here)}: bring back those data, or delete the record to train the run again."
                            )  # fmt: skip

    def __eq__(self, other: object) -> bool:  # field by field would compare weights that were read
        return isinstance(other, Record) and (self.key, self.weights_sha256) == (other.key, other.weights_sha256)

    def __hash__(self) -> int:
        return hash(self.weights_sha256)


@lru_cache(maxsize=8)
def _network(record: Record, folded: bool, equalized: bool) -> nn.Module:
    if equalized:
        return equalization.equalized(record.network(folded))
    if folded:
        return fold(record.network())
    weights = record.weights
    heads = (len(weight) for weight in weights.values() if weight.dim() == 2)  # one, where the record is an older one
    classes = record.provenance.get("classes") or next(heads)
    model = models.build(record.config.model, data.SOURCES[record.config.data].channels, classes)
    models.load_weights(model, weights, f"of {record.config.label}")
    return model.to(device.device()).eval()


def find(config: RunConfig) -> Record | None:
    """The record of a configuration, or None; `KureError` names the file if it is damaged."""
    path = record_path(config)
    try:
        content = path.read_bytes()
        record = Record.model_validate_json(content)
        if record.digest not in (None, _digest(json.loads(content))):
            raise ValueError("its digest is not that of its content")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KureError) as error:
        raise KureError(f"The record {path} is damaged ({in_words(error)}): restore it, or delete it to train "
                        "the run again.") from error  # fmt: skip
    if record.config != config or record.key != config.key:
        raise KureError(f"The record {path} is not the one its name says: restore it, or delete it to train the "
                        "run again.")  # fmt: skip
    return record


def forget(config: RunConfig) -> None:
    """Delete the record, the weights and the checkpoint of a run."""
    for path in (record_path(config), weights_path(config), checkpoint_path(config)):
        path.unlink(missing_ok=True)


def run_name(config: RunConfig) -> str:
    """What the files of a run are called; a label alone may stand for runs that start from different ones."""
    return f"{config.label}-{config.key}"


def record_path(config: RunConfig) -> Path:
    return results() / "records" / f"{run_name(config)}.json"


def weights_path(config: RunConfig) -> Path:
    """Where the weights lie: in `weights/` if they are committed, else in `weights/local/`, which git ignores."""
    committed = results() / "weights" / f"{run_name(config)}.safetensors"
    return committed if committed.is_file() else committed.parent / "local" / committed.name


def checkpoint_path(config: RunConfig) -> Path:
    return results() / "checkpoints" / f"{run_name(config)}.pt"


def write(record: Record) -> None:
    """One field a line, evaluations and layers one item a line, and the digest last."""
    lines, content = [], record.model_dump(mode="json", by_alias=True)
    for name, value in (content | {"digest": _digest(content)}).items():
        if name == "evaluations":
            items = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in sorted(value.items()))
            text = "{\n" + ",\n".join(items) + "\n}"
        elif name == "layers":
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(name)}: {text}")
    write_atomically(record_path(record.config), "{\n" + ",\n".join(lines) + "\n}\n")


def _digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a record without its digest, as JSON with sorted names and no spaces."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def locked(config: RunConfig, wait: float | None = None) -> Iterator[None]:
    """Within the block no other process works on the run: one that does is waited for, and the user is told.

    Raises `KureError` after `wait` seconds; None: never.
    """
    path = results() / "checkpoints" / f"{run_name(config)}.lock"
    make_folder(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        held = f"Another process is working on {config.label} (it holds {path})"
        try:
            with progress.waiting(config.label, f"{held}: waiting until it is done."):
                lock.acquire(timeout=-1 if wait is None else wait)
        except Timeout:
            raise KureError(f"{held}: wait until it is done, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def _said(identity: dict[str, Any]) -> str:
    """The data that a record names, in words."""
    train, test = (str(identity[name])[:12] for name in ("train_sha256", "test_sha256"))
    return f"{identity['data']} with {identity['classes']} classes (SHA-256 of training {train}, of test {test})"
