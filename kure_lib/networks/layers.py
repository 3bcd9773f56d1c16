"""Which layers of a network are regularized and which are quantized, and their full-precision weights."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from kure_lib.paths import KureError, check_known

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)  # layers whose weights can be quantized
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def followed(model: nn.Module, advice: str) -> fx.Graph:
    """The calls of a network in their order, down to modules that hold no others.

    Raises `KureError`, which ends in `advice`, for a network that cannot be followed so.
    """
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the network does
        name, reason = type(model).__name__, type(error).__name__
        raise KureError(f"{name} cannot be followed from layer to layer ({reason}): {advice}.") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; afterwards each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name; `KureError` if this is no network, or one whose weights are not there yet."""
    if not isinstance(model, nn.Module):
        raise KureError(f"{reprlib.repr(model)} is no network: give a torch.nn.Module.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise KureError(f"The parameter '{name}' has no values yet: pass a batch of images through the network.")
    return dict(model.named_modules())


def regularized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution but the first, as in the authors' code, and every linear layer but the last, by name.

    These are 19 convolutions in torchvision's ResNet-18, 51 in its MobileNet-V2 and 52 in its ResNet-50, whose one
    linear layer is the last. A transformer has its linear layers, but not the projections that `nn.MultiheadAttention`
    keeps in a parameter of its own.
    """
    layers = {name: m for name, m in _modules(model).items() if isinstance(m, QUANTIZABLE)}
    convolutions = [name for name, layer in layers.items() if isinstance(layer, CONVOLUTIONS)]
    linear = [name for name in layers if name not in convolutions]
    spared = {*convolutions[:1], *linear[-1:]}
    return {name: layer for name, layer in layers.items() if name not in spared}


#: Layers whose weights nothing here can reach.
OUT_OF_REACH = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvTransposeNd)


def quantized_layers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Every convolution and linear layer but the first and the last, by name, as in the paper; or those of `names`.

    Raises `KureError` if there is none or one of the names is not among them, for a network of TorchScript or one that
    has no weights yet, and, unless names are given, for one with weights that would stay in full precision, such as
    those of attention.
    """
    modules = _modules(model)
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise KureError(f"'{name or type(model).__name__}' is compiled by torch.jit, where weights cannot be "
                            "quantized: take the network from before it was scripted or traced.")  # fmt: skip
        if names is None and isinstance(module, OUT_OF_REACH):
            raise KureError(f"'{name}' ({type(module).__name__}) has weights that would stay in full precision: name "
                            "the layers to quantize instead, with layers=.")  # fmt: skip
    weighted = {name: m for name, m in modules.items() if isinstance(m, QUANTIZABLE)}
    chosen = dict(list(weighted.items())[1:-1])
    if names is not None:
        names = list(names)
        for name in names:
            check_known("quantized layer", name, chosen)
        chosen = {name: layer for name, layer in chosen.items() if name in names}
    if not chosen:
        raise KureError("There is no layer to quantize: take a network with convolutions or linear layers between its "
                        "first and its last, which stay in full precision, or leave weight_bits out.")  # fmt: skip
    return chosen


class LatentWeight(nn.Module):
    """A parametrization that a block lays over the full-precision weight of a layer, and takes away again."""


def latent_weight(layer: nn.Module) -> Tensor:
    """The full-precision weight that a layer computes with, also while it is trained quantized.

    It is the weight below a quantizer, but above what the network itself is made with, such as an orthogonal
    parametrization.
    """
    laid_over = parametrize.is_parametrized(layer, "weight") and isinstance(
        layer.parametrizations.weight[0], LatentWeight
    )
    return layer.parametrizations.weight.original if laid_over else layer.weight


@contextmanager
def restored(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A block in which the layers' weights may be parametrized; afterwards they are the same plain parameters again.

    Raises `KureError` if one of them is no plain parameter: quantized already, or computed by the network itself.
    """
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            (first, *_) = layer.parametrizations.weight
            if isinstance(first, LatentWeight):
                raise KureError(f"Layer '{name}' is quantized already: leave that block before this one begins.")
            raise KureError(f"The weight of layer '{name}' is parametrized ({type(first).__name__}): make it plain "
                            "with torch.nn.utils.parametrize.remove_parametrizations first.")  # fmt: skip
        if "weight" not in layer._parameters:
            raise KureError(f"Layer '{name}' computes its weight, as weight_norm, spectral_norm and pruning do: make "
                            "it plain by remove_weight_norm, remove_spectral_norm or prune.remove.")  # fmt: skip
    orders = {name: list(layer._parameters) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for parameter in orders[name]:  # an optimizer's state is kept by the order of the parameters
                layer._parameters[parameter] = layer._parameters.pop(parameter)
