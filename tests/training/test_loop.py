"""Training is a function of its configuration: repeated, interrupted or resumed, it gives the same bits."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import TINY, same_weights
from pydantic import ValidationError
from scipy.stats import kurtosis as scipy_kurtosis

from kure_lib.networks import data, device, evaluation, models
from kure_lib.networks.layers import regularized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration
from kure_lib.training import configs
from kure_lib.training import loop as training
from kure_lib.training.configs import KureConfig, QatConfig, RivalConfig, RunConfig
from kure_lib.training.loop import fit
from kure_lib.training.protocol import TrainingMethod

KNOWN = RunConfig(
    model="resnet20", seed=1, epochs=4, learning_rate=0.04, weight_decay=5e-4, regularizer=KureConfig(),
    start=RunConfig(model="resnet20", seed=1, epochs=10, learning_rate=0.2, weight_decay=5e-4),
)  # fmt: skip


# The configuration and its key


def test_the_key_of_a_known_configuration_stays():
    """If this fails, every committed record is lost: take back what changed the key."""
    assert KNOWN.key == "277ca9a426"
    assert KNOWN.start.key == "70e41b0b31"
    assert KNOWN.label == "resnet20-kure-1.8-1-seed1" and KNOWN.start.label == "resnet20-pretrained-seed1"


def test_the_key_does_not_count_fields_at_their_defaults():
    class Extended(RunConfig):
        warm_up: int = 0
        label_smoothing: float = 0.0

    fields = {name: getattr(KNOWN, name) for name in RunConfig.model_fields if getattr(KNOWN, name) is not None}
    assert Extended(**fields).key == RunConfig(**fields).key == KNOWN.key
    assert Extended(**fields, warm_up=1).key != KNOWN.key
    assert RunConfig(**TINY, model="resnet20").key == RunConfig(**TINY, model="resnet20", momentum=0.9, seed=0).key


CHANGES = {
    "model": "mobilenet_v2_050", "data": "cifar10", "train_size": 100, "seed": 2, "start": None, "pretrained": True,
    "epochs": 5, "learning_rate": 0.05, "weight_decay": 0.0, "batch_size": 128, "momentum": 0.8, "decay_every": 2,
    "decay_factor": 0.2, "regularizer": None, "optimizer": "adamw",
    "quantization": QatConfig(quantizer="lsq", weight_bits=4, activation_bits=4),
    "rival": RivalConfig(name="sam", strength=0.1), "held_out": 100, "kept": "float16",
    "replicas": 2, "test_size": 200,
}  # fmt: skip


def test_the_key_counts_every_field(monkeypatch):
    assert set(CHANGES) == set(RunConfig.model_fields), "a new field needs a row here"
    keys = {KNOWN.model_copy(update={name: value}).key for name, value in CHANGES.items()}
    kure = {"target": 2.0}, {"coefficient": 0.5}, {"reduction": "sum"}, {"per_channel": True}, {"of": "activations"}
    for change in kure:
        keys.add(KNOWN.model_copy(update={"regularizer": KureConfig(**change)}).key)
    quantized = {"quantizer": "dorefa"}, {"weight_bits": 3}, {"activation_bits": 8}
    for change in quantized:
        other = CHANGES["quantization"].model_copy(update=change)
        keys.add(KNOWN.model_copy(update={"quantization": other}).key)
    for change in {"name": "ema"}, {"strength": 0.2}:
        keys.add(KNOWN.model_copy(update={"rival": CHANGES["rival"].model_copy(update=change)}).key)
    keys.add(KNOWN.model_copy(update={"start": KNOWN.start.model_copy(update={"seed": 5})}).key)
    monkeypatch.setattr(configs, "TRAINING_VERSION", configs.TRAINING_VERSION + 1)
    keys.add(KNOWN.key)
    monkeypatch.undo()
    assert len(keys - {KNOWN.key}) == len(CHANGES) + 12


def test_a_configuration_survives_json():
    again = RunConfig.model_validate_json(KNOWN.model_dump_json())
    assert again == KNOWN and again.key == KNOWN.key and hash(again) == hash(KNOWN)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rat": 0.1}, {"learning_rate": 0}, {"learning_rate": "fast"}, {"epochs": -1}, {"weight_decay": -1},
        {"weight_decay": float("inf")}, {"learning_rate": float("nan")},
        {"batch_size": 1}, {"momentum": 1.0}, {"seed": 2**64}, {"seed": -1}, {"train_size": 0}, {"test_size": 0},
        {"regularizer": {"lambda": 1}},
        {"regularizer": {"coefficient": 0}}, {"regularizer": {"target": 0.9}}, {"regularizer": {"of": "gradients"}},
        {"rival": {"name": "sam", "strength": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_a_misspelled_or_impossible_field_is_an_error(change):
    with pytest.raises(KureError) as error:
        RunConfig(**{"model": "resnet20", **TINY, **change})
    ((field, value),) = list(change.items())
    field = [*value][-1] if isinstance(value, dict) else field
    assert field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "vgg"}, "Unknown architecture 'vgg': choose one of resnet20, "),
        ({"data": "mnist"}, "Unknown data set 'mnist': choose one of fashion_mnist, "),
        ({"rival": {"name": "dropout", "strength": 1}}, "Unknown rival 'dropout': choose one of gradient_l1, "),
        ({"regularizer": {"reduction": "median"}}, "Unknown reduction 'median': choose one of mean, sum, max."),
        ({"regularizer": {"of": "activations", "per_channel": True}}, "leave the other options out"),
        ({"model": "mobilenet_v2_050", "start": KNOWN}, "cannot start from a resnet20 on fashion_mnist"),
        ({"pretrained": True}, "published weights 'resnet20': choose one of resnet18, "),
        ({"model": "resnet18", "pretrained": True, "start": KNOWN}, "leave pretrained or start out"),
        ({"rival": {"name": "sam", "strength": 1}, "quantization": {"quantizer": "lsq", "weight_bits": 4,
          "activation_bits": 4}}, "leave quantization out"),
        ({"held_out": 100, "test_size": 100}, "leave test_size or held_out out"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_name_that_does_not_exist_and_a_contradiction_are_one_sentence(change, said):
    with pytest.raises(KureError) as error:
        RunConfig(**{"model": "resnet20", **TINY, **change})
    assert said in str(error.value) and str(error.value).count(". ") == 0


def test_in_json_quantizers_and_rivals_are_called_method_and_input_takes_both_names():
    """The committed keys and records have it so."""
    for config, field in ((CHANGES["quantization"], "quantizer"), (CHANGES["rival"], "name")):
        written = json.loads(config.model_dump_json())
        assert written["method"] == getattr(config, field) and field not in written
        assert type(config)(**written) == config == type(config)(**config.model_dump(by_alias=False))
    run = RunConfig(model="resnet20", **TINY, quantization=CHANGES["quantization"])
    assert json.loads(run.model_dump_json())["quantization"]["method"] == "lsq"
    assert run.key == "eb2734827b"


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        KNOWN.epochs = 3


# Training


@pytest.fixture(scope="module")
def trained():
    """A tiny run, its final weights and its curves."""
    config = RunConfig(model="resnet20", **TINY)
    model, history = fit(config)
    return config, {name: value.clone() for name, value in model.state_dict().items()}, history


def timeless(history):
    return {name: values for name, values in history.curves.items() if name != "seconds"}, history.layer_kurtosis


def test_training_twice_gives_the_same_bits(trained):
    config, weights, history = trained
    torch.manual_seed(12345)  # what was drawn before does not matter
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # nor how many threads there are
    try:
        model, again = fit(config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert same_weights(model.state_dict(), weights)
    assert timeless(again) == timeless(history)
    assert not model.training


def test_the_small_mobilenet_trains_to_the_same_bits_twice():
    config = RunConfig(model="mobilenet_v2_050", **{**TINY, "train_size": 256, "epochs": 1})
    assert same_weights(fit(config)[0].state_dict(), fit(config)[0].state_dict())


def test_another_seed_gives_other_weights(trained):
    config, weights, _ = trained
    model, _ = fit(config.model_copy(update={"seed": 1, "epochs": 1}))
    assert not torch.equal(model.fc.weight, weights["fc.weight"])


def test_the_curves_are_what_they_say(trained):
    config, weights, history = trained
    model = models.build("resnet20", 1, 10)
    model.load_state_dict(weights)
    test = data.load("fashion_mnist", "test").head(config.train_size)
    result = evaluation.evaluate(model, test)
    assert all(len(values) == config.epochs for values in (*history.curves.values(), *history.layer_kurtosis.values()))
    assert (history.curves["test_top1"][-1], history.curves["test_loss"][-1]) == (result.top1, result.loss)
    layers = regularized_layers(model)
    by_scipy = {name: scipy_kurtosis(m.weight.detach().numpy(), axis=None, fisher=False) for name, m in layers.items()}
    assert {name: values[-1] for name, values in history.layer_kurtosis.items()} == pytest.approx(by_scipy, rel=1e-5)
    assert history.curves["kurtosis"][-1] == pytest.approx(sum(by_scipy.values()) / 20, rel=1e-5)
    assert history.curves["penalty"] == [0.0, 0.0]


def test_evaluation_is_the_share_of_right_answers(trained):
    _, weights, _ = trained
    model = models.build("resnet20", 1, 10)
    model.load_state_dict(weights)
    split = data.load("fashion_mnist", "test").head(300)
    result = evaluation.evaluate(model.train(), split)
    with torch.no_grad(), device.autocast():
        scores = model.eval()((split.images.float() - split.mean) / split.std).float()
    assert result.top1 == pytest.approx(100 * (scores.argmax(1) == split.labels).float().mean().item(), abs=0.7)
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(scores, split.labels).item(), rel=1e-2)
    assert evaluation.accuracy(model, split) == result.top1


def test_training_learns_and_kure_lowers_the_kurtosis_where_its_control_does_not(trained):
    """Both arms start from the same weights and see the same images in the same order."""
    config, weights, history = trained
    control = RunConfig(model="resnet20", **{**TINY, "learning_rate": 0.1}, start=config)
    _, plain = fit(control, weights)
    _, kure = fit(control.model_copy(update={"regularizer": KureConfig(coefficient=10)}), weights)
    assert plain.curves["train_loss"][-1] < history.curves["train_loss"][-1] < history.curves["train_loss"][0]
    assert plain.curves["kurtosis"][-1] == pytest.approx(history.curves["kurtosis"][-1], abs=0.1)
    assert kure.curves["kurtosis"][-1] < plain.curves["kurtosis"][-1] - 0.2
    assert 0 < kure.curves["penalty"][-1] < 0.9 * kure.curves["penalty"][0]


def test_kure_of_activations_lowers_their_kurtosis_and_not_that_of_weights(trained):
    config, weights, _ = trained
    control = RunConfig(model="resnet20", **{**TINY, "learning_rate": 0.1}, start=config)
    images = data.load("fashion_mnist", "train").head(256).images.float() / 255

    def mean_kurtosis(regularizer):
        model, history = fit(control.model_copy(update={"regularizer": regularizer}), weights)
        with calibration.reestimated_batch_norm(model, [images]):  # a tiny run leaves them far behind its weights
            seen = calibration.observe(model, images)
        return np.mean([scipy_kurtosis(np.concatenate([x, -x]), fisher=False) for x in (
            site.values[site.values > 0] for site in seen.values())]), history  # fmt: skip

    before, plain = mean_kurtosis(None)
    after, kure = mean_kurtosis(KureConfig(of="activations", coefficient=3))
    assert after < before - 0.3
    assert kure.curves["penalty"][-1] < kure.curves["penalty"][0]
    assert kure.curves["kurtosis"][-1] > plain.curves["kurtosis"][-1] - 0.1


def test_without_epochs_a_run_is_its_start(trained):
    config, weights, _ = trained
    model, history = fit(config.model_copy(update={"start": config, "epochs": 0}), weights)
    assert same_weights(model.state_dict(), weights)
    assert history.curves == {} and history.layer_kurtosis == {}


@pytest.mark.parametrize("regularizer", [None, KureConfig()])
def test_a_learning_rate_that_diverges_is_named(tiny, regularizer):
    config = tiny.model_copy(update={"learning_rate": 1e6, "regularizer": regularizer})
    with pytest.raises(KureError, match=rf"Training {config.label} diverged in epoch 1: lower its learning rate"):
        fit(config)


def test_the_learning_rate_follows_one_cycle_or_steps():
    def rates(config, steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config.learning_rate)
        schedule = training._schedule(config, optimizer, steps)
        result = []
        for _ in range(config.epochs * steps):
            result.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return result

    cycle = rates(RunConfig(model="resnet20", **{**TINY, "epochs": 10}), 10)
    peak = cycle.index(max(cycle))
    assert max(cycle) == pytest.approx(0.05, rel=1e-2) and 25 <= peak <= 35
    assert cycle[: peak + 1] == sorted(cycle[: peak + 1]) and cycle[peak:] == sorted(cycle[peak:], reverse=True)
    assert cycle[-1] < 1e-3 * max(cycle)
    steps = rates(RunConfig(model="resnet20", **{**TINY, "epochs": 6}, decay_every=2), 3)
    assert steps == pytest.approx([0.05] * 6 + [0.005] * 6 + [0.0005] * 6)


def test_adamw_takes_the_step_of_loshchilov_and_hutter():
    """Algorithm 2 of Loshchilov and Hutter (2019), two steps by hand: the decay is no part of the gradient."""
    model = torch.nn.Linear(3, 1, bias=False)
    config = RunConfig(model="resnet20", **{**TINY, "weight_decay": 0.1}, momentum=0.8, optimizer="adamw")
    optimizer = training._optimizer(config, model, TrainingMethod())
    weight, gradients = model.weight.detach().double().clone(), torch.tensor([[[1.0, -2.0, 0.0]], [[3.0, 1.0, -1.0]]])
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        model.weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.999 * second + 0.001 * gradient.square()
        scaled = first / (1 - 0.8**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 0.05 * (scaled + 0.1 * weight)
    assert torch.allclose(model.weight.double(), weight, atol=1e-6)


@pytest.mark.parametrize(
    ("train_size", "test_size", "tested"), [(None, 300, 300), (128, 300, 300), (128, None, 128), (None, None, 10_000)]
)
def test_a_run_is_tested_on_the_first_test_images(train_size, test_size, tested):
    config = RunConfig(model="resnet20", **{**TINY, "train_size": train_size, "test_size": test_size})
    train, test = training.splits(config)
    assert len(train) == (train_size or 60_000)
    assert torch.equal(test.images, data.load("fashion_mnist", "test").images[:tested])


@pytest.mark.parametrize("held_out", [60_000, 70_000])
def test_images_must_be_left_to_train_on(tiny, held_out):
    with pytest.raises(KureError, match=rf"Of the 60000 training images of fashion_mnist, {held_out} cannot be"):
        fit(tiny.model_copy(update={"held_out": held_out}))


# Interruption

RUN = """
import sys, time
from pathlib import Path
from kure_lib.training.configs import RunConfig
from kure_lib.training.loop import fit
config = RunConfig.model_validate_json(sys.argv[1])
fit(config, checkpoint=Path(sys.argv[2]), on_epoch=lambda epoch, values: print(epoch, flush=True))
"""


@pytest.mark.parametrize("network", [{"model": "resnet20"}, {"model": "vit_small_images", "optimizer": "adamw"}])
def test_a_killed_run_goes_on_to_the_same_bits(network, tmp_path, environment):
    config = RunConfig(**{**TINY, "epochs": 3, "learning_rate": 0.01}, **network, regularizer=KureConfig())
    checkpoint = tmp_path / "run.pt"
    command = [sys.executable, "-c", RUN, config.model_dump_json(), str(checkpoint)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "1\n"
        time.sleep(0.15)  # into the second epoch
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    done = training.read_checkpoint(checkpoint, config)["epoch"]
    assert 1 <= done < config.epochs

    epochs = []
    resumed, history = fit(config, checkpoint=checkpoint, on_epoch=lambda epoch, values: epochs.append(epoch))
    assert epochs == list(range(done + 1, config.epochs + 1))
    whole, wanted = fit(config)
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert timeless(history) == timeless(wanted)


@pytest.fixture
def interrupted(tmp_path):
    """A run of two epochs and its checkpoint after the first."""

    def stop(epoch, values):
        raise KeyboardInterrupt

    config = RunConfig(model="resnet20", **{**TINY, "train_size": 128})
    with pytest.raises(KeyboardInterrupt):
        fit(config, checkpoint=tmp_path / "run.pt", on_epoch=stop)
    return config, tmp_path / "run.pt"


def rewritten(content, **fields):
    """A checkpoint with some of its fields changed and the SHA-256 that belongs to them."""
    buffer = io.BytesIO()
    torch.save(torch.load(io.BytesIO(content[32:]), weights_only=True) | fields, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


DAMAGES = {
    "half": (lambda content: content[: len(content) // 2], "SHA-256"),
    "one bit": (lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:], "SHA-256"),
    "text": (lambda content: b"no checkpoint", "SHA-256"),
    "empty": (lambda content: b"", "SHA-256"),
    "no archive": (lambda content: hashlib.sha256(b"no").digest() + b"no", "cannot be used"),
    "of another run": (lambda content: rewritten(content, key="0123456789"), "that of the run 0123456789"),
    "too far": (lambda content: rewritten(content, epoch=99), "cannot have finished 99 of 2 epochs"),
    "curves": (lambda content: rewritten(content, history={"curves": [1]}), "curves: "),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_damaged_or_foreign_is_named_and_not_used(interrupted, damage, said, capsys):
    config, checkpoint = interrupted
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    epochs = []
    model, _ = fit(config, checkpoint=checkpoint, on_epoch=lambda epoch, values: epochs.append(epoch))
    told = capsys.readouterr().err
    assert epochs == [1, 2]
    assert same_weights(model.state_dict(), fit(config)[0].state_dict())
    assert told.startswith(f"The checkpoint {checkpoint} of {config.label} cannot be used") and told.count("\n") == 1
    assert said in told and "starts again from its first epoch" in told


def test_a_checkpoint_of_a_gpu_is_read_where_there_is_none(interrupted, monkeypatch):
    config, checkpoint = interrupted
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    content = rewritten(checkpoint.read_bytes())
    assert b"cuda:0" in content
    checkpoint.write_bytes(content)
    assert training.read_checkpoint(checkpoint, config)["epoch"] == 1


def test_a_checkpoint_that_other_code_wrote_is_named(interrupted):
    config, checkpoint = interrupted
    checkpoint.write_bytes(rewritten(checkpoint.read_bytes(), model={}))
    with pytest.raises(KureError, match=rf"The checkpoint {checkpoint} does not suit .*: delete it"):
        fit(config, checkpoint=checkpoint)
