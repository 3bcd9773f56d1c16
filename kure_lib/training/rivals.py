"""Other ways to make a network robust to quantization, in the same training loop as KURE, for comparison.

A rival takes part in training at one or more of four places, all of them idle in `Rival` itself: a penalty added
to the loss, a view of the network that is trained, a second gradient for each step, and an average of the
weights that is kept in place of the last ones.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kure_lib.networks.models import DepthwiseConv2d
from kure_lib.paths import KureError
from kure_lib.quantization.view import restored
from kure_lib.tensors.uniformity import PENALTIES, outliers
from kure_lib.training.configs import RivalConfig
from kure_lib.training.regularizers import regularized_layers


class Rival:
    """Plain training, and what every rival does where it says nothing else; `strength` is explained by each."""

    def __init__(self, model: nn.Module, strength: float):
        self.model, self.strength = model, strength
        self.average: AveragedModel | None = None  # of the weights, to be tested and kept in place of the last

    def penalty(self, loss: Tensor) -> Tensor:
        """What is added to the loss of a step, a scalar with gradients."""
        return torch.zeros((), device=loss.device)

    def view(self) -> AbstractContextManager:
        """The network as it is trained."""
        return nullcontext()

    def elsewhere(self) -> AbstractContextManager | None:
        """Within this block the weights are where a step's final gradient is taken; None: where they are."""
        return None


class Penalty(Rival):
    """strength · mean over the regularized layers of a statistic that is zero for a uniform tensor."""

    def __init__(self, model: nn.Module, strength: float, statistic: Callable[[Tensor], Tensor]):
        super().__init__(model, strength)
        self._layers, self._statistic = regularized_layers(model).values(), statistic

    def penalty(self, loss: Tensor) -> Tensor:
        return self.strength * torch.stack([self._statistic(layer.weight) for layer in self._layers]).mean()


class GradientL1(Rival):
    """strength · ‖∂L/∂W‖₁ over the regularized layers, by double backward (Alizadeh et al., ICLR 2020)."""

    def __init__(self, model: nn.Module, strength: float):
        super().__init__(model, strength)
        if any(isinstance(module, DepthwiseConv2d) for module in model.modules()):
            raise KureError("The gradient of the fast depthwise convolutions cannot be differentiated again: leave "
                            "gradient_l1 to networks without them, such as resnet20.")  # fmt: skip
        self._layers = regularized_layers(model).values()

    def penalty(self, loss: Tensor) -> Tensor:
        weights = [layer.weight for layer in self._layers]
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return self.strength * torch.stack([gradient.abs().sum() for gradient in gradients]).sum()


class Noise(Rival):
    """Uniform noise on the weights of every step, of `strength` standard deviations of each regularized layer.

    As much as rounding adds: a normal tensor at 4 bits has an error of 0.107 standard deviations.
    """

    @contextmanager
    def view(self) -> Iterator[None]:
        with restored(layers := regularized_layers(self.model)):
            for layer in layers.values():
                parametrize.register_parametrization(layer, "weight", _Noisy(self.strength))
            yield


class _Noisy(nn.Module):
    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # tested without
            return weight
        width = self.strength * 12**0.5 * weight.detach().std()
        return weight + width * (torch.rand_like(weight) - 0.5)


class Sam(Rival):
    """Each step's gradient is taken `strength` further along the gradient, in weight space (Foret et al., ICLR 2021).

    Batch norms do not count the second pass.
    """

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        length = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters])) + 1e-12
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=self.strength / length.item())
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(parameters, before, strict=True):
                    p.copy_(old)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


class Ema(Rival):
    """The exponential moving average of weights and batch-norm statistics; `strength` is the share it keeps a step."""

    def __init__(self, model: nn.Module, strength: float):
        super().__init__(model, strength)
        if not strength < 1:
            raise KureError(f"The average of weights must forget: give a strength below 1, not {strength}.")
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(strength), use_buffers=True)


#: Penalties on weights by name, those of `uniformizing` but kurtosis itself, and one on outliers alone.
STATISTICS = {name: f for name, f in PENALTIES.items() if name != "kurtosis"} | {"outliers": outliers}
METHODS: dict[str, type[Rival]] = {"gradient_l1": GradientL1, "noise": Noise, "sam": Sam, "ema": Ema}


def build(model: nn.Module, config: RivalConfig | None) -> Rival:
    """The rival that a configuration names, for this network; plain training for None."""
    if config is None:
        return Rival(model, 0.0)
    if config.method in STATISTICS:
        return Penalty(model, config.strength, STATISTICS[config.method])
    return METHODS[config.method](model, config.strength)
