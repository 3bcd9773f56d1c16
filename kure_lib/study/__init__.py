"""What a profile trains, the record of every run, and what is measured of it: the names that notebooks use."""

from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study.plans import Plan, Planned, needed, open, plan, trained_spec
from kure_lib.study.records import Record, find
from kure_lib.study.runs import evaluate, get
from kure_lib.tensors.grids import FULL, Bits
from kure_lib.training.configs import RunConfig

__all__ = [
    "FULL", "Bits", "Plan", "Planned", "QuantizationSpec", "Record", "RunConfig", "evaluate", "find", "get", "needed",
    "open", "plan", "trained_spec",
]  # fmt: skip
