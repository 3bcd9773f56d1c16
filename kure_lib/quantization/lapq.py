"""Loss-aware steps (LAPQ, Nahshan et al. 2019): all steps of a network at once, by its loss on calibration images.

The authors' code picks the norm p it starts from by validation accuracy, that is with test images. Here every
choice is made on the calibration loss.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kure_lib import progress
from kure_lib.networks import activations, device
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration, view
from kure_lib.quantization.spec import SEARCH, QuantizationSpec

NORMS = (2.0, 2.5, 3.0, 3.5, 4.0)  # p of the starts
REACH = 1.0  # octaves by which it may move a step in either direction
KEPT = 2**24  # values of a block's output that are worth their memory


def loss_aware_steps(model: nn.Module, images: Tensor, labels: Tensor, spec: QuantizationSpec) -> dict[str, Tensor]:
    """A step for every layer and activation site that `spec` quantizes, by name: scalar tensors, before any ratio.

    Three stages, all on the cross-entropy of `images` [N, C, H, W] and `labels` [N]: per layer the step of least
    p-norm of the error for several p; a parabola through the losses of these starts, whose lowest point gives
    another p; Powell's method from the best of them over all steps together, at most `spec.search` times the
    loss. Raises `KureError` as `view.quantized` does.
    """
    if not len(images):
        raise KureError("The calibration set is empty: give at least one image.")
    if spec.search is None:
        raise KureError(f"LAPQ needs a specification of its own: give step_rule='lapq', and search={SEARCH} or less.")
    kept = ("weight_bits", "layers", "activation_bits", "grid")
    plain = QuantizationSpec(**{name: getattr(spec, name) for name in kept})
    layers = quantized_layers(model, plain.layers) if plain.weight_bits else {}
    observed = calibration.observe(model, images) if plain.activation_bits else {}

    @cache
    def start(p: float) -> dict[str, float]:
        steps = view.weight_steps(layers, plain.model_copy(update={"step_rule": f"lp:{p}"}))
        steps |= calibration.activation_steps(observed, plain.activation_bits, f"lp:{p}", activations.grid(model))
        return {name: step.item() for name, step in steps.items()}

    placed = dict[str, float]()
    steps = {name: torch.tensor(value, device=images.device) for name, value in start(NORMS[0]).items()}  # of the view
    with (
        view.quantized(model, plain, images, steps=steps),
        _remembering(model, steps),
        progress.bar(len(NORMS) + 1 + spec.search, "LAPQ", "loss") as bar,
    ):

        def loss_at(values: dict[str, float]) -> float:
            for name, value in values.items():
                if placed.get(name) != value:  # what is not written to is not computed anew
                    placed[name] = value
                    steps[name].fill_(value)
            with torch.no_grad(), device.autocast():
                loss = cross_entropy(model(images).float(), labels).item()
            bar.update()
            return loss if np.isfinite(loss) else np.inf

        tried = {p: (loss_at(start(p)), start(p)) for p in NORMS}
        best_p = lowest_point(np.array(NORMS), np.array([loss for loss, _ in tried.values()]))
        tried[best_p] = loss_at(start(best_p)), start(best_p)
        best_loss, best = min(tried.values(), key=lambda pair: pair[0])
        best_octaves = np.zeros(len(best))

        def moved(octaves: np.ndarray) -> float:
            nonlocal best_loss, best_octaves
            loss = loss_at({name: value * 2**o for (name, value), o in zip(best.items(), octaves, strict=True)})
            if loss < best_loss:
                best_loss, best_octaves = loss, octaves.copy()
            return loss

        minimize(
            moved, best_octaves, method="Powell", bounds=[(-REACH, REACH)] * len(best),
            options={"maxfev": spec.search, "xtol": 0.05, "ftol": 1e-4},
        )  # fmt: skip
    return {name: torch.tensor(value * 2**o, dtype=torch.float32)
            for (name, value), o in zip(best.items(), best_octaves, strict=True)}  # fmt: skip


def lowest_point(p: np.ndarray, losses: np.ndarray) -> float:
    """The lowest point, within the range of `p`, of the parabola that fits the losses best.

    >>> round(lowest_point(np.array([2.0, 3.0, 4.0]), np.array([1.25, 0.25, 1.25])), 6)
    3.0
    """
    second, first, _ = np.polyfit(p, losses, 2)
    if second <= 0:  # no valley: the best that was tried
        return float(p[losses.argmin()])
    return float(np.clip(-first / (2 * second), p.min(), p.max()))


@contextmanager
def _remembering(model: nn.Module, steps: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, a residual block is computed anew only if its input or one of its steps has changed.

    A search that moves one step at a time need not repeat what comes before it: about half of the work.
    """
    blocks = dict(_blocks(model))
    for name, block in blocks.items():
        own = [step for place, step in steps.items() if place.startswith(f"{name}.")]
        block.forward = _remembered(block.forward, own)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward  # the class's own is found again


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks that follow one another in a network, by name: the children of its `nn.Sequential`s with children."""
    for name, part in module.named_children():
        if isinstance(part, nn.Sequential):
            yield from _blocks(part, f"{prefix}{name}.")
        elif any(part.children()):
            yield prefix + name, part


def _remembered(forward: Callable[[Tensor], Tensor], steps: list[Tensor]) -> Callable[[Tensor], Tensor]:
    seen = kept = None

    def recall(x: Tensor) -> Tensor:
        nonlocal seen, kept
        moved = [step._version for step in steps]
        if seen and seen[1:] == (moved, kept._version) and torch.equal(x, seen[0]):
            return kept
        kept = forward(x)
        seen = (x, moved, kept._version) if kept.numel() <= KEPT else None
        return kept

    return recall
