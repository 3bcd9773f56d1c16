"""A quantized network is a view of the full-precision one, for as long as a `with` block lasts."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kure_lib.paths import KureError
from kure_lib.quantizers import MID_RISE, Grid, quantize
from kure_lib.steps import best_step


class QuantizationSpec(BaseModel):
    """How a network is quantized for an evaluation; the defaults are full precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int | None = Field(None, ge=1, le=16)
    method: str = "mse"
    grid: str = "mid_rise"
    step_ratio: float = Field(1.0, gt=0)
    per_channel: bool = False

    @property
    def key(self) -> str:
        """The fields that are not at their defaults, as JSON: the name of the evaluation in its record."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer but the first and the last, by name: what the paper quantizes."""
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return dict(list(weighted.items())[1:-1])


class FakeQuantize(nn.Module):
    """The parametrization W → Q_Δ(W)."""

    def __init__(self, step: Tensor, bits: int, grid: Grid):
        super().__init__()
        self.bits, self.grid = bits, grid
        self.register_buffer("step", step)

    def forward(self, weight: Tensor) -> Tensor:
        return quantize(weight, self.step, self.bits, self.grid)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.grid.name}, step {tuple(self.step.shape)}"


@contextmanager
def quantized(
    model: nn.Module,
    weight_bits: int | None,
    method: str = "mse",
    grid: Grid = MID_RISE,
    step_ratio: float = 1.0,
    layers: Iterable[str] | None = None,
    per_channel: bool = False,
) -> Iterator[nn.Module]:
    """The model with the weights of its layers quantized to `weight_bits`; None leaves them as they are.

    The step of each layer is chosen by `method` (see `steps.best_step`) and multiplied by `step_ratio`, the
    Δ/Δ̃ of the paper's Fig. 4. `layers` names the layers; the default is all but the first and the last.
    The weights themselves are never written to: after the block, also when an exception leaves it, the
    model is what it was. Raises `KureError` for an unknown layer and for weights that cannot be quantized.
    """
    chosen = quantized_layers(model)
    if layers is not None:
        layers = list(layers)
        if unknown := [name for name in layers if name not in chosen]:
            raise KureError(f"'{unknown[0]}' is not a layer that is quantized: choose from {', '.join(chosen)}.")
        chosen = {name: chosen[name] for name in layers}
    if not step_ratio > 0:
        raise KureError(f"The step ratio must be above zero, not {step_ratio}.")
    if weight_bits is None:
        yield model
        return
    parametrized = []
    try:
        for name, layer in chosen.items():
            if parametrize.is_parametrized(layer, "weight"):
                raise KureError(f"Layer '{name}' is quantized already: leave that block before this one begins.")
            try:
                step = best_step(layer.weight, weight_bits, grid, method, per_channel) * step_ratio
            except KureError as error:
                raise KureError(f"Layer '{name}' cannot be quantized: {error}") from None
            view = FakeQuantize(step.to(layer.weight.device), weight_bits, grid)
            order = list(layer._parameters)
            parametrize.register_parametrization(layer, "weight", view)
            parametrized.append((layer, order))
        yield model
    finally:
        for layer, order in parametrized:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for name in order:  # an optimizer's state is kept by the order of the parameters
                layer._parameters[name] = layer._parameters.pop(name)
