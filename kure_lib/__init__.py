"""The library behind the notebooks of the KURE reproducibility study."""

from kure_lib.kurtosis import kurtosis
from kure_lib.quantizers import MID_RISE, MID_TREAD, SIGNED_INT, UNSIGNED, quantize
from kure_lib.regularizers import KurtosisRegularizer
from kure_lib.steps import best_step

__all__ = [
    "MID_RISE", "MID_TREAD", "SIGNED_INT", "UNSIGNED", "KurtosisRegularizer", "best_step", "kurtosis", "quantize",
]
