"""KURE, which drives the kurtosis of every regularized weight tensor to a target (paper, Eq. 15).

The same penalty on activations, which the paper does not have, is here for comparison.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kure_lib.networks import activations
from kure_lib.networks.layers import latent_weight, regularized_layers
from kure_lib.paths import KureError, check_known, say
from kure_lib.tensors.kurtosis import kurtoses, kurtosis
from kure_lib.training.protocol import TrainingMethod

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.max}


class KurtosisRegularizer(TrainingMethod):
    """λ · L_K with L_K = (1/L) Σᵢ (Kurt[Wᵢ] − K_T)² over L weight tensors (paper, Eq. 15).

    In any training loop the term is one more summand: `loss = criterion(model(x), y) + penalty()`.

    Args:
        model: The network that is trained.
        target: K_T.
        coefficient: λ.
        reduction: Over layers: "mean" (the paper), "sum" or "max".
        per_channel: Whether each output channel has a kurtosis, whose squared distances are averaged within the layer.
        layers: Names of the layers to regularize; the default is every convolution but the first and every linear layer
            but the last. Of those, layers whose weights are not trained are left out, which is said on stderr, and
            weights that several layers share count once.

    Returns:
        When it is called: the term as a scalar tensor with gradients. Weights may be of any floating-point type; below
        float32, moments are computed in float32.

    Raises:
        KureError: A layer or the reduction is unknown, or there is none to train. When it is called: all weights of a
            layer have one value, or one is not finite. On a GPU, which would have to be waited for, and in a compiled
            step the term is NaN instead.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    >>> penalty = KurtosisRegularizer(model)
    >>> penalty.layers, penalty().shape
    ({'1': (8, 8, 3, 3)}, torch.Size([]))
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 1.8,
        coefficient: float = 1.0,
        reduction: str = "mean",
        per_channel: bool = False,
        layers: Iterable[str] | None = None,
    ):
        check_known("reduction", reduction, REDUCTIONS)
        chosen = _trained_once(regularized_layers(model) if layers is None else _layers_named(model, layers))
        if not chosen:
            raise KureError("There is no layer to regularize: the model needs trainable weights in a convolution but "
                            "the first or a linear layer but the last, or name others with layers=.")  # fmt: skip
        self.target, self.coefficient = target, coefficient
        self.reduction, self.per_channel = reduction, per_channel
        self._layers = chosen

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Names and weight shapes of the regularized layers."""
        return {name: tuple(latent_weight(layer).shape) for name, layer in self._layers.items()}

    def penalty(self, loss: Tensor) -> Tensor:
        return self()

    def __call__(self) -> Tensor:
        weights = [latent_weight(layer) for layer in self._layers.values()]
        if self.per_channel:
            distances = torch.stack([(kurtoses([w], len(w)) - self.target).square().mean() for w in weights])
        else:
            distances = (kurtoses(weights) - self.target).square()
        waits = distances.device.type != "cpu" or torch.compiler.is_compiling()
        if not waits and not torch.isfinite(distances).all():
            for name in self._layers:
                self._kurtosis(name)  # raises for the layer to blame
        return self.coefficient * REDUCTIONS[self.reduction](distances)

    def _kurtosis(self, name: str) -> Tensor:
        try:
            return kurtosis(latent_weight(self._layers[name]), per_channel=self.per_channel)
        except KureError as error:
            raise KureError(f"Layer '{name}' cannot be regularized: {error}") from None


def _layers_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    weighted = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    names = list(names)
    for name in names:
        check_known("layer with weights", name, weighted)
    return {name: weighted[name] for name in names}


def _trained_once(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without those whose weights are frozen, and those whose weights are another's."""
    trained = {name: layer for name, layer in layers.items() if latent_weight(layer).requires_grad}
    if frozen := layers.keys() - trained.keys():
        say(f"KURE leaves out {len(frozen)} of {len(layers)} layers, whose weights are not trained: {min(frozen)} ...")
    first: dict[int, str] = {}
    for name, layer in trained.items():
        first.setdefault(id(layer._parameters.get("weight", layer)), name)
    return {name: trained[name] for name in first.values()}


class ActivationKurtosisRegularizer(TrainingMethod):
    """λ · (1/S) Σₛ (Kurt[Aₛ] − K_T)² over the S activations that are quantized, for the images of one training step.

    Within `view()` every forward pass with gradients leaves its terms, of which the next `penalty` is the mean times λ.

    Args:
        model: The network that is trained.
        images: Images [N, C, H, W] that are run through the network to find its activations.
        target: K_T.
        coefficient: λ.
    """

    def __init__(self, model: nn.Module, images: Tensor, target: float = 1.8, coefficient: float = 1.0):
        activations.check_rectified(model)
        self.target, self.coefficient = target, coefficient
        self._model, self._sites = model, set(activations.quantized_sites(model, images))
        self._terms: list[Tensor] = []

    def view(self) -> AbstractContextManager:
        return activations.replaced(self._model, self._note)

    def penalty(self, loss: Tensor) -> Tensor:
        terms, self._terms = self._terms, []
        return self.coefficient * torch.stack(terms).mean()

    def _note(self, site: str, output: Tensor) -> Tensor:
        if site in self._sites and torch.is_grad_enabled():
            self._terms.append((rectified_kurtosis(output) - self.target).square())
        return output


def rectified_kurtosis(x: Tensor) -> Tensor:
    """Kurtosis of what a ReLU lets through, E[x⁴]/E[x²]² over x > 0: a scalar tensor with gradients.

    The positive values are taken for one half of a distribution that is symmetric about zero, so that uniform values
    have 1.8 and those of a normal distribution 3, as among weights. Zeros do not count, as quantization keeps them.

    >>> round(rectified_kurtosis(torch.linspace(-1, 1, 1001).relu()).item(), 2)
    1.8
    """
    squares = x.float().square()
    return (x > 0).sum() * squares.square().sum() / squares.sum().square()
