"""Processes killed at any moment: what was finished is kept, and what goes on ends in the same bits."""

import json
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from children import PATIENCE, RUNS, Child
from filelock import FileLock

from kure_lib import files, paths
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import runs


def assert_whole(config, whole) -> None:
    """The run goes on to the weights of one that was not disturbed, and leaves nothing beside its two files."""
    assert runs.get(config).weights_sha256 == whole(config)[0]
    files.sweep(paths.results())
    left = {file.suffix for file in paths.results().rglob("*") if file.is_file()}
    assert left == {".json", ".safetensors", ".lock"}


def test_a_training_killed_once_or_twice(chance, whole, results_folder):
    config = RUNS[chance.integers(len(RUNS))]
    for _ in range(chance.integers(1, 3)):
        Child("train", config).kill(after=chance.uniform(0, whole(config)[1]))
    assert_whole(config, whole)


def test_a_training_killed_where_it_writes(chance, whole, results_folder):
    config, writes = RUNS[chance.integers(len(RUNS))], RUNS[0].epochs + 2  # the checkpoints, weights and record
    call, nth, after = (
        chance.choice(["replace", "fsync"]),
        int(chance.integers(1, writes + 1)),
        bool(chance.integers(2)),
    )
    assert Child("train_and_die", config, str(call), nth, after).ended() == -9
    assert_whole(config, whole)


def test_an_evaluation(chance, finished):
    specs = {bits: QuantizationSpec(weight_bits=bits) for bits in (2, 3, 4, 5)}
    Child("evaluate", finished, list(specs)).kill(after=chance.uniform(0, 3))
    record = runs.find(finished)
    kept = dict(record.evaluations)
    record.evaluations.clear()
    for spec in specs.values():
        if spec.key in kept:
            assert runs.evaluate(record, spec) == kept[spec.key]


DRIVER = """
import sys
from pathlib import Path
from kure_lib import driver, paths
paths.NOTEBOOKS = Path(sys.argv[1])
driver.train = lambda *arguments: None
driver.run("smoke")
"""
NOTEBOOK = """
import json, os, pathlib, time
pathlib.Path("asked").write_text(json.dumps([os.getpid(), os.getppid()]))
time.sleep(600)
"""


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a process that was killed")
def test_the_driver_and_all_that_it_started(results_folder, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    parameters = nbformat.v4.new_code_cell('profile = "smoke"', metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "90_long.ipynb")
    with subprocess.Popen([sys.executable, "-c", DRIVER, folder]) as process:
        end = time.monotonic() + PATIENCE
        while not (asked := folder / "asked").exists() or not asked.read_text():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.2)
        kernel_of, papermill = json.loads(asked.read_text())
        children = psutil.Process(process.pid).children(recursive=True)
        assert {kernel_of, papermill} <= {child.pid for child in children}
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    with FileLock(tmp_path / "smoke" / "study.lock", timeout=0):
        pass
