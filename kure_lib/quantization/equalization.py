"""Cross-layer equalization: the channels between two convolutions are rescaled until both have the same ranges there.

A ReLU commutes with a positive scale, so that dividing an output channel of one convolution and multiplying the
input channel of the next by the same number leaves the network as it was, and changes what one step a tensor costs
(Nagel et al. 2019, Sec. 4.1).
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from kure_lib.networks.layers import followed
from kure_lib.paths import KureError

ROUNDS, CLOSE = 100, 1e-6  # sweeps over all pairs at most, and the largest logarithm of a scale that ends them


class Pair(NamedTuple):
    """Two convolutions by name, and the clipped ReLUs between them."""

    first: str
    second: str
    clips: tuple[str, ...]


class ClippedReLU(nn.ReLU6):
    """A ReLU that ends at a limit of each channel's own, [C, 1, 1]: a ReLU6 of rescaled channels."""

    def __init__(self, limits: Tensor):
        super().__init__()
        self.register_buffer("limits", limits)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x.relu(), self.limits.to(x.dtype))


def pairs(model: nn.Module) -> list[Pair]:
    """Every two convolutions with nothing but ReLUs, clipped or not, between them and no other reader of the first.

    Raises `KureError` if the network cannot be followed from layer to layer.
    """
    return list(_pairs(model, followed(model, "leave equalized out")))


def _pairs(model: nn.Module, graph: fx.Graph) -> Iterator[Pair]:
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for start in graph.nodes:
        node, clips = start, list[str]()
        if _module(model, start, nn.Conv2d) is None or calls.count(start.target) > 1:
            continue
        while len(node.users) == 1:
            (node,) = node.users
            if _module(model, node, nn.Conv2d) is not None and calls.count(node.target) == 1:
                yield Pair(start.target, node.target, tuple(clips))
                break
            if _module(model, node, nn.ReLU6) is not None and calls.count(node.target) == 1:
                clips.append(node.target)
            elif _module(model, node, nn.ReLU | nn.Identity) is None:
                break


def _module(model: nn.Module, node: fx.Node, kinds: type) -> nn.Module | None:
    module = model.get_submodule(node.target) if node.op == "call_module" else None
    return module if isinstance(module, kinds) else None


def ranges(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    """The largest magnitude of the first convolution's weights in each output channel, and of the second's in each
    input channel: [C], both."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    return first.weight.abs().amax((1, 2, 3)), _by_input(second).abs().amax((1, 3, 4)).flatten()


def _by_input(layer: nn.Conv2d) -> Tensor:
    """The weights as [groups, outputs of a group, inputs of a group, height, width]; no copy."""
    weight = layer.weight.detach()
    return weight.view(layer.groups, -1, *weight.shape[1:])


@torch.no_grad()
def equalized(model: nn.Module) -> nn.Module:
    """A copy of a folded network in which the two convolutions of every pair have the same range in each channel.

    It computes what the network did: biases are rescaled too, and a ReLU6 ends at a limit of each channel's own, where
    Nagel et al. take its limit away. A channel that is zero on one side stays as it is.

    Raises `KureError` if there is no pair, as in a network whose batch norms have not been folded.
    """
    model = copy.deepcopy(model)
    found = pairs(model)
    if not found:
        raise KureError("There are no two convolutions in a row to equalize: fold the batch norms first, or leave "
                        "equalized out.")  # fmt: skip
    for name in {name for pair in found for name in (pair.first, pair.second)}:
        layer = model.get_submodule(name)
        for key, value in list(layer.named_parameters()):  # another layer may share them
            layer.register_parameter(key, nn.Parameter(value.clone()))
    total = {pair: torch.ones_like(ranges(model, pair)[0]) for pair in found}
    for _ in range(ROUNDS):
        furthest = 0.0
        for pair in found:
            ahead, behind = ranges(model, pair)
            scale = torch.where((ahead > 0) & (behind > 0), (ahead / behind).sqrt(), 1.0)
            _rescale(model.get_submodule(pair.first), model.get_submodule(pair.second), scale)
            total[pair] *= scale
            furthest = max(furthest, scale.log().abs().max().item())
        if furthest < CLOSE:
            break
    for pair, scale in total.items():
        for name in pair.clips:
            clip = model.get_submodule(name)
            limits = clip.limits if isinstance(clip, ClippedReLU) else torch.full_like(scale, 6.0)[:, None, None]
            model.set_submodule(name, ClippedReLU(limits / scale[:, None, None]))
    return model


def _rescale(first: nn.Conv2d, second: nn.Conv2d, scale: Tensor) -> None:
    first.weight /= scale[:, None, None, None]
    if first.bias is not None:
        first.bias /= scale
    _by_input(second).mul_(scale.view(second.groups, 1, -1, 1, 1))
