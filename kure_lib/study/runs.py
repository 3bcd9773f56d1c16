"""A run is a record: trained once, found again ever after, together with every evaluation made of it.

`get` returns the record of a configuration and trains the run first if there is none; `evaluate` does the same for one
accuracy. A record is a JSON file that says what was trained, what came out and how; the weights lie beside it. In check
mode nothing is computed, and what is missing is an error.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from kure_lib.files import write_atomically
from kure_lib.networks import data, device, evaluation
from kure_lib.networks.evaluation import Evaluation
from kure_lib.networks.layers import quantized_layers, regularized_layers
from kure_lib.paths import KureError, checking, in_words
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import views
from kure_lib.study.records import (
    LayerSummary,
    Record,
    checkpoint_path,
    find,
    locked,
    record_path,
    weights_path,
    write,
)  # fmt: skip
from kure_lib.tensors.kurtosis import kurtosis
from kure_lib.training import loop
from kure_lib.training.configs import RunConfig

BINS = 80  # of a layer's histogram
EVALUATION_WAIT = 600  # seconds for which an evaluation waits for one of the same network in another process
FULL_PRECISION = QuantizationSpec()

Missing = dict[RunConfig, dict[str, QuantizationSpec]]  # evaluations that are not on record, of each run by their keys
_asked: Missing | None = None  # what is noted within `asking`


def get(config: RunConfig, on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, values: None) -> Record:
    """The record of a configuration; where there is none the run is trained, after the one it starts from.

    An interrupted run goes on from its last finished epoch, and one that another process is training is waited for.
    Raises `KureError` in check mode if there is no record.
    """
    if _asked is not None:
        return _as_asked(config)
    if record := find(config):
        return record
    if checking():
        raise KureError(
            f"There is no record of {config.label} ({record_path(config)}): nothing is trained in check mode; run the "
            "study without it first."
        )
    start = None
    if config.start:
        first = get(config.start, on_epoch)
        first.check_data()
        start = first.weights
    with locked(config):
        if record := find(config):  # finished by another process in the meantime
            return record
        record, weights = _trained(config, start, checkpoint_path(config), on_epoch)
        keep(record, weights)
    return record


def _trained(
    config: RunConfig, start: dict[str, Tensor] | None, checkpoint: Path, on_epoch: Callable
) -> tuple[Record, bytes]:
    model, trained = loop.fit(config, start, checkpoint, on_epoch)
    state = {name: v.contiguous() for name, v in model.state_dict().items()}
    if config.kept == "float16":
        state = {name: v.half() if v.dim() > 1 else v for name, v in state.items()}
        model.load_state_dict(state)  # what is kept is what the record describes
    content = safetensors.torch.save(state)
    record = Record(
        key=config.key, config=config, **trained.model_dump(), layers=_summaries(model),
        weights_sha256=hashlib.sha256(content).hexdigest(),
        provenance=device.provenance() | data.identity(config.data),
    )  # fmt: skip
    return record, content


def keep(record: Record, weights: bytes) -> None:
    """Write a finished run, the weights first, and delete its checkpoint."""
    write_atomically(weights_path(record.config), weights)
    write(record)
    checkpoint_path(record.config).unlink(missing_ok=True)


def inputs(config: RunConfig) -> tuple[bytes | None, bytes | None]:
    """What `elsewhere` begins with: the weights of the run that this one starts from, and its own checkpoint, if any.

    A damaged checkpoint is named on stderr and left aside. Raises `KureError` if the first run is damaged or missing.
    """
    start, saved, checkpoint = None, None, checkpoint_path(config)
    if config.start:
        first = get(config.start)
        first.check_data()
        start = safetensors.torch.save(first.weights)
    if loop.read_checkpoint(checkpoint, config):
        saved = checkpoint.read_bytes()
    return start, saved


def elsewhere(
    config: RunConfig,
    checkpoint: Path,
    report: Callable[[int, dict[str, float], bytes], None],
    start: bytes | None,
    saved: bytes | None,
) -> tuple[Record, bytes]:
    """Train a run in another process, perhaps of another machine, which writes no results.

    Args:
        config: The run.
        checkpoint: Where the first process keeps the checkpoint, for what is said of it.
        report: Called after every epoch with the number of finished ones, the values of the last, and the checkpoint.
        start: The weights it starts from, as a safetensors file holds them.
        saved: The checkpoint it goes on from.

    Returns:
        The record, and the weights as `keep` takes them.
    """
    with tempfile.TemporaryDirectory(prefix="kure-") as folder:
        here = Path(folder) / checkpoint.name
        if saved:
            here.write_bytes(saved)
        weights = safetensors.torch.load(start) if start else None
        try:
            return _trained(config, weights, here, lambda epoch, values: report(epoch, values, here.read_bytes()))
        except KureError as error:
            raise KureError(str(error).replace(str(here), str(checkpoint))) from error


def evaluate(record: Record, spec: QuantizationSpec = FULL_PRECISION) -> Evaluation:
    """Top-1 accuracy in percent and loss in nats on the test images, quantized as `spec` says; kept in the record.

    Raises `KureError` for a quantizer that the run was not trained with, where the data are not those it was made on,
    for a loss that is not finite, and in check mode for what was not evaluated.
    """
    if spec.key in record.evaluations:
        return record.evaluations[spec.key]
    if _asked is not None:
        _asked.setdefault(record.config, {})[spec.key] = spec
        return Evaluation(math.nan, math.nan)
    if checking():
        raise KureError(
            f"{record_path(record.config)} does not hold the evaluation {spec.key}: nothing is evaluated in check "
            "mode; run the notebook without it first."
        )
    with locked(record.config, wait=EVALUATION_WAIT):  # another notebook may be making the same one
        kept = find(record.config)
        record.evaluations.update(kept.evaluations if kept else {})
        if spec.key not in record.evaluations:
            record.evaluations[spec.key] = _evaluation(record, spec)
            write(record)
    return record.evaluations[spec.key]


def _evaluation(record: Record, spec: QuantizationSpec) -> Evaluation:
    """On one thread, as a run is trained, so that it does not depend on the number of cores."""
    record.check_data()
    _, split = loop.splits(record.config)
    with device.single_thread(), views.quantized(record, spec) as model:
        result = evaluation.evaluate(model, split)
    if not math.isfinite(result.loss):
        raise KureError(f"The loss of {record.config.label} under {spec.key} is {result.loss}, so it is not "
                        "kept: its steps are too large or too small; take ratios nearer to 1.")  # fmt: skip
    return result


def to_evaluate(config: RunConfig) -> tuple[bytes, bytes]:
    """What `evaluate_elsewhere` takes last: the record of a run without its evaluations, and its weights."""
    record = get(config)
    return record.model_dump_json(by_alias=True, exclude={"evaluations", "digest"}).encode(), record.packed()


def evaluate_elsewhere(
    specs: Iterable[QuantizationSpec], report: Callable[[int], None], content: bytes, weights: bytes
) -> tuple[RunConfig, dict[str, Evaluation], list[str]]:
    """Evaluate a run in another process, perhaps of another machine, which writes no results.

    `report` is called after each evaluation with the number of them. Returns the run and its evaluations, as `add`
    takes them, and what went wrong with the others.
    """
    made: dict[str, Evaluation] = {}
    failed: list[str] = []
    record = Record.model_validate_json(content)
    vars(record)["weights"] = record.unpacked(weights)  # else they would be read from their file
    for number, spec in enumerate(specs, start=1):
        try:
            made[spec.key] = _evaluation(record, spec)
        except Exception as error:  # of any class: it spares the others
            failed.append(f"{record.config.label} under {spec.key}: {in_words(error)}.")
        report(number)
    return record.config, made, failed


def add(config: RunConfig, evaluations: Mapping[str, Evaluation]) -> None:
    """Keep evaluations in the record of a run, beside those that other processes have added meanwhile."""
    with locked(config, wait=EVALUATION_WAIT):
        if record := find(config):
            record.evaluations.update(evaluations)
            write(record)


@contextmanager
def asking() -> Iterator[Missing]:
    """Within the block nothing is trained or evaluated: what is not on record is noted in what is yielded, and is NaN.

    A run without a record has an empty one. In a block within a block, what is noted is that of the inner one.
    """
    global _asked
    outer, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = outer
        _as_asked.cache_clear()


@cache
def _as_asked(config: RunConfig) -> Record:
    return find(config) or Record(
        key=config.key, config=config, curves={}, layer_kurtosis={}, layers=[], weights_sha256="", provenance={}
    )


def _summaries(model: nn.Module) -> list[LayerSummary]:
    regularized, quantized = regularized_layers(model), quantized_layers(model)
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
