"""The library behind the notebooks of the KURE reproducibility study; a name is loaded when it is first used."""

from importlib import import_module

_HOMES = {
    "kurtosis": "tensors.kurtosis", "KurtosisRegularizer": "training.regularizers",
    "MID_RISE": "tensors.grids", "MID_TREAD": "tensors.grids", "SIGNED_INT": "tensors.grids",
    "UNSIGNED": "tensors.grids", "quantize": "tensors.quantizers", "best_step": "tensors.steps",
    "quantized": "quantization.view", "QuantizationSpec": "quantization.view",
}  # fmt: skip
_MODULES = {"theory": "tensors.theory", "paper": "findings.paper", "show": "findings.show",
            "verdicts": "findings.verdicts", "study": "study"}  # fmt: skip

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"kure_lib.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"kure_lib.{_MODULES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
