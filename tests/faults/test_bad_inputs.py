"""What a user may type or write wrongly, at random: the right thing is done, or one sentence says what is wrong."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from children import RUNS, answered, assert_sentence
from torch import nn

from kure_lib import __main__ as command_line
from kure_lib import driver, notebooks, overview, paths
from kure_lib.findings import verdicts
from kure_lib.networks import data, published
from kure_lib.quantization import view
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import manifest, plans, records, runs
from kure_lib.tensors.steps import best_step
from kure_lib.training.configs import RunConfig
from kure_lib.training.regularizers import KurtosisRegularizer

WRONG = [None, True, -1, 0, 1.5, 2**70, 1e308, math.nan, math.inf, "", "x", "1", "../x", [], [1], {}, {"a": 1}]


def spoiled(value, chance):
    """A copy of a JSON value in which one thing, anywhere, is another, is gone or is new."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        copied, key = type(value)(value), keys[chance.integers(len(keys))]
        how = chance.random()
        if how < 0.1:
            del copied[key]
        elif how < 0.2 and isinstance(value, dict):
            copied["x"] = copied.pop(key)
        else:
            copied[key] = spoiled(value[key], chance)
        return copied
    return WRONG[chance.integers(len(WRONG))]


# The command line and the environment

WORDS = ["--profile", "smoke", "quick", "study", "huge", "--only", "05", "77", "05_target", "notebooks/05.ipynb", "",
         "--fresh", "--jobs", "0", "2", "-1", "x", "--conda", "--list", "--manifest", "--lab", "--help", "--", "-v",
         "--no-browser", "--=", "-", "é", "--onl", "--faults", "\n"]  # fmt: skip


@pytest.mark.draws(5)
def test_words_of_the_command_line(chance, results_folder, monkeypatch, capsys):
    monkeypatch.setattr(driver, "run", lambda profile, only, **options: notebooks.select(only))
    monkeypatch.setattr(overview, "describe", lambda profile, only: notebooks.select(only))
    monkeypatch.setattr(command_line, "_python", lambda *command, **variables: 0)
    monkeypatch.setattr(command_line.os, "execve", lambda *arguments: None)
    argv = [WORDS[i] for i in chance.integers(len(WORDS), size=chance.integers(1, 6))]
    try:
        code = command_line.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    if code:
        assert_sentence(said.err)
    else:
        assert said.err == ""


VARIABLES = {
    "KURE_CHECK": ["true ", "2", "on", "é"],
    "KURE_PROFILE": ["../x", "/x", ".", "a b", "\n"],
    "KURE_GPUS_PER_RUN": ["0", "-1", "two", "²", "3"],
    "KURE_RESULTS": ["/dev/null", "/dev/full/x", "x" * 300],
    "KURE_CACHE": ["/dev/null", "/dev/full/x", "x" * 300],
    "KURE_CIFAR10": ["", "/nowhere", "/dev/null"],
    "KURE_TINY_IMAGENET": ["", "/nowhere", "/dev/null", "/dev"],
    "KURE_IMAGENET": ["", "/nowhere", "/dev/null", "/dev"],
    "KURE_WEIGHTS": ["/nowhere", "/dev/null", "/dev"],
}
ASKED = {
    "KURE_CIFAR10": lambda: data.load("cifar10", "train"),
    "KURE_TINY_IMAGENET": lambda: data.load("tiny_imagenet", "test"),
    "KURE_IMAGENET": lambda: data.load("imagenet", "test"),
    "KURE_WEIGHTS": lambda: published.load(nn.Linear(1, 1), "resnet18"),
    "KURE_CACHE": data.unpack_fashion_mnist,
    "KURE_GPUS_PER_RUN": lambda: plans.plan("quick"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in VARIABLES for value in VARIABLES[name]])
def test_an_environment_variable(name, value, results_folder, monkeypatch):
    monkeypatch.setenv(name, value)
    assert answered(ASKED.get(name, lambda: runs.get(RUNS[0]))) is None


# Values

FULL = RunConfig(**{
    **RUNS[0].model_dump(by_alias=False), "start": RUNS[1], "data": "fashion_mnist", "decay_every": 2,
}).model_dump(mode="json", by_alias=True)  # fmt: skip


@pytest.mark.draws(10)
def test_a_configuration(chance):
    wrong = spoiled(FULL, chance)
    config = answered(lambda: RunConfig.model_validate(wrong))
    if config:
        assert RunConfig.model_validate_json(config.model_dump_json()).key == config.key


SPECS = [
    {"weight_bits": 4, "activation_bits": 8, "step_rule": "mse", "step_ratio": 1.1, "bias_correction": True},
    {"weight_bits": 3, "step_rule": "lapq", "calibration": 64},
    {"weight_bits": 4, "grid": "signed_int", "rounding": "even", "reestimate_batch_norm": True, "calibration": 64},
    {"weight_bits": 4, "step_rule": "lsq"},
]


@pytest.mark.draws(10)
def test_a_specification(chance):
    fields = spoiled(SPECS[chance.integers(len(SPECS))], chance)
    if isinstance(fields, dict):
        spec = answered(lambda: QuantizationSpec(**fields))
        assert spec is None or all(value == value for value in json.loads(spec.key).values())


@pytest.mark.draws(5)
def test_steps(chance, tiny_model):
    with view.quantized(tiny_model, QuantizationSpec(weight_bits=4)):
        pass
    right = view.chosen_steps(tiny_model, QuantizationSpec(weight_bits=4))
    given = dict(right)
    name = [*right, "0", "x"][chance.integers(len(right) + 2)]
    wrong = [0.0, -1.0, math.nan, math.inf, 1e-45, [1.0, 2.0], [], "x", None]
    value = wrong[chance.integers(len(wrong))]
    given[name] = torch.tensor(value) if isinstance(value, float | list) else value
    before = {key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}

    def use():
        with view.quantized(tiny_model, QuantizationSpec(weight_bits=4), steps=given) as model:
            return model(torch.zeros(1, 1, 10, 10))

    scores = answered(use)
    assert scores is None or scores.isfinite().all()
    assert all(torch.equal(before[key], tensor) for key, tensor in tiny_model.state_dict().items())


MODELS = {
    "torchscript": lambda: torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 2))),
    "one layer": lambda: nn.Linear(3, 2),
    "no layer": lambda: nn.ReLU(),
    "no module": lambda: "resnet20",
    "nothing": lambda: None,
    "a list": lambda: [nn.Linear(3, 2)],
    "not begun": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3), nn.LazyLinear(3)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
    "not a number": lambda: _filled(math.nan),
    "zero": lambda: _filled(0.0),
}


def _filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model(model):
    def use():
        with view.quantized(model(), QuantizationSpec(weight_bits=4)):
            return "quantized"

    assert answered(use) is None
    assert answered(lambda: float(KurtosisRegularizer(model())().detach()) >= 0) is not False


@pytest.mark.draws(5)
def test_a_tensor_and_its_step(chance):
    x = torch.from_numpy(chance.normal(size=chance.integers(0, 4, size=chance.integers(0, 3)))).float()
    if x.numel() and chance.random() < 0.5:
        x.view(-1)[0] = [math.nan, math.inf, 1e38, 0.0][chance.integers(4)]
    bits = [None, 0, 1, 4, 17, 2.5, "4"][chance.integers(7)]
    step = answered(lambda: best_step(x, bits))
    assert step is None or (step.isfinite().all() and (step > 0).all())


# Files

STUDY = paths.ROOT / "results" / "study"


@pytest.mark.draws(5)
def test_a_verdict(chance, results_folder):
    files = sorted((STUDY / "verdicts").glob("*.json"))
    file = files[chance.integers(len(files))]
    (results_folder / "verdicts").mkdir(parents=True)
    wrong = json.dumps(spoiled(json.loads(file.read_text()), chance))
    (results_folder / "verdicts" / file.name).write_text(wrong)
    board = answered(verdicts.scoreboard)
    assert board is None or set(board.outcome) <= {*verdicts.OUTCOMES, *verdicts.ANSWERS.values()}
    assert (answered(verdicts.scoreboard_markdown) is None) == (board is None)


@pytest.fixture
def claims_of(tmp_path, monkeypatch):
    """Puts other claims in the place of ours."""

    def put(content: bytes):
        (tmp_path / "claims.toml").write_bytes(content)
        monkeypatch.setattr(verdicts, "CLAIMS", tmp_path / "claims.toml")
        verdicts.claims.cache_clear()
        return answered(verdicts.claims)

    yield put
    monkeypatch.undo()
    verdicts.claims.cache_clear()


@pytest.mark.draws(5)
def test_the_claims(chance, claims_of):
    """A line of a claim is gone, or its value is another."""
    lines = verdicts.CLAIMS.read_text(encoding="utf-8").splitlines()
    places = [i for i, line in enumerate(lines) if " = " in line]
    place = places[chance.integers(len(places))]
    wrong = ['""', "1", "-1.0", "nan", "[]", "[1]", "{}", "x", "true", '"x"'][chance.integers(10)]
    lines[place] = "" if chance.random() < 0.3 else f"{lines[place].partition(' = ')[0]} = {wrong}"
    if found := claims_of("\n".join(lines).encode()):
        assert all(isinstance(claim.statement, str) and claim.kind in verdicts.KINDS for claim in found.values())
        assert all(claim.margin >= 0 for claim in found.values())


@pytest.mark.parametrize("content", [b"", b"\xff", b"claims = 3", b"[claims]\nS1 = 3"], ids=str)
def test_a_file_without_claims(content, claims_of):
    assert claims_of(content) is None


@pytest.mark.draws(5)
def test_effects(chance, results_folder):
    rows = [{"setting": "a", "seed": seed, "effect": 1.0 + seed} for seed in range(3)]
    wrong = pd.DataFrame(row if isinstance(row, dict) else {} for row in [spoiled(rows[0], chance), *rows[1:]])
    answered(lambda: verdicts.judge("S3", wrong))
    assert answered(verdicts.scoreboard) is not None


@pytest.mark.draws(5)
def test_a_record_with_the_digest_of_what_is_wrong(chance, finished):
    path = records.record_path(finished)
    content = spoiled(json.loads(path.read_text()), chance)
    if isinstance(content, dict):
        content["digest"] = records._digest(content)
    path.write_text(json.dumps(content))
    record = answered(lambda: runs.find(finished))
    assert record is None or record.config == finished


@pytest.mark.draws(2)
def test_a_committed_record_that_tells_how_long_training_takes(chance, results_folder, tmp_path, monkeypatch):
    files = sorted((STUDY / "records").glob("*.json"))
    content = files[chance.integers(len(files))].read_text()
    folder = tmp_path / "committed"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(spoiled(json.loads(content), chance)))
    (folder / "b.json").write_text(content[: chance.integers(len(content))])
    monkeypatch.setattr(overview, "COMMITTED", folder)
    assert "runs are on record" in overview.describe("smoke")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"null", b'{"cells": 3}'], ids=str)
def test_a_file_that_is_no_notebook(content, results_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    (tmp_path / "90_wrong.ipynb").write_bytes(content)
    assert answered(lambda: notebooks.execute("90_wrong", "smoke")) is None


def test_a_manifest_without_a_folder(tmp_path):
    assert manifest.differences(Path(tmp_path / "gone")) == []
