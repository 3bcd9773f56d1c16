"""How a network is quantized, as one frozen value that travels whole."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)  # fmt: skip

from kure_lib.paths import KureError, check_known, refusal
from kure_lib.quantization import perturbations
from kure_lib.quantization.transforms import Transform
from kure_lib.tensors.grids import MID_RISE, MID_TREAD, SIGNED_INT, Bits, Codebook, Format, grid_named
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, Scope, parse_rule, per_block

IMAGES = 512  # training images to calibrate with, as many as the paper's authors take
ITERATIONS = 1000  # in which AdaRound learns to round a layer
SEARCH = 400  # evaluations of the loss, in all, that LAPQ's search may use
TRAINED_RULES = ("dorefa", "lsq")  # the quantizer that quantization-aware training left (see `training.qat`)

#: Ways in which weights lose bits when they are made from an 8-bit copy. `step` chooses a new step of least squared
#: error and rounds to it. The others drop low bits, so that the step doubles with each: `even` rounds to the nearest,
#: ties to even; `half_up` adds half a step and truncates, as a rounding shift in hardware does; `truncate` lowers every
#: weight by almost half a step on average; `middle` truncates, then reads a code as the middle of those it stands for.
ROUNDINGS = ("step", "even", "half_up", "truncate", "middle")

Validate = ModelWrapValidatorHandler["QuantizationSpec"]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], AfterValidator(lambda names: tuple(sorted(set(names))))]
NamedGrid = Annotated[Format, BeforeValidator(lambda grid: grid_named(grid) if isinstance(grid, str) else grid)]


class QuantizationSpec(BaseModel):
    """How a network is quantized; the defaults leave it in full precision.

    A specification that cannot be is refused with a `KureError` where it is made.

    Args:
        weight_bits: Bit-width of the weights of all convolutions and linear layers but the first and the last.
        layers: Names of the layers whose weights are quantized, of these; None for all of them.
        activation_bits: Bit-width of the outputs of all ReLUs but the first and the last, on the `UNSIGNED` grid; in a
            network without ReLUs, of the inputs of all layers but these, on the `SIGNED_INT` grid.
        step_rule: How steps are chosen: a rule of `steps.best_step`, "lapq", or the trained "dorefa" and "lsq".
        grid: Grid or codebook of the weights, or its name.
        scope: Which weights share a step: `PER_TENSOR`, `PER_CHANNEL` or `per_block(size)`.
        step_ratio: Factor Δ/Δ̃ on every weight step (paper, Fig. 4).
        activation_ratio: The same factor for activation steps.
        power_of_two: Whether every step is then rounded to a power of two (paper, Supp. Table 5).
        bias_correction: Whether each output channel keeps its mean and variance (Banner et al. 2019).
        fold_batch_norm: Whether batch norms are folded into the convolutions before anything is quantized.
        reestimate_batch_norm: Whether batch-norm statistics are taken anew from the quantized network; "means" or
            "variances" alone, where the others stay.
        calibration: Number of training images from which activations, statistics and LAPQ's steps are learned.
        search: Number of evaluations of the loss that LAPQ's search may use; None for all other step rules.
        rounding: How weights lose bits when they are made from an 8-bit copy instead of the network's own.
        reconstruction: How weights are rounded by what it does to each layer's output on calibration images, "gptq"
            or "adaround", instead of to the nearest level. Activations stay in full precision meanwhile.
        iterations: Steps in which AdaRound learns the rounding of a layer; None for all else.
        perturbation: What a device does to the weights beside quantizing them, as in `perturbations`: "steps 1.25",
            each layer's step off by a factor of its own; "flips 1e-4", bits that flip once all is corrected and
            re-estimated; "stochastic", rounding at random.
        draw: Which random numbers the perturbation takes; None without one.
        equalized: Whether the ranges of successive convolutions are equalized, once batch norms are folded.
        accumulator_bits: Bits of the accumulators in which layers sum the products of their codes, in two's complement;
            a sum that does not fit wraps around. None: they are as wide as they need to be.
        transform: What is done to linear layers before anything is quantized, as in `transforms`: "smoothed" or
            "rotated".
        refit: Whether a network of quantization-aware training takes weight steps of least squared error at these bits
            instead of those it was trained with.

    >>> QuantizationSpec(weight_bits=3, scope=PER_CHANNEL).key
    '{"per_channel": true, "weight_bits": 3}'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    weight_bits: int | None = Field(None, ge=1, le=16)
    layers: Names | None = None
    activation_bits: int | None = Field(None, ge=1, le=16)
    step_rule: str = "mse"
    grid: NamedGrid = MID_RISE
    scope: Scope = PER_TENSOR
    step_ratio: Ratio = 1.0
    activation_ratio: Ratio = 1.0
    power_of_two: bool = False
    bias_correction: bool = False
    fold_batch_norm: bool = False
    reestimate_batch_norm: bool | Literal["means", "variances"] = False
    calibration: int | None = Field(None, ge=1)
    search: int | None = Field(None, ge=1)
    rounding: str | None = None
    reconstruction: Literal["gptq", "adaround"] | None = None
    iterations: int | None = Field(None, ge=1)
    perturbation: Annotated[str, AfterValidator(perturbations.canonical)] | None = None
    draw: int | None = Field(None, ge=0)
    equalized: bool = False
    accumulator_bits: int | None = Field(None, ge=2, le=24)
    transform: Transform | None = None
    refit: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _name_calibration(cls, fields: Any, validate: Validate) -> "QuantizationSpec":
        """How many calibration images are taken is filled in where any are, and so are search, iterations and draw."""
        if isinstance(fields, QuantizationSpec):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        rule = fields.get("step_rule")
        searched = {"calibration": IMAGES, "search": SEARCH} if rule == "lapq" else {}
        learned = {"iterations": ITERATIONS} if fields.get("reconstruction") == "adaround" else {}
        drawn = {"draw": 0} if fields.get("perturbation") else {}
        needed = fields.get("reestimate_batch_norm")
        if rule not in TRAINED_RULES:  # which have the steps of their activations, and refuse the others
            needed = needed or any(map(fields.get, ("activation_bits", "reconstruction")))
            needed = needed or fields.get("transform") == "smoothed"
        calibrated = {"calibration": IMAGES} if needed else {}
        if "calibration" in fields and not needed and not searched and rule not in TRAINED_RULES:
            raise KureError(f"Nothing here looks at images: leave calibration={fields['calibration']!r} out.")
        try:
            return validate({**calibrated, **searched, **learned, **drawn, **fields})
        except ValidationError as error:
            raise refusal("A specification", error) from None

    @model_validator(mode="after")
    def _check(self) -> "QuantizationSpec":
        if self.layers is not None and self.weight_bits is None:
            raise KureError("Named layers have weights to quantize: give weight_bits, or leave layers out.")
        if self.search is not None and self.step_rule != "lapq":
            raise KureError(f"Only LAPQ searches: leave search={self.search} out, or take step_rule='lapq'.")
        if self.iterations is not None and self.reconstruction != "adaround":
            raise KureError(
                f"Only AdaRound learns: leave iterations={self.iterations} out, or take reconstruction='adaround'."
            )
        if self.refit and (self.step_rule not in TRAINED_RULES or self.weight_bits is None):
            raise KureError("Weight steps are refit where training left others: give weight_bits and the step_rule of "
                            f"the training, {' or '.join(TRAINED_RULES)}, or leave refit out.")  # fmt: skip
        if self.grid != grid_named(self.grid.name):
            raise KureError(f"{self.grid!r} is not the grid that records call {self.grid.name}: take that one.")
        if self.scope not in (PER_TENSOR, PER_CHANNEL) and (self.scope.name, bool(self.scope.size)) != ("block", True):
            raise KureError(f"There is no scope {self.scope!r}: take PER_TENSOR, PER_CHANNEL or per_block(size).")
        if self.rounding is not None:
            check_known("rounding", self.rounding, ROUNDINGS)
            self._allow_only(
                "made from an 8-bit copy", {"grid": SIGNED_INT},
                "weight_bits", "grid", "scope", "rounding", "reestimate_batch_norm", "calibration",
            )  # fmt: skip
            if self.weight_bits is None or self.weight_bits > 8 or self.scope.size:
                raise KureError("Weights made from an 8-bit copy have 1 to 8 bits, per tensor or per channel.")
        elif self.step_rule in TRAINED_RULES:
            allowed = ["step_rule", "weight_bits", "activation_bits", "step_ratio", "refit", "reestimate_batch_norm"]
            allowed += ["calibration"] if self.reestimate_batch_norm else []  # nothing else looks at images
            self._allow_only(f"quantized as it was trained, by {self.step_rule}", {}, *allowed)
        elif self.step_rule == "lapq":
            if self.scope != PER_TENSOR:
                raise KureError(f"LAPQ chooses one step a tensor, not {self.scope}: take another step rule or scope.")
            if self.reconstruction:
                raise KureError("LAPQ searches steps for rounding to the nearest level: leave reconstruction out.")
            if self.bits == Bits():
                raise KureError("LAPQ needs something to quantize: give weight_bits, activation_bits or both.")
        else:
            parse_rule(self.step_rule, self.scope)
            if self.activation_bits is not None:  # which have a step a site
                parse_rule(self.step_rule)
        if self.equalized and not self.fold_batch_norm:
            raise KureError("Ranges are equalized once batch norms are folded: give fold_batch_norm=True, or leave "
                            "equalized out.")  # fmt: skip
        if self.transform and self.fold_batch_norm:
            raise KureError(f"A {self.transform} network has linear layers alone, with no batch norm to fold: leave "
                            "fold_batch_norm or transform out.")  # fmt: skip
        if self.reconstruction and self.weight_bits is None:
            raise KureError(f"There are no weights to round by {self.reconstruction}: give weight_bits.")
        if self.reconstruction and self.bias_correction:
            raise KureError(f"Bias correction would move what {self.reconstruction} fits: leave bias_correction out.")
        if self.reconstruction == "adaround" and isinstance(self.grid, Codebook):
            raise KureError(f"AdaRound rounds up or down on an even grid, which {self.grid.name} is not: take a grid.")
        self._check_perturbation()
        if self.accumulator_bits is not None:
            whole = {"grid": SIGNED_INT, "bias_correction": False, "reconstruction": None, "perturbation": None}
            if self.weight_bits is None or self.scope.size or not 1 <= (self.activation_bits or 0) <= 8:
                raise KureError("An accumulator sums products of codes: give weight_bits, activation_bits of at most "
                                "8, and a step a tensor or a channel.")  # fmt: skip
            if wrong := [name for name, value in whole.items() if getattr(self, name) != value]:
                raise KureError(f"An accumulator sums whole numbers, which {wrong[0]}={getattr(self, wrong[0])!r} does "
                                f"not leave: take {wrong[0]}={whole[wrong[0]]!r}.")  # fmt: skip
        if isinstance(self.grid, Codebook) and self.weight_bits is not None:
            self.grid.levels(self.weight_bits)  # raises for a bit-width that is not the format's
        return self

    def _check_perturbation(self) -> None:
        if self.perturbation is None:
            if self.draw is not None:
                raise KureError(f"Only a perturbation is drawn: leave draw={self.draw} out, or give a perturbation.")
            return
        kind, _ = perturbations.parse(self.perturbation)
        if self.weight_bits is None:
            raise KureError(f"There are no quantized weights for '{self.perturbation}' to change: give weight_bits.")
        if self.reconstruction:
            raise KureError(f"{self.reconstruction} does not round as '{self.perturbation}' says: leave one of the two "
                            "out.")  # fmt: skip
        if kind != "steps" and (isinstance(self.grid, Codebook) or self.grid == MID_TREAD):
            raise KureError(f"'{self.perturbation}' is about codes of whole bits on an even grid, which "
                            f"{self.grid.name} has not: take mid_rise or signed_int.")  # fmt: skip

    def _allow_only(self, what: str, fixed: dict[str, Any], *allowed: str) -> None:
        """Raise `KureError` if a field beside `allowed` is not at its default, or one of `fixed` has another value."""
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        wrong = [name for name in changed if name not in allowed]
        wrong += [name for name, value in fixed.items() if getattr(self, name) != value]
        if wrong:
            raise KureError(f"A network {what} cannot take {wrong[0]}={getattr(self, wrong[0])!r}: leave it out.")

    @classmethod
    def named(cls, key: str) -> "QuantizationSpec":
        """The specification that has the key.

        >>> print(QuantizationSpec.named('{"weight_bits": 4, "per_channel": true}').scope)
        per channel
        """
        names = {name: field for field, name in _KEY_NAMES.items()}
        fields = {names.get(name, name): value for name, value in json.loads(key).items()}
        if fields.pop("per_channel", False):
            fields["scope"] = PER_CHANNEL
        if "block" in fields:
            fields["scope"] = per_block(fields.pop("block"))
        return cls(**fields)

    @property
    def bits(self) -> Bits:
        return Bits(self.weight_bits, self.activation_bits)

    @property
    def key(self) -> str:
        """The fields that are not at their defaults, as JSON: the name of the evaluation in its record."""
        fields = self.model_dump(exclude_defaults=True)
        for name, usual in (("search", SEARCH), ("iterations", ITERATIONS)):  # the defaults of LAPQ and AdaRound
            if fields.get(name) == usual:
                del fields[name]
        renamed = {_KEY_NAMES.get(name, name): value for name, value in fields.items() if name != "scope"}
        if "grid" in fields:
            renamed["grid"] = self.grid.name
        if self.scope == PER_CHANNEL:
            renamed["per_channel"] = True
        if self.scope.size:
            renamed["block"] = self.scope.size
        return json.dumps(renamed, sort_keys=True)


_KEY_NAMES = {"step_rule": "method", "rounding": "master"}  # as the records call them

#: The pipelines under which the study asks its main questions, each by the fields that it sets.
PIPELINES: dict[str, dict[str, Any]] = {
    "plain": {},  # a step of least squared error for each tensor, no images: isolates the effect, and flatters KURE
    "lapq": {"step_rule": "lapq"},  # the paper's: a step for each tensor that lowers the loss of calibration images
    "practice": {"scope": PER_CHANNEL, "bias_correction": True, "reestimate_batch_norm": True},  # what people do
}
