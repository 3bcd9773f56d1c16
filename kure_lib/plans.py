"""Which runs a profile consists of: the design of the experiment, as data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import pandas as pd

from kure_lib import runs
from kure_lib.paths import KureError, use_profile
from kure_lib.training import KureConfig, RunConfig

KURE = KureConfig()  # the paper's setting everywhere: K_T = 1.8, λ = 1

FULL = 32  # bits of a tensor that is not quantized

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

    def sweep(self, part: str) -> "Plan":
        """A swept part with the main runs of the same networks and seeds, in order of network, arm, K_T, λ and seed."""
        swept = {(run.model, run.seed) for run in self.select(part=part)}
        chosen = [run for run in self.runs if run.part in ("main", part) and (run.model, run.seed) in swept]

        def place(run: Planned) -> tuple:
            kure = run.config.regularizer
            strength = (kure.target, kure.coefficient) if kure else (0, 0)
            return self.models.index(run.model), ARMS.index(run.arm), *strength, run.seed

        return Plan(self.profile, tuple(sorted(chosen, key=place)))

    def records(self, **wanted) -> list[runs.Record]:
        """The records of the selected runs, trained where they are missing, in the order of their seeds."""
        return [runs.get(run.config) for run in self.select(**wanted)]

    def measure(self, specs: Iterable[runs.QuantizationSpec], **wanted) -> pd.DataFrame:
        """Accuracy and loss of every selected run under every specification: one row a measurement.

        Columns: model, method (the arm), target, coefficient, seed, w_bits and a_bits (32: not quantized),
        grid, step_ratio, top1 in percent, loss in nats; and of the run: kurtosis, the mean over its layers,
        and train_loss, of its last epoch in nats.
        """
        rows = []
        for run, spec in product(self.select(**wanted), specs):
            record, kure = runs.get(run.config), run.config.regularizer
            result = runs.evaluate(record, spec)
            rows.append({
                "model": run.model, "method": run.arm, "target": kure.target if kure else None,
                "coefficient": kure.coefficient if kure else 0.0, "seed": run.seed,
                "w_bits": spec.weight_bits or FULL, "a_bits": spec.activation_bits or FULL, "grid": spec.grid,
                "step_ratio": spec.step_ratio, "top1": result.top1, "loss": result.loss,
                "kurtosis": record.mean_kurtosis, "train_loss": record.curves.get("train_loss", [math.nan])[-1],
            })  # fmt: skip
        return pd.DataFrame(rows)


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


def _imagenet(model: str, batch_size: int, epochs: int, **sweeps) -> Recipe:
    """Fine-tuning of torchvision's weights as in Supp. Tables 1 and 2, with the targets of Fig. 3c."""
    shared = {"data": "imagenet", "weight_decay": 1e-4, "decay_every": 30, "batch_size": batch_size}
    return Recipe(
        model,
        pretraining={**shared, "pretrained": True, "epochs": 0, "learning_rate": 1e-3},
        fine_tuning={**shared, "epochs": epochs, "learning_rate": 1e-3},
        **sweeps,
    )


TINY = {"train_size": 2048, "epochs": 2}
SWEEP = {"targets": (1.4, 1.6, 2.4, 3.0, 4.0, 6.0), "coefficients": (0.01, 0.1, 0.3, 3.0)}

PROFILES: dict[str, tuple[Recipe, ...]] = {
    "smoke": (
        _with(SMALL_RESNET, TINY, TINY, targets=(3.0,), coefficients=(0.1,), scratch_seeds=1),
        _with(SMALL_MOBILENET, TINY, TINY, coefficients=(0.1,)),
    ),
    "quick": (
        _with(SMALL_RESNET, {"epochs": 4}, {"epochs": 3}, targets=(3.0,), coefficients=(0.1,)),
        _with(SMALL_MOBILENET, {"epochs": 3}, {"epochs": 4}),
    ),
    "study": (
        _with(SMALL_RESNET, seeds=5, sweep_seeds=3, scratch_seeds=1, **SWEEP),
        _with(SMALL_MOBILENET, seeds=3, coefficients=SWEEP["coefficients"]),
    ),
    "imagenet": (
        _imagenet("resnet18", 256, 83, targets=(3.0, 4.0, 6.0), coefficients=(0.1,)),
        _imagenet("resnet50", 128, 50), _imagenet("mobilenet_v2", 256, 83),
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


#: Parameters of notebooks, other than the profile, that a profile changes.
PARAMETERS = {"smoke": {"02": {"image_count": 50}}}

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
