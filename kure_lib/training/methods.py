"""Every training method by name, and those that a configuration asks for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kure_lib.training.configs import RunConfig
from kure_lib.training.protocol import Together, TrainingMethod
from kure_lib.training.qat import QuantizationAwareTraining
from kure_lib.training.regularizers import ActivationKurtosisRegularizer, KurtosisRegularizer
from kure_lib.training.rivals import RIVALS

Build = Callable[[nn.Module, Any, Tensor], TrainingMethod]  # from a network, the method's settings and some images


#: Training methods by name, each made for a network by its settings.
METHODS: dict[str, Build] = {
    "kure": lambda model, kure, _: KurtosisRegularizer(model, **kure.model_dump(exclude={"of"})),
    "kure_of_activations": lambda model, kure, images: ActivationKurtosisRegularizer(
        model, images[:1], kure.target, kure.coefficient
    ),
    "dorefa": QuantizationAwareTraining,
    "lsq": QuantizationAwareTraining,
    **dict.fromkeys(RIVALS, lambda model, rival, _: RIVALS[rival.name](model, rival.strength)),
}


def build(model: nn.Module, config: RunConfig, images: Tensor) -> TrainingMethod:
    """The training methods of a configuration, acting as one; by `images` activations are found and steps begin."""
    return Together(METHODS[name](model, settings, images) for name, settings in config.methods.items())
