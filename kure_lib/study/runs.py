"""A run is a record: trained once, found again ever after, together with every evaluation made of it.

`get` returns the record of a configuration, training it first if there is none; `evaluate` does the same
for one accuracy. A record is a JSON file that says what was trained, what came out and how; the weights
lie beside it. In check mode nothing is computed: what is missing is an error.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from kure_lib.files import write_atomically
from kure_lib.networks import activations, data, device, evaluation
from kure_lib.networks.evaluation import Evaluation
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError, checking
from kure_lib.quantization import calibration, lapq
from kure_lib.quantization import integers as master
from kure_lib.quantization import view as ptq
from kure_lib.quantization.view import QuantizationSpec
from kure_lib.study.records import (
    LayerSummary,
    Record,
    checkpoint_path,
    find,
    forget,
    locked,
    record_path,
    weights_path,
    write,
)  # fmt: skip
from kure_lib.tensors.grids import SIGNED_INT, grid_named
from kure_lib.tensors.kurtosis import kurtosis
from kure_lib.training import loop as training
from kure_lib.training import qat
from kure_lib.training.configs import KureConfig, RunConfig
from kure_lib.training.regularizers import regularized_layers

__all__ = [
    "Evaluation", "KureConfig", "QuantizationSpec", "Record", "RunConfig", "evaluate", "find", "forget", "get",
]  # fmt: skip

BINS = 80  # of a layer's histogram
EVALUATION_WAIT = 600  # seconds for which an evaluation waits for one of the same network in another process


def _view(record: Record, spec: QuantizationSpec) -> AbstractContextManager[nn.Module]:
    """The network of a record, quantized as a specification says."""
    if spec.method in ptq.TRAINED_METHODS:
        return _trained_view(record, spec)
    if spec.master:
        return _master_view(record, spec)
    options = spec.model_dump(exclude={"fold_batch_norm", "calibration", "master"}) | {"grid": grid_named(spec.grid)}
    if spec.calibration:
        options["images"], _ = calibration.images(record.config.data, spec.calibration)
    if spec.method == "lapq":
        if spec.per_channel or spec.block:
            raise KureError("LAPQ chooses one step a tensor: leave per_channel and block out, or take another method.")
        options["method"] = "mse"
        options["steps"] = _lapq(
            record, spec.weight_bits, spec.activation_bits, spec.grid, spec.calibration, spec.fold_batch_norm)
        return ptq.quantized(record.network(spec.fold_batch_norm), **options)
    options["steps"] = {}
    if spec.weight_bits:
        options["steps"] |= _weight_steps(
            record, spec.weight_bits, spec.method, spec.grid, spec.per_channel, spec.block, spec.fold_batch_norm)
    if spec.activation_bits:
        options["steps"] |= _activation_steps(
            record, spec.activation_bits, spec.method, spec.calibration, spec.fold_batch_norm)  # fmt: skip
    return ptq.quantized(record.network(spec.fold_batch_norm), **options)


# Steps before any ratio, so that a sweep of ratios chooses them once.


@lru_cache(maxsize=32)
def _weight_steps(
    record: Record, bits: int, method: str, grid: str, per_channel: bool, block: int | None, folded: bool
) -> dict[str, Tensor]:
    layers = quantized_layers(record.network(folded))
    return ptq.weight_steps(layers, bits, grid_named(grid), method, per_channel, block)


@lru_cache(maxsize=32)
def _activation_steps(record: Record, bits: int, method: str, size: int, folded: bool) -> dict[str, Tensor]:
    images, _ = calibration.images(record.config.data, size)
    return calibration.activation_steps(calibration.observe(record.network(folded), images), bits, method)


def _trained_view(record: Record, spec: QuantizationSpec) -> AbstractContextManager[nn.Module]:
    """The network with the quantizer it was trained with, at the bit-widths and the weight step ratio of `spec`."""
    trained = record.config.quantization
    if trained is None or trained.method != spec.method:
        raise KureError(f"{record.config.label} was not trained with {spec.method}: choose another method.")
    asked = {"method": spec.method, "weight_bits": spec.weight_bits, "step_ratio": spec.step_ratio,
             "activation_bits": spec.activation_bits}  # fmt: skip
    if spec != QuantizationSpec(**asked) or spec.activation_bits not in (None, trained.activation_bits):
        raise KureError(f"A network trained with {spec.method} is evaluated at any weight_bits and step_ratio, and at "
                        f"activation_bits {trained.activation_bits} or none: leave other options out.")  # fmt: skip
    model = record.network()
    image = next(data.load(record.config.data, "train").head(1).batches(1))[0].to(device.device())
    sites = activations.quantized_sites(model, image)
    del asked["method"]
    return qat.quantized(model, trained, qat.Steps.of(record.steps), sites, **asked)


@contextmanager
def _master_view(record: Record, spec: QuantizationSpec) -> Iterator[nn.Module]:
    """The network with weights made from an 8-bit copy, and with new batch-norm statistics if asked."""
    asked = {"weight_bits": spec.weight_bits, "grid": SIGNED_INT.name, "master": spec.master,
             "per_channel": spec.per_channel, "reestimate_batch_norm": spec.reestimate_batch_norm,
             "calibration": spec.calibration}  # fmt: skip
    if spec.weight_bits is None or spec != QuantizationSpec(**asked):
        raise KureError("Weights made from an 8-bit copy are evaluated at weight_bits up to 8 on the signed_int grid, "
                        "per_channel or not, with reestimate_batch_norm or not: leave other options out.")  # fmt: skip
    network = record.network()
    stored = _from_master(record, spec.weight_bits, spec.master, spec.per_channel)
    with ExitStack() as stack:
        stack.enter_context(master.served(network, stored))
        if spec.reestimate_batch_norm:
            images, _ = calibration.images(record.config.data, spec.calibration)
            stack.enter_context(calibration.reestimated_batch_norm(network, images.split(ptq.BATCH)))
        yield network


@lru_cache(maxsize=32)
def _master(record: Record, per_channel: bool) -> dict[str, master.Integers]:
    return master.of(record.network(), per_channel)


@lru_cache(maxsize=64)
def _from_master(record: Record, bits: int, method: str, per_channel: bool) -> dict[str, master.Integers]:
    return {name: each.to(bits, method) for name, each in _master(record, per_channel).items()}


@lru_cache(maxsize=8)
def _lapq(record: Record, weight_bits: int | None, activation_bits: int | None, grid: str, size: int, folded: bool):
    images, labels = calibration.images(record.config.data, size)
    return lapq.loss_aware_steps(
        record.network(folded), images, labels, weight_bits, activation_bits, grid_named(grid))  # fmt: skip


def get(config: RunConfig, on_epoch=lambda epoch, values: None) -> Record:
    """The record of a configuration; where there is none the run is trained, after the one it starts from.

    An interrupted run goes on from its last finished epoch. Raises `KureError` if another process is
    training the same run, and in check mode if there is no record.
    """
    if record := find(config):
        return record
    if checking():
        raise KureError(f"There is no record of {config.label} ({record_path(config)}): nothing is trained in "
                        "check mode; run the study without it first.")  # fmt: skip
    start = get(config.start, on_epoch).weights if config.start else None
    checkpoint = checkpoint_path(config)
    with locked(config):
        if record := find(config):  # finished by another process in the meantime
            return record
        model, trained = training.fit(config, start, checkpoint, on_epoch)
        content = safetensors.torch.save({name: v.contiguous() for name, v in model.state_dict().items()})
        write_atomically(weights_path(config), content)
        record = Record(
            key=config.key, config=config, **trained.model_dump(), layers=_summaries(model),
            weights_sha256=hashlib.sha256(content).hexdigest(), provenance=device.provenance(),
        )  # fmt: skip
        write(record)
        checkpoint.unlink(missing_ok=True)
    return record


def evaluate(record: Record, spec: QuantizationSpec = QuantizationSpec()) -> Evaluation:
    """Top-1 accuracy in percent and loss on the test images, quantized as `spec` says; kept in the record.

    Raises `KureError` for a bad specification, and in check mode if the evaluation has not been made.
    """
    if spec.key in record.evaluations:
        return record.evaluations[spec.key]
    grid_named(spec.grid)
    if checking():
        raise KureError(f"{record_path(record.config)} does not hold the evaluation {spec.key}: nothing is "
                        "evaluated in check mode; run the notebook without it first.")  # fmt: skip
    with locked(record.config, wait=EVALUATION_WAIT):  # another notebook may be making the same one
        kept = find(record.config)
        record.evaluations.update(kept.evaluations if kept else {})
        if spec.key not in record.evaluations:
            _, split = training.splits(record.config)
            with _view(record, spec) as model:
                record.evaluations[spec.key] = evaluation.evaluate(model, split)
            write(record)
    return record.evaluations[spec.key]


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
