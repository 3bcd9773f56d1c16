"""No room to write, and folders that cannot be: one sentence, and what was there before is still there."""

import gzip
import hashlib
import sys

import pytest
from children import RUNS, Child, answered, assert_sentence, decode, judge, unpack
from PIL import Image

from kure_lib import __main__ as command_line
from kure_lib import driver, files, notebooks, paths, site
from kure_lib.study import records, runs

NOWHERE = ["/dev/full/results", "/dev/null", "/proc/results"]


def test_a_training_goes_on_once_there_is_room(chance, whole, results_folder):
    config = RUNS[chance.integers(len(RUNS))]
    value, sentence = Child("train", config, limit=int(chance.integers(3_000_000))).outcome()
    assert value or "make room" in sentence
    assert not [file for file in results_folder.rglob(".*") if file.is_file()]
    assert runs.get(config).weights_sha256 == whole(config)[0]


def test_an_evaluation_leaves_the_record_as_it_was(chance, finished):
    path = records.record_path(finished)
    before = path.read_bytes()
    _, sentence = Child("evaluate", finished, [4], limit=int(chance.integers(len(before)))).outcome()
    assert str(path) in sentence and path.read_bytes() == before


def test_a_cache_without_room(chance, tmp_path, monkeypatch):
    cache, source = tmp_path / "cache", tmp_path / "source"
    source.mkdir()
    sums = ""
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        content = gzip.compress(bytes(1000))
        (source / f"{name}-ubyte.gz").write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {name}-ubyte.gz\n"
    (source / "SHA256SUMS").write_text(sums)
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    for work, argument in (("unpack", source), ("decode", [picture])):
        _, sentence = Child(work, argument, limit=int(chance.integers(200)), KURE_CACHE=str(cache)).outcome()
        assert str(cache) in sentence
    monkeypatch.setenv("KURE_CACHE", str(cache))
    assert set(unpack(source).values()) == {bytes(1000)} and len(decode([picture])) == 1


@pytest.mark.parametrize("where", NOWHERE)
def test_folders_that_cannot_be(where, results_folder, tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.setenv("KURE_CACHE", where)
    assert answered(lambda: decode([picture])) is None
    assert answered(lambda: unpack(paths.DATA)) is None
    monkeypatch.setenv("KURE_RESULTS", where)
    monkeypatch.setattr(notebooks, "available", lambda: ["00_start_here"])
    effects = [{"setting": "a", "seed": seed, "effect": 1.0} for seed in range(3)]
    asked = [
        lambda: runs.get(RUNS[0]), lambda: driver.run("smoke"), lambda: site.build("smoke"),
        lambda: judge("S3", effects, "06_step_size_robustness"), lambda: files.keep(paths.results() / "a.csv", "a"),
    ]  # fmt: skip
    for ask in asked:
        assert answered(ask) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
@pytest.mark.parametrize("argv", [["--help"], ["--profile", "smoke", "--list"], ["--manifest"], ["--profile", "smoke"]],
                         ids=" ".join)  # fmt: skip
def test_an_output_without_room(argv, results_folder, monkeypatch, capsys):
    def run(*arguments, **options):
        print("a run epoch 1/2", flush=True)

    monkeypatch.setattr(driver, "run", run)
    with open("/dev/full", "w") as disk, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", disk)
        code = command_line.main(argv)
    assert code == 1
    assert_sentence(said := capsys.readouterr().err)
    assert "No space left on device" in said
