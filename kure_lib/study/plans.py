"""The runs of a profile, each in its place, and what they measure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd

from kure_lib import progress
from kure_lib.paths import check_known, gpus_per_run, use_profile
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import runs
from kure_lib.study.profiles import KEPT_SEEDS, NEEDS, PROFILES, TUNING_SIZE, Contender, Recipe
from kure_lib.study.records import Record, find
from kure_lib.training.configs import KureConfig, QatConfig, RivalConfig, RunConfig

KURE = KureConfig()  # the paper's setting everywhere: K_T = 1.8, λ = 1
ACTIVATION_KURE = KureConfig(of="activations")

ARMS = ("pretrained", "control", "kure", "scratch", "activations")  # and those of `Recipe.contenders`
PARTS = (
    "main", "target", "coefficient", "qat", "activations", "scratch", "rivals", "tuning", "schedules", "lengths",
    "natural", "group_norm", "transformer",
)  # fmt: skip
ASIDE = (
    "tuning",
    "schedules",
    "lengths",
    "natural",
    "group_norm",
    "transformer",
)  # parts with arms that others have, too
CHOICES = ("model", "arm", "part", "seed", "target", "coefficient", "quantizer", "kept")
FEW = 3  # evaluations that are made without a word
COLUMNS = (
    "model", "arm", "target", "coefficient", "quantizer", "seed", "w_bits", "a_bits", "bits", "grid", "step_ratio",
    "activation_ratio", "top1", "loss", "kurtosis", "train_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A run with its place in the study; `arm` is one of `ARMS` or a contender, `part` says which question needs it."""

    model: str
    arm: str
    part: str
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def quantizer(self) -> str:
        """The quantizer of quantization-aware training, as in `Recipe.quantizers`; empty for full precision."""
        return self.config.quantization.name if self.config.quantization else ""

    @property
    def kept(self) -> bool:
        """Whether it is of the seeds whose weights are committed, so that what is computed from weights is theirs."""
        return self.seed < (KEPT_SEEDS.get(self.part, 1) if self.config.start else 1)

    @property
    def setting(self) -> str:
        """The key that the configuration would have with seed 0: runs that share it differ in their seeds alone."""
        first = self.config.start and self.config.start.model_copy(update={"seed": 0})
        return self.config.model_copy(update={"seed": 0, "start": first}).key

    @property
    def target(self) -> float | None:
        """K_T, or None without KURE."""
        return self.config.regularizer.target if self.config.regularizer else None

    @property
    def coefficient(self) -> float | None:
        """λ, or None without KURE."""
        return self.config.regularizer.coefficient if self.config.regularizer else None


@dataclass(frozen=True)
class Plan:
    """The runs of a profile, each after the one it starts from."""

    profile: str
    runs: tuple[Planned, ...]

    @property
    def networks(self) -> list[str]:
        """Every network of which there is a run."""
        return list(dict.fromkeys(run.model for run in self.runs))

    @property
    def models(self) -> list[str]:
        """The networks that every notebook measures: those with runs of the part `main`."""
        return list(dict.fromkeys(run.model for run in self.runs if run.part == "main"))

    def missing(self) -> list[RunConfig]:
        """The configurations of the runs that have no record."""
        return [run.config for run in self.runs if find(run.config) is None]

    def quantizers(self, model: str) -> list[str]:
        """Those that networks of this architecture are trained with."""
        return list(dict.fromkeys(run.quantizer for run in self.runs if run.model == model and run.quantizer))

    def select(self, **wanted: Any) -> list[Planned]:
        """The runs that agree with every choice given, in the order of the choices, then of the plan.

        Each choice is one value or a list of them. With `arm="kure"` K_T is 1.8 and λ is 1 unless chosen; runs of
        tuning, of other schedules and lengths, and on natural images are selected only by their `part`.

        Args:
            **wanted: Any of model, arm, part, seed, target (K_T), coefficient (λ), quantizer and kept; the quantizer is
                that of quantization-aware training, and without one the run is trained in full precision.

        Raises:
            KureError: A choice or one of its values does not exist.
        """
        choices = {"quantizer": [""]} | {name: _several(value) for name, value in wanted.items() if value is not None}
        known = self._known()
        for name, values in choices.items():
            check_known("choice", name, CHOICES)
            for value in values if name in known else ():
                check_known(name, value, known[name])
        usual = {"target": [KURE.target], "coefficient": [KURE.coefficient]} | choices

        def matches(run: Planned) -> bool:
            asked = usual if run.arm == "kure" and "arm" in choices and "part" not in choices else choices
            aside = run.part in ASIDE and "part" not in choices
            return not aside and all(getattr(run, name) in values for name, values in asked.items())

        def place(run: Planned) -> list[int]:
            return [values.index(getattr(run, name)) for name, values in choices.items()]

        return sorted(filter(matches, self.runs), key=place)

    def _known(self) -> dict[str, list]:
        """The values that choices may have; arms and quantizers are those of all profiles, as this may lack some."""
        recipes = [recipe for recipes in PROFILES.values() for recipe in recipes]
        return {
            "model": self.networks,
            "arm": list(dict.fromkeys([*ARMS, *(c.arm for recipe in recipes for c in recipe.contenders)])),
            "part": list(PARTS),
            "seed": sorted({run.seed for run in self.runs}),
            "quantizer": ["", *dict.fromkeys(name for recipe in recipes for name, _ in recipe.quantizers)],
        }

    def sweep(self, part: str) -> "Plan":
        """A swept part with the main runs of the same networks and seeds, in order of network, arm, K_T, λ and seed.

        Raises `KureError` unless the arms of the part are among those of `ARMS`.
        """
        runs = self.select(part=part)
        for run in runs:
            check_known("arm of a sweep", run.arm, ARMS)
        swept = {(run.model, run.seed) for run in runs}
        chosen = [run for run in self.runs if run.part in ("main", part) and (run.model, run.seed) in swept]

        def place(run: Planned) -> tuple:
            kure = run.config.regularizer
            strength = (kure.target, kure.coefficient) if kure else (0, 0)
            return self.networks.index(run.model), ARMS.index(run.arm), *strength, run.seed

        return Plan(self.profile, tuple(sorted(chosen, key=place)))

    def records(self, **wanted: Any) -> list[Record]:
        """The records of the selected runs, trained where they are missing, in the order of `select`."""
        return [runs.get(run.config) for run in self.select(**wanted)]

    def measure(self, specs: Iterable[QuantizationSpec], **wanted: Any) -> pd.DataFrame:
        """Accuracy and loss of every selected run under every specification: one row a measurement.

        Columns: model, arm, target, coefficient, quantizer and seed of the run; w_bits and a_bits (32: full precision),
        bits in words, grid, step_ratio, activation_ratio; top1 in percent and loss in nats; and of the run kurtosis,
        the mean over its regularized layers, and train_loss of its last epoch in nats. What is not on record is
        evaluated, with a bar where that are more than a few.
        """
        rows, specs = [], list(specs)
        measured = [(run, runs.get(run.config)) for run in self.select(**wanted)]
        to_make = sum(len({spec.key for spec in specs} - record.evaluations.keys()) for _, record in measured)
        with progress.bar(to_make, "evaluations", "evaluation", few=FEW) as bar:
            for (run, record), spec in product(measured, specs):
                on_record = spec.key in record.evaluations
                result, train_losses = runs.evaluate(record, spec), record.curves.get("train_loss", [math.nan])
                rows.append((
                    run.model, run.arm, run.target, run.coefficient or 0.0, run.quantizer, run.seed, *spec.bits.widths,
                    str(spec.bits), spec.grid.name, spec.step_ratio, spec.activation_ratio, result.top1, result.loss,
                    record.mean_kurtosis, train_losses[-1],
                ))  # fmt: skip
                bar.update(not on_record)
        return pd.DataFrame(rows, columns=COLUMNS)


def _several(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple | set | range) else [value]


def plan(profile: str) -> Plan:
    """All runs of a profile, seed by seed, each by as many processes as `paths.gpus_per_run` says.

    Raises `KureError` for an unknown profile and for a run that cannot be shared by so many.
    """
    check_known("profile", profile, PROFILES)
    recipes = PROFILES[profile]
    seeds = range(max(recipe.seeds for recipe in recipes))
    planned = [run for seed in seeds for recipe in recipes for run in _runs(recipe, seed)]
    return Plan(profile, tuple(sorted(planned, key=lambda run: run.part != "main")))


def _runs(recipe: Recipe, seed: int) -> list[Planned]:
    def planned(arm: str, part: str, settings: dict, **more: Any) -> Planned:
        config = RunConfig(model=recipe.model, seed=seed, replicas=gpus_per_run(), **settings, **more)
        return Planned(recipe.model, arm, part, config)

    def two_arms(part: str, settings: dict, start: RunConfig) -> list[Planned]:
        control = planned("control", part, settings, start=start)
        return [control, planned("kure", part, settings, start=start, regularizer=KURE)]

    def main_arms(part: str, pretraining: dict) -> list[Planned]:
        first = planned("pretrained", part, pretraining)
        return [first, *two_arms(part, recipe.fine_tuning, first.config)]

    if seed >= recipe.seeds:
        return []
    result = main_arms(recipe.part, recipe.pretraining)
    start = {"start": result[0].config}
    for target in recipe.targets if seed < recipe.target_seeds else ():
        kure = KureConfig(target=target)
        result.append(planned("kure", "target", recipe.fine_tuning, **start, regularizer=kure))
    for coefficient in recipe.coefficients if seed < recipe.coefficient_seeds else ():
        kure = KureConfig(coefficient=coefficient)
        result.append(planned("kure", "coefficient", recipe.fine_tuning, **start, regularizer=kure))
    for quantizer in (name for name, seeds in recipe.quantizers if seed < seeds):
        settings = recipe.fine_tuning | recipe.quantized_tuning | {"quantization": QatConfig.named(quantizer)}
        result += two_arms("qat", settings, **start)
    if seed < recipe.activation_seeds:
        result.append(planned("activations", "activations", recipe.fine_tuning, **start, regularizer=ACTIVATION_KURE))
    if seed < recipe.scratch_seeds:
        result.append(planned("scratch", "scratch", recipe.pretraining, regularizer=KURE))
    if seed < recipe.rival_seeds:
        there = {run.config for run in result}
        for contender in recipe.contenders:
            settings = _contending(recipe, contender, contender.strength, contender.decay)
            run = planned(contender.arm, "rivals", settings, **start)
            if run.config not in there:
                result.append(run)
    if seed < recipe.schedule_seeds:
        for schedule in recipe.schedules:
            result += two_arms("schedules", recipe.fine_tuning | schedule, **start)
    if seed < recipe.length_seeds:
        for epochs in recipe.lengths:
            result += main_arms("lengths", recipe.pretraining | {"epochs": epochs})
    if seed == 0 and recipe.held_out:
        first = planned("pretrained", "tuning", recipe.pretraining, held_out=recipe.held_out)
        tried = {"start": first.config, "held_out": recipe.held_out, "train_size": TUNING_SIZE}
        result.append(first)
        for contender in recipe.contenders:
            strengths = [(strength, 1.0) for strength in contender.strengths]
            for pair in dict.fromkeys([*strengths, *((contender.strength, decay) for decay in contender.decays)]):
                result.append(planned(contender.arm, "tuning", _contending(recipe, contender, *pair), **tried))
    return result


def _contending(recipe: Recipe, contender: Contender, strength: float | None, decay: float) -> dict:
    rival = RivalConfig(name=contender.rival, strength=strength) if contender.rival else None
    own = {"rival": rival, "regularizer": KURE if contender.kure else None}
    return recipe.fine_tuning | own | {"weight_decay": decay * recipe.fine_tuning["weight_decay"]}


def trained_spec(quantizer: str, weight_bits: int | None, step_ratio: float = 1.0, **renewed: bool) -> QuantizationSpec:
    """A network of quantization-aware training, tested with its own quantizer at these weight bits and step ratio.

    `renewed` says what is not as training left it: `refit`, `reestimate_batch_norm` or both.
    """
    qat = QatConfig.named(quantizer)
    bits = {"weight_bits": weight_bits, "activation_bits": qat.activation_bits}
    return QuantizationSpec(step_rule=qat.quantizer, step_ratio=step_ratio, **bits, **renewed)


def open(profile: str) -> Plan:
    """Make a profile the ambient one and return its plan: how every notebook begins."""
    planned = plan(profile)
    use_profile(profile)
    return planned


def needed(planned: Plan, stems: Iterable[str]) -> Plan:
    """The part of a plan that these notebooks read."""
    parts = set().union(*(NEEDS.get(stem[:2], set()) for stem in stems))
    return Plan(planned.profile, tuple(run for run in planned.runs if run.part in parts))
