"""The library behind the notebooks of the KURE reproducibility study; every name is loaded when it is first used."""

from importlib import import_module
from typing import Any

_PLACES = {
    "kurtosis": "tensors.kurtosis",
    "KurtosisRegularizer": "training.regularizers",
    "quantize": "tensors.quantizers",
    "best_step": "tensors.steps",
    "quantized": "quantization.view",
    "check": "quantization.check",
    "QuantizationSpec": "quantization.spec",
    **dict.fromkeys(("MID_RISE", "MID_TREAD", "SIGNED_INT", "UNSIGNED"), "tensors.grids"),
    "theory": "tensors",
    **dict.fromkeys(("paper", "show", "statistics", "verdicts"), "findings"),
}

__all__ = [*_PLACES, "study"]


def __getattr__(name: str) -> Any:
    if name == "study":
        return import_module("kure_lib.study")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = import_module(f"kure_lib.{_PLACES[name]}")
    return getattr(place, name, None) or import_module(f"{place.__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
