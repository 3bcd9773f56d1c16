"""What makes a transformer easier to quantize and computes the same: the inputs of linear layers scaled or rotated.

A linear layer multiplies its input x by its weights W, so that any invertible matrix A may come between them:
W x = (W A⁻ᵀ)(Aᵀ x). Smoothing takes a diagonal A, which moves the outliers of the activations into the weights;
rotation takes an orthogonal one, which mixes channels until no channel stands out.
"""

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from kure_lib.networks import activations, layers
from kure_lib.paths import KureError

Transform = Literal["smoothed", "rotated"]
BLOCK = 64  # channels that are rotated among themselves
MIGRATION = 0.5  # how much of a channel's range smoothing takes from its activations: α of Xiao et al. (2023), Eq. 4


def transformed(model: nn.Module, kind: Transform, images: Tensor | None = None) -> nn.Module:
    """A copy of the model that computes the same, with every linear layer but the first and the last transformed.

    Args:
        model: A network in full precision, without ReLUs, whose layers but for the first and the last are all linear.
        kind: "smoothed": each input channel j is divided by s_j = max|x_j|^½ / max|w_j|^½ and its weights are
            multiplied by it, as in SmoothQuant (Xiao et al. 2023, Eq. 4), here at every layer and not only after layer
            norms. "rotated": input and weights are rotated by a Hadamard matrix in blocks of 64 channels, as in QuaRot
            (Ashkboos et al. 2024), with no part of it folded into other layers.
        images: Images [N, C, H, W] by which channels are smoothed.

    Raises:
        KureError: The network has ReLUs; or one of the layers is a convolution, has channels that are no whole number
            of blocks, or is to be smoothed without images or by such as do not reach it.
    """
    if activations.rectified(model):
        raise KureError(f"{type(model).__name__} has ReLUs, whose outputs would be quantized before they are {kind}: "
                        "leave transform out.")  # fmt: skip
    model = copy.deepcopy(model).eval()
    inner = layers.quantized_layers(model)
    for name, layer in inner.items():
        if not isinstance(layer, nn.Linear):
            raise KureError(f"Layer '{name}' is no linear layer, and only those can be {kind}: leave transform out.")
    if kind == "rotated":
        for name, layer in inner.items():
            _rotate(name, layer)
        return model
    if images is None or not len(images):
        raise KureError("Channels are smoothed by what they see: give at least one image.")
    ranges = channel_ranges(model, images, inner)
    for name, layer in inner.items():
        if name not in ranges:
            raise KureError(f"The images do not reach layer '{name}', which is to be smoothed by what it sees: give "
                            "images that do, or leave transform out.")  # fmt: skip
        _smooth(layer, ranges[name])
    return model


@torch.inference_mode()
def channel_ranges(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The largest magnitude of every input channel of the named linear layers on images [N, C, H, W]: [channels]."""
    wanted, found = {f"{name}:0": name for name in names}, dict[str, Tensor]()

    def note(site: str, x: Tensor) -> Tensor:
        if site in wanted:
            found[wanted[site]] = x.float().abs().flatten(0, -2).amax(0)
        return x

    with activations.replaced(model.eval(), note):
        model(images)
    return found


def _rotate(name: str, layer: nn.Linear) -> None:
    if layer.in_features % BLOCK:
        raise KureError(f"Layer '{name}' has {layer.in_features} input channels, which are no whole number of blocks "
                        f"of {BLOCK}: leave transform out.")  # fmt: skip
    rotation = torch.from_numpy(hadamard(BLOCK) / BLOCK**0.5).float().to(layer.weight.device)

    def rotated(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, BLOCK)) @ rotation.to(x.dtype)).flatten(-2)

    layer.weight = nn.Parameter(rotated(layer.weight.detach()))  # one of its own: another layer may share the old one
    layer.register_forward_pre_hook(lambda _, inputs: rotated(inputs[0]))


def _smooth(layer: nn.Linear, highest: Tensor) -> None:
    ranges = layer.weight.detach().abs().amax(0)
    scale = torch.where((highest > 0) & (ranges > 0), highest**MIGRATION / ranges ** (1 - MIGRATION), 1.0)
    layer.weight = nn.Parameter(layer.weight.detach() * scale)
    layer.register_forward_pre_hook(lambda _, inputs: inputs[0] / scale.to(inputs[0].dtype))
