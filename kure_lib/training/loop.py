"""One training loop for every run: `loss = criterion(model(x), y) + penalty`, within the view of its training method.

A run is trained on one processor thread or on one GPU, or as `replicas` says. A study fills the cores with several
runs at once, which is faster than several threads for one network of this size, and a result does not depend on the
number of cores.
"""

import hashlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, Field
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from kure_lib.files import write_atomically
from kure_lib.networks import data, device, evaluation, models, pictures
from kure_lib.networks.layers import latent_weight, regularized_layers
from kure_lib.paths import KureError, in_words, say
from kure_lib.tensors.kurtosis import kurtosis
from kure_lib.training import methods, replicas
from kure_lib.training.configs import RunConfig
from kure_lib.training.protocol import TrainingMethod

criterion = nn.functional.cross_entropy


def _possible(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    for name, values in curves.items():
        lowest = -math.inf if name == "penalty" else 0
        highest = 100 if name.endswith("top1") else math.inf
        for value in values:
            if not (math.isfinite(value) and lowest <= value <= highest):
                raise ValueError(f"{name} cannot be {value}")
    return curves


Curves = Annotated[dict[str, list[float]], AfterValidator(_possible)]  # one value an epoch, which can be
Steps = dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class Trained(BaseModel):
    """What a finished run leaves behind, next to the weights: one value an epoch in each curve, and learned steps."""

    curves: Curves = {}
    layer_kurtosis: Curves = {}
    steps: Steps = {}


def fit(
    config: RunConfig,
    start: dict[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, values: None,
) -> tuple[nn.Module, Trained]:
    """Train a network as `config` says.

    Args:
        config: The run.
        start: The weights of the run that `config.start` names.
        checkpoint: Where the state is kept after every epoch; training goes on from there to the same weights. One that
            is damaged or of another run is named on stderr and not used.
        on_epoch: Called with the number of finished epochs and the values of the last.

    Returns:
        The network in evaluation mode, and its curves.

    Raises:
        KureError: The loss or a learned step diverged, or the checkpoint cannot be written or was by other code; for
            several replicas what `replicas.together` says.
    """
    if config.replicas == 1 or not config.epochs:
        return _fit(on_epoch, config, start, checkpoint)
    with tempfile.TemporaryDirectory(prefix="kure-") as folder:
        checkpoint = checkpoint or Path(folder) / "checkpoint.pt"
        replicas.together(config.replicas, _fit, (config, start, checkpoint), on_epoch)
        return _fit(on_epoch, config, start, checkpoint)  # of which all epochs are finished


def _fit(
    on_epoch: Callable[[int, dict[str, float]], None],
    config: RunConfig,
    start: dict[str, Tensor] | None,
    checkpoint: Path | None,
) -> tuple[nn.Module, Trained]:
    """`fit` in this process: the whole run, or its part of one of which the first process evaluates and keeps."""
    rank, count = replicas.part()
    train, test = splits(config)
    torch.manual_seed(config.seed)
    model = models.build(config.model, train.channels, train.classes, config.pretrained)
    if start is not None:
        models.load_weights(model, start, f"that {config.label} starts from")
    model = replicas.synchronized(model.to(device.device()), config.batch_size // count)
    images, _ = next(train.head(config.batch_size).batches(config.batch_size, place=device.device()))
    method = methods.build(model, config, images)
    optimizer = _optimizer(config, model, method)
    schedule = _schedule(config, optimizer, max(len(train) // config.batch_size, 1))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, **method.state()}
    kept = method.average.module if method.average else model
    with device.single_thread(), method.view():
        finished, history = _resume(checkpoint, config, state)
        for epoch in range(finished, config.epochs):
            began = time.perf_counter()
            try:
                values = train_epoch(model, _batches(config, train, epoch), method, optimizer, schedule)
                if rank:
                    continue
                weights = {name: latent_weight(layer) for name, layer in regularized_layers(kept).items()}
                layers = {name: kurtosis(weight).item() for name, weight in weights.items()}
                result = evaluation.evaluate(kept, test)
                values |= {"test_loss": result.loss, "test_top1": result.top1}
                _check(values, method)
            except pictures.Unreadable:
                raise
            except KureError as error:
                raise KureError(
                    f"Training {config.label} diverged in epoch {epoch + 1}: lower its learning rate "
                    f"({in_words(error)})."
                ) from error
            values |= {"kurtosis": sum(layers.values()) / len(layers), "seconds": time.perf_counter() - began}
            _append(history.curves, values)
            _append(history.layer_kurtosis, layers)
            _save(checkpoint, config, epoch + 1, state, history)
            on_epoch(epoch + 1, values)
    history.steps.update(method.steps.as_numbers())
    return kept.eval(), history


def splits(config: RunConfig) -> tuple[data.Split, data.Split]:
    """The images a run is trained on, and those it is tested on: test images, or training images held out.

    Raises `KureError` if none would be left to train on.
    """
    train = data.load(config.data, "train")
    if not config.held_out:
        test = data.load(config.data, "test").head(config.test_size or config.train_size)
    else:
        if config.held_out >= len(train):
            raise KureError(f"Of the {len(train)} training images of {config.data}, {config.held_out} cannot be held "
                            "out: choose a smaller held_out, so that some are left.")  # fmt: skip
        train, test = train.parted(config.held_out)
    return train.head(config.train_size), test


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    method: TrainingMethod,
    optimizer: Optimizer,
    schedule: lr_scheduler.LRScheduler,
) -> dict[str, float]:
    """Take one step of the optimizer for every batch.

    Args:
        model: The network, within the view of the method.
        batches: Images [N, C, H, W] and labels [N].
        method: The training method; `TrainingMethod()` is plain training.
        optimizer: What moves the weights and the learned steps of the method.
        schedule: What sets the learning rate of every step.

    Returns:
        Means over the images: `train_loss` without the penalty in nats, `penalty`, and `train_top1` in percent.
    """
    place = device.device()
    model.train()
    network = replicas.averaging(model, method.steps)
    total_loss = total_penalty = correct = torch.zeros((), device=place)
    seen = 0

    def backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leave the gradients of a step where the weights are; the scores and the two terms of the loss."""
        with device.autocast():
            scores = network(x)
            error = criterion(scores, y)
        penalty = method.penalty(error)
        loss = error + penalty
        optimizer.zero_grad()
        loss.backward()
        return scores.detach(), error.detach(), penalty.detach()

    for x, y in batches:
        scores, error, penalty = backward(x, y)
        if elsewhere := method.elsewhere():
            with elsewhere:
                backward(x, y)
        optimizer.step()
        schedule.step()
        if method.average:
            method.average.update_parameters(model)
        total_loss = total_loss + error * len(y)
        total_penalty = total_penalty + penalty * len(y)
        correct = correct + (scores.argmax(1) == y).sum()
        seen += len(y)
    sums = replicas.total(torch.stack([total_loss, total_penalty, correct])).tolist()
    seen *= replicas.part()[1]
    return {"train_loss": sums[0] / seen, "penalty": sums[1] / seen, "train_top1": 100 * sums[2] / seen}


def _batches(config: RunConfig, train: data.Split, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images of an epoch; its seed depends on the run and the epoch alone, so that runs can be resumed."""
    seed = 1_000_003 * config.seed + epoch
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return train.batches(config.batch_size, generator, device.device(), replicas.part())


def _optimizer(config: RunConfig, model: nn.Module, method: TrainingMethod) -> Optimizer:
    groups: list[dict[str, Any]] = [{"params": model.parameters()}]
    groups += [{"params": method.steps.values(), "weight_decay": 0}] if method.steps else []
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(config.momentum, 0.999), **shared)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **shared)


def _schedule(config: RunConfig, optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    if config.decay_every:
        return lr_scheduler.StepLR(optimizer, config.decay_every * steps, config.decay_factor)
    total = max(config.epochs * steps, 1) + 1
    return lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total, cycle_momentum=False)


def _check(values: dict[str, float], method: TrainingMethod) -> None:
    for name in ("train_loss", "penalty", "test_loss"):
        if not math.isfinite(values[name]):
            raise KureError(f"The {name} is {values[name]}.")
    for name, step in method.steps.as_numbers().items():
        if not step > 0:
            raise KureError(f"The learned step of {name} is {step:.2g}.")


def _append(columns: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        columns.setdefault(name, []).append(value)


def _save(checkpoint: Path | None, config: RunConfig, finished: int, state: dict[str, Any], history: Trained) -> None:
    """Write the SHA-256, 32 bytes, then what it is of: the run's key, its state, and its curves so far."""
    if checkpoint is None:
        return
    buffer = io.BytesIO()
    content = {name: part.state_dict() for name, part in state.items()}
    torch.save({"key": config.key, "epoch": finished, "history": history.model_dump(), **content}, buffer)
    write_atomically(checkpoint, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def read_checkpoint(checkpoint: Path | None, config: RunConfig) -> dict[str, Any] | None:
    """What a checkpoint holds: `epoch`, the number of finished ones, `history`, and the parts of the state by name.

    None if there is none; one that is damaged or of another run is named on stderr and left aside, which costs time and
    changes no result.
    """
    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        sealed = checkpoint.read_bytes()
        digest, content = sealed[:32], sealed[32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its SHA-256 is not the one it carries")
        saved = torch.load(io.BytesIO(content), "cpu", weights_only=True)  # of whatever device it was
        if saved["key"] != config.key:
            raise ValueError(f"it is that of the run {saved['key']}")
        history = Trained(**saved["history"])
        if not {len(values) for values in history.curves.values()} == {saved["epoch"]} <= {*range(config.epochs + 1)}:
            raise ValueError(f"it cannot have finished {saved['epoch']} of {config.epochs} epochs")
        return saved | {"history": history}
    except Exception as error:  # the unpickler has no common class of errors
        if replicas.part()[0] == 0:
            say(f"The checkpoint {checkpoint} of {config.label} cannot be used ({in_words(error)}): it is left aside, "
                "and the run starts again from its first epoch.")  # fmt: skip
        return None


def _resume(checkpoint: Path | None, config: RunConfig, state: dict[str, Any]) -> tuple[int, Trained]:
    """Load the state kept after the last finished epoch; the number of epochs and the curves until then."""
    saved = read_checkpoint(checkpoint, config)
    if saved is None:
        return 0, Trained()
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
    except Exception as error:  # whole and of this run: another version of the code wrote it
        raise KureError(f"The checkpoint {checkpoint} does not suit {config.label} ({type(error).__name__}): delete "
                        "it, and the run starts again from its first epoch.") from error  # fmt: skip
    return saved["epoch"], saved["history"]
