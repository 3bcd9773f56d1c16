"""What decides what a training run computes, as frozen values: a run's configuration, its key and its label."""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)  # fmt: skip

from kure_lib.networks.data import SOURCES
from kure_lib.networks.models import NETWORKS
from kure_lib.networks.published import DIGITS
from kure_lib.paths import KureError, check_known, refusal
from kure_lib.quantization.spec import TRAINED_RULES
from kure_lib.tensors.grids import Bits
from kure_lib.training.regularizers import REDUCTIONS
from kure_lib.training.rivals import RIVALS

OF_WHOLE_BATCHES = ("gradient_l1", "kure_of_activations")  # penalties on what all images of a step make together
TRAINING_VERSION = 1  # raise it when the same configuration would give other weights

Positive = Annotated[float, Field(gt=0)]


def _one_of(kind: str, table: Iterable[str]) -> AfterValidator:
    def check(name: str) -> str:
        check_known(kind, name, table)
        return name

    return AfterValidator(check)


def _written_as_method(name: str) -> Any:
    """The field of that name is called "method" in JSON, hence in keys and records; input takes both."""
    return Field(validation_alias=AliasChoices(name, "method"), serialization_alias="method")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Config(Frozen):
    """Settings of a run; those that cannot be are refused with a `KureError` where they are made."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, fields: Any, validate: ModelWrapValidatorHandler) -> Any:
        try:
            return validate(fields)
        except ValidationError as error:
            raise refusal(f"A {cls.__name__}", error) from None


class KureConfig(Config):
    """The KURE term of a run: K_T, λ, the reduction over layers, per tensor or per channel.

    Of `activations` instead of weights it is `regularizers.ActivationKurtosisRegularizer`, which has no other settings.
    """

    target: float = Field(1.8, ge=1)
    coefficient: Positive = 1.0
    reduction: Annotated[str, _one_of("reduction", REDUCTIONS)] = "mean"
    per_channel: bool = False
    of: Literal["weights", "activations"] = "weights"

    @model_validator(mode="after")
    def _check(self) -> "KureConfig":
        if self.of == "activations" and (self.reduction != "mean" or self.per_channel):
            raise KureError("KURE of activations is per tensor, with the mean over them: leave the other options out.")
        return self


class QatConfig(Config):
    """How a run is quantized while it is trained. LSQ needs two bits for weights: at one its Q_p is zero."""

    quantizer: Annotated[str, _one_of("quantizer", TRAINED_RULES), _written_as_method("quantizer")]
    weight_bits: int = Field(ge=2, le=16)
    activation_bits: int = Field(ge=1, le=16)

    @property
    def bits(self) -> Bits:
        return Bits(self.weight_bits, self.activation_bits)

    @property
    def name(self) -> str:
        return f"{self.quantizer} {self.bits}"

    @classmethod
    def named(cls, name: str) -> "QatConfig":
        """From its name, such as "lsq 4/8": the quantizer, the bits of weights and those of activations."""
        quantizer, _, bits = name.partition(" ")
        widths = Bits.named(bits)
        fields = {"quantizer": quantizer, "weight_bits": widths.weight, "activation_bits": widths.activation}
        return cls.model_validate(fields)


class RivalConfig(Config):
    """Another way to robustness, in place of KURE or beside it; `rivals` explains what `strength` is for each."""

    name: Annotated[str, _one_of("rival", RIVALS), _written_as_method("name")]
    strength: Positive


class RunConfig(Config):
    """Everything that decides what a training run computes."""

    model: Annotated[str, _one_of("architecture", NETWORKS)]
    data: Annotated[str, _one_of("data set", SOURCES)] = "fashion_mnist"
    train_size: int | None = Field(None, ge=1)  # only so many of the first images are trained on
    test_size: int | None = Field(None, ge=1)  # so many of the first are tested on; unless said, as many as train_size
    held_out: int = Field(0, ge=0)  # so many of the last training images replace the test images, to choose settings by
    seed: int = Field(0, ge=0, lt=2**40)  # the seeds of its epochs are 64-bit numbers made of it
    start: "RunConfig | None" = None  # the run whose weights this one begins with
    pretrained: bool = False  # begins with torchvision's ImageNet weights
    epochs: int = Field(ge=0)
    learning_rate: Positive  # the peak of one cycle (Smith 2018) or, with `decay_every`, the rate of the first epochs
    weight_decay: float = Field(ge=0)
    batch_size: int = Field(256, ge=2)
    momentum: float = Field(0.9, ge=0, lt=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"  # AdamW's first moment decays by `momentum`
    decay_every: int | None = Field(None, ge=1)  # epochs after which the learning rate is multiplied by `decay_factor`
    decay_factor: Positive = 0.1
    regularizer: KureConfig | None = None
    quantization: QatConfig | None = None
    rival: RivalConfig | None = None
    kept: Literal["float32", "float16"] = "float32"  # in which the trained weights are kept; vectors always in float32
    replicas: int = Field(1, ge=1)  # processes that share every batch, so that batch norm sees their part of it alone

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.test_size and self.held_out:
            raise KureError("A run is tested on test images or on held-out ones: leave test_size or held_out out.")
        if self.rival and self.quantization:
            raise KureError("A rival is compared in full precision: leave quantization out.")
        if self.pretrained:
            check_known("network with published weights", self.model, DIGITS)
        if self.pretrained and self.start:
            raise KureError("A run begins with published weights or with those of another run: leave pretrained or "
                            "start out.")  # fmt: skip
        if self.start and (self.start.model, self.start.data) != (self.model, self.data):
            start = f"{self.start.model} on {self.start.data}"
            raise KureError(f"A {self.model} on {self.data} cannot start from a {start}: take a run of the same "
                            "network and data.")  # fmt: skip
        if min(self.batch_size, self.train_size or self.batch_size) % self.replicas:
            raise KureError(f"A batch of {self.batch_size} images cannot be shared equally among {self.replicas} "
                            "processes: take a number of them that divides it.")  # fmt: skip
        if self.replicas > 1 and (unshared := set(OF_WHOLE_BATCHES) & set(self.methods)):
            raise KureError(f"The penalty {min(unshared)} is one on whole batches, of which each of {self.replicas} "
                            "processes would see a part: train it in one.")  # fmt: skip
        return self

    @property
    def methods(self) -> dict[str, Frozen]:
        """Settings by the name of their training method, in the order in which penalties add."""
        kure = self.regularizer and ("kure_of_activations" if self.regularizer.of == "activations" else "kure")
        qat, rival = self.quantization and self.quantization.quantizer, self.rival and self.rival.name
        settings = {qat: self.quantization, kure: self.regularizer, rival: self.rival}
        return {name: each for name, each in settings.items() if name and each}

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
        parts += [f"{qat.quantizer}-{qat.weight_bits}-{qat.activation_bits}"] if qat else []
        parts += [f"kure-{of}{kure.target:g}-{kure.coefficient:g}"] if kure else []
        parts += [f"{rival.name}-{rival.strength:g}"] if rival else []
        parts += ["control" if start else "pretrained"] if not (kure or rival) else []
        parts += ["scratch"] if kure and not start else []
        if start:  # what differs from it and is not the stage's own
            parts += [f"decay-{self.weight_decay:g}"] if self.weight_decay != start.weight_decay else []
            parts += [f"every-{self.decay_every}"] if self.decay_every != start.decay_every else []
        parts += ["held-out"] if self.held_out else []
        parts += [f"replicas-{self.replicas}"] if self.replicas > 1 else []
        return "-".join([*parts, f"seed{self.seed}"])
