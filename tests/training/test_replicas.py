"""One run by several processes: the weights of one process, whatever is lost on the way."""

import hashlib
import multiprocessing
import time

import pytest
import safetensors.torch
import torch
from helpers import TINY
from torch import nn
from torch.nn.functional import cross_entropy

from kure_lib.networks import data, device
from kure_lib.networks.layers import latent_weight, regularized_layers
from kure_lib.paths import KureError
from kure_lib.study import runs
from kure_lib.training import loop, methods, replicas
from kure_lib.training.configs import KureConfig, QatConfig, RivalConfig, RunConfig

BATCH, STEPS = 32, 6
CONFIG = RunConfig(model="resnet20", **{**TINY, "batch_size": BATCH, "train_size": BATCH * STEPS})
KURE = KureConfig(target=3, coefficient=0.5)
CASES = {
    name: CONFIG.model_copy(update=change)
    for name, change in {
        "plain": {},
        "kure": {"regularizer": KURE},
        "kure, lsq": {"regularizer": KURE, "quantization": QatConfig.named("lsq 4/4")},
        "dorefa": {"quantization": QatConfig.named("dorefa 4/4")},
        "sam": {"rival": RivalConfig(name="sam", strength=0.05)},
        "ema": {"rival": RivalConfig(name="ema", strength=0.9)},
        "noise": {"rival": RivalConfig(name="noise", strength=0.1)},
    }.items()
}
SHARED = RunConfig(model="resnet20", **{**TINY, "epochs": 3}, regularizer=KureConfig(), replicas=2,
                   start=RunConfig(model="resnet20", **{**TINY, "epochs": 0}))  # fmt: skip


# The weights of one process


def beginning(config):
    """A small network in float64, always the same, its training method, its optimizer, and its batches."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)).double()
    method = methods.build(model, config, torch.linspace(-1, 2, 28**2).double().reshape(1, 1, 28, 28))
    for step in method.steps.values():
        step.data = step.data.double()
    images = data.load("fashion_mnist", "train").head(config.train_size)
    batches = ((x.double(), y) for x, y in loop._batches(config, images, 0))
    return model.train(), method, loop._optimizer(config, model, method), batches


def numbers(model, method):
    """All that is trained, in a row."""
    kept = method.average.module if method.average else model
    return torch.cat([p.detach().flatten() for p in (*kept.parameters(), *method.steps.values())])


def work(report, file, start, checkpoint):
    """What two processes do in one group, as to begin takes them seconds: all cases, a run, and one that is refused."""
    with device.in_float32():
        found = {}
        for name, config in CASES.items():
            model, method, optimizer, batches = beginning(config)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
            with method.view():
                values = loop.train_epoch(model, batches, method, optimizer, schedule)
            found[name] = numbers(model, method), values
    if replicas.part() == (0, 2):
        torch.save(found, file)
    loop._fit(report, SHARED, start, checkpoint)
    torch.distributed.barrier()  # the first still evaluates and keeps
    loop._fit(report, SHARED.model_copy(update={"batch_size": 16}), start, None)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What came of all cases, by name, and the weights of the run."""
    folder = tmp_path_factory.mktemp("replicas")
    file, checkpoint = folder / "found.pt", folder / "checkpoint.pt"
    start, epochs = loop.fit(SHARED.start)[0].state_dict(), []
    with pytest.raises(KureError, match="Batch norm would see 8 images in each process"):
        replicas.together(2, work, (file, start, checkpoint), lambda epoch, values: epochs.append(epoch))
    assert epochs == [1, 2, 3]
    return torch.load(file), loop.read_checkpoint(checkpoint, SHARED)


def by_hand(config, times=1):
    """One process that adds the gradients of both halves of every batch, and so often those of the penalty."""
    model, method, optimizer, batches = beginning(config)
    curves = []

    def penalty():
        """KURE as Eq. 15 says."""
        weights = [latent_weight(layer) for layer in regularized_layers(model).values()]
        standardized = [(w - w.mean()) / w.std(correction=0) for w in weights]
        distances = torch.stack([(z.pow(4).mean() - KURE.target) ** 2 for z in standardized])
        return KURE.coefficient * distances.mean() * bool(config.regularizer)

    def backward(x, y):
        optimizer.zero_grad()
        drawn, scores, added = torch.get_rng_state(), [], penalty()
        for images, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            torch.set_rng_state(drawn)  # as both processes draw the same noise
            scores.append(model(images))
            (cross_entropy(scores[-1], labels) / 2).backward()
        for _ in range(times if added.requires_grad else 0):
            added.backward(retain_graph=True)
        return torch.cat(scores).detach(), added.item()

    with method.view():
        for x, y in batches:
            scores, added = backward(x, y)
            curves.append([cross_entropy(scores, y).item(), added, 100 * (scores.argmax(1) == y).float().mean().item()])
            if elsewhere := method.elsewhere():
                with elsewhere:
                    backward(x, y)
            optimizer.step()
            if method.average:
                method.average.update_parameters(model)
    means = torch.tensor(curves).mean(0).tolist()
    return numbers(model, method), dict(zip(("train_loss", "penalty", "train_top1"), means, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_weights_of_one_that_sees_both_halves(by_two, name, float32):
    weights, values = by_two[0][name]
    wanted, means = by_hand(CASES[name])
    assert (weights - wanted).norm() < 1e-10 * wanted.norm()
    assert values == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("times", [0, 2])
def test_a_penalty_that_is_left_out_or_added_twice_would_be_seen(by_two, times, float32):
    weights, _ = by_two[0]["kure"]
    other, _ = by_hand(CASES["kure"], times)
    assert (weights - other).norm() > 0.01 * weights.norm()


# A process is lost


def test_after_a_process_is_killed_a_run_goes_on_to_the_same_weights(by_two, results_folder, capfd):
    epochs = []

    def kill(epoch, values):
        epochs.append(epoch)
        if epoch == 1:
            time.sleep(0.1)  # into the second epoch
            max(multiprocessing.active_children(), key=lambda process: process.pid).kill()

    record = runs.get(SHARED, kill)
    assert "was lost (process 1 terminated with signal SIGKILL): they go on from" in capfd.readouterr().err
    assert epochs == [1, 2, 3]
    undisturbed = {name: value.contiguous() for name, value in by_two[1]["model"].items()}
    assert record.weights_sha256 == hashlib.sha256(safetensors.torch.save(undisturbed)).hexdigest()
    assert record.curves["train_loss"] == by_two[1]["history"].curves["train_loss"]


def test_processes_that_are_lost_again_and_again_are_one_sentence(monkeypatch, capsys):
    said = "\n-- Process 1 terminated with the following error:\nTraceback\nMemoryError: all of it\n"

    def lose(*arguments):
        raise torch.multiprocessing.ProcessRaisedException(said, 1, 1)

    monkeypatch.setattr(replicas, "_attempt", lose)
    with pytest.raises(KureError, match=r"^One of the 2 processes .* 4 times \(MemoryError: all of it\): .*\.$"):
        replicas.together(2, print, (), print)
    assert capsys.readouterr().err.count("lost (MemoryError: all of it): they go on from its last epoch.\n") == 3


# What cannot be shared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replicas": 0}, "A RunConfig cannot have replicas=0"),
        ({"replicas": 3}, "A batch of 32 images cannot be shared equally among 3 processes"),
        ({"replicas": 16, "train_size": 24}, "cannot be shared equally among 16 processes"),
        ({"replicas": 2, "regularizer": KureConfig(of="activations")}, "The penalty kure_of_activations is one on"),
        ({"replicas": 2, "rival": RivalConfig(name="gradient_l1", strength=1)}, "The penalty gradient_l1 is one on"),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_cannot_be_shared_is_refused(change, said):
    with pytest.raises(KureError) as error:
        RunConfig(**{"model": "resnet20", **TINY, **change})
    assert str(error.value).startswith(said) or said in str(error.value)
    assert "\n" not in str(error.value)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(KureError, match="2 processes need as many GPUs, and PyTorch sees 1"):
        loop.fit(SHARED)


def test_a_part_that_is_small_has_batch_norms_of_the_whole_batch_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to("meta")
    assert isinstance(replicas.synchronized(model, replicas.FEW)[1], nn.BatchNorm2d)
    assert isinstance(replicas.synchronized(model, replicas.FEW - 1)[1], nn.SyncBatchNorm)


# The images of a step


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("size", [32, 100])  # 100: more than there are
def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes(parts, size):
    split = data.load("fashion_mnist", "train").head(72)

    def batches(part):
        return split.batches(size, torch.Generator().manual_seed(3), part=part)

    whole = list(batches((0, 1)))
    shares = zip(*(batches((which, parts)) for which in range(parts)), strict=True)
    for (images, labels), parted in zip(whole, shares, strict=True):
        assert torch.equal(torch.cat([x for x, _ in parted]), images)
        assert torch.equal(torch.cat([y for _, y in parted]), labels)
        assert {len(y) for _, y in parted} == {len(labels) // parts}
