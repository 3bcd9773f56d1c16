"""A profile carried out: what is missing is trained, the notebooks are executed, the site is built."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from queue import Queue
from statistics import median
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from kure_lib import engine, files, notebooks, paths
from kure_lib.networks import device
from kure_lib.networks.data import SOURCES
from kure_lib.paths import KureError
from kure_lib.study import plans, records, runs
from kure_lib.study.plans import Plan
from kure_lib.study.profiles import PARAMETERS
from kure_lib.study.records import Record
from kure_lib.training.configs import RunConfig

COMMITTED = paths.ROOT / "results" / "study" / "records"  # tell how long an epoch takes
TRAINING_IMAGES = {name: source.training_images for name, source in SOURCES.items()}


def describe(profile: str, only: Iterable[str] | None = None) -> str:
    """What the profile, or what these notebooks of it, would train: the state of each run, and the estimated time.

    Raises `KureError` for an unknown profile or notebook.
    """
    planned = plans.needed(plans.open(profile), notebooks.select(only))
    missing = _missing(planned)
    state = {run.config: "on record" for run in planned.runs} | dict.fromkeys(missing, "to train")
    lines = [f"{said:10}{records.run_name(config):60} {config.epochs:3} epochs" for config, said in state.items()]
    lines += [f"{len(lines) - len(missing)} of {len(lines)} runs are on record."]
    return "\n".join([*lines, f"Training the others takes {_duration(missing)}."] if missing else lines)


def _missing(planned: Plan) -> list[RunConfig]:
    return [run.config for run in planned.runs if records.find(run.config) is None]


def _duration(missing: Iterable[RunConfig]) -> str:
    """The estimated time of training, in words."""
    on_record, seconds, unknown = _seconds_per_image(), 0.0, set()
    for config in missing:
        method = on_record.get(_kind(config, device.precision()))
        if times := method or on_record.get((config.model, config.data)):
            seconds += config.epochs * _images(config) * median(times)
        elif config.epochs:
            unknown.add(f"{config.model} on {config.data}")
    if unknown:
        return f"an unknown time: no record of {', '.join(sorted(unknown))} says how long an epoch takes"
    return f"about {seconds / workers() / 60:.0f} min with {workers()} at a time"


def _seconds_per_image() -> Mapping[tuple, list[float]]:
    """What an image took in every epoch of the committed records, by kind of run, and by network and data set alone.

    A record that cannot be read tells nothing: the tests name it, and an estimate does without it.
    """
    found: dict[tuple, list[float]] = defaultdict(list)
    for path in COMMITTED.glob("*.json"):
        with suppress(OSError, ValueError, KureError):
            record = records.Record.model_validate_json(path.read_bytes())
            config, precision = record.config, record.provenance.get("precision")
            for kind in (_kind(config, precision), (config.model, config.data)):
                found[kind] += [seconds / _images(config) for seconds in record.curves.get("seconds", [])]
    return found


def _kind(config: RunConfig, precision: str) -> tuple[Any, ...]:
    """What an epoch's time depends on, beside the number of images."""
    kure, qat, rival = config.regularizer, config.quantization, config.rival
    return config.model, config.data, precision, kure and kure.of, qat and qat.quantizer, rival and rival.name


def _images(config: RunConfig) -> int:
    return config.train_size or TRAINING_IMAGES[config.data] - config.held_out


def workers() -> int:
    """How many runs are trained at once: one for each GPU, else one for each core."""
    return len(device.gpus()) or device.cores()


def _places(jobs: int) -> list[dict[str, str]]:
    """The environment of every worker: they take turns with the GPUs, where there are any."""
    gpus = device.gpus()
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
        where = engine.Cluster(cluster, jobs) if cluster else engine.Pool(_places(min(jobs or workers(), len(tasks))))
        engine.run(tasks, where, report, finish)


def _execute_all(stems: Iterable[str], profile: str, jobs: int) -> list[str]:
    """Execute notebooks, several at once; 00 shows the verdicts of all others, so it comes last and alone.

    One that fails spares the others. Returns what went wrong, in reading order.
    """
    others, last = [s for s in stems if s[:2] != "00"], [s for s in stems if s[:2] == "00"]
    threads = max(1, device.cores() // min(jobs, max(len(others), 1)))  # more would wait for one another
    free: Queue[dict[str, str]] = Queue()
    for place in _places(jobs):
        free.put({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **place})
    changed: dict[str, Any] = PARAMETERS.get(profile, {})
    failed: dict[str, str] = {}
    with tqdm(total=len(others) + len(last), desc="notebooks", unit="notebook", disable=None) as bar:

        def execute(stem: str) -> None:
            if bar.disable:
                print(f"executing {stem}", flush=True)
            place = free.get()
            try:
                notebooks.execute(stem, profile, parameters=changed.get(stem[:2]), environment=place)
            except KureError as error:
                failed[stem] = str(error)
            finally:
                free.put(place)
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
    """Train what is missing, execute the notebooks, build the site.

    Args:
        profile: The scale, a name in `profiles.PROFILES`.
        only: Numbers or names of notebooks, which then are the only ones executed; only the runs they need are trained.
        fresh: Whether to delete the profile's records of these runs first.
        jobs: How many runs are trained, and notebooks executed, at once; `workers()` if None.
        cluster: The address of a Ray cluster to train on, or "auto"; notebooks are executed here.

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
            failed = _execute_all(stems, profile, jobs or workers())
            page = site.build(profile, failed)
    except Timeout:
        sentence = f"Another study is writing to {paths.results()}: wait until it is done, or stop it."
        raise KureError(sentence) from None
    if failed:
        summary = f"{len(failed)} of {len(stems)} notebooks failed, the site {page} shows what came of the others."
        raise KureError("\n".join([summary, *failed]))
    return page
