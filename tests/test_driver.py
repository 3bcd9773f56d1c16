"""Training in several processes, notebooks executed at once, and a second study on the same results."""

import io
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import nbformat
import pytest
from filelock import FileLock
from helpers import TINY, Losing, same_weights

from kure_lib import driver, engine, notebooks, overview, paths, site
from kure_lib.networks import device
from kure_lib.paths import KureError
from kure_lib.quantization.spec import PIPELINES, QuantizationSpec
from kure_lib.study import records, runs
from kure_lib.study.plans import KURE, Plan, Planned, plan
from kure_lib.training.configs import RunConfig


@pytest.mark.parametrize(
    ("gpus", "options", "said"),
    [([], {}, "2 GPUs of this machine, and PyTorch sees 0"), (["4"], {}, "PyTorch sees 1"),
     (["0", "1"], {"cluster": "auto"}, "a cluster gives one to each run")],
)  # fmt: skip
def test_more_gpus_for_a_run_than_there_are_is_one_sentence(results_folder, monkeypatch, gpus, options, said):
    monkeypatch.setenv("KURE_GPUS_PER_RUN", "2")
    monkeypatch.setattr(device, "gpus", lambda: gpus)
    with pytest.raises(KureError, match=said) as error:
        driver.train(plan("quick"), **options)
    assert str(error.value).startswith("--gpus-per-run 2 needs") and "\n" not in str(error.value)


@pytest.mark.parametrize(("said", "threads"), [(None, "3"), ("1", "1")])
def test_notebooks_take_turns_with_the_gpus_and_share_the_cores(monkeypatch, said, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(device, "gpus", lambda: ["4", "GPU-8a"])
    monkeypatch.setattr(device, "cores", lambda: 6)
    together, at_work, seen = threading.Barrier(2, timeout=60), Counter(), []

    def execute(stem, profile, parameters, environment, report):
        gpu = environment["CUDA_VISIBLE_DEVICES"]
        at_work[gpu] += 1
        if stem[:2] != "00":
            together.wait()  # two at once
        seen.append((gpu, at_work[gpu], environment["OMP_NUM_THREADS"]))
        together.wait() if stem[:2] != "00" else None
        at_work[gpu] -= 1

    monkeypatch.setattr(notebooks, "execute", execute)
    assert driver._execute_all(["00_start", "01_a", "02_b", "03_c", "04_d"], "smoke", jobs=2) == []
    assert len(seen) == 5 and {gpu for gpu, *_ in seen} == {"4", "GPU-8a"}
    assert {(count, used) for _, count, used in seen} == {(1, threads)}


@pytest.fixture
def clock(monkeypatch):
    """The driver's clock, which stands still unless a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_one_line_of_progress_a_minute_at_most(clock, capsys):
    lines = driver._Lines()
    with lines.show("07_ptq", 1) as seven:
        with lines.show("08_qat", 2) as eight:
            for second in range(150):
                clock[0] = 1000.0 + second
                seven(f"cell {second} of 150")
                eight("cell 1 of 9")
        clock[0] += 60
        seven("cell 149 of 150, evaluations 3 of 4")
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "07_ptq: cell 60 of 150; 08_qat: cell 1 of 9", "07_ptq: cell 120 of 150; 08_qat: cell 1 of 9",
        "07_ptq: cell 149 of 150, evaluations 3 of 4",
    ]  # fmt: skip
    assert said.err == ""


def test_on_a_terminal_every_notebook_has_a_line_that_goes_with_it(monkeypatch, capsys):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(KureError), driver._Lines().show("07_ptq", 1) as report:
        report("cell 3 of 9, evaluations 34 of 126, LAPQ 120 of 406")
        report("cell 3 of 9, evaluations 35 of 126")
        raise KureError("The kernel died.")
    written = re.split(r"[\r\n]|\x1b\[A", screen.getvalue())
    assert [line.rstrip() for line in written if line.strip()] == [
        "07_ptq", "07_ptq: cell 3 of 9, evaluations 34 of", "07_ptq: cell 3 of 9, evaluations 35 of",
    ]  # fmt: skip
    assert written[-1].strip() == "" and capsys.readouterr().out == ""


# Training in several processes

BASE = {**TINY, "train_size": 128, "epochs": 1}


def tiny_plan(long=1) -> Plan:
    first = RunConfig(model="resnet20", **BASE)
    tuned = {"model": "resnet20", **BASE, "start": first}
    return Plan("trial", (
        Planned("resnet20", "pretrained", "main", first),
        Planned("resnet20", "control", "main", RunConfig(**tuned)),
        Planned("resnet20", "kure", "main", RunConfig(**{**tuned, "epochs": long}, regularizer=KURE)),
    ))  # fmt: skip


@pytest.fixture
def workers(environment, monkeypatch):
    """Workers with one thread; the pools that were made, to look at their processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pools = []

    class Recorded(ProcessPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr(engine, "ProcessPoolExecutor", Recorded)
    return pools


def test_two_workers_train_what_one_process_does_bit_for_bit(results_folder, workers, monkeypatch, capsys):
    planned = tiny_plan()
    driver.train(planned, jobs=2)
    said = capsys.readouterr().out
    assert all(f"{run.config.label}-{run.config.key} epoch 1/1: loss " in said for run in planned.runs)
    trained = [records.find(run.config) for run in planned.runs]
    assert all(trained)
    assert not multiprocessing.active_children()

    monkeypatch.setattr(engine, "ProcessPoolExecutor", None)
    driver.train(planned, jobs=2)  # nothing is missing: no process is started

    monkeypatch.setenv("KURE_RESULTS", str(results_folder.parent / "here"))
    for run, record in zip(planned.runs, trained, strict=True):
        alone = runs.get(run.config)
        assert alone.weights_sha256 == record.weights_sha256
        assert same_weights(alone.weights, record.weights)
        assert alone.layers == record.layers and alone.layer_kurtosis == record.layer_kurtosis


def test_runs_that_share_a_label_are_all_listed_and_trained(results_folder, monkeypatch):
    """Networks pre-trained for 2 and for 4 epochs, and what starts from them, have the same label."""
    planned = plan("smoke")
    assert len({run.config.label for run in planned.runs}) < len(planned.runs)
    assert f"0 of {len(planned.runs)} runs are on record." in overview.describe("smoke")
    made = []

    def take(tasks, where, on_report, on_result):
        made.extend(tasks)
        where.cancel()

    monkeypatch.setattr(engine, "run", take)
    driver.train(planned)
    names = [task.name for task in made]
    assert len(set(names)) == len(planned.runs)
    for task, run in zip(made, planned.runs, strict=True):
        assert task.after == (names[[r.config for r in planned.runs].index(run.config.start)] if run.config.start
                              else None)  # fmt: skip


def test_a_killed_worker_is_one_sentence_and_what_was_finished_stays(results_folder, workers):
    planned = tiny_plan(long=2000)
    first, control, kure = (run.config for run in planned.runs)

    def kill():
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline and not (records.find(control) and records.checkpoint_path(kure).exists()):
            time.sleep(0.1)
        time.sleep(1)  # the driver has seen by now that the control is done
        os.kill(next(iter(workers[0]._processes)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(KureError, match=rf"The process of {kure.label}-{kure.key} was killed.*from its last epoch"):
        driver.train(planned, jobs=2)
    killer.join()
    assert records.find(first) and records.find(control) and not records.find(kure)
    assert records.checkpoint_path(kure).exists()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_reaches_the_user(results_folder, workers):
    broken = RunConfig(model="resnet20", **{**BASE, "learning_rate": 1e12})
    with pytest.raises(KureError, match=rf"Training {broken.label} diverged"):
        driver.train(Plan("trial", (Planned("resnet20", "pretrained", "main", broken),)), jobs=1)


def test_a_second_study_on_the_same_results_is_refused(results_folder, monkeypatch):
    monkeypatch.setattr(notebooks, "available", lambda: ["00_start_here"])
    folder = results_folder.parent / "smoke"
    folder.mkdir()
    monkeypatch.setattr(driver, "train", lambda *arguments: pytest.fail("this must not train"))
    with (
        FileLock(folder / "study.lock"),
        pytest.raises(KureError, match=rf"Another study is writing to {folder}: wait until it is done, or stop it"),
    ):
        driver.run("smoke")


# Evaluations in several processes


def quantized(**options) -> QuantizationSpec:
    return QuantizationSpec(**{"weight_bits": 3, **options})


LAPQ = {"step_rule": "lapq", "calibration": 32, "search": 5}
SPECS = [
    QuantizationSpec(), quantized(), quantized(step_ratio=0.8), quantized(activation_bits=4, calibration=32),
    quantized(**PIPELINES["practice"], calibration=32), quantized(**LAPQ), quantized(**LAPQ, step_ratio=1.2),
    quantized(reconstruction="gptq", calibration=32),
]  # fmt: skip
BAD = quantized(step_rule="lsq")  # no run here was trained with it


@pytest.fixture
def network(results_folder) -> RunConfig:
    """A run on record."""
    return runs.get(RunConfig(model="resnet20", **BASE)).config


def keyed(specs) -> dict[str, QuantizationSpec]:
    return {spec.key: spec for spec in specs}


def test_tasks_evaluate_what_one_process_does_to_the_last_bit(network, results_folder, workers, monkeypatch, capsys):
    again = {network: keyed(SPECS)}
    driver.evaluate(again, jobs=2)
    assert capsys.readouterr().out.startswith(f"evaluations to make: {len(SPECS)}\n")
    assert len(workers) == 1 and not multiprocessing.active_children()
    made = records.find(network).evaluations
    record = records.find(network)
    record.evaluations.clear()
    records.write(record)
    assert {spec.key: runs.evaluate(record, spec) for spec in SPECS} == made
    monkeypatch.setattr(engine, "ProcessPoolExecutor", None)
    driver.evaluate({})  # nothing is missing: no process is started


def test_specifications_that_share_searched_steps_are_one_task_and_begin_first(network, monkeypatch):
    made = []
    monkeypatch.setattr(engine, "run", lambda tasks, *rest: made.extend(tasks))
    monkeypatch.setattr(driver, "_engine", lambda *arguments: None)
    driver.evaluate({network: keyed(SPECS)})
    shared = [[spec.key for spec in task.work.args[0]] for task in made]
    assert sorted(map(sorted, shared)) == sorted(
        [sorted(spec.key for spec in SPECS if spec in group) for group in (
            SPECS[:1], [SPECS[i] for i in (1, 2, 7)], SPECS[3:4], SPECS[4:5], SPECS[5:7])]
    )  # fmt: skip
    assert shared[0] == [spec.key for spec in SPECS[5:7]] and len({task.name for task in made}) == len(made)


def test_an_evaluation_that_fails_is_one_sentence_and_spares_the_others(network, workers, capsys):
    lost = network.model_copy(update={"seed": 1})
    records.weights_path(runs.get(lost).config).unlink()
    driver.evaluate({network: keyed([quantized(), BAD, quantized(step_ratio=0.8)]), lost: keyed(SPECS)}, jobs=1)
    head, *reasons = capsys.readouterr().err.splitlines()
    assert head == "Evaluations failed and are left to notebooks, for such reasons:" and len(reasons) == 2
    assert reasons[0].startswith(f"The weights {records.weights_path(lost)} are missing: restore them")
    assert reasons[1].startswith(f"{network.label} under {BAD.key}: ") and "was not trained with lsq" in reasons[1]
    assert set(records.find(network).evaluations) == {quantized().key, quantized(step_ratio=0.8).key}
    assert not records.find(lost).evaluations


def test_a_worker_that_is_killed_while_it_evaluates_loses_its_task_alone(network, workers):
    long = quantized(**LAPQ | {"search": 100_000, "calibration": 512})
    missing = {network: keyed([long, quantized()]), network.model_copy(update={"seed": 1}): keyed([quantized()])}
    runs.get(list(missing)[1])

    def kill():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not all(records.find(config).evaluations for config in missing):
            time.sleep(0.1)
        for process in list(workers[0]._processes):
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(KureError, match=re.escape(long.key) + ".* was killed.*what was finished is kept"):
        driver.evaluate(missing, jobs=2)
    killer.join()
    assert [list(records.find(config).evaluations) for config in missing] == [[quantized().key]] * 2


def test_an_engine_that_loses_tasks_makes_every_evaluation_and_counts_each_once(network, monkeypatch, clock, capsys):
    specs = [quantized(), quantized(step_ratio=0.8)]
    losing = Losing(**{f"{records.run_name(network)} under {specs[0].key}": 2})
    monkeypatch.setattr(driver, "_engine", lambda *arguments: losing)
    work = runs.evaluate_elsewhere

    def slow(specs, report, *inputs):
        clock[0] += driver.MINUTE
        return work(specs, report, *inputs)

    monkeypatch.setattr(runs, "evaluate_elsewhere", slow)
    driver.evaluate({network: keyed(specs)})
    assert len(losing.begun) == 3 and losing.ended
    assert set(records.find(network).evaluations) == set(keyed(specs))
    assert capsys.readouterr().out.splitlines() == ["evaluations to make: 2", "evaluations: 1 of 2"]


# Notebooks


def book(*cells: str) -> nbformat.NotebookNode:
    """A notebook of these cells, after one with its parameters."""
    parameters = nbformat.v4.new_code_cell('profile = "study"  # str: a profile', metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel)


def test_a_notebook_that_fails_spares_the_others_and_the_site(results_folder, tmp_path, monkeypatch):
    books = {"00_first": book("1 + 1"), "05_broken": book("1 / 0"), "03_whole": book("2 + 2"), "08_torn": book("x")}
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    paths.NOTEBOOKS.mkdir()
    for stem, cells in books.items():
        nbformat.write(cells, paths.NOTEBOOKS / f"{stem}.ipynb")
    began = []
    execute = notebooks.execute
    monkeypatch.setattr(
        notebooks, "execute", lambda stem, *rest, **more: (began.append(stem), execute(stem, *rest, **more))
    )
    monkeypatch.setattr(driver, "train", lambda *arguments: None)
    monkeypatch.setitem(driver.PARAMETERS, "smoke", {})  # these notebooks have none of the study's
    with pytest.raises(KureError) as error:
        driver.run("smoke", jobs=2)
    folder = paths.results()
    lines = str(error.value).splitlines()
    assert lines[0].startswith("2 of 4 notebooks failed") and str(folder / "site" / "index.html") in lines[0]
    assert (
        "Notebook 05_broken failed in the cell that begins with `1 / 0`: ZeroDivisionError: division by zero" in lines
    )
    assert f"What was executed lies in {folder / 'notebooks' / '08_torn.partial.ipynb'}." in lines
    assert began[-1] == "00_first" and len(began) == 4
    assert {file.stem for file in (folder / "notebooks").glob("*.ipynb")} == {
        "00_first", "05_broken.partial", "03_whole", "08_torn.partial"
    }  # fmt: skip
    index = (folder / "site" / "index.html").read_text()
    assert "ZeroDivisionError: division by zero" in index


ASKS = """
import pandas as pd
from kure_lib import QuantizationSpec, show, study
record = study.get(study.RunConfig.model_validate_json({config!r}))
"""
MEASURES = """
for bits in (4, bits_wanted):
    print(study.evaluate(record, QuantizationSpec(weight_bits=bits)).top1)
1 / 0 if study.evaluate(record).top1 != study.evaluate(record).top1 else None
show.table(pd.DataFrame({"made": [1]}), "made")
"""
MORE = "print(study.evaluate(record, QuantizationSpec(weight_bits=2)).top1)"


def test_what_notebooks_declare_is_evaluated_before_and_what_they_do_not_is_told(
    results_folder, workers, tmp_path, monkeypatch, capsys
):
    planned = tiny_plan()
    monkeypatch.setattr(driver.plans, "needed", lambda *arguments: Plan("smoke", planned.runs[:1]))
    monkeypatch.setitem(driver.PARAMETERS, "smoke", {"05": {"bits_wanted": 3}})
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    paths.NOTEBOOKS.mkdir()
    config = planned.runs[0].config.model_dump_json(by_alias=True)
    cells = book(ASKS.format(config=config), MEASURES, MORE)
    cells.cells[0].source += "\nbits_wanted = 8  # int: of the weights"
    for cell in cells.cells[1:3]:
        cell.metadata.tags = ["needs"]
    nbformat.write(cells, paths.NOTEBOOKS / "05_asks.ipynb")
    execute, seen = notebooks.execute, []

    def look(*arguments, **options):
        seen.append(set(records.find(planned.runs[0].config).evaluations))
        assert not (paths.results() / "tables").exists(), "asking writes nothing"
        return execute(*arguments, **options)

    monkeypatch.setattr(notebooks, "execute", look)
    monkeypatch.setattr(site, "build", lambda profile, failed: paths.results() / "site")  # the test above builds one
    driver.run("smoke", jobs=2)
    declared = {QuantizationSpec(weight_bits=bits).key for bits in (None, 4, 3)}
    assert seen == [declared]
    assert set(records.find(planned.runs[0].config).evaluations) == {*declared, QuantizationSpec(weight_bits=2).key}
    said = capsys.readouterr().out
    assert "evaluations to make: 3\n" in said
    assert "evaluations made by notebooks, which no cell tagged `needs` asks for: 1\n" in said
    assert (paths.results() / "tables" / "made.csv").exists()
