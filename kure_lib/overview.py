"""What a profile comes to before anything is done: its runs, what is on record of them, and how long the rest takes."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, NamedTuple

import pandas as pd
from tabulate import tabulate

from kure_lib import driver, notebooks, paths
from kure_lib.networks import device
from kure_lib.networks.data import SOURCES
from kure_lib.paths import KureError
from kure_lib.study import plans, records
from kure_lib.study.plans import Plan, Planned
from kure_lib.study.profiles import ONLY_TRAINED
from kure_lib.study.records import Record
from kure_lib.training.configs import RunConfig

COMMITTED = paths.ROOT / "results" / "study" / "records"  # tell how long an epoch takes
WIDTH = 100  # columns of a terminal, at most


class Time(NamedTuple):
    """What training a run takes, and the device of the records that tell; NaN, or 0 of no epochs, and "" if none."""

    seconds: float
    device: str


def describe(profile: str, only: Iterable[str] | None = None) -> str:
    """What the profile, or what these notebooks of it, would train and execute: two tables and what they come to.

    A row of the first is a part of the plan in one network: its runs, how many are on record, the epochs of all, the
    evaluations on record, the weights on disk, and the estimated time of training all, one after another. Raises
    `KureError` for an unknown profile or notebook.
    """
    stems = notebooks.select(only)
    planned = plans.needed(plans.open(profile), stems)
    found = {run.config: records.find(run.config) for run in planned.runs}
    missing = [config for config, record in found.items() if not record]
    times = estimates(found)
    lines = [
        f"Time: one run after another, estimated for {', '.join(models)} from records made on {place}."
        for place, models in _tell(times).items()
    ]
    lines.append(f"{len(found) - len(missing)} of {len(found)} runs are on record.")
    lines += [f"Training the others takes {duration(missing)}."] if missing else []
    if profile in ONLY_TRAINED:
        lines.append("No notebook reads this profile yet.")
    elif missing_evaluations := sum(map(len, driver.asked(stems, profile).values())):
        lines.append(f"Evaluations to make for the notebooks: {missing_evaluations}.")
    blocks = [_runs(planned, found, times)] if planned.runs else []
    blocks.append("\n".join(fill(line, WIDTH, break_on_hyphens=False) for line in lines))
    blocks += [] if profile in ONLY_TRAINED else [_books(planned, stems)]
    return "\n\n".join(blocks)


def _runs(planned: Plan, found: Mapping[RunConfig, Record | None], times: Mapping[RunConfig, Time]) -> str:
    """A row for each part of the plan in a network, the networks one after another, and a row for all."""
    held, weights = "evaluations\non record", "weights\nin MB"
    columns = ["network", "part", "arms", "runs", "on\nrecord", "epochs", held, weights, "time"]
    rows = [
        (run.model, run.part, run.arm, 1, bool(record), run.config.epochs, len(record.evaluations) if record else 0,
         _size(records.weights_path(run.config)), times[run.config].seconds)
        for run in sorted(planned.runs, key=lambda run: planned.networks.index(run.model))
        for record in [found[run.config]]
    ]  # fmt: skip
    each = pd.DataFrame(rows, columns=columns)
    sums: dict[str, Any] = {"arms": _arms} | dict.fromkeys(columns[3:-1], "sum") | {"time": lambda t: sum(t)}
    parts = [each, each.assign(network="all", part="", arms="")]
    table = pd.concat([part.groupby(columns[:2], sort=False).agg(sums) for part in parts]).reset_index()
    words = {weights: lambda size: f"{size / 1e6:.1f}", "time": _in_words}
    return _plain(table.assign(**{name: table[name].map(said) for name, said in words.items()}), text=3)


def _books(planned: Plan, stems: Iterable[str]) -> str:
    """A row for each notebook: how many runs it reads, and of which parts."""
    runs = {stem: plans.needed(planned, [stem]).runs for stem in stems}
    every = plans.plan(planned.profile).runs
    rows = [(stem, _parts(read, every), len(read)) for stem, read in runs.items()]
    return _plain(pd.DataFrame(rows, columns=["notebook", "reads the parts", "runs"]), text=2)


def _parts(read: Iterable[Planned], every: Iterable[Planned]) -> str:
    """The parts that some runs belong to, or all but those that they do not, whichever is said in fewer letters."""
    named, known = (dict.fromkeys(run.part for run in runs) for runs in (read, every))
    others = [part for part in known if part not in named]
    return min(", ".join(named), f"all but {', '.join(others)}" if others else "all", key=len)


def _plain(table: pd.DataFrame, text: int) -> str:
    """A table of text in its first columns and of numbers in the others."""
    sides = ["left"] * text + ["right"] * (table.shape[1] - text)
    return tabulate([[*table], *table.to_numpy()], tablefmt="plain", colalign=sides, disable_numparse=True)


def _tell(times: Mapping[RunConfig, Time]) -> dict[str, list[str]]:
    """The networks whose time is known from records, by the device these were made on."""
    found: dict[str, list[str]] = {}
    for config, (_, place) in times.items():
        if place and config.model not in found.setdefault(place, []):
            found[place].append(config.model)
    return found


def _arms(arms: pd.Series) -> str:
    """The arms by name, or how many there are."""
    names = list(dict.fromkeys(arms))
    return ", ".join(names) if len(names) < 3 else f"{len(names)} arms"


def _size(path: Path) -> int:
    """In bytes; 0 for a file that is not there."""
    return path.stat().st_size if path.is_file() else 0


def _in_words(seconds: float) -> str:
    if math.isnan(seconds):
        return "unknown"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def duration(missing: Iterable[RunConfig]) -> str:
    """The estimated time of training, several at once, in words."""
    times, here = estimates(missing), device.provenance()["device"]
    if unknown := {f"{run.model} on {run.data}" for run, time in times.items() if math.isnan(time.seconds)}:
        return f"an unknown time: no record of {', '.join(sorted(unknown))} says how long an epoch takes"
    seconds, at_once = sum(time.seconds for time in times.values()), device.workers()
    words = f"about {_in_words(seconds / at_once)} with {at_once} at a time"
    if elsewhere := {time.device for time in times.values()} - {here, ""}:
        return f"{words}, if {here} is as fast as {' and '.join(sorted(elsewhere))}, on which the records were made"
    return words


def estimates(configs: Iterable[RunConfig]) -> dict[RunConfig, Time]:
    """The time of every run as epochs of the committed records tell, of the same kind or else of the same network.

    Records made on this machine's device come first, then those of the device with most of them.
    """
    on_record, here, precision = _seconds_per_image(), device.provenance()["device"], device.precision()
    places = sorted(on_record, key=lambda place: (place != here, -sum(map(len, on_record[place].values()))))

    def time(config: RunConfig) -> Time:
        for place in places:
            for kind in (_kind(config, precision), (config.model, config.data)):
                if known := on_record[place].get(kind):
                    return Time(config.epochs * _images(config) * median(known), place)
        return Time(math.nan if config.epochs else 0.0, "")

    return {config: time(config) for config in configs}


def _seconds_per_image() -> Mapping[str, Mapping[tuple, list[float]]]:
    """What an image took in every epoch of the committed records, by device, then by kind of run and by network.

    A record that cannot be read tells nothing: the tests name it, and an estimate does without it.
    """
    found: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in COMMITTED.glob("*.json"):
        with suppress(OSError, ValueError, KureError):
            record = records.Record.model_validate_json(path.read_bytes())
            config, place = record.config, str(record.provenance.get("device", "an unknown device"))
            for kind in (_kind(config, record.provenance.get("precision")), (config.model, config.data)):
                found[place][kind] += [seconds / _images(config) for seconds in record.curves.get("seconds", [])]
    return found


def _kind(config: RunConfig, precision: str) -> tuple[Any, ...]:
    """What an epoch's time depends on, beside the number of images."""
    kure, qat, rival = config.regularizer, config.quantization, config.rival
    method = kure and kure.of, qat and qat.quantizer, rival and rival.name
    return config.model, config.data, precision, config.replicas, *method


def _images(config: RunConfig) -> int:
    return config.train_size or SOURCES[config.data].training_images - config.held_out
