"""Means over seeds with their intervals, and the gain of KURE paired by seed."""

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy.stats import t as student_t

from kure_lib.findings.show import NAME
from kure_lib.paths import KureError


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """The mean and the half-width of its Student-t confidence interval; nan for a single value.

    Raises `KureError` if there are no values.

    >>> mean, half_width = mean_interval([91.0, 92.0, 93.0])
    >>> f"{mean:.1f} ± {half_width:.2f}"
    '92.0 ± 2.48'
    """
    values = [float(value) for value in values]
    if not values:
        raise KureError("No values to average: check which runs were selected.")
    if len(values) == 1:
        return values[0], math.nan
    half_width = student_t.ppf((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half_width)


def paired_interval(a: Iterable[float], b: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of the differences a − b of runs paired by seed.

    Raises `KureError` if the two do not pair.

    >>> paired_interval([92.0, 93.0], [91.0, 92.0])
    (1.0, 0.0)
    """
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise KureError(f"Cannot pair {len(a)} values with {len(b)}: give one a seed, in the same order.")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)])


def format_interval(values: Iterable[float], digits: int = 1, sign: bool = False) -> str:
    """A mean with its 95 % interval; one value alone is only indicative. `sign` shows the plus of a gain.

    >>> format_interval([91.0, 92.0, 93.0]), format_interval([0.25], digits=2, sign=True)
    ('92.0 ± 2.5', '+0.25 (indicative)')
    """
    mean, half_width = mean_interval(values)
    shown = f"{mean:{'+' if sign else ''}.{digits}f}"
    return f"{shown} (indicative)" if math.isnan(half_width) else f"{shown} ± {half_width:.{digits}f}"


def pivot(
    frame: pd.DataFrame, rows: list[str], columns: str, value: str = "top1", digits: int = 1, sign: bool = False
) -> pd.DataFrame:
    """A tidy frame as a table of means with intervals over what is neither in `rows` nor in `columns`.

    Rows and columns keep the order in which they first appear; networks and arms get the names readers see.
    """
    groups = frame.groupby([*rows, columns], sort=False, dropna=False)[value]
    cells = groups.agg(lambda values: format_interval(values, digits, sign)).unstack(columns, sort=False)
    return cells.rename(index=NAME, columns=NAME).rename_axis(index={"model": "network"})


def gain(frame: pd.DataFrame, keys: list[str], value: str = "top1") -> pd.DataFrame:
    """KURE minus its control, paired by seed: one row for each combination of `keys` and seed, column `gain`.

    >>> gain(pd.DataFrame(columns=["w_bits", "arm", "seed", "top1"]), ["w_bits"]).empty  # a part that a profile lacks
    True
    """
    wide = frame.pivot_table(index=[*keys, "seed"], columns="arm", values=value, sort=False)
    wide = wide.reindex(columns=["control", "kure"])  # of no rows there are no arms either
    return (wide["kure"] - wide["control"]).rename("gain").reset_index()


def effects(frame: pd.DataFrame, by: list[str], value: str = "gain") -> pd.DataFrame:
    """A tidy frame as the effects that `verdicts.judge` decides: columns `setting`, `seed` (if it has one), `effect`.

    A setting is named by the columns `by`; networks and arms get the names readers see, bits a w or an a before them.

    >>> effects(pd.DataFrame({"model": ["resnet20"], "w_bits": [3], "seed": [0], "gain": [1.5]}), ["model", "w_bits"])
             setting  seed  effect
    0  ResNet-20, w3     0     1.5
    """

    def word(column: str, value: Any) -> str:
        shown = value if isinstance(value, str) else f"{value:g}"
        return f"{column[0]}{shown}" if column in ("w_bits", "a_bits") else NAME.get(shown, shown)

    setting = [", ".join(map(word, by, row)) for row in frame[by].itertuples(index=False)]
    found = frame.assign(setting=setting).rename(columns={value: "effect"}).reset_index(drop=True)
    return found[[name for name in ("setting", "seed", "effect") if name in found]]
