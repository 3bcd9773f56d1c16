"""A run is a record: trained once, found again ever after, together with every evaluation made of it.

`get` returns the record of a configuration, training it first if there is none; `evaluate` does the same
for one accuracy. A record is a JSON file that says what was trained, what came out and how; the weights
lie beside it. In check mode nothing is computed: what is missing is an error.
"""

import hashlib
import json
import platform
import subprocess
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision
from filelock import FileLock, Timeout
from pydantic import ValidationError
from torch import nn

from kure_lib import data, evaluation, models, ptq, training
from kure_lib.evaluation import Evaluation
from kure_lib.kurtosis import kurtosis
from kure_lib.paths import ROOT, KureError, checking, results, write_atomically
from kure_lib.ptq import QuantizationSpec
from kure_lib.quantizers import grid_named
from kure_lib.regularizers import regularized_layers
from kure_lib.training import Frozen, KureConfig, RunConfig

__all__ = ["Evaluation", "KureConfig", "QuantizationSpec", "Record", "RunConfig", "evaluate", "find", "get"]

BINS = 80


class LayerSummary(Frozen):
    """One layer after training; the histogram counts its weights in equal bins from `low` to `high`."""

    name: str
    shape: tuple[int, ...]
    regularized: bool
    quantized: bool
    kurtosis: float
    low: float
    high: float
    counts: tuple[int, ...]


class Record(Frozen):
    """A finished run."""

    key: str
    config: RunConfig
    curves: dict[str, list[float]]
    layer_kurtosis: dict[str, list[float]]
    layers: list[LayerSummary]
    weights_sha256: str
    provenance: dict[str, Any]
    evaluations: dict[str, Evaluation] = {}

    @property
    def mean_kurtosis(self) -> float:
        """The mean over the regularized layers, as in L_K."""
        return float(np.mean([layer.kurtosis for layer in self.layers if layer.regularized]))

    @property
    def seconds(self) -> float:
        return sum(self.curves.get("seconds", []))

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters and buffers; `KureError` if their file is missing or damaged."""
        path = _weights_path(self.config)
        if not path.is_file():
            raise KureError(f"The weights {path} are missing: restore them, or delete the record of the same "
                            "name to train the run again.")  # fmt: skip
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.weights_sha256:
            raise KureError(f"The weights {path} are damaged (their SHA-256 is not the record's): restore them, "
                            "or delete the record of the same name to train the run again.")  # fmt: skip
        return safetensors.torch.load(content)

    def network(self) -> nn.Module:
        """The trained network in evaluation mode; the same object every time."""
        return _network(self)

    def __eq__(self, other: object) -> bool:  # field by field would compare weights that were read
        return isinstance(other, Record) and (self.key, self.weights_sha256) == (other.key, other.weights_sha256)

    def __hash__(self) -> int:
        return hash(self.weights_sha256)


@lru_cache(maxsize=8)
def _network(record: Record) -> nn.Module:
    train = data.load(record.config.data, "train")
    model = models.build(record.config.model, train.channels, train.classes)
    model.load_state_dict(record.weights)
    return model.to(evaluation.device()).eval()


def find(config: RunConfig) -> Record | None:
    """The record of a configuration, or None; `KureError` names the file if it is damaged."""
    path = _record_path(config)
    try:
        record = Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        raise KureError(f"The record {path} is damaged ({_first_line(error)}): restore it, or delete it to train "
                        "the run again.") from error  # fmt: skip
    if record.config != config or record.key != config.key:
        raise KureError(f"The record {path} is not the one its name says: restore it, or delete it to train the "
                        "run again.")  # fmt: skip
    return record


def get(config: RunConfig, on_epoch=lambda epoch, values: None) -> Record:
    """The record of a configuration; where there is none the run is trained, after the one it starts from.

    An interrupted run goes on from its last finished epoch. Raises `KureError` if another process is
    training the same run, and in check mode if there is no record.
    """
    if record := find(config):
        return record
    if checking():
        raise KureError(f"There is no record of {config.label} ({_record_path(config)}): nothing is trained in "
                        "check mode; run the study without it first.")  # fmt: skip
    start = get(config.start, on_epoch).weights if config.start else None
    checkpoint = _checkpoint_path(config)
    with _locked(config):
        if record := find(config):  # finished by another process in the meantime
            return record
        model, trained = training.fit(config, start, checkpoint, on_epoch)
        content = safetensors.torch.save({name: v.contiguous() for name, v in model.state_dict().items()})
        write_atomically(_weights_path(config), content)
        record = Record(
            key=config.key, config=config, **trained.model_dump(), layers=_summaries(model),
            weights_sha256=hashlib.sha256(content).hexdigest(), provenance=_provenance(),
        )  # fmt: skip
        _write(record)
        checkpoint.unlink(missing_ok=True)
    return record


def evaluate(record: Record, spec: QuantizationSpec = QuantizationSpec()) -> Evaluation:
    """Top-1 accuracy in percent and loss on the test images, quantized as `spec` says; kept in the record.

    Raises `KureError` for a bad specification, and in check mode if the evaluation has not been made.
    """
    if spec.key in record.evaluations:
        return record.evaluations[spec.key]
    grid = grid_named(spec.grid)
    if checking():
        raise KureError(f"{_record_path(record.config)} does not hold the evaluation {spec.key}: nothing is "
                        "evaluated in check mode; run the notebook without it first.")  # fmt: skip
    split = data.load(record.config.data, "test").head(record.config.train_size)
    options = spec.model_dump(exclude={"grid"})
    with ptq.quantized(record.network(), grid=grid, **options) as model:
        result = evaluation.evaluate(model, split)
    with _locked(record.config, wait=60):
        kept = find(record.config)
        record.evaluations.update(kept.evaluations if kept else {})
        record.evaluations[spec.key] = result
        _write(record)
    return result


def forget(config: RunConfig) -> None:
    """Delete the record, the weights and the checkpoint of a run."""
    for path in (_record_path(config), _weights_path(config), _checkpoint_path(config)):
        path.unlink(missing_ok=True)


def _name(config: RunConfig) -> str:
    return f"{config.label}-{config.key}"


def _record_path(config: RunConfig) -> Path:
    return results() / "records" / f"{_name(config)}.json"


def _weights_path(config: RunConfig) -> Path:
    return results() / "weights" / f"{_name(config)}.safetensors"


def _checkpoint_path(config: RunConfig) -> Path:
    return results() / "checkpoints" / f"{_name(config)}.pt"


def _write(record: Record) -> None:
    """One field a line, evaluations and layers one item a line."""
    lines = []
    for name, value in record.model_dump(mode="json").items():
        if name == "evaluations":
            items = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in sorted(value.items()))
            text = "{\n" + ",\n".join(items) + "\n}"
        elif name == "layers":
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(name)}: {text}")
    write_atomically(_record_path(record.config), "{\n" + ",\n".join(lines) + "\n}\n")


@contextmanager
def _locked(config: RunConfig, wait: float = 0):
    path = results() / "checkpoints" / f"{_name(config)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=wait):
            yield
    except Timeout:
        raise KureError(f"Another process is working on {config.label} (it holds {path}): wait until it is done, "
                        "or stop it.") from None  # fmt: skip


def _summaries(model: nn.Module) -> list[LayerSummary]:
    regularized, quantized = regularized_layers(model), ptq.quantized_layers(model)
    summaries = []
    for name, layer in (regularized | quantized).items():
        weight = layer.weight.detach().cpu()
        low, high = weight.min().item(), weight.max().item()
        counts, _ = np.histogram(weight.numpy(), bins=BINS, range=(low, high))
        summaries.append(LayerSummary(
            name=name, shape=tuple(weight.shape), regularized=name in regularized, quantized=name in quantized,
            kurtosis=kurtosis(weight).item(), low=low, high=high, counts=tuple(counts.tolist()),
        ))  # fmt: skip
    return summaries


def _provenance() -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    place = evaluation.device()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "numpy": np.__version__, "machine": platform.machine(), "system": platform.system(),
        "device": torch.cuda.get_device_name() if place.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "precision": evaluation.precision(), "threads": 1, "commit": git.stdout.strip() or "unknown",
    }  # fmt: skip


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
