"""The activations of a network: where they are, and how they are watched or replaced while a `with` block lasts.

A site is one use of a ReLU, or, in a network without them such as a transformer, of the input of a convolution or
linear layer. torchvision's residual blocks use one module twice, so a module's name is not enough: `layer1.0.relu:1` is
the second use of `layer1.0.relu` in a forward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from kure_lib.networks.layers import QUANTIZABLE, evaluating
from kure_lib.paths import KureError
from kure_lib.tensors.grids import SIGNED_INT, UNSIGNED, Grid

RELUS = (nn.ReLU, nn.ReLU6)


def rectified(model: nn.Module) -> bool:
    """Whether the network has ReLUs, whose outputs are its activations; otherwise they are the inputs of its layers."""
    return any(isinstance(module, RELUS) for module in model.modules())


def check_rectified(model: nn.Module) -> None:
    """Raise `KureError` for a network without ReLUs, where what is trained for their outputs means nothing."""
    if not rectified(model):
        raise KureError(f"{type(model).__name__} has no ReLUs, whose outputs quantization-aware training and KURE of "
                        "activations are about: train it in full precision, with KURE of its weights.")  # fmt: skip


def grid(model: nn.Module) -> Grid:
    """The grid of the activations: `UNSIGNED` after ReLUs, else `SIGNED_INT`."""
    return UNSIGNED if rectified(model) else SIGNED_INT


@contextmanager
def replaced(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> Iterator[nn.Module]:
    """The model with the output of every ReLU and ReLU6 replaced by `replace(site, output)`.

    Without any of them it is the input of every convolution and linear layer. Sites are named in the order of their
    use within one forward pass of `model`. After the block, also when an exception leaves it, the model computes what
    it did before.
    """
    uses: Counter[str] = Counter()
    relus = rectified(model)

    def hook(name: str, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> Tensor:
        site = f"{name}:{uses[name]}"
        uses[name] += 1
        return replace(site, inputs[0] if output is None else output)

    with ExitStack() as stack:
        stack.enter_context(model.register_forward_pre_hook(lambda *_: uses.clear()))
        for name, module in model.named_modules():
            if isinstance(module, RELUS if relus else QUANTIZABLE):
                watch = module.register_forward_hook if relus else module.register_forward_pre_hook
                stack.enter_context(watch(partial(hook, name)))
        yield model


@torch.no_grad()
def sites(model: nn.Module, images: Tensor) -> list[str]:
    """Every site in the order of its use, found by running a few images [N, C, H, W] through the model."""
    found: list[str] = []

    def note(site: str, output: Tensor) -> Tensor:
        found.append(site)
        return output

    with evaluating(model), replaced(model, note):
        model(images)
    return found


def quantized_sites(model: nn.Module, images: Tensor) -> list[str]:
    """The sites whose activations are quantized: all but the first and the last, as with the layers.

    Raises `KureError` if there is none, as in a network of two layers.
    """
    inner = sites(model, images)[1:-1]
    if not inner:
        raise KureError("There is no activation to quantize: the outputs of nn.ReLU and nn.ReLU6 are, or without any "
                        "the inputs of layers, but for the first and the last; leave activation_bits out.")  # fmt: skip
    return inner
