"""One training loop: from scratch or from another run, with or without a regularizer.

A run is trained on one processor thread (or on one GPU). A study fills the cores with several runs at
once, which is faster than several threads for one net of this size, and what a run computes does not
depend on how many cores the machine has.
"""

import io
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kure_lib.files import write_atomically
from kure_lib.networks import activations, data, device, evaluation, models
from kure_lib.networks.device import single_thread
from kure_lib.paths import KureError
from kure_lib.tensors.kurtosis import kurtosis
from kure_lib.training import qat, rivals
from kure_lib.training.configs import KureConfig, RunConfig
from kure_lib.training.regularizers import (
    ActivationKurtosisRegularizer,
    KurtosisRegularizer,
    latent_weight,
    regularized_layers,
)  # fmt: skip


class Trained(BaseModel):
    """What a finished run leaves behind, next to the weights: one value an epoch in each curve, and learned steps."""

    curves: dict[str, list[float]]
    layer_kurtosis: dict[str, list[float]]
    steps: dict[str, float] = {}


def fit(
    config: RunConfig,
    start: dict[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, values: None,
) -> tuple[nn.Module, Trained]:
    """Train a network as `config` says; returns it in evaluation mode, with its curves.

    `start` are the weights of the run that `config.start` names. With a `checkpoint` path the state is kept
    there after every epoch, and training goes on from it to the same weights, bit for bit. `on_epoch` is
    called with the number of finished epochs and the values of the last. Raises `KureError` if the loss is
    no longer finite or the checkpoint cannot be read.
    """
    train, test = splits(config)
    torch.manual_seed(config.seed)
    model = models.build(config.model, train.channels, train.classes, config.pretrained)
    if start is not None:
        model.load_state_dict(start)
    model.to(device.device())
    steps, view = _quantized(model, config, train)
    groups = [{"params": model.parameters()}] + ([{"params": steps.values(), "weight_decay": 0}] if steps else [])
    optimizer = torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    schedule = _schedule(config, optimizer, train.steps_per_epoch(config.batch_size))
    regularizer, watching = _regularizer(model, config.regularizer, train)
    rival = rivals.build(model, config.rival)
    history = Trained(curves={}, layer_kurtosis={})
    state = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"steps": steps} if steps else {})
    state |= {"average": rival.average} if rival.average else {}
    tested = rival.average.module if rival.average else model
    watched = regularized_layers(tested)
    with single_thread(), view, watching, rival.view():
        finished = _resume(checkpoint, state, history) if checkpoint else 0
        for epoch in range(finished, config.epochs):
            began = time.perf_counter()
            diverged = f"Training {config.label} diverged in epoch {epoch + 1}: lower its learning rate"
            try:
                values = train_epoch(model, train, regularizer, optimizer, schedule, config, epoch, rival)
                layers = {name: kurtosis(latent_weight(layer)).item() for name, layer in watched.items()}
            except KureError as error:  # weights that have no kurtosis
                raise KureError(f"{diverged} ({str(error).rstrip('.')}).") from error
            if not math.isfinite(values["train_loss"]) or min(steps.as_numbers().values(), default=1) <= 0:
                raise KureError(f"{diverged}.")
            result = evaluation.evaluate(tested, test)
            values |= {"test_loss": result.loss, "test_top1": result.top1,
                       "kurtosis": sum(layers.values()) / len(layers),
                       "seconds": time.perf_counter() - began}  # fmt: skip
            _append(history.curves, values)
            _append(history.layer_kurtosis, layers)
            if checkpoint:
                _save(checkpoint, epoch + 1, state, history)
            on_epoch(epoch + 1, values)
    history.steps.update(steps.as_numbers())
    return tested.eval(), history


def splits(config: RunConfig) -> tuple[data.Split, data.Split]:
    """The images a run is trained on, and those it is tested on: test images, or training images held out."""
    train = data.load(config.data, "train")
    if config.held_out:
        train, test = train.parted(config.held_out)
    else:
        test = data.load(config.data, "test").head(config.train_size)
    return train.head(config.train_size), test


def _regularizer(
    model: nn.Module, kure: KureConfig | None, train: data.Split
) -> tuple[Callable[[], Tensor], AbstractContextManager]:
    """The penalty of a step, and the view of the model in which it is taken."""
    if kure is None:
        return lambda: torch.zeros(()), nullcontext()
    options = kure.model_dump(exclude={"of"})
    if kure.of == "weights":
        return KurtosisRegularizer(model, **options), nullcontext()
    images, _ = next(train.head(1).batches(1))
    regularizer = ActivationKurtosisRegularizer(
        model, images.to(device.device()), kure.target, kure.coefficient)  # fmt: skip
    return regularizer, regularizer.watching()


def _quantized(model: nn.Module, config: RunConfig, train: data.Split) -> tuple[qat.Steps, AbstractContextManager]:
    """The steps to learn, and the view in which to train; no steps and the model itself for full precision."""
    if config.quantization is None:
        return qat.Steps(), nullcontext()
    images, _ = next(train.batches(config.batch_size))
    steps = qat.initial_steps(model, config.quantization, images.to(device.device()))
    sites = activations.quantized_sites(model, images[:1].to(device.device()))
    return steps, qat.quantized(model, config.quantization, steps, sites)


def train_epoch(model, train, regularizer, optimizer, schedule, config, epoch, rival=None) -> dict[str, float]:
    """One pass over the training images; returns the means of its losses and its accuracy in percent.

    What is random in it depends on the seed and on the number of the epoch alone, so that an interrupted
    run goes on as if it had not been interrupted.
    """
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
    torch.manual_seed(1_000_003 * config.seed + epoch)
    place = device.device()
    rival = rival or rivals.build(model, None)
    model.train()
    total_loss = total_penalty = torch.zeros((), device=place)
    correct = seen = 0

    def gradients(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with device.autocast():
            scores = model(images)
            loss = nn.functional.cross_entropy(scores, labels)
        penalty = regularizer() + rival.penalty(loss)
        optimizer.zero_grad()
        (loss + penalty).backward()
        return scores.detach(), loss.detach(), penalty.detach()

    for images, labels in train.batches(config.batch_size, generator):
        images, labels = images.to(place), labels.to(place)
        scores, loss, penalty = gradients(images, labels)
        if elsewhere := rival.elsewhere():
            with elsewhere:
                gradients(images, labels)
        optimizer.step()
        schedule.step()
        if rival.average:
            rival.average.update_parameters(model)
        total_loss = total_loss + loss * len(labels)
        total_penalty = total_penalty + penalty * len(labels)
        correct += (scores.argmax(1) == labels).sum().item()
        seen += len(labels)
    return {
        "train_loss": total_loss.item() / seen,
        "penalty": total_penalty.item() / seen,
        "train_top1": 100 * correct / seen,
    }


def _schedule(config: RunConfig, optimizer: torch.optim.Optimizer, steps: int):
    scheduler = torch.optim.lr_scheduler
    if config.decay_every:
        return scheduler.StepLR(optimizer, config.decay_every * steps, config.decay_factor)
    return scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(config.epochs * steps, 1) + 1, cycle_momentum=False
    )


def _append(columns: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        columns.setdefault(name, []).append(value)


def _save(checkpoint: Path, epoch: int, state: dict, history: Trained) -> None:
    buffer = io.BytesIO()
    content = {name: part.state_dict() for name, part in state.items()}
    torch.save({"epoch": epoch, "history": history.model_dump(), **content}, buffer)
    write_atomically(checkpoint, buffer.getvalue())


def _resume(checkpoint: Path, state: dict, history: Trained) -> int:
    """Load the state kept after the last finished epoch; the number of epochs it has."""
    if not checkpoint.exists():
        return 0
    try:
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
    except Exception as error:
        raise KureError(f"The checkpoint {checkpoint} cannot be read ({type(error).__name__}): delete it, "
                        "and the run starts again from its first epoch.") from error  # fmt: skip
    history.curves.update(saved["history"]["curves"])
    history.layer_kurtosis.update(saved["history"]["layer_kurtosis"])
    return saved["epoch"]
