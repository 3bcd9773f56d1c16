"""The networks: torchvision's, and three of its architectures cut to size for small images.

torchvision takes two seconds to import, so that this waits until a network is built: who reads records needs none.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kure_lib.networks import published
from kure_lib.networks.depthwise import DenseGradient, DepthwiseConv2d
from kure_lib.paths import KureError, check_known

IMAGENET = tuple(published.DIGITS)


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


def resnet20_group_norm(channels: int, classes: int) -> nn.Module:
    """`ResNet20` with group norms (Wu and He 2018) in place of its batch norms: one group for every eight channels.

    A group norm takes mean and variance anew from every image, and keeps none that quantization could make wrong.
    """
    model = ResNet20(channels, classes)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, nn.GroupNorm(norm.num_features // 8, norm.num_features))
    return model


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

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
    from torchvision import models

    model = models.mobilenet_v2(width_mult=0.5, num_classes=classes)
    stem = model.features[0][0]
    model.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    [m for m in depthwise if m.stride == (2, 2)][-1].stride = (1, 1)
    return _with_fast_kernels(model)


class Attention(nn.Module):
    """The self-attention of an `nn.MultiheadAttention`, with its two projections as linear layers.

    There they are a parameter and a layer that computes nothing itself, and neither could be quantized. It computes the
    same, with no weights of attention to give back.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        width, self.heads = attention.embed_dim, attention.num_heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        query, key, value = self.in_proj(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, L, d]
        attended = (query * query.shape[-1] ** -0.5) @ key.mT  # of so few patches faster than PyTorch's own attention
        return self.out_proj((attended.softmax(-1) @ value).transpose(1, 2).flatten(2)), None


def vit_small_images(channels: int, classes: int) -> nn.Module:
    """torchvision's vision transformer (Dosovitskiy et al. 2021) for images of 28 × 28: depth 6, width 192, patch 7.

    Beside the class token it sees 16 patches; patches of 4 would be 49, and more work. Its weights are those of linear
    layers, between layer norms, GELUs and attention; there is no batch norm, and no ReLU. They begin normal, as in
    BERT, GPT and DeiT: torchvision's own begin uniform, with the kurtosis that KURE asks for.
    """
    from torchvision import models

    width, patch = 192, 7
    model = models.VisionTransformer(
        image_size=28, patch_size=patch, num_layers=6, num_heads=3, hidden_dim=width, mlp_dim=768, num_classes=classes
    )
    model.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
    for block in model.encoder.layers:
        block.self_attention = Attention(block.self_attention)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return model


def _torchvision(name: str) -> Callable[[int, int], nn.Module]:
    """torchvision's own architecture, for color images and any number of classes."""

    def build(channels: int, classes: int) -> nn.Module:
        from torchvision import models

        return _with_fast_kernels(models.get_model(name, num_classes=classes))

    return build


def _with_fast_kernels(model: nn.Module) -> nn.Module:
    """One of torchvision's networks that trains faster; its results and the names in its state dict stay."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            model.set_submodule(name, DepthwiseConv2d(layer))
    if hasattr(model, "avgpool"):
        model.avgpool = nn.Sequential(DenseGradient(), model.avgpool)
    else:  # MobileNet-V2 takes the mean in its forward pass
        model.features.append(DenseGradient())
    return model


#: Networks by name, each made for images of so many channels and for so many classes.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet20": ResNet20,
    "resnet20_group_norm": resnet20_group_norm,
    "mobilenet_v2_050": mobilenet_v2_050,
    "vit_small_images": vit_small_images,
    **{name: _torchvision(name) for name in IMAGENET},
}


def build(name: str, channels: int, classes: int, pretrained: bool = False) -> nn.Module:
    """A network by name, channels-last, in training mode.

    Args:
        name: One of `NETWORKS`.
        channels: Color channels of the images.
        classes: Number of classes.
        pretrained: Whether to load torchvision's ImageNet weights (see `published`), with which the paper starts.

    Raises:
        KureError: The name is unknown, or there are no published weights for the network or none that suit it.
    """
    check_known("architecture", name, NETWORKS)
    model = NETWORKS[name](channels, classes)
    if pretrained:
        published.load(model, name)
    return model.to(memory_format=torch.channels_last)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], whose: str) -> None:
    """Load parameters and buffers; `KureError` naming whose they are if they are those of another architecture."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise KureError(f"The weights {whose} do not suit {type(model).__name__} ({reason}): take those of a "
                        "network of the same architecture, channels and classes.") from None  # fmt: skip
