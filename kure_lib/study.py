"""Which runs and notebooks a profile consists of, and how they are carried out."""

import concurrent.futures
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from kure_lib import notebooks, report, runs
from kure_lib.paths import KureError, results, use_profile
from kure_lib.training import KureConfig, RunConfig

KURE = KureConfig()  # the paper's setting everywhere: K_T = 1.8, λ = 1

ARMS = ("pretrained", "control", "kure", "scratch")


@dataclass(frozen=True)
class Recipe:
    """How one architecture is trained: from scratch, then fine-tuned with KURE and, as long, without.

    `seeds` for the three main arms, `sweep_seeds` for other K_T (`targets`) and λ (`coefficients`), and
    `scratch_seeds` for KURE from the first epoch on.
    """

    model: str
    pretraining: dict
    fine_tuning: dict
    seeds: int = 1
    sweep_seeds: int = 1
    targets: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    scratch_seeds: int = 0


@dataclass(frozen=True)
class Planned:
    """A run with its place in the study; `arm` is one of `ARMS`, `part` says which question needs it."""

    model: str
    arm: str
    part: str
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class Plan:
    """The runs of a profile, each after the one it starts from."""

    profile: str
    runs: tuple[Planned, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    def select(
        self, model: str | None = None, arm: str | None = None, part: str | None = None,
        seed: int | None = None, target: float | None = None, coefficient: float | None = None,
    ) -> list[Planned]:  # fmt: skip
        """The runs that agree with every argument given; for `arm="kure"` with K_T = 1.8 and λ = 1 unless named."""
        if arm == "kure" and part is None:
            target, coefficient = target or KURE.target, coefficient or KURE.coefficient

        def matches(run: Planned) -> bool:
            kure = run.config.regularizer
            pairs = [(model, run.model), (arm, run.arm), (part, run.part), (seed, run.seed),
                     (target, kure and kure.target), (coefficient, kure and kure.coefficient)]  # fmt: skip
            return all(wanted is None or wanted == have for wanted, have in pairs)

        return [run for run in self.runs if matches(run)]

    def records(self, **wanted) -> list[runs.Record]:
        """The records of the selected runs, trained where they are missing, in the order of their seeds."""
        return [runs.get(run.config) for run in self.select(**wanted)]


SMALL_RESNET = Recipe(
    "resnet20",
    pretraining={"epochs": 10, "learning_rate": 0.2, "weight_decay": 5e-4},
    fine_tuning={"epochs": 4, "learning_rate": 0.04, "weight_decay": 5e-4},
)
SMALL_MOBILENET = Recipe(
    "mobilenet_v2_050",
    pretraining={"epochs": 8, "learning_rate": 0.2, "weight_decay": 1e-4},
    fine_tuning={"epochs": 5, "learning_rate": 0.05, "weight_decay": 1e-4},
)


def _with(recipe: Recipe, pretraining=None, fine_tuning=None, **changes) -> Recipe:
    """The recipe with some settings of its two stages, and some fields, replaced."""
    return Recipe(**{
        **vars(recipe), **changes,
        "pretraining": {**recipe.pretraining, **(pretraining or {})},
        "fine_tuning": {**recipe.fine_tuning, **(fine_tuning or {})},
    })  # fmt: skip


def _imagenet(model: str, batch_size: int, epochs: int) -> Recipe:
    """Fine-tuning of torchvision's weights as in Supp. Tables 1 and 2."""
    shared = {"data": "imagenet", "weight_decay": 1e-4, "decay_every": 30, "batch_size": batch_size}
    return Recipe(
        model,
        pretraining={**shared, "pretrained": True, "epochs": 0, "learning_rate": 1e-3},
        fine_tuning={**shared, "epochs": epochs, "learning_rate": 1e-3},
    )


TINY = {"train_size": 2048, "epochs": 2}
SWEEP = {"targets": (1.4, 1.6, 2.4, 3.0, 4.0, 6.0), "coefficients": (0.01, 0.1, 0.3, 3.0)}

PROFILES: dict[str, tuple[Recipe, ...]] = {
    "smoke": (
        _with(SMALL_RESNET, TINY, TINY, targets=(3.0,), coefficients=(0.1,), scratch_seeds=1),
        _with(SMALL_MOBILENET, TINY, TINY, coefficients=(0.1,)),
    ),
    "quick": (
        _with(SMALL_RESNET, {"epochs": 5}, targets=(3.0,), coefficients=(0.1,)),
        _with(SMALL_MOBILENET, {"epochs": 4}),
    ),
    "study": (
        _with(SMALL_RESNET, seeds=5, sweep_seeds=3, scratch_seeds=3, **SWEEP),
        _with(SMALL_MOBILENET, seeds=3, coefficients=SWEEP["coefficients"]),
    ),
    "imagenet": (
        _imagenet("resnet18", 256, 83), _imagenet("resnet50", 128, 50), _imagenet("mobilenet_v2", 256, 83),
    ),
}  # fmt: skip


def plan(profile: str) -> Plan:
    """All runs of a profile, seed by seed; `KureError` for an unknown profile."""
    if profile not in PROFILES:
        raise KureError(f"Unknown profile '{profile}': choose one of {', '.join(PROFILES)}.")
    recipes = PROFILES[profile]
    seeds = range(max(recipe.seeds for recipe in recipes))
    planned = [run for seed in seeds for recipe in recipes for run in _runs(recipe, seed)]
    return Plan(profile, tuple(sorted(planned, key=lambda run: run.part != "main")))


def _runs(recipe: Recipe, seed: int) -> list[Planned]:
    def planned(arm: str, part: str, settings: dict, **more) -> Planned:
        return Planned(recipe.model, arm, part, RunConfig(model=recipe.model, seed=seed, **settings, **more))

    if seed >= recipe.seeds:
        return []
    first = planned("pretrained", "main", recipe.pretraining)
    start = {"start": first.config}
    result = [
        first,
        planned("control", "main", recipe.fine_tuning, **start),
        planned("kure", "main", recipe.fine_tuning, **start, regularizer=KURE),
    ]
    if seed < recipe.sweep_seeds:
        for target in recipe.targets:
            kure = KureConfig(target=target)
            result.append(planned("kure", "target", recipe.fine_tuning, **start, regularizer=kure))
        for coefficient in recipe.coefficients:
            kure = KureConfig(coefficient=coefficient)
            result.append(planned("kure", "coefficient", recipe.fine_tuning, **start, regularizer=kure))
    if seed < recipe.scratch_seeds:
        result.append(planned("scratch", "scratch", recipe.pretraining, regularizer=KURE))
    return result


def open(profile: str) -> Plan:
    """Make a profile the ambient one and return its plan: how every notebook begins."""
    planned = plan(profile)
    use_profile(profile)
    return planned


#: Parts of the plan that a notebook reads; a notebook that is not named here trains nothing.
NEEDS = {
    "02": {"main"},
    "04": {"main", "coefficient", "scratch"},
    "05": {"main", "target", "coefficient"},
    "07": {"main"},
}


def needed(planned: Plan, stems: Iterable[str]) -> Plan:
    """The part of a plan that these notebooks read."""
    parts = set().union(*(NEEDS.get(stem[:2], set()) for stem in stems))
    return Plan(planned.profile, tuple(run for run in planned.runs if run.part in parts))


#: Seconds an epoch takes on one core of a 2023 server; for the estimate before the first record is there.
SECONDS_PER_EPOCH = {"resnet20": 30, "mobilenet_v2_050": 32}


def seconds_left(planned: Plan) -> float:
    """Estimated seconds of training, on one core, of the runs that have no record."""
    missing = [run for run in planned.runs if runs.find(run.config) is None]
    return sum(_seconds(run) for run in missing)


def _seconds(run: Planned) -> float:
    share = 1.0 if run.config.train_size is None else run.config.train_size / 60_000
    return run.config.epochs * share * SECONDS_PER_EPOCH.get(run.model, float("nan"))


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
    return torch.cuda.device_count() or psutil.cpu_count(logical=False) or 1


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
    while waiting or at_work:
        unfinished = {run.config for run in [*waiting, *at_work.values()]}
        for run in [run for run in waiting if run.config.start not in unfinished][: jobs - len(at_work)]:
            waiting.remove(run)
            at_work[pool.submit(_train_one, run.config, progress)] = run
        finished, _ = concurrent.futures.wait(at_work, timeout=0.5, return_when="FIRST_COMPLETED")
        board.update(progress)
        for future in finished:
            run = at_work.pop(future)
            try:
                future.result()
            except concurrent.futures.process.BrokenProcessPool:
                raise KureError(f"The process that trained {run.config.label} was killed, perhaps for want of memory: "
                                "start again with a smaller --jobs; it goes on from its last epoch.") from None  # fmt: skip
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
            for stem in tqdm(stems, desc="notebooks", unit="notebook", disable=None):
                if not sys.stderr.isatty():
                    print(f"executing {stem}", flush=True)
                notebooks.execute(stem, profile)
            return report.build(profile)
    except Timeout:
        raise KureError(f"Another study is writing to {results()}: wait until it is done, or stop it.") from None
