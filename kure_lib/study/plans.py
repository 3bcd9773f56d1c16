"""The runs of a profile, each in its place, and what they measure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import pandas as pd

from kure_lib.paths import KureError, use_profile
from kure_lib.study import runs
from kure_lib.study.profiles import NEEDS, PROFILES, TUNING_SIZE, Contender, Recipe
from kure_lib.training.configs import KureConfig, RivalConfig, RunConfig
from kure_lib.training.qat import QatConfig

KURE = KureConfig()  # the paper's setting everywhere: K_T = 1.8, λ = 1
ACTIVATION_KURE = KureConfig(of="activations")

FULL = 32  # bits of a tensor that is not quantized

ARMS = ("pretrained", "control", "kure", "scratch", "activations")  # and those of `Recipe.contenders`


ASIDE = ("tuning", "schedules")  # parts whose arms have the names of others


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


@dataclass(frozen=True)
class Plan:
    """The runs of a profile, each after the one it starts from."""

    profile: str
    runs: tuple[Planned, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    def quantizers(self, model: str) -> list[str]:
        """Those that networks of this architecture are trained with."""
        return list(dict.fromkeys(run.quantizer for run in self.runs if run.model == model and run.quantizer))

    def select(
        self, model: str | None = None, arm: str | None = None, part: str | None = None,
        seed: int | None = None, target: float | None = None, coefficient: float | None = None, quantizer: str = "",
    ) -> list[Planned]:  # fmt: skip
        """The runs that agree with every argument given, trained in full precision unless a `quantizer` is named.

        For `arm="kure"` with K_T = 1.8 and λ = 1 unless named; runs of tuning and of other schedules only where
        their `part` is named.
        """
        if arm == "kure" and part is None:
            target, coefficient = target or KURE.target, coefficient or KURE.coefficient

        def matches(run: Planned) -> bool:
            kure = run.config.regularizer
            pairs = [(model, run.model), (arm, run.arm), (part, run.part), (seed, run.seed),
                     (target, kure and kure.target), (coefficient, kure and kure.coefficient)]  # fmt: skip
            if part is None and run.part in ASIDE:
                return False
            return run.quantizer == quantizer and all(wanted is None or wanted == have for wanted, have in pairs)

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

        Columns: model, method (the arm), target, coefficient, seed, w_bits and a_bits (32: not quantized), grid,
        step_ratio, activation_ratio, top1 in percent, loss in nats; and of the run: kurtosis, the mean over its
        layers, and train_loss, of its last epoch in nats.
        """
        rows = []
        for run, spec in product(self.select(**wanted), specs):
            record, kure = runs.get(run.config), run.config.regularizer
            result = runs.evaluate(record, spec)
            rows.append({
                "model": run.model, "method": run.arm, "target": kure.target if kure else None,
                "coefficient": kure.coefficient if kure else 0.0, "seed": run.seed,
                "w_bits": spec.weight_bits or FULL, "a_bits": spec.activation_bits or FULL, "grid": spec.grid,
                "step_ratio": spec.step_ratio, "activation_ratio": spec.activation_ratio,
                "top1": result.top1, "loss": result.loss,
                "kurtosis": record.mean_kurtosis, "train_loss": record.curves.get("train_loss", [math.nan])[-1],
            })  # fmt: skip
        return pd.DataFrame(rows)


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
    for quantizer in (name for name, seeds in recipe.quantizers if seed < seeds):
        settings = recipe.fine_tuning | recipe.quantized_tuning | {"quantization": QatConfig.named(quantizer)}
        result.append(planned("control", "qat", settings, **start))
        result.append(planned("kure", "qat", settings, **start, regularizer=KURE))
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
            for arm, kure in (("control", None), ("kure", KURE)):
                settings = recipe.fine_tuning | schedule
                result.append(planned(arm, "schedules", settings, **start, regularizer=kure))
    if seed == 0 and recipe.held_out:
        first = planned("pretrained", "tuning", recipe.pretraining, held_out=recipe.held_out)
        tried = {"start": first.config, "held_out": recipe.held_out, "train_size": TUNING_SIZE}
        result.append(first)
        for contender in recipe.contenders:
            pairs = [(strength, 1) for strength in contender.strengths]
            pairs += [(contender.strength, decay) for decay in contender.decays]
            for pair in dict.fromkeys(pairs):
                result.append(planned(contender.arm, "tuning", _contending(recipe, contender, *pair), **tried))
    return result


def _contending(recipe: Recipe, contender: Contender, strength: float | None, decay: float) -> dict:
    rival = RivalConfig(method=contender.method, strength=strength) if contender.method else None
    own = {"rival": rival, "regularizer": KURE if contender.kure else None}
    return recipe.fine_tuning | own | {"weight_decay": decay * recipe.fine_tuning["weight_decay"]}


def trained_spec(quantizer: str, weight_bits: int | None, step_ratio: float = 1.0) -> runs.QuantizationSpec:
    """A network of quantization-aware training, tested with its own quantizer at these weight bits and step ratio."""
    qat = QatConfig.named(quantizer)
    bits = {"weight_bits": weight_bits, "activation_bits": qat.activation_bits}
    return runs.QuantizationSpec(method=qat.method, step_ratio=step_ratio, **bits)


def open(profile: str) -> Plan:
    """Make a profile the ambient one and return its plan: how every notebook begins."""
    planned = plan(profile)
    use_profile(profile)
    return planned


def needed(planned: Plan, stems: Iterable[str]) -> Plan:
    """The part of a plan that these notebooks read."""
    parts = set().union(*(NEEDS.get(stem[:2], set()) for stem in stems))
    return Plan(planned.profile, tuple(run for run in planned.runs if run.part in parts))
