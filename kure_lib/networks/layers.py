"""Which layers of a network are regularized and which are quantized, and their full-precision weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize

from kure_lib.paths import KureError


def regularized_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every convolution but the first, by name, as in the authors' code.

    There are 19 in torchvision's ResNet-18, 51 in its MobileNet-V2 and 52 in its ResNet-50.
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return dict(list(convolutions.items())[1:])


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer but the first and the last, by name, as in the paper."""
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return dict(list(weighted.items())[1:-1])


def latent_weight(layer: nn.Module) -> Tensor:
    """The full-precision weight of a layer, also while it is trained quantized."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight


@contextmanager
def restored(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A block in which the layers' weights may be parametrized; afterwards they are the same plain parameters again.

    Raises `KureError` if one of them is parametrized already.
    """
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise KureError(f"Layer '{name}' is quantized already: leave that block before this one begins.")
    orders = {name: list(layer._parameters) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for parameter in orders[name]:  # an optimizer's state is kept by the order of the parameters
                layer._parameters[parameter] = layer._parameters.pop(parameter)
