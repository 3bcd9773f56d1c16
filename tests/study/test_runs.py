"""Records: written once, found again, damaged, missing, shared by two processes; and those of the study."""

import copy
import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import same_weights
from PIL import Image
from scipy.stats import kurtosis as scipy_kurtosis

from kure_lib.networks import data, device, evaluation
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import ROOT, KureError
from kure_lib.quantization import calibration, layerwise
from kure_lib.quantization import integers as master
from kure_lib.quantization import view as ptq
from kure_lib.quantization.spec import ROUNDINGS, QuantizationSpec
from kure_lib.study import records, runs, views
from kure_lib.study.plans import plan
from kure_lib.study.records import Record
from kure_lib.tensors.grids import grid_named
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, best_step, distortion
from kure_lib.training import loop as training
from kure_lib.training.configs import RunConfig

pytestmark = pytest.mark.usefixtures("results_folder")
FOUR = QuantizationSpec(weight_bits=4)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A trained run with two evaluations, as files; tests copy it."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KURE_RESULTS", str(folder))
        patch.setenv("KURE_PROFILE", "trial")
        patch.delenv("KURE_CHECK", raising=False)
        record = runs.get(RunConfig(model="resnet20", train_size=256, epochs=1, learning_rate=0.05, weight_decay=0))
        runs.evaluate(record)
        runs.evaluate(record, FOUR)
    return folder / "trial"


@pytest.fixture
def config():
    return RunConfig(model="resnet20", train_size=256, epochs=1, learning_rate=0.05, weight_decay=0)


@pytest.fixture
def files(kept, results_folder, config, monkeypatch):
    """The kept run in a folder of the test's own, and training made impossible; returns record and weights files."""
    for file in kept.rglob("*.*"):
        if file.suffix in (".json", ".safetensors"):
            target = results_folder / file.relative_to(kept)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    def fit(*arguments, **options):
        raise AssertionError("this must not train")

    monkeypatch.setattr(training, "fit", fit)
    name = f"{config.label}-{config.key}"
    return results_folder / "records" / f"{name}.json", results_folder / "weights" / "local" / f"{name}.safetensors"


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Found again


def test_a_second_get_finds_the_record_and_does_not_train(files, config):
    record = runs.get(config)
    assert record.config == config and record.key == config.key
    assert list(record.evaluations) == sorted({QuantizationSpec().key, FOUR.key})
    assert record == runs.find(config) and hash(record) == hash(runs.find(config))


def test_a_record_survives_being_written(files, config):
    before = files[0].read_bytes()
    records.write(runs.find(config))
    assert files[0].read_bytes() == before
    assert json.loads(before)["config"]["learning_rate"] == 0.05
    assert not (files[0].parents[1] / "checkpoints" / f"{files[0].stem}.pt").exists()


def test_the_network_is_the_trained_one_and_the_same_object(files, config):
    record = runs.find(config)
    network = record.network()
    assert not network.training and record.network() is network
    assert same_weights(network.state_dict(), {name: record.weights[name] for name in network.state_dict()})
    other = runs.find(config)
    assert len(other.weights) == len(record.weights)  # both have read their weights
    assert other == record and other.network() is network


def test_the_layers_are_summarized(files, config):
    record = runs.find(config)
    network = record.network()
    assert sum(layer.regularized for layer in record.layers) == 20
    assert {layer.name for layer in record.layers if layer.quantized} == set(quantized_layers(network))
    for layer in record.layers:
        weight = network.get_submodule(layer.name).weight.detach().numpy()
        assert layer.shape == weight.shape
        assert layer.kurtosis == pytest.approx(scipy_kurtosis(weight, axis=None, fisher=False), rel=1e-5)
        assert (layer.low, layer.high) == (weight.min(), weight.max())
        assert layer.counts == tuple(np.histogram(weight, 80, (layer.low, layer.high))[0])
        assert layer.reach == pytest.approx(np.abs(weight).max() / weight.std(), rel=2e-3)
        values = layer.quantiles(2**14)
        shares = np.histogram(values.numpy(), 80, (layer.low, layer.high))[0] / 2**14
        assert np.abs(shares - np.array(layer.counts) / weight.size).max() < 1.01 / 2**14
        for bits in (4, 2):
            assert distortion(values, bits) == pytest.approx(distortion(torch.from_numpy(weight), bits), rel=0.05)
        assert sum(layer.counts) == weight.size
    assert record.mean_kurtosis == pytest.approx(np.mean([layer.kurtosis for layer in record.layers]))
    assert record.curves["kurtosis"][-1] == pytest.approx(record.mean_kurtosis, rel=1e-6)
    assert sum(record.curves["seconds"]) > 0
    assert {"python", "torch", "device", "precision", "commit"} <= set(record.provenance)


def test_a_run_is_trained_after_the_one_it_starts_from(tiny_kure, results_folder, monkeypatch):
    configs, starts, fit = [], [], training.fit

    def recorded(config, start, *more):
        configs.append(config)
        starts.append(start)
        return fit(config.model_copy(update={"epochs": 0}), start, *more)

    monkeypatch.setattr(training, "fit", recorded)
    record = runs.get(tiny_kure)
    assert configs == [tiny_kure.start, tiny_kure]
    assert starts[0] is None and same_weights(starts[1], runs.find(tiny_kure.start).weights)
    assert runs.get(tiny_kure) == record and len(configs) == 2
    assert runs.find(tiny_kure).evaluations == {}
    records.forget(tiny_kure)
    assert runs.find(tiny_kure) is None and runs.find(tiny_kure.start) is not None
    assert not any(tiny_kure.key in name for name in everything(results_folder) if not name.endswith(".lock"))


# Damaged and missing


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "{}",
        lambda text: text.replace('"curves"', '"curve"'), lambda text: text.replace('"resnet20"', '"resnet21"'),
    ],
    ids=["half", "empty", "list", "no fields", "misspelled field", "unknown model"],
)  # fmt: skip
def test_a_damaged_record_is_named(files, config, damage):
    files[0].write_text(damage(files[0].read_text()))
    for ask in (runs.find, runs.get):
        with pytest.raises(KureError, match=rf"The record {files[0]} is damaged .*: restore it, or delete it") as error:
            ask(config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"), [('"learning_rate": 0.05', '"learning_rate": 0.06'), ('"key": "', '"key": "0')], ids=["rate", "key"]
)
def test_a_record_whose_configuration_was_edited_is_named(files, config, old, new):
    text = _without_digest(files[0])
    assert text.count(old) == 1
    files[0].write_text(text.replace(old, new))
    with pytest.raises(KureError, match=rf"The record {files[0]} is not the one its name says"):
        runs.get(config)


def _without_digest(file: Path) -> str:
    """A record as earlier versions wrote it."""
    lines = file.read_text().splitlines()
    assert lines[-2].startswith('"digest": ')
    return "\n".join([*lines[:-3], lines[-3].removesuffix(","), "}"])


def test_a_record_of_an_earlier_version_is_read_and_gets_its_digest_when_it_is_written(files, config):
    whole = files[0].read_bytes()
    files[0].write_text(_without_digest(files[0]))
    record = runs.find(config)
    assert record.digest is None
    records.write(record)
    assert files[0].read_bytes() == whole
    content = json.loads(whole)
    digest = content.pop("digest")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["curves"].update(test_top1=[1234.5]), r"curves: .*test_top1 cannot be 1234\.5"),
        (lambda r: r["curves"].update(test_loss=[float("nan")]), "test_loss cannot be nan"),
        (lambda r: r["curves"].update(seconds=[-1.0]), r"seconds cannot be -1\.0"),
        (lambda r: r["curves"].update(kurtosis=[2.0, 2.0]), "kurtosis has 2 values for 1 epochs"),
        (lambda r: r["layer_kurtosis"].update(conv1=[float("inf")]), "conv1 cannot be inf"),
        (lambda r: r["evaluations"].update({"{}": [101.0, 0.1]}), r"evaluations\.\{\}\.0: .*less than or equal to 100"),
        (lambda r: r["evaluations"].update({"{}": [10.0, float("nan")]}), r"evaluations\.\{\}\.1: .*finite"),
        (lambda r: r.update(steps={"conv1": 0.0}), r"steps\.conv1: .*greater than 0"),
        (lambda r: r["layers"][0].update(low=9.0), "the histogram of"),
        (lambda r: r["layers"][0].update(shape=[1, 2]), "is not one of 2 weights"),
    ],
)
def test_values_that_cannot_be_are_refused(files, config, change, said):
    content = json.loads(_without_digest(files[0]))
    change(content)
    files[0].write_text(json.dumps(content))
    with pytest.raises(KureError, match=rf"The record {files[0]} is damaged \(.*{said}"):
        runs.find(config)


def test_a_loss_that_is_not_finite_is_not_kept(files, config, monkeypatch):
    record, before = runs.find(config), files[0].read_bytes()
    monkeypatch.setattr(evaluation, "evaluate", lambda model, split: evaluation.Evaluation(10.0, float("nan")))
    with pytest.raises(KureError, match=r"The loss of .* is nan, so it is not kept"):
        runs.evaluate(record, QuantizationSpec(weight_bits=6))
    assert files[0].read_bytes() == before and len(record.evaluations) == 2


def test_damaged_or_missing_weights_are_named(files, config):
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    records._network.cache_clear()  # a network in memory would do without the file
    with pytest.raises(KureError, match=rf"The weights {files[1]} are damaged"):
        runs.get(config).network()
    files[1].unlink()
    with pytest.raises(KureError, match=rf"The weights {files[1]} are missing"):
        runs.evaluate(runs.get(config), QuantizationSpec(weight_bits=5))


def test_a_record_that_is_a_folder_and_weights_that_are_no_weights_are_named(files, config):
    content = b"no safetensors"
    record = runs.find(config).model_copy(update={"weights_sha256": hashlib.sha256(content).hexdigest()})
    files[1].write_bytes(content)
    with pytest.raises(KureError, match=rf"The weights {files[1]} are no safetensors file"):
        record.weights  # noqa: B018
    files[0].unlink()
    files[0].mkdir()
    with pytest.raises(KureError, match=rf"The record {files[0]} is damaged .*directory"):
        runs.find(config)


# Evaluations


def test_full_precision_is_the_accuracy_of_the_network(files, config):
    record = runs.find(config)
    split = data.load("fashion_mnist", "test").head(config.train_size)
    record.evaluations.clear()
    assert runs.evaluate(record).top1 == evaluation.accuracy(record.network(), split)
    assert runs.evaluate(record).top1 == record.curves["test_top1"][-1]


def test_an_evaluation_is_made_once_and_kept(files, config, monkeypatch):
    record, spec = runs.find(config), QuantizationSpec(weight_bits=3, grid="signed_int", scope=PER_CHANNEL)
    result = runs.evaluate(record, spec)
    split = data.load("fashion_mnist", "test").head(config.train_size)
    with ptq.quantized(record.network(), weight_bits=3, grid=grid_named("signed_int"), scope=PER_CHANNEL) as model:
        assert evaluation.evaluate(model, split) == result
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert runs.evaluate(record, spec) == result == runs.evaluate(runs.find(config), spec)


def test_an_evaluation_says_its_precision_and_one_of_an_earlier_version_stays_as_it_is(files, config, monkeypatch):
    old = runs.find(config)
    old.evaluations[FOUR.key] = old.evaluations[FOUR.key]._replace(precision=None)
    records.write(old)
    monkeypatch.setattr(evaluation, "precision", lambda: "bfloat16")
    runs.evaluate(runs.find(config), QuantizationSpec(weight_bits=2))
    kept = json.loads(files[0].read_text())["evaluations"]
    assert kept[FOUR.key] == list(old.evaluations[FOUR.key][:2])
    assert kept[QuantizationSpec(weight_bits=2).key][2] == "bfloat16"


def test_two_open_records_do_not_lose_each_others_evaluations(files, config):
    one, other = runs.find(config), runs.find(config)
    specs = [QuantizationSpec(weight_bits=bits) for bits in (2, 3)]
    runs.evaluate(one, specs[0])
    runs.evaluate(other, specs[1])
    assert {specs[0].key, specs[1].key, FOUR.key} <= set(runs.find(config).evaluations)
    assert one.evaluations is not other.evaluations


@pytest.mark.parametrize("method", ROUNDINGS)
def test_weights_made_from_an_8_bit_copy_are_evaluated(files, config, method):
    record = runs.find(config)
    network, split = record.network(), data.load("fashion_mnist", "test").head(256)
    stored = {name: each.to(4, method) for name, each in master.of(network).items()}
    with master.served(network, stored):
        expected = evaluation.evaluate(network, split)
    spec = QuantizationSpec(weight_bits=4, grid="signed_int", rounding=method)
    assert runs.evaluate(record, spec) == expected
    assert runs.evaluate(record) == evaluation.evaluate(network, split)  # and the network is what it was


def test_an_8_bit_copy_with_new_batch_norms_is_another_network(files, config):
    record = runs.find(config)
    spec = {"weight_bits": 3, "grid": "signed_int", "rounding": "even", "scope": PER_CHANNEL}
    renewed = runs.evaluate(record, QuantizationSpec(**spec, reestimate_batch_norm=True, calibration=64))
    assert renewed.loss != runs.evaluate(record, QuantizationSpec(**spec)).loss
    split = data.load("fashion_mnist", "test").head(256)
    assert evaluation.evaluate(record.network(), split) == runs.evaluate(record)


def test_a_layer_is_quantized_alone_as_by_hand(files, config):
    record = runs.get(config)
    name, layer = list(quantized_layers(record.network()).items())[4]
    found = runs.evaluate(record, QuantizationSpec(weight_bits=1, layers=[name]))
    network, (_, split) = copy.deepcopy(record.network()), training.splits(config)
    weight = network.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(quantize(weight, best_step(weight, 1), 1))
    assert found == evaluation.evaluate(network, split) != runs.evaluate(record)
    assert not torch.equal(weight, layer.weight)


def test_weight_steps_are_chosen_once_for_all_specifications_that_share_them(files, config, monkeypatch):
    record, asked = runs.find(config), []
    choose = ptq.weight_steps
    counted = lambda layers, *args: asked.append(len(layers)) or choose(layers, *args)  # noqa: E731
    monkeypatch.setattr(ptq, "weight_steps", counted)
    views._steps.cache_clear()
    varied = [{"step_ratio": 0.8}, {"step_ratio": 1.3}, {"power_of_two": True}, {"bias_correction": True}]
    varied += [{"reestimate_batch_norm": True, "calibration": 64}]
    varied += [{"perturbation": name, "draw": 1} for name in ("steps 1.5", "flips 0.01", "stochastic")]
    specs = [QuantizationSpec(weight_bits=3, **fields) for fields in varied]
    results = [runs.evaluate(record, spec) for spec in specs]
    assert [count for count in asked if count] == [len(quantized_layers(record.network()))]
    specs += [QuantizationSpec(weight_bits=3, activation_bits=3, calibration=images) for images in (8, 64)]
    results += [runs.evaluate(record, spec) for spec in specs[-2:]]  # activations are other ones in other images
    split = data.load("fashion_mnist", "test").head(config.train_size)
    for spec, result in zip(specs, results, strict=True):
        images = calibration.images("fashion_mnist", spec.calibration or 1)[0]
        with device.single_thread(), ptq.quantized(record.network(), spec, images) as model:
            assert evaluation.evaluate(model, split) == result
    assert len(set(results)) == len(results)


@pytest.mark.parametrize("folded", [False, True])
def test_reconstructed_weights_are_shared_and_give_the_view_of_the_network(files, config, folded, monkeypatch):
    record, made = runs.find(config), []
    rounded = layerwise.rounded
    monkeypatch.setattr(layerwise, "rounded", lambda *args: made.append(args[2]) or rounded(*args))
    shared = {"weight_bits": 3, "reconstruction": "gptq", "calibration": 64, "fold_batch_norm": folded}
    specs = [QuantizationSpec(**shared, **fields) for fields in ({}, {"reestimate_batch_norm": True})]
    specs += [QuantizationSpec(**shared, activation_bits=4, activation_ratio=0.9)]
    views._rounded.cache_clear()
    results = [runs.evaluate(record, spec) for spec in specs]
    assert made == list(quantized_layers(record.network()))  # once for all three
    images, split = calibration.images("fashion_mnist", 64)[0], data.load("fashion_mnist", "test").head(256)
    for spec, result in zip(specs, results, strict=True):
        with device.single_thread(), ptq.quantized(record.network(), spec, images) as model:
            assert evaluation.evaluate(model, split) == result
    assert len(set(results)) == 3 - folded  # a folded network has no statistics to renew
    assert evaluation.evaluate(record.network(), split) == runs.evaluate(record)


# Check mode


def test_check_mode_computes_nothing_and_writes_nothing(files, config, results_folder, monkeypatch):
    monkeypatch.setenv("KURE_CHECK", "1")
    before = everything(results_folder)
    record = runs.get(config)
    assert runs.evaluate(record, FOUR) == record.evaluations[FOUR.key]
    with pytest.raises(KureError, match=rf"{files[0]} does not hold the evaluation .*weight_bits.*check mode"):
        runs.evaluate(record, QuantizationSpec(weight_bits=5))
    other = config.model_copy(update={"seed": 9})
    with pytest.raises(KureError, match=rf"There is no record of {other.label} .*{other.key}.*check mode"):
        runs.get(other)
    assert everything(results_folder) == before


# What will be evaluated


def test_what_is_asked_for_is_noted_and_neither_trained_nor_evaluated(files, config, results_folder, monkeypatch):
    files[1].unlink()  # no weights are needed
    before = everything(results_folder)
    other, five = config.model_copy(update={"seed": 9}), QuantizationSpec(weight_bits=5)
    with runs.asking() as missing:
        record, empty = runs.get(config), runs.get(other)
        assert runs.evaluate(record, FOUR) == record.evaluations[FOUR.key], "what is on record is read"
        answers = [runs.evaluate(asked, five) for asked in (record, record, empty)]
    assert missing == {config: {five.key: five}, other: {five.key: five}}
    assert all(np.isnan([answer.top1, answer.loss]).all() for answer in answers)
    assert everything(results_folder) == before
    monkeypatch.setenv("KURE_CHECK", "1")
    with pytest.raises(KureError, match="does not hold the evaluation"):  # it was noted alone
        runs.evaluate(runs.get(config), five)


def test_asking_within_asking_notes_its_own_and_leaves_the_outer_one_asking(config):
    other = config.model_copy(update={"seed": 9})
    with runs.asking() as outer:
        with runs.asking() as inner:
            runs.evaluate(runs.get(other), FOUR)
        runs.evaluate(runs.get(other))
    assert (inner, outer) == ({other: {FOUR.key: FOUR}}, {other: {runs.FULL_PRECISION.key: runs.FULL_PRECISION}})


# Two processes

HOLD = """
import sys
from kure_lib.study import runs
config = runs.RunConfig.model_validate_json(sys.argv[1])
def wait(epoch, values):
    print(epoch, flush=True)
    sys.stdin.readline()
runs.get(config, wait)
"""


def test_a_run_that_another_process_trains_is_waited_for(config, environment, results_folder, capsys):
    command = [sys.executable, "-c", HOLD, config.model_dump_json()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        assert child.stdout.readline() == "1\n"  # it is training and holds the run
        with (
            pytest.raises(KureError, match=rf"Another process is working on {config.label} "),
            records.locked(config, 0),
        ):
            pass
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(runs.get, config, lambda *values: pytest.fail("this must not train"))
            time.sleep(1)
            assert not waiting.done() and runs.find(config) is None
            child.communicate("\n")
            assert waiting.result(120) == runs.find(config)
    assert f"Another process is working on {config.label}" in (said := capsys.readouterr().err)
    assert "waiting until it is done" in said


# The records of the study

STUDY = ROOT / "results" / "study"
RECORDS = sorted((STUDY / "records").glob("*.json"))


@pytest.fixture
def study_results(monkeypatch):
    """The committed results, read in check mode: nothing there can be written."""
    monkeypatch.setenv("KURE_RESULTS", str(ROOT / "results"))
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.setenv("KURE_CHECK", "1")


def test_every_record_of_the_study_is_whole_and_planned(study_results):
    planned = {run.config.key: run for run in plan("study").runs}
    assert {path.stem.rpartition("-")[2] for path in RECORDS} == set(planned)
    for path in RECORDS:
        record = Record.model_validate_json(path.read_bytes())
        assert path.stem == f"{record.config.label}-{record.config.key}"
        assert runs.find(record.config) == record
        assert record.key == record.config.key
        run = planned[record.key]
        if run.kept and run.part in ("main", "target", "scratch", "activations"):
            assert len(record.weights) > 0  # read, and their SHA-256 compared
        assert all(len(values) == record.config.epochs for values in record.curves.values())
        assert record.config.start is None or runs.find(record.config.start)


def test_a_network_of_the_study_has_the_accuracy_on_record(study_results):
    """Of 10,000 images a few lie so near a border that bfloat16 and float32, or other kernels, decide them apart."""
    kept = {file.stem for file in (STUDY / "weights").glob("*.safetensors")}  # of other runs the records are committed
    path = next(path for path in RECORDS if path.stem in kept and path.name.startswith("resnet20-kure-1.8-1-seed"))
    record = runs.find(Record.model_validate_json(path.read_bytes()).config)
    with device.single_thread():
        result = evaluation.evaluate(record.network(), data.load("fashion_mnist", "test"))
    assert result.top1 == pytest.approx(record.curves["test_top1"][-1], abs=0.3)
    assert torch.isfinite(torch.tensor(result.loss))


# Other data


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Makes a folder in the form of Tiny ImageNet, with so many classes, and the source that is read."""
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))

    def write(name, classes, each=4, seed=0):
        root, rng = tmp_path / name, np.random.default_rng(seed)
        names, lines = [f"n{i:02}" for i in range(classes)], []
        (root / "val" / "images").mkdir(parents=True)
        (root / "wnids.txt").write_text("\n".join(names))
        for label, kind in enumerate(names):
            folder = root / "train" / kind / "images"
            folder.mkdir(parents=True)
            targets = [folder / f"{kind}_{i}.JPEG" for i in range(each)]
            lines.append(f"val_{label}.JPEG\t{kind}\t0\t0\t63\t63\n")
            for target in [*targets, root / "val" / "images" / f"val_{label}.JPEG"]:
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(target)
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
        monkeypatch.setenv("KURE_TINY_IMAGENET", str(root))

    write("first", classes=3)
    return write


LARGE = {"model": "resnet18", "data": "tiny_imagenet", "learning_rate": 0.01, "weight_decay": 2e-4, "batch_size": 6}


def test_a_large_network_is_trained_resumed_and_evaluated_on_pictures(pictures, monkeypatch):
    config = RunConfig(**LARGE, epochs=2)
    seen = []

    def stop(epoch, values):
        seen.append(epoch)
        if len(seen) == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        runs.get(config, stop)
    record = runs.get(config, stop)
    assert seen == [1, 2], "two steps an epoch, the second in another call"
    assert data.identity("tiny_imagenet").items() <= record.provenance.items()
    assert record.provenance["classes"] == 3 and len(record.provenance["train_sha256"]) == 64
    assert record == runs.find(config) and record.weights["fc.weight"].shape == (3, 512)
    uninterrupted, _ = training.fit(config)
    assert same_weights(uninterrupted.state_dict(), record.weights)
    result = runs.evaluate(runs.find(config))
    assert result.loss == pytest.approx(record.curves["test_loss"][-1], rel=1e-4)
    assert runs.evaluate(record, QuantizationSpec(weight_bits=4, activation_bits=4, calibration=6)).loss > 0


def test_weights_kept_in_half_precision_are_those_that_are_evaluated_and_started_from(pictures):
    config = RunConfig(**LARGE, epochs=1, kept="float16")
    assert config.key != RunConfig(**LARGE, epochs=1).key
    runs.get(config)
    record = runs.find(config)
    file = records.weights_path(config)
    full = RunConfig(**LARGE, epochs=1)
    runs.get(full)
    assert file.stat().st_size < 0.51 * records.weights_path(full).stat().st_size
    wanted = {name: w.half().float() if w.dim() > 1 else w for name, w in runs.find(full).weights.items()}
    assert same_weights(record.weights, wanted), "matrices rounded to nearest, vectors as they were"
    network, _ = training.fit(config)
    network.load_state_dict(wanted)
    assert runs.evaluate(record).loss == evaluation.evaluate(network, training.splits(config)[1]).loss
    layer = record.layers[0]
    assert layer.kurtosis == pytest.approx(scipy_kurtosis(wanted[f"{layer.name}.weight"].flatten(), fisher=False))
    further = runs.get(RunConfig(**LARGE, epochs=0, start=config))
    assert same_weights(further.weights, wanted)


def test_a_record_is_not_used_on_other_data(pictures, monkeypatch):
    config = RunConfig(**LARGE, epochs=0)
    record = runs.get(config)
    first = runs.evaluate(record)
    pictures("second", classes=4)
    found = runs.find(config)
    assert runs.evaluate(found) == first, "what is on record is read"
    said = f"{records.record_path(config)} was made on tiny_imagenet with 3 classes .* here is .* with 4 classes"
    with pytest.raises(KureError, match=said):
        runs.evaluate(found, FOUR)
    with pytest.raises(KureError, match=said):
        runs.get(RunConfig(**LARGE, epochs=1, start=config))
    pictures("third", classes=3, seed=1)
    with pytest.raises(KureError, match="was made on tiny_imagenet with 3 classes"):
        runs.evaluate(found, FOUR)
    monkeypatch.setenv("KURE_TINY_IMAGENET", "/nowhere")
    assert runs.evaluate(runs.get(config)) == first, "without any images too"
    assert runs.find(config).network()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_an_old_record_that_names_no_data_is_used(files, config):
    path, _ = files
    content = json.loads(_without_digest(path))
    for name in data.identity("fashion_mnist"):
        del content["provenance"][name]
    content["evaluations"] = {}
    path.write_text(json.dumps(content))
    assert runs.evaluate(runs.find(config)).top1 >= 0
