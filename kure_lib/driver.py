"""A profile carried out: what is missing is trained and evaluated, notebooks are executed, the site is built."""

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Queue
from shutil import get_terminal_size
from statistics import median
from textwrap import fill
from threading import Lock
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock, Timeout
from tabulate import tabulate
from tqdm import tqdm

from kure_lib import engine, files, notebooks, paths
from kure_lib.networks import device
from kure_lib.networks.data import SOURCES
from kure_lib.networks.evaluation import Evaluation
from kure_lib.paths import KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import plans, records, runs, views
from kure_lib.study.plans import Plan, Planned
from kure_lib.study.profiles import ONLY_TRAINED, PARAMETERS
from kure_lib.study.records import Record
from kure_lib.training.configs import RunConfig

COMMITTED = paths.ROOT / "results" / "study" / "records"  # tell how long an epoch takes
SHOWN = 10  # reasons why evaluations failed, at most
MINUTE = 60.0  # seconds between two lines of progress where there is no terminal
WIDTH = 100  # columns of a terminal, at most
TRAINING_IMAGES = {name: source.training_images for name, source in SOURCES.items()}


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
    times = _times(found)
    lines = [
        f"Time: one run after another, estimated for {', '.join(models)} from records made on {place}."
        for place, models in _tell(times).items()
    ]
    lines.append(f"{len(found) - len(missing)} of {len(found)} runs are on record.")
    lines += [f"Training the others takes {_duration(missing)}."] if missing else []
    if profile in ONLY_TRAINED:
        lines.append("No notebook reads this profile yet.")
    elif missing_evaluations := sum(map(len, _asked(stems, profile).values())):
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


def _missing(planned: Plan) -> list[RunConfig]:
    return [run.config for run in planned.runs if records.find(run.config) is None]


def _duration(missing: Iterable[RunConfig]) -> str:
    """The estimated time of training, several at once, in words."""
    times, here = _times(missing), device.provenance()["device"]
    if unknown := {f"{run.model} on {run.data}" for run, time in times.items() if math.isnan(time.seconds)}:
        return f"an unknown time: no record of {', '.join(sorted(unknown))} says how long an epoch takes"
    words = f"about {_in_words(sum(time.seconds for time in times.values()) / workers())} with {workers()} at a time"
    if elsewhere := {time.device for time in times.values()} - {here, ""}:
        return f"{words}, if {here} is as fast as {' and '.join(sorted(elsewhere))}, on which the records were made"
    return words


def _times(configs: Iterable[RunConfig]) -> dict[RunConfig, Time]:
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
    return config.train_size or TRAINING_IMAGES[config.data] - config.held_out


def workers() -> int:
    """How many runs are trained at once: one for each GPU, or for so many as share a run, else one for each core."""
    return len(_groups()) or device.cores()


def _groups() -> list[str]:
    """The GPUs in groups that share a run, each as `CUDA_VISIBLE_DEVICES` names it; none if there are too few."""
    gpus, each = device.gpus(), paths.gpus_per_run()
    return [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]


def _places(jobs: int) -> list[dict[str, str]]:
    """The environment of every worker: they take turns with the GPUs, where there are any."""
    gpus = _groups()
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(jobs)]


def train(planned: Plan, jobs: int | None = None, cluster: str | None = None) -> None:
    """Train every run of the plan that has no record, several at once, each in a process of its own.

    The processes are those of this machine or, where `cluster` is the address of one, of a Ray cluster; this one alone
    reads and writes results. Shows one bar over all epochs with the time left; where there is no terminal, a plain line
    for each epoch. Raises `KureError` if a run fails; those that do not start from it are trained all the same.
    """
    missing = {records.run_name(config): config for config in _missing(planned)}
    if not missing:
        return
    if (each := paths.gpus_per_run()) > 1 and (cluster or not _groups()):
        reason = "a cluster gives one to each run" if cluster else f"PyTorch sees {len(device.gpus())}"
        raise KureError(f"--gpus-per-run {each} needs {each} GPUs of this machine, and {reason}: leave it out, or give "
                        "a number that is there, without --cluster.")  # fmt: skip
    seen: dict[str, int] = {}
    held: dict[str, ExitStack] = {}  # the locks of the runs that have begun
    total = sum(config.epochs for config in missing.values())
    with ExitStack() as stack, tqdm(total=total, unit="epoch", desc="training", disable=None, smoothing=0.05) as bar:

        def begin(name: str) -> tuple | None:
            if name not in held:
                held[name] = stack.enter_context(ExitStack())
                held[name].enter_context(records.locked(missing[name]))
            return None if records.find(missing[name]) else runs.inputs(missing[name])

        def report(name: str, epoch: int, values: Mapping[str, float], checkpoint: bytes) -> None:
            files.write_atomically(records.checkpoint_path(missing[name]), checkpoint)
            # A resumed run begins to count at the epoch it goes on from.
            bar.update(epoch - seen.get(name, 0))
            seen[name] = epoch
            line = (f"{name} epoch {epoch}/{missing[name].epochs}: loss {values['train_loss']:.3f}, "
                    f"test {values['test_top1']:.2f} %, kurtosis {values['kurtosis']:.2f}")  # fmt: skip
            if bar.disable:
                print(line, flush=True)
            else:
                bar.set_postfix_str(line)

        def finish(name: str, result: tuple[Record, bytes]) -> None:
            runs.keep(*result)
            held[name].close()

        tasks = [
            engine.Task(
                name, partial(runs.elsewhere, config, records.checkpoint_path(config)),
                records.run_name(config.start) if config.start else None, partial(begin, name),
            )
            for name, config in missing.items()
        ]  # fmt: skip
        engine.run(tasks, _engine(tasks, jobs, cluster), report, finish)


def evaluate(missing: runs.Missing, jobs: int | None = None, cluster: str | None = None) -> None:
    """Make evaluations that are not on record, several at once, by processes as those of `train`, with one bar.

    A task makes those of a run that share chosen steps, the longest first. What fails is told on stderr and spares the
    others; a notebook comes to it again. Raises `KureError` for a task whose process is lost, as `train` does.
    """
    parts: dict[tuple[RunConfig, QuantizationSpec], list[QuantizationSpec]] = defaultdict(list)
    for config, specs in missing.items():
        for spec in specs.values():
            parts[config, views.choosing(spec)].append(spec)
    if not parts:
        return
    longest_first = sorted(
        parts.items(), key=lambda part: part[0][1].search or part[0][1].iterations or 0, reverse=True
    )
    seen: Counter[str] = Counter()
    failed: dict[str, None] = {}  # in order, each once
    total, printed = sum(map(len, parts.values())), time.monotonic()
    with tqdm(total=total, unit="evaluation", desc="evaluations", disable=None, smoothing=0.05) as bar:

        def begin(config: RunConfig) -> tuple | None:
            try:
                return runs.to_evaluate(config)
            except KureError as error:
                failed[str(error)] = None
                return None

        def report(name: str, number: int) -> None:
            nonlocal printed
            bar.update(number - seen[name])
            seen[name] = number
            if bar.disable and time.monotonic() - printed >= MINUTE:
                printed = time.monotonic()
                print(f"evaluations: {seen.total()} of {total}", flush=True)

        def finish(name: str, result: tuple[RunConfig, dict[str, Evaluation], list[str]]) -> None:
            config, made, wrong = result
            runs.add(config, made)
            failed.update(dict.fromkeys(wrong))

        if bar.disable:
            print(f"evaluations to make: {total}", flush=True)
        tasks = [
            engine.Task(f"{records.run_name(config)} under {specs[0].key}", partial(runs.evaluate_elsewhere, specs),
                        inputs=partial(begin, config))
            for (config, _), specs in longest_first
        ]  # fmt: skip
        engine.run(tasks, _engine(tasks, jobs, cluster), report, finish)
    if failed:
        paths.say("\n".join(["Evaluations failed and are left to notebooks, for such reasons:", *list(failed)[:SHOWN]]))


def _engine(tasks: Sequence[engine.Task], jobs: int | None, cluster: str | None) -> engine.Engine:
    return engine.Cluster(cluster, jobs) if cluster else engine.Pool(_places(min(jobs or workers(), len(tasks))))


def _asked(stems: Iterable[str], profile: str) -> runs.Missing:
    """The evaluations that these notebooks declare and that are not on record."""
    with runs.asking() as missing:
        for stem in stems:
            notebooks.ask(stem, {"profile": profile, **PARAMETERS.get(profile, {}).get(stem[:2], {})})
    return missing


def _evaluations(planned: Plan) -> int:
    """How many are on record."""
    return sum(len(record.evaluations) for run in planned.runs if (record := records.find(run.config)))


class _Lines:
    """What every notebook is at: a line for each below the bar on a terminal, else one for all in a minute at most."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.printed = time.monotonic()
        self.lock = Lock()  # each notebook is waited for in a thread of its own

    @contextmanager
    def show(self, stem: str, row: int) -> Iterator[Callable[[str], None]]:
        """Within the block a notebook has the line `row` of a terminal; yields what is called with what it is at."""
        with tqdm(desc=stem, bar_format="{desc}", position=row, leave=False, disable=None) as line:

            def report(said: str) -> None:
                with self.lock:
                    self.said[stem] = f"{stem}: {said}"
                    if not line.disable:
                        line.set_description_str(self.said[stem][: get_terminal_size().columns - 1])
                    elif time.monotonic() - self.printed >= MINUTE:
                        self.printed = time.monotonic()
                        print("; ".join(self.said.values()), flush=True)

            try:
                yield report
            finally:
                with self.lock:
                    self.said.pop(stem, None)


def _execute_all(stems: Iterable[str], profile: str, jobs: int) -> list[str]:
    """Execute notebooks, several at once; 00 shows the verdicts of all others, so it comes last and alone.

    One that fails spares the others. Returns what went wrong, in reading order.
    """
    others, last = [s for s in stems if s[:2] != "00"], [s for s in stems if s[:2] == "00"]
    threads = max(1, device.cores() // min(jobs, max(len(others), 1)))  # more would wait for one another
    free: Queue[tuple[int, dict[str, str]]] = Queue()
    for row, place in enumerate(_places(jobs), start=1):
        free.put((row, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **place}))
    changed: dict[str, Any] = PARAMETERS.get(profile, {})
    failed: dict[str, str] = {}
    lines = _Lines()
    with tqdm(total=len(others) + len(last), desc="notebooks", unit="notebook", disable=None) as bar:

        def execute(stem: str) -> None:
            if bar.disable:
                print(f"executing {stem}", flush=True)
            row, place = free.get()
            try:
                with lines.show(stem, row) as report:
                    changes = changed.get(stem[:2])
                    notebooks.execute(stem, profile, parameters=changes, environment=place, report=report)
            except KureError as error:
                failed[stem] = str(error)
            finally:
                free.put((row, place))
            bar.update()

        pool = ThreadPoolExecutor(jobs)
        try:
            for finished in as_completed([pool.submit(execute, stem) for stem in others]):
                finished.result()
            for stem in last:
                execute(stem)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            notebooks.kill_children(os.getpid())
            raise
    return [failed[stem] for stem in sorted(failed)]


def run(
    profile: str,
    only: Iterable[str] | None = None,
    fresh: bool = False,
    jobs: int | None = None,
    cluster: str | None = None,
) -> Path:
    """Train what is missing, make the evaluations that notebooks declare, execute these, build the site.

    Args:
        profile: The scale, a name in `profiles.PROFILES`.
        only: Numbers or names of notebooks, which then are the only ones executed; only the runs they need are trained.
        fresh: Whether to delete the profile's records of these runs first.
        jobs: How many runs are trained and evaluated, and notebooks executed, at once; `workers()` if None.
        cluster: The address of a Ray cluster to train and evaluate on, or "auto"; notebooks are executed here.

    Returns:
        The path of the site's first page.

    Raises:
        KureError: Another study is writing to the same results, a run or a notebook fails, or a name is unknown. A
            notebook that fails spares the others and the site, a run those that do not start from it.

    Example:
        `driver.run("smoke", only=["05"])`
    """
    from kure_lib import site  # takes seconds to import, which `--list` should not cost

    planned = plans.open(profile)
    stems = notebooks.select(only)
    files.make_folder(paths.results())
    try:
        with FileLock(paths.results() / "study.lock", timeout=0):
            files.sweep(paths.results())
            chosen = plans.needed(planned, stems)
            if fresh:
                for each in chosen.runs:
                    records.forget(each.config)
            train(chosen, jobs, cluster)
            if not paths.checking():
                evaluate(_asked(stems, profile), jobs, cluster)
            before = _evaluations(chosen)
            failed = _execute_all(stems, profile, jobs or workers())
            if alone := _evaluations(chosen) - before:
                print(f"evaluations made by notebooks, which no cell tagged `needs` asks for: {alone}", flush=True)
            page = site.build(profile, failed)
    except Timeout:
        sentence = f"Another study is writing to {paths.results()}: wait until it is done, or stop it."
        raise KureError(sentence) from None
    if failed:
        summary = f"{len(failed)} of {len(stems)} notebooks failed, the site {page} shows what came of the others."
        raise KureError("\n".join([summary, *failed]))
    return page
