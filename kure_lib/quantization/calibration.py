"""Calibration on a few training images: steps of activations, and statistics of batch norms."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from kure_lib.networks import activations, device
from kure_lib.networks.layers import BATCH_NORMS, evaluating
from kure_lib.paths import KureError
from kure_lib.quantization.spec import IMAGES
from kure_lib.tensors.grids import UNSIGNED, Grid
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import best_step

RENEWED = {"means": "running_mean", "variances": "running_var"}  # by the name of what alone is taken anew
BATCH = 256  # images at a time for new batch-norm statistics
KEPT = 2**18  # values of a site that are looked at, evenly spread over images, channels and positions


def images(name: str, size: int = IMAGES) -> tuple[Tensor, Tensor]:
    """The first `size` training images of a data set, not augmented, and their labels, on the device of evaluation.

    Raises `KureError` if there are none.
    """
    from kure_lib.networks import data  # needs torchvision, which a network of the user's own does not

    batch, labels = next(data.load(name, "train").head(size).batches(max(size, 1)), (torch.empty(0), None))
    if not len(batch):
        raise KureError("The calibration set is empty: give at least one image.")
    return batch.to(device.device()), labels.to(device.device())


@torch.inference_mode()
def observe(model: nn.Module, batch: Tensor) -> dict[str, EmpiricalDistribution]:
    """The activations at every quantized site of the model in float32, for a batch of images [N, C, H, W]."""
    wanted = set(activations.quantized_sites(model, batch[:1]))
    seen: dict[str, EmpiricalDistribution] = {}

    def note(site: str, output: Tensor) -> Tensor:
        if site in wanted:
            values = output.flatten()
            if values.numel() > KEPT:  # a whole stride would see the same few positions of every image
                values = values[torch.linspace(0, values.numel() - 1, KEPT, dtype=torch.float64).long()]
            seen[site] = EmpiricalDistribution(values)
        return output

    with evaluating(model), activations.replaced(model, note):
        model(batch)
    return seen


def parts(images: Tensor) -> tuple[Tensor, ...]:
    """Images in batches of equal size but for one, so that a mean over batches is one over images."""
    return images.chunk(-(-len(images) // BATCH))


@torch.inference_mode()
def seen_by_norms(model: nn.Module, batch: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Variance and mean of every channel before each batch norm, in the order of their use, for images [N, C, H, W]."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, x: tuple[Tensor]) -> None:
        found.append(torch.var_mean(x[0], (0, 2, 3)))

    hooks = [each.register_forward_pre_hook(note) for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def activation_steps(
    observed: Mapping[str, EmpiricalDistribution], bits: int, rule: str = "mse", grid: Grid = UNSIGNED
) -> dict[str, Tensor]:
    """The step of every observed site on the grid of the activations, chosen by `rule` (see `steps.best_step`).

    Raises `KureError` naming the site if its activations are zero for all images: it cannot be calibrated.
    """
    chosen = {}
    for site, seen in observed.items():
        try:
            chosen[site] = best_step(seen, bits, grid, rule)
        except KureError as error:
            raise KureError(f"The activations at '{site}' cannot be calibrated: {error}") from None
    return chosen


@contextmanager
def reestimated_batch_norm(
    model: nn.Module, batches: Iterable[Tensor], which: bool | Literal["means", "variances"] = True
) -> Iterator[nn.Module]:
    """The model with the statistics of its batch norms taken anew from batches of images; restored afterwards.

    Quantization shifts the mean and variance that the following batch norm was trained on. With `which` "means" or
    "variances" the others stay as they were trained, also while images pass: a layer sees what it will see.
    """
    alone = RENEWED[which] if isinstance(which, str) else None
    norms = [norm for norm in model.modules() if isinstance(norm, BATCH_NORMS) and norm.track_running_stats]
    kept = [(norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    try:
        with evaluating(model):
            for norm, (_, old) in zip(norms, kept, strict=True):
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
                if alone:
                    norm.forward = _renewing(norm, alone, old)
            with torch.no_grad(), device.autocast():
                for batch in batches:
                    model(batch)
            for norm, (_, old) in zip(norms, kept, strict=True):
                norm.eval()
                if alone:
                    del norm.forward  # the class's own is found again
                    for name in {*RENEWED.values()} - {alone}:
                        norm.get_buffer(name).copy_(old[name])
            yield model
    finally:
        for norm, (momentum, buffers) in zip(norms, kept, strict=True):
            norm.__dict__.pop("forward", None)
            norm.momentum = momentum
            for name, value in norm.named_buffers():
                value.copy_(buffers[name])


def _renewing(norm: nn.Module, alone: str, old: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The forward pass of a batch norm that takes both statistics anew, and computes with one new and one old."""

    def forward(x: Tensor) -> Tensor:
        type(norm).forward(norm, x)
        over = [0, *range(2, x.dim())]  # all but the channels
        new = {"running_mean": x.float().mean(over), "running_var": x.float().var(over)}
        used = {**old, alone: new[alone]}
        return batch_norm(x, used["running_mean"], used["running_var"], norm.weight, norm.bias, eps=norm.eps)

    return forward
