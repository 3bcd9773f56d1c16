"""What a profile trains, the record of every run, and what is measured of it: the names that notebooks use."""

from kure_lib.study import runs
from kure_lib.study.plans import ARMS, FULL, Plan, Planned, needed, open, plan, trained_spec

__all__ = ["ARMS", "FULL", "Plan", "Planned", "needed", "open", "plan", "runs", "trained_spec"]
