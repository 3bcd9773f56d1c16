"""What a look at the weights tells before anybody trains anything: layer by layer, as a table and one figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kure_lib.networks.layers import QUANTIZABLE, latent_weight, regularized_layers
from kure_lib.paths import KureError, in_words
from kure_lib.tensors.grids import MID_RISE, Format
from kure_lib.tensors.kurtosis import kurtosis
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import best_step, mse_curve
from kure_lib.tensors.uniformity import kolmogorov_smirnov

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = (8, 4, 3, 2)
UNIFORM, NORMAL = 1.8, 3.0  # their kurtosis
SMALLEST = 8  # weights: fewer say nothing about a distribution


@dataclass(frozen=True)
class Layer:
    """One weight tensor: its kurtosis, its distance to the uniform distribution and its distortion when quantized.

    `distance` is the Kolmogorov–Smirnov distance to the uniform distribution of equal mean and variance, 0 to 1.
    `sqnr` is the signal-to-quantization-noise ratio 10·log₁₀(E[w²]/MSE) in dB by bits, at the step of least MSE.
    `regularized` says whether KURE regularizes the layer by default.
    """

    name: str
    shape: tuple[int, ...]
    regularized: bool
    kurtosis: float
    distance: float
    sqnr: dict[int, float]


@dataclass(frozen=True)
class Check:
    """The layers of a network in its own order; printed it is a table, and `figure` draws it."""

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        bits = list(self.layers[0].sqnr)
        wide = max(len("layer"), *(len(layer.name) for layer in self.layers))
        head = f"  {'layer':{wide}}  {'weights':>11}  kurtosis  from uniform  " + "  ".join(f"{b} bits" for b in bits)
        lines = [
            f"{'*' if layer.regularized else ' '} {layer.name:{wide}}  {torch.Size(layer.shape).numel():11,}"
            f"  {layer.kurtosis:8.2f}  {layer.distance:12.3f}  "
            + "  ".join(f"{layer.sqnr[b]:{len(f'{b} bits')}.1f}" for b in bits)
            for layer in self.layers
        ]
        legend = (
            f"Kurtosis is {UNIFORM} for uniform and {NORMAL:g} for normal weights; columns of bits are the "
            "signal-to-noise ratio in dB\nat the best step of the tensor"
        )
        legend += "; * KURE regularizes the layer by default." if any(x.regularized for x in self.layers) else "."
        return "\n".join([head, *lines, legend])

    def figure(self) -> "Figure":
        """Kurtosis above and signal-to-noise ratio below, by layer. Raises `KureError` without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise KureError("The figure needs matplotlib: install it with pip install matplotlib.") from None
        places = range(len(self.layers))
        figure = Figure(figsize=(max(6, 2 + 0.22 * len(self.layers)), 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        for regularized, marker in ((True, "o"), (False, "x")):
            chosen = [i for i in places if self.layers[i].regularized == regularized]
            label = "regularized by default" if regularized else "others"
            above.plot(chosen, [self.layers[i].kurtosis for i in chosen], marker, color="C0", label=label)
        for name, value in (("uniform", UNIFORM), ("normal", NORMAL)):
            above.axhline(value, color="0.6", linewidth=1)
            above.annotate(
                name, (1, value), (4, 0), ("axes fraction", "data"), "offset points", va="center", color="0.4"
            )
        above.set(ylabel="kurtosis", yscale="log")
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("{x:g}")
        if any(layer.regularized for layer in self.layers):
            above.legend(frameon=False)
        for bits in self.layers[0].sqnr:
            below.plot(places, [layer.sqnr[bits] for layer in self.layers], ".-", label=f"{bits} bits")
        below.set(ylabel="signal-to-noise ratio in dB", ylim=(0, None))
        below.legend(frameon=False, ncols=len(BITS))
        below.set_xticks(places, [layer.name for layer in self.layers], rotation=90, fontsize=7)
        return figure


def check(model: nn.Module, bits: Iterable[int] = BITS, grid: Format = MID_RISE) -> Check:
    """Kurtosis, distance to uniform and distortion of every convolution and linear layer of a network.

    Args:
        model: Any network; it is only read.
        bits: Bit-widths for the distortion.
        grid: The grid, or the format, that the weights are quantized to.

    Raises:
        KureError: No layer has weights that can be quantized, a weight tensor holds values that are not finite, or its
            weights are all the same.

    >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> [(layer.name, layer.regularized) for layer in check(network).layers]
    [('0', False), ('2', True)]
    """
    weights = {name: latent_weight(m) for name, m in model.named_modules() if isinstance(m, QUANTIZABLE)}
    return _check(weights, set(regularized_layers(model)), bits, grid)


def check_file(path: Path) -> Check:
    """`check` for the weights in a safetensors file: every floating-point tensor with at least two dimensions.

    Which layers are convolutions such a file does not say, so none counts as regularized.

    Raises:
        KureError: The file is missing or no safetensors file, or as `check` does.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise KureError("Reading weights needs safetensors: install it with pip install safetensors.") from None
    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise KureError(f"{path} cannot be read ({error.strerror}): name a safetensors file.") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise KureError(f"{path} is no safetensors file ({in_words(error)}): name one.") from None
    chosen = [name for name, w in tensors.items() if w.is_floating_point() and w.dim() > 1 and w.numel() >= SMALLEST]
    return _check({name: tensors[name] for name in sorted(chosen, key=_numbers_by_value)}, set(), BITS, MID_RISE)


def _numbers_by_value(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 behind layer 9, as a file of weights has its names in no useful order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _check(weights: Mapping[str, Tensor], regularized: set[str], bits: Iterable[int], grid: Format) -> Check:
    if not weights:
        raise KureError("There is no layer to look at: take a network with convolutions or linear layers.")
    bits, layers = tuple(bits), []
    for name, weight in weights.items():
        weight = weight.detach().float().cpu()
        try:
            sample = EmpiricalDistribution(weight)
            errors = {b: mse_curve(sample, best_step(sample, b, grid), b, grid).item() for b in bits}
            value = kurtosis(weight).item()
        except KureError as error:
            raise KureError(f"Layer '{name}' cannot be looked at: {error}") from None
        power = weight.double().square().mean().item()
        sqnr = {b: 10 * log10(power / error) if error else inf for b, error in errors.items()}
        distance = kolmogorov_smirnov(weight).item()
        layers.append(Layer(name, tuple(weight.shape), name in regularized, value, distance, sqnr))
    return Check(tuple(layers))
