"""The protocol of training methods: the four places of a training step at which a method can take part."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Steps(dict[str, nn.Parameter]):
    """Learned step sizes by layer and activation site, kept in a checkpoint as the parameters of a module are."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: step.detach() for name, step in self.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        for name, step in self.items():
            step.data.copy_(saved[name])

    @classmethod
    def of(cls, numbers: Mapping[str, float], place: torch.device | None = None) -> "Steps":
        return cls({name: nn.Parameter(torch.tensor(step, device=place)) for name, step in numbers.items()})

    def as_numbers(self) -> dict[str, float]:
        return {name: step.item() for name, step in self.items()}


class TrainingMethod:
    """Plain training; a subclass overrides the hooks at which its method takes part.

    `steps` are positive parameters that are learned beside the weights, without weight decay. `average` is an average
    of the weights that is tested and kept in place of the last ones.
    """

    steps: Steps = Steps()
    average: AveragedModel | None = None

    def penalty(self, loss: Tensor) -> Tensor:
        """The term that is added to the loss of a step: a scalar tensor with gradients."""
        return torch.zeros((), device=loss.device)

    def view(self) -> AbstractContextManager:
        """A block within which the network is as it is trained."""
        return nullcontext()

    def elsewhere(self) -> AbstractContextManager | None:
        """A block within which the weights are where a step's final gradient is taken; None: where they are."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the method, by name."""
        return {name: part for name in ("steps", "average") if (part := getattr(self, name))}


class Together(TrainingMethod):
    """Several methods acting together: penalties add and views nest in the order given.

    The final gradient and the average are those of the first method that has one.
    """

    def __init__(self, methods: Iterable[TrainingMethod]):
        self.methods = list(methods)
        self.steps = Steps({name: step for method in self.methods for name, step in method.steps.items()})
        self.average = next((method.average for method in self.methods if method.average), None)

    def penalty(self, loss: Tensor) -> Tensor:
        return sum((method.penalty(loss) for method in self.methods), super().penalty(loss))

    @contextmanager
    def view(self) -> Iterator[None]:
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.view())
            yield

    def elsewhere(self) -> AbstractContextManager | None:
        return next((place for method in self.methods if (place := method.elsewhere())), None)
