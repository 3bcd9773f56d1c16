"""A profile carried out: its runs trained, its notebooks executed, its report built."""

import concurrent.futures
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from kure_lib import notebooks
from kure_lib import site as report
from kure_lib.networks import device
from kure_lib.paths import KureError, results, use_profile
from kure_lib.study import runs
from kure_lib.study.plans import ARMS, FULL, Plan, Planned, needed, open, plan, trained_spec
from kure_lib.study.profiles import PARAMETERS, PROFILES
from kure_lib.training.configs import RunConfig

__all__ = [
    "ARMS", "FULL", "PROFILES", "Plan", "Planned", "describe", "needed", "open", "plan", "run", "train", "trained_spec",
]  # fmt: skip

#: Seconds an epoch takes on one core of the processors in results/benchmarks, to estimate the time a plan takes.
SECONDS_PER_EPOCH = {
    "bfloat16": {"resnet20": 16, "mobilenet_v2_050": 20},
    "float32": {"resnet20": 65, "mobilenet_v2_050": 62},
}
QUANTIZED = 1.4  # times as long, for quantization-aware training
SLOWER = {"gradient_l1": 6.0, "sam": 2.0}  # and with these rivals


def seconds_left(planned: Plan) -> float:
    """Estimated seconds of training, on one core, of the runs that have no record."""
    missing = [run for run in planned.runs if runs.find(run.config) is None]
    return sum(_seconds(run) for run in missing)


def _seconds(run: Planned) -> float:
    share = 1.0 if run.config.train_size is None else run.config.train_size / 60_000
    slower = QUANTIZED if run.quantizer else SLOWER.get(run.config.rival.method, 1) if run.config.rival else 1
    return run.config.epochs * share * slower * SECONDS_PER_EPOCH[device.precision()].get(run.model, float("nan"))


def describe(planned: Plan) -> str:
    """What would run: a line for each run with its state, and the estimated time."""
    done = [runs.find(run.config) is not None for run in planned.runs]
    lines = [
        f"{'on record' if found else 'to train ':10} {run.config.label:48} {run.config.epochs:3} epochs"
        for run, found in zip(planned.runs, done, strict=True)
    ]
    minutes = seconds_left(planned) / workers() / 60
    total = f"{sum(done)} of {len(done)} runs are on record; training the others takes about {minutes:.0f} min"
    return "\n".join([*lines, f"{total} with {workers()} at a time."])


def workers() -> int:
    """How many runs are trained at once: one for each GPU, else one for each core."""
    return torch.cuda.device_count() or _cores()


def _cores() -> int:
    return psutil.cpu_count(logical=False) or 1


def train(planned: Plan, jobs: int | None = None) -> None:
    """Train every run of the plan that has no record, several at once, each in a process of its own.

    Shows one line for all of it with the time left, and one for each run at work; where there is no
    terminal, a plain line for each epoch. Raises `KureError` if a run fails; what was finished is kept.
    """
    missing = [run for run in planned.runs if runs.find(run.config) is None]
    if not missing:
        return
    jobs = min(jobs or workers(), len(missing))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        progress, places = manager.Queue(), manager.Queue()
        for place in range(jobs):
            places.put(place)
        pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (planned.profile, places))
        try:
            _train_all(missing, pool, jobs, progress)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.kill()  # checkpoints are written whole or not at all
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _train_all(missing: list[Planned], pool, jobs: int, progress) -> None:
    board = _Progress(missing)
    waiting, at_work = list(missing), {}
    try:
        while waiting or at_work:
            unfinished = {run.config for run in [*waiting, *at_work.values()]}
            for run in [run for run in waiting if run.config.start not in unfinished][: jobs - len(at_work)]:
                at_work[pool.submit(_train_one, run.config, progress)] = run
                waiting.remove(run)
            finished, _ = concurrent.futures.wait(at_work, timeout=0.5, return_when="FIRST_COMPLETED")
            board.update(progress)
            for future in finished:
                future.result()
                del at_work[future]
    except concurrent.futures.process.BrokenProcessPool:  # does not say which of them
        labels = " or ".join(run.config.label for run in at_work.values())
        raise KureError(f"A process that trained {labels} was killed, perhaps for want of memory: start again with a "
                        "smaller --jobs; it goes on from its last epoch.") from None  # fmt: skip
    board.close()


def _start_worker(profile: str, places) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports; a worker just ends
    use_profile(profile)
    place = places.get()
    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)


def _train_one(config: RunConfig, progress) -> None:
    runs.get(config, lambda epoch, values: progress.put((config.label, epoch, config.epochs, values)))


class _Progress:
    """One tqdm line over all epochs to come; a plain line for each epoch where there is no terminal."""

    def __init__(self, missing: list[Planned]):
        self.plain = not sys.stderr.isatty()
        self.total = tqdm(total=sum(run.config.epochs for run in missing), unit="epoch", desc="training",
                          disable=None, smoothing=0.05)  # fmt: skip
        self.seen: dict[str, int] = {}

    def update(self, progress) -> None:
        with suppress(queue.Empty):
            while True:
                label, epoch, epochs, values = progress.get_nowait()
                # a resumed run begins to count at the epoch it goes on from
                self.total.update(epoch - self.seen.get(label, 0))
                self.seen[label] = epoch
                line = (f"{label} epoch {epoch}/{epochs}: loss {values['train_loss']:.3f}, "
                        f"test {values['test_top1']:.2f} %, kurtosis {values['kurtosis']:.2f}")  # fmt: skip
                if self.plain:
                    print(line, flush=True)
                else:
                    self.total.set_postfix_str(line)

    def close(self) -> None:
        self.total.close()


def _execute_all(stems: Iterable[str], profile: str, jobs: int) -> None:
    """Execute notebooks, several at once; 00 shows the verdicts of all others, so it comes last and alone."""
    others, last = [s for s in stems if s[:2] != "00"], [s for s in stems if s[:2] == "00"]
    threads = max(1, _cores() // min(jobs, max(len(others), 1)))  # more would wait for one another
    with tqdm(total=len(others) + len(last), desc="notebooks", unit="notebook", disable=None) as bar:

        def execute(stem: str) -> None:
            if bar.disable:
                print(f"executing {stem}", flush=True)
            changed = PARAMETERS.get(profile, {}).get(stem[:2])
            notebooks.execute(stem, profile, parameters=changed, threads=threads)
            bar.update()

        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        try:
            for finished in concurrent.futures.as_completed([pool.submit(execute, stem) for stem in others]):
                finished.result()
            for stem in last:
                execute(stem)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            raise


def run(profile: str, only: Iterable[str] | None = None, fresh: bool = False, jobs: int | None = None) -> Path:
    """Train what is missing, execute the notebooks, build the report; returns the report's path.

    `only` names notebooks; `fresh` first deletes the profile's records of their runs. Raises `KureError` if
    another study is writing to the same results.
    """
    planned = open(profile)
    stems = notebooks.select(only)
    results().mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(results() / "study.lock", timeout=0):
            chosen = needed(planned, stems)
            if fresh:
                for item in chosen.runs:
                    runs.forget(item.config)
            train(chosen, jobs)
            _execute_all(stems, profile, jobs or workers())
            return report.build(profile)
    except Timeout:
        raise KureError(f"Another study is writing to {results()}: wait until it is done, or stop it.") from None
