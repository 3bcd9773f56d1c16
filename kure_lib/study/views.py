"""The network of a record, quantized as a specification says."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

from torch import Tensor, nn

from kure_lib.networks import activations, device
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration, integers, lapq, transforms, view
from kure_lib.quantization.spec import TRAINED_RULES, QuantizationSpec
from kure_lib.study.records import Record
from kure_lib.tensors.steps import Scope
from kure_lib.training import qat


def quantized(record: Record, spec: QuantizationSpec) -> AbstractContextManager[nn.Module]:
    """The network of a record as a view, quantized with calibration images of its own training set.

    Raises `KureError` for a trained quantizer that the run was not trained with.
    """
    if spec.step_rule in TRAINED_RULES:
        return _as_trained(record, spec)
    if spec.rounding:
        return _from_master(record, spec)
    if spec.reconstruction:
        return _reconstructed(record, spec)
    steps = _steps(record, choosing(spec))
    return view.quantized(_network(record, spec), _as_kept(spec), _images(record, spec), steps=steps)


def _network(record: Record, spec: QuantizationSpec) -> nn.Module:
    """The network in full precision, folded, equalized and transformed if asked; it is kept."""
    if spec.transform:
        return _transformed(record, spec.transform, spec.calibration if spec.transform == "smoothed" else None)
    return record.network(spec.fold_batch_norm, spec.equalized)


@lru_cache(maxsize=4)
def _transformed(record: Record, kind: transforms.Transform, calibrated: int | None) -> nn.Module:
    images = calibration.images(record.config.data, calibrated)[0] if calibrated else None
    return transforms.transformed(record.network(), kind, images)


def _as_kept(spec: QuantizationSpec) -> QuantizationSpec:
    """What is left to do to the network that the record keeps."""
    return spec.model_copy(update={"fold_batch_norm": False, "equalized": False, "transform": None})


def choosing(spec: QuantizationSpec) -> QuantizationSpec:
    """What of a specification steps are chosen by, so that those which differ in other fields share them."""
    later = (
        "step_ratio", "activation_ratio", "power_of_two", "bias_correction", "reestimate_batch_norm", "reconstruction",
        "perturbation", "draw", "accumulator_bits",
    )  # fmt: skip
    used = spec.activation_bits or spec.step_rule == "lapq" or spec.transform == "smoothed"
    unused = () if used else ("calibration",)
    fields = QuantizationSpec.model_fields
    return spec.model_copy(update={name: fields[name].default for name in (*later, *unused)})


@lru_cache(maxsize=32)
def _steps(record: Record, spec: QuantizationSpec) -> dict[str, Tensor]:
    """The steps before any ratio."""
    network = _network(record, spec)
    if spec.step_rule == "lapq":
        return lapq.loss_aware_steps(network, *calibration.images(record.config.data, spec.calibration), spec)
    return view.chosen_steps(network, spec, _images(record, spec))


def _images(record: Record, spec: QuantizationSpec) -> Tensor | None:
    return calibration.images(record.config.data, spec.calibration)[0] if spec.calibration else None


@contextmanager
def _reconstructed(record: Record, spec: QuantizationSpec) -> Iterator[nn.Module]:
    """The network with its rounded weights, which views that differ in other fields share; they take a while."""
    alone = {"activation_bits": None, "reestimate_batch_norm": False, "activation_ratio": 1.0}
    weights = _rounded(record, spec.model_copy(update=alone))
    rest = quantized(record, spec.model_copy(update={"weight_bits": None, "reconstruction": None}))
    with view.served(_network(record, spec), weights), rest as network:
        yield network


@lru_cache(maxsize=2)
def _rounded(record: Record, spec: QuantizationSpec) -> dict[str, Tensor]:
    """The weights of every quantized layer, by name."""
    network, steps = _network(record, spec), _steps(record, choosing(spec))
    with view.quantized(network, _as_kept(spec), _images(record, spec), steps=steps) as rounded:
        return {name: layer.weight for name, layer in quantized_layers(rounded, spec.layers).items()}


@contextmanager
def _as_trained(record: Record, spec: QuantizationSpec) -> Iterator[nn.Module]:
    """The network with the quantizer of its training, with new batch-norm statistics if asked."""
    trained = record.config.quantization
    if trained is None or trained.quantizer != spec.step_rule:
        raise KureError(f"{record.config.label} was not trained with {spec.step_rule}: choose another step rule.")
    if spec.activation_bits not in (None, trained.activation_bits):
        raise KureError(
            f"{record.config.label} is evaluated at activation_bits {trained.activation_bits}, as it was trained, or "
            f"at none, not at {spec.activation_bits}."
        )
    model = record.network()
    sites = activations.quantized_sites(model, calibration.images(record.config.data, 1)[0])
    steps = qat.Steps.of(record.steps, device.device())
    as_trained = qat.quantized(model, trained, steps, sites, spec.bits, spec.step_ratio, spec.refit)
    with as_trained as network, _renewed(record, spec, network):
        yield network


@contextmanager
def _from_master(record: Record, spec: QuantizationSpec) -> Iterator[nn.Module]:
    """The network with weights made from an 8-bit copy, and with new batch-norm statistics if asked."""
    stored = {name: each.to(spec.weight_bits, spec.rounding) for name, each in _master(record, spec.scope).items()}
    network = record.network()
    with integers.served(network, stored), _renewed(record, spec, network):
        yield network


def _renewed(record: Record, spec: QuantizationSpec, network: nn.Module) -> AbstractContextManager:
    """The block in which the network has new batch-norm statistics, if asked."""
    if not spec.reestimate_batch_norm:
        return nullcontext()
    batches = calibration.parts(_images(record, spec))
    return calibration.reestimated_batch_norm(network, batches, spec.reestimate_batch_norm)


@lru_cache(maxsize=32)
def _master(record: Record, scope: Scope) -> dict[str, integers.Integers]:
    return integers.of(record.network(), scope)
