"""What decides what a training run computes, as frozen values: a run's configuration, its key and its label."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kure_lib.training.qat import QatConfig

TRAINING_VERSION = 1  # raise it when the same configuration would give other weights

Positive = Annotated[float, Field(gt=0)]
Architecture = Literal["resnet20", "mobilenet_v2_050", "resnet18", "resnet50", "mobilenet_v2"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KureConfig(Frozen):
    """The KURE term of a run: K_T, λ, the reduction over layers, per tensor or per channel.

    Of `activations` instead of weights it is `regularizers.ActivationKurtosisRegularizer`, which has no other settings.
    """

    target: float = Field(1.8, ge=1)
    coefficient: Positive = 1.0
    reduction: Literal["mean", "sum", "max"] = "mean"
    per_channel: bool = False
    of: Literal["weights", "activations"] = "weights"

    @model_validator(mode="after")
    def _check(self) -> "KureConfig":
        if self.of == "activations" and (self.reduction != "mean" or self.per_channel):
            raise ValueError("KURE of activations is per tensor, with the mean over them")
        return self


class RivalConfig(Frozen):
    """Another way to robustness (see `rivals`), in place of KURE or beside it; `strength` is explained there."""

    method: Literal[
        "gradient_l1", "range", "outliers", "entropy", "variation", "wasserstein", "noise", "sam", "ema"
    ]  # fmt: skip
    strength: Positive


class RunConfig(Frozen):
    """Everything that decides what a training run computes.

    `start` is the run whose weights this one begins with. The learning rate follows one cycle (Smith 2018)
    that peaks at `learning_rate`, or, with `decay_every`, is multiplied by `decay_factor` every so many
    epochs. `train_size` keeps only the first so many training images; `held_out` takes so many of the last ones away,
    and the run is tested on these instead of the test images, so that settings can be chosen by them.
    """

    model: Architecture
    data: Literal["fashion_mnist", "cifar10", "imagenet"] = "fashion_mnist"
    train_size: int | None = Field(None, ge=1)
    held_out: int = Field(0, ge=0)
    seed: int = 0
    start: "RunConfig | None" = None
    pretrained: bool = False
    epochs: int = Field(ge=0)
    learning_rate: Positive
    weight_decay: float = Field(ge=0)
    batch_size: int = Field(256, ge=2)
    momentum: float = Field(0.9, ge=0, lt=1)
    decay_every: int | None = Field(None, ge=1)
    decay_factor: Positive = 0.1
    regularizer: KureConfig | None = None
    quantization: QatConfig | None = None
    rival: RivalConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.rival and self.quantization:
            raise ValueError("a rival is compared in full precision: leave quantization out")
        if self.held_out and self.data == "imagenet":
            raise ValueError("held_out takes images from the end of a set that is not sorted by class, as ImageNet is")
        return self

    @property
    def key(self) -> str:
        """Ten hexadecimal digits that stand for this configuration and `TRAINING_VERSION`.

        Fields at their defaults do not count, so that a new one leaves the old keys as they are.
        """
        content = {"version": TRAINING_VERSION, **self.model_dump(mode="json", exclude_defaults=True)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def label(self) -> str:
        """A readable name; together with the key it names the files of the run."""
        kure, rival, qat, start = self.regularizer, self.rival, self.quantization, self.start
        of = "activations-" if kure and kure.of == "activations" else ""
        parts = [self.model]
        parts += [f"{qat.method}-{qat.weight_bits}-{qat.activation_bits}"] if qat else []
        parts += [f"kure-{of}{kure.target:g}-{kure.coefficient:g}"] if kure else []
        parts += [f"{rival.method}-{rival.strength:g}"] if rival else []
        parts += ["control" if start else "pretrained"] if not (kure or rival) else []
        parts += ["scratch"] if kure and not start else []
        if start:  # what differs from it and is not the stage's own
            parts += [f"decay-{self.weight_decay:g}"] if self.weight_decay != start.weight_decay else []
            parts += [f"every-{self.decay_every}"] if self.decay_every != start.decay_every else []
        parts += ["held-out"] if self.held_out else []
        return "-".join([*parts, f"seed{self.seed}"])
