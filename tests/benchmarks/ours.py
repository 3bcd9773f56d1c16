"""The work of the comparisons as the library does it, a round at a time."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from kure_lib.networks import data, device, evaluation, models
from kure_lib.networks.layers import quantized_layers
from kure_lib.quantization import lapq
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.samples import EmpiricalDistribution
from kure_lib.tensors.steps import PER_CHANNEL, best_step
from kure_lib.training import methods
from kure_lib.training.configs import KureConfig, RunConfig
from kure_lib.training.loop import train_epoch
from kure_lib.training.regularizers import KurtosisRegularizer

BITS = (2, 3, 4, 5, 6, 8)
BATCH = 256
SMALL = {"resnet20", "mobilenet_v2_050"}  # networks for Fashion-MNIST; the others get noise of 64 × 64
NOISE = 1024  # images of it
SPEC = QuantizationSpec(weight_bits=3, activation_bits=4, step_rule="lapq", calibration=BATCH, search=30)

Round = Callable[[], object]


def large_network() -> nn.Module:
    """Torchvision's ResNet-18 for ImageNet, untrained: 19 regularized layers, 11.2 million weights."""
    torch.manual_seed(0)
    return resnet18()


def noise(size: int = NOISE) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 64, 64] and labels of 200 classes, as Tiny ImageNet has them once they are decoded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 200, (size,), generator=generator)


def images(name: str, steps: int) -> data.TensorSplit:
    """Training images for so many steps of a network."""
    if name in SMALL:
        return data.load("fashion_mnist", "train").head(steps * BATCH)
    mean, std = torch.full((2, 1, 3, 1, 1), 127.5)
    return data.TensorSplit(*noise(steps * BATCH), 200, mean, std, shift=4)


def training(name: str, steps: int, **method: object) -> Round:
    """One call of the library's `train_epoch` on as many images as make so many steps, by a method or plainly."""
    split = images(name, steps)
    config = RunConfig(model=name, epochs=1, learning_rate=0.02, weight_decay=5e-4, **method)
    torch.manual_seed(0)
    model = models.build(name, split.channels, split.classes)
    first, _ = next(split.batches(BATCH))
    acting = methods.build(model, config, first)
    groups = [{"params": model.parameters()}]
    groups += [{"params": acting.steps.values(), "weight_decay": 0}] if acting.steps else []
    optimizer = torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    epochs = count()

    def work() -> None:
        batches = split.batches(BATCH, torch.Generator().manual_seed(next(epochs)))
        with acting.view():
            train_epoch(model, batches, acting, optimizer, schedule)

    return work


def products(name: str, steps: int, batch: int = BATCH, backward: bool = True) -> Round:
    """The convolutions and products of so many steps and nothing else, each layer on inputs of its own."""
    split = images(name, 4)  # 1,024 images
    model = models.build(name, split.channels, split.classes).train(backward)
    first, _ = next(split.batches(batch))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()})) for layer in layers
    ]
    with torch.no_grad(), device.autocast():
        model(first)
        for hook in hooks:
            hook.remove()
        grads = {layer: torch.ones_like(layer(x)) for layer, x in inputs.items()}
    for layer in layers[1:]:  # of the images no gradient is needed
        inputs[layer].requires_grad_(backward)

    def work() -> None:
        for _ in range(steps):
            for layer, x in inputs.items():
                layer.weight.grad = x.grad = None
                with torch.set_grad_enabled(backward), device.autocast():
                    y = layer(x)
                if backward:
                    y.backward(grads[layer])

    return work


def kure_term(per_channel: bool) -> Round:
    """KURE of ResNet-18 and its gradient, which the round returns."""
    model = large_network()
    return _gradients(model, KurtosisRegularizer(model, per_channel=per_channel))


def _gradients(model: nn.Module, term: Callable[[], Tensor]) -> Round:
    layers = KurtosisRegularizer(model).layers

    def work() -> list[Tensor]:
        model.zero_grad()
        term().backward()
        return [model.get_submodule(name).weight.grad for name in layers]

    return work


def copies() -> Round:
    """The weights of ResNet-18 copied, to memory that was freed after the round before, as gradients are."""
    model = large_network()
    weights = [model.get_submodule(name).weight.detach() for name in KurtosisRegularizer(model).layers]
    kept: list[Tensor] = []

    def work() -> None:
        kept.clear()
        kept.extend(weight.clone() for weight in weights)

    return work


def tensor() -> Tensor:
    torch.manual_seed(0)
    return nn.init.kaiming_normal_(torch.empty(512, 512, 3, 3), mode="fan_out")


def steps_at_six_bits() -> Round:
    weight = tensor()

    def work() -> list[Tensor]:
        distribution = EmpiricalDistribution(weight)
        return [best_step(distribution, bits) for bits in BITS]

    return work


def steps_of_a_network() -> Round:
    """At 4 bits, one step for each layer."""
    layers = quantized_layers(large_network())
    return lambda: [best_step(layer.weight.detach(), 4) for layer in layers.values()]


def steps_by_channel() -> Round:
    """At 4 bits, one step for each of 512 channels."""
    weight = tensor()
    return lambda: best_step(weight, 4, scope=PER_CHANNEL)


def small_network() -> nn.Module:
    """A ResNet-20, untrained: its speed does not depend on what it knows."""
    torch.manual_seed(0)
    return models.build("resnet20", 1, 10).eval()


def variants(ratios: tuple[float, ...]) -> Round:
    """Accuracies at 4 bits with these ratios Δ/Δ̃, on 10,000 images; steps are searched."""
    model, test = small_network(), data.load("fashion_mnist", "test")

    def work() -> list[float]:
        found = []
        for ratio in ratios:
            with quantized(model, weight_bits=4, step_ratio=ratio) as view:
                found.append(evaluation.accuracy(view, test))
        return found

    return work


def calibration_images() -> tuple[Tensor, Tensor]:
    return next(data.load("fashion_mnist", "train").batches(BATCH))


def loss_aware_steps() -> Round:
    """LAPQ with as many losses as `SPEC` allows its search, and six before it."""
    model, (images, labels) = small_network(), calibration_images()
    return lambda: lapq.loss_aware_steps(model, images, labels, SPEC)


def training_with_kure(name: str, steps: int) -> Round:
    return training(name, steps, regularizer=KureConfig())


def flops(name: str, backward: bool) -> int:
    """Operations of the convolutions and products of a network for one image; backward takes twice as many again."""
    split = images(name, 1)
    model = models.build(name, split.channels, split.classes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *split.images.shape[1:]))
    return (3 if backward else 1) * counter.get_total_flops()
