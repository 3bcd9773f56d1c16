"""The networks: torchvision's, and two of its architectures cut to size for small images."""

from itertools import product

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.resnet import BasicBlock

from kure_lib.paths import KureError

IMAGENET = ("resnet18", "resnet50", "mobilenet_v2")
SMALL = ("resnet20", "mobilenet_v2_050")


def build(name: str, channels: int, classes: int, pretrained: bool = False) -> nn.Module:
    """A network by name, for images of that many channels, channels-last, in training mode.

    `pretrained` loads torchvision's ImageNet weights, the ones the paper starts from.
    Raises `KureError` for an unknown name.
    """
    if name == "resnet20":
        model = ResNet20(channels, classes)
    elif name == "mobilenet_v2_050":
        model = mobilenet_v2_050(channels, classes)
    elif name in IMAGENET:
        weights = torchvision_models.get_model_weights(name).IMAGENET1K_V1 if pretrained else None
        model = torchvision_models.get_model(name, weights=weights, **({} if pretrained else {"num_classes": classes}))
    else:
        raise KureError(f"Unknown architecture '{name}': choose one of {', '.join((*SMALL, *IMAGENET))}.")
    return model.to(memory_format=torch.channels_last)


class ResNet20(nn.Module):
    """He et al.'s residual net for small images: three stages of three blocks of 16, 32 and 64 channels.

    Built from torchvision's `BasicBlock`, so a shortcut that changes shape is a 1 × 1 convolution. The stem
    has stride 2: a 28 × 28 image is a quarter of the work at 14 × 14.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.dense = DenseGradient()
        self.fc = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dense(x).mean((2, 3)))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs), BasicBlock(outputs, outputs)
    )


def mobilenet_v2_050(channels: int, classes: int) -> nn.Module:
    """torchvision's MobileNet-V2 at half width, with a stem for `channels` and its last downsampling removed.

    For a 28 × 28 image the last maps are then 2 × 2. At 1 × 1 eight of the nine taps of a depthwise filter
    would only ever meet padding, keep their initial values and make the layer's kurtosis meaningless.
    """
    model = torchvision_models.mobilenet_v2(width_mult=0.5, num_classes=classes)
    stem = model.features[0][0]
    model.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
    depthwise = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    [m for m in depthwise.values() if m.stride == (2, 2)][-1].stride = (1, 1)
    for name, layer in depthwise.items():
        model.set_submodule(name, DepthwiseConv2d(layer))
    model.features.append(DenseGradient())
    return model


class DepthwiseConv2d(nn.Conv2d):
    """A 3 × 3 depthwise convolution that is fast to train on a processor.

    Two of oneDNN's kernels are slow there, by 10 to 300 times: the gradient of the weights for maps of
    2 × 2, done here as nine products of shifted maps, and in bfloat16 the gradient of the input for
    stride 2, done here in float32. Elsewhere this is `nn.Conv2d`.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.in_channels, layer.out_channels, 3, layer.stride, 1, groups=layer.groups, bias=False)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.bias is not None:  # a bias comes from a folded batch norm: no training
            return super().forward(x)
        autocast = torch.is_autocast_enabled("cpu")
        return _Depthwise.apply(x.bfloat16() if autocast else x, self.weight, self.stride[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.conv2d(x, weight.to(x.dtype), None, stride, 1, 1, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wide = torch.float32 if ctx.stride == 2 else x.dtype
        grad_x, _ = _convolution_backward(grad.to(wide), x.to(wide), weight.to(wide), ctx.stride, (True, False))
        if ctx.stride == 1 and x.shape[-1] <= SMALL_MAP:
            return grad_x.to(x.dtype), _shifted_products(grad, x), None
        _, grad_weight = _convolution_backward(grad, x, weight.to(x.dtype), ctx.stride, (False, True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


SMALL_MAP = 2  # pixels a side


def _convolution_backward(grad, x, weight, stride, wanted):
    pair, padding, dilation = (stride, stride), (1, 1), (1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, pair, padding, dilation, False, (0, 0), len(weight), (*wanted, False)
    )[:2]


def _shifted_products(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient [C, 1, 3, 3] of a stride-1 depthwise filter: tap (i, j) sees x moved by (i − 1, j − 1)."""
    size = x.shape[-1]
    inside = {-1: (slice(1, None), slice(None, -1)), 0: (slice(None),) * 2, 1: (slice(None, -1), slice(1, None))}
    result = x.new_zeros(x.shape[1], 1, 3, 3, dtype=torch.float32)
    for i, j in product((-1, 0, 1), repeat=2):
        if abs(i) < size and abs(j) < size:
            (rows, x_rows), (columns, x_columns) = inside[i], inside[j]
            overlap = grad[:, :, rows, columns] * x[:, :, x_rows, x_columns]
            result[:, 0, i + 1, j + 1] = overlap.sum((0, 2, 3), dtype=torch.float32)
    return result


class DenseGradient(nn.Module):
    """The identity; the gradient that passes it is laid out in memory as the images are.

    The gradient of a mean over positions is one number repeated with stride zero, on which the backward
    passes of the layers before it fall back to code several times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return x
