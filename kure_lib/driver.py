"""A profile carried out: what is missing is trained and evaluated, notebooks are executed, the site is built."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from shutil import get_terminal_size
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from kure_lib import engine, files, notebooks, paths
from kure_lib.networks import device
from kure_lib.networks.evaluation import Evaluation
from kure_lib.paths import KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import plans, records, runs, views
from kure_lib.study.plans import Plan
from kure_lib.study.profiles import PARAMETERS
from kure_lib.study.records import Record
from kure_lib.training.configs import RunConfig

SHOWN = 10  # reasons why evaluations failed, at most
MINUTE = 60.0  # seconds between two lines of progress where there is no terminal


def train(planned: Plan, jobs: int | None = None, cluster: str | None = None) -> None:
    """Train every run of the plan that has no record, several at once, each in a process of its own.

    The processes are those of this machine or, where `cluster` is the address of one, of a Ray cluster; this one alone
    reads and writes results. Shows one bar over all epochs with the time left; where there is no terminal, a plain line
    for each epoch. Raises `KureError` if a run fails; those that do not start from it are trained all the same.
    """
    missing = {records.run_name(config): config for config in planned.missing()}
    if not missing:
        return
    if (each := paths.gpus_per_run()) > 1 and (cluster or not device.gpu_groups()):
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
    if cluster:
        return engine.Cluster(cluster, jobs)
    return engine.Pool(device.places(min(jobs or device.workers(), len(tasks))))


def asked(stems: Iterable[str], profile: str) -> runs.Missing:
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
    for row, place in enumerate(device.places(jobs), start=1):
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
        jobs: How many runs are trained and evaluated, and notebooks executed, at once; `device.workers()` if None.
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
                evaluate(asked(stems, profile), jobs, cluster)
            before = _evaluations(chosen)
            failed = _execute_all(stems, profile, jobs or device.workers())
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
