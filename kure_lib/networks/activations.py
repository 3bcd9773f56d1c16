"""The activations of a network: where they are, and how they are watched or replaced while a `with` block lasts.

A site is one use of a ReLU. torchvision's residual blocks use one module twice, so a module's name is not
enough: `layer1.0.relu:1` is the second use of `layer1.0.relu` in a forward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kure_lib.paths import KureError


@contextmanager
def replaced(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> Iterator[nn.Module]:
    """The model with the output of every ReLU and ReLU6 replaced by `replace(site, output)`.

    Sites are named in the order of their use within one forward pass of `model`. After the block, also when
    an exception leaves it, the model computes what it did before.
    """
    uses: Counter[str] = Counter()
    handles = [model.register_forward_pre_hook(lambda *_: uses.clear())]

    def hook_for(name: str) -> Callable:
        def hook(module, inputs, output):
            site = f"{name}:{uses[name]}"
            uses[name] += 1
            return replace(site, output)

        return hook

    handles += [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU | nn.ReLU6)
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sites(model: nn.Module, images: Tensor) -> list[str]:
    """Every site in the order of its use, found by running a few images [N, C, H, W] through the model."""
    found: list[str] = []

    def note(site: str, output: Tensor) -> Tensor:
        found.append(site)
        return output

    training = model.training
    model.eval()
    with replaced(model, note):
        model(images)
    model.train(training)
    return found


def quantized_sites(model: nn.Module, images: Tensor) -> list[str]:
    """The sites whose activations are quantized: all but the first and the last, as with the layers.

    Raises `KureError` if there is none, as in a network without ReLUs.
    """
    inner = sites(model, images)[1:-1]
    if not inner:
        raise KureError("There is no activation to quantize: only the outputs of nn.ReLU and nn.ReLU6 are, but for the "
                        "first and the last; leave activation_bits out.")  # fmt: skip
    return inner
