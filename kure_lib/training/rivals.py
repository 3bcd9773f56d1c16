"""Other ways to make a network robust to quantization, as training methods beside KURE, for comparison."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kure_lib.networks.depthwise import DepthwiseConv2d
from kure_lib.networks.layers import LatentWeight, regularized_layers, restored
from kure_lib.paths import KureError
from kure_lib.tensors.uniformity import PENALTIES, outliers
from kure_lib.training.protocol import TrainingMethod


class Penalty(TrainingMethod):
    """strength · mean over the regularized layers of a statistic that is zero for a uniform tensor."""

    def __init__(self, model: nn.Module, strength: float, statistic: Callable[[Tensor], Tensor]):
        self.strength, self._statistic = strength, statistic
        self._layers = regularized_layers(model).values()

    def penalty(self, loss: Tensor) -> Tensor:
        return self.strength * torch.stack([self._statistic(layer.weight) for layer in self._layers]).mean()


class GradientL1(TrainingMethod):
    """strength · ‖∂L/∂W‖₁ over the regularized layers, by double backward (Alizadeh et al., ICLR 2020)."""

    def __init__(self, model: nn.Module, strength: float):
        if any(isinstance(module, DepthwiseConv2d) for module in model.modules()):
            raise KureError("The gradient of the fast depthwise convolutions cannot be differentiated again: leave "
                            "gradient_l1 to networks without them, such as resnet20.")  # fmt: skip
        self.strength, self._layers = strength, regularized_layers(model).values()

    def penalty(self, loss: Tensor) -> Tensor:
        weights = [layer.weight for layer in self._layers]
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return self.strength * torch.stack([gradient.abs().sum() for gradient in gradients]).sum()


class Noise(TrainingMethod):
    """Uniform noise on the weights of every step, of `strength` standard deviations of each regularized layer.

    Rounding adds as much: the error of a normal tensor at 4 bits is 0.107 standard deviations.
    """

    def __init__(self, model: nn.Module, strength: float):
        self.model, self.strength = model, strength

    @contextmanager
    def view(self) -> Iterator[None]:
        with restored(layers := regularized_layers(self.model)):
            for layer in layers.values():
                parametrize.register_parametrization(layer, "weight", _Noisy(self.strength))
            yield


class _Noisy(LatentWeight):
    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the network is tested without noise
            return weight
        width = self.strength * 12**0.5 * weight.detach().std()
        return weight + width * (torch.rand_like(weight) - 0.5)


class Sam(TrainingMethod):
    """Each step's gradient is taken `strength` further along the gradient, in weight space (Foret et al., ICLR 2021).

    Batch norms do not count the second pass.
    """

    def __init__(self, model: nn.Module, strength: float):
        self.model, self.strength = model, strength

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        moved = [(p, p.detach().clone(), p.grad) for p in self.model.parameters() if p.grad is not None]
        norms = [(m, m.momentum) for m in self.model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
        length = torch.linalg.vector_norm(torch.stack([gradient.norm() for _, _, gradient in moved])) + 1e-12
        with torch.no_grad():
            for p, _, gradient in moved:
                p.add_(gradient, alpha=self.strength / length.item())
        for norm, _ in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            with torch.no_grad():
                for p, before, _ in moved:
                    p.copy_(before)
            for norm, momentum in norms:
                norm.momentum = momentum


class Ema(TrainingMethod):
    """The exponential moving average of weights and batch-norm statistics; `strength` is the share it keeps a step."""

    def __init__(self, model: nn.Module, strength: float):
        if not strength < 1:
            raise KureError(f"The average of weights must forget: give a strength below 1, not {strength}.")
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(strength), use_buffers=True)


#: Penalties on weights by name: those of `uniformity` but kurtosis itself, and one on outliers alone.
STATISTICS = {name: f for name, f in PENALTIES.items() if name != "kurtosis"} | {"outliers": outliers}

#: Rivals by name, each made for a network and a strength.
RIVALS: dict[str, Callable[[nn.Module, float], TrainingMethod]] = {
    "gradient_l1": GradientL1,
    "noise": Noise,
    "sam": Sam,
    "ema": Ema,
    **{name: partial(Penalty, statistic=statistic) for name, statistic in STATISTICS.items()},
}
