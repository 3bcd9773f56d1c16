"""What is trained and for how long, training in several processes, and a second study on the same results."""

import io
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor

import nbformat
import pytest
from filelock import FileLock
from helpers import TINY, Losing, same_weights

from kure_lib import driver, engine, notebooks, paths
from kure_lib.networks import data, device
from kure_lib.paths import KureError
from kure_lib.quantization.spec import PIPELINES, QuantizationSpec
from kure_lib.study import records, runs
from kure_lib.study.plans import KURE, Plan, Planned, plan
from kure_lib.study.records import Record
from kure_lib.training.configs import QatConfig, RunConfig

# The time that training takes


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Puts records of seconds per epoch in the place of the committed ones; one run at a time would be trained."""
    monkeypatch.setattr(driver, "COMMITTED", tmp_path)
    monkeypatch.setattr(driver, "workers", lambda: 1)
    monkeypatch.setattr(device, "precision", lambda: "bfloat16")
    monkeypatch.setattr(device, "provenance", lambda: {"device": "AVX512"})

    def write(seconds, precision="bfloat16", place="AVX512", **settings):
        config = run(**{"epochs": len(seconds), **settings})
        record = Record(key=config.key, config=config, curves={"seconds": seconds}, layer_kurtosis={}, layers=[],
                        weights_sha256="", provenance={"precision": precision, "device": place})  # fmt: skip
        (tmp_path / f"{config.key}-{precision}-{place}.json").write_text(record.model_dump_json())

    return write


def run(**settings) -> RunConfig:
    return RunConfig(**{"model": "resnet20", "epochs": 3, "learning_rate": 0.1, "weight_decay": 0, **settings})


LSQ = QatConfig.named("lsq 4/4")


def test_the_time_is_estimated_from_records_of_the_same_kind(timed):
    timed([60.0, 120.0, 600.0])  # seconds; their median is 2 min
    timed([5.0] * 9, precision="float32")
    timed([300.0], quantization=LSQ)
    timed([7.0] * 9, model="mobilenet_v2_050")
    assert driver._duration([run(epochs=4)]) == "about 8 min with 1 at a time"
    assert driver._duration([run(epochs=4, quantization=LSQ)]) == "about 20 min with 1 at a time"
    assert driver._duration([run(), run(seed=1), run(quantization=LSQ)]) == "about 27 min with 1 at a time"


def test_the_time_grows_with_the_number_of_training_images(timed):
    timed([120.0], train_size=30_000)
    timed([200.0], seed=1, held_out=10_000)  # of 60,000: as many seconds for an image
    assert driver._duration([run(epochs=1)]) == "about 4 min with 1 at a time"
    assert driver._duration([run(epochs=10, train_size=15_000)]) == "about 10 min with 1 at a time"


def test_where_no_record_is_of_the_same_kind_those_of_the_network_tell_the_time(timed):
    timed([60.0], precision="float32")
    timed([120.0], precision="float32", regularizer=KURE)
    timed([180.0], precision="float32", quantization=LSQ)
    assert driver._duration([run(epochs=1)]) == "about 2 min with 1 at a time"


def test_every_data_set_has_a_number_of_training_images():
    assert set(driver.TRAINING_IMAGES) == set(data.SOURCES)
    assert len(data.load("fashion_mnist", "train")) == driver.TRAINING_IMAGES["fashion_mnist"]


def test_several_workers_share_the_time(timed, monkeypatch):
    timed([60.0])
    monkeypatch.setattr(driver, "workers", lambda: 4)
    assert driver._duration([run(epochs=8)]) == "about 2 min with 4 at a time"


def test_the_time_of_a_network_without_a_record_is_unknown(timed):
    timed([60.0])
    timed([], model="resnet18", data="imagenet", epochs=0)
    said = driver._duration([run(), run(model="resnet18", data="imagenet"), run(model="resnet50", epochs=0)])
    assert said == "an unknown time: no record of resnet18 on imagenet says how long an epoch takes"


def test_the_time_on_a_gpu_is_not_that_of_a_processor(timed, monkeypatch):
    timed([60.0] * 9)
    timed([6.0], place="NVIDIA H100", seed=1)
    assert driver._duration([run(epochs=1)]) == "about 1 min with 1 at a time"
    monkeypatch.setattr(device, "provenance", lambda: {"device": "NVIDIA H100"})
    assert driver._duration([run(epochs=10)]) == "about 1 min with 1 at a time"
    monkeypatch.setattr(device, "provenance", lambda: {"device": "NVIDIA T4"})
    said = driver._duration([run(epochs=1)])
    assert said == ("about 1 min with 1 at a time, if NVIDIA T4 is as fast as AVX512, on which the records were made")
    assert driver._times([run(epochs=1)]) == {run(epochs=1): driver.Time(60.0, "AVX512")}


def cells(said: str) -> dict[tuple[str, str], list[str]]:
    """The columns after the arms, in every row of the table of runs, by network and part."""
    rows = [re.split(r"  +", line) for line in said.partition("\n\n")[0].splitlines()[2:]]
    return {(row[0], row[1] if row[0] != "all" else ""): row[-6:] for row in rows}


def test_the_table_of_runs_counts_what_the_plan_and_the_files_hold(monkeypatch):
    monkeypatch.delenv("KURE_RESULTS", raising=False)
    monkeypatch.setenv("KURE_PROFILE", "study")
    said = driver.describe("study")
    assert max(map(len, said.splitlines())) <= 100
    expected = defaultdict(lambda: [0, 0, 0, 0, 0.0])
    folder = driver.COMMITTED.parent
    for each in plan("study").runs:
        name = f"{each.config.label}-{each.config.key}"
        record = folder / "records" / f"{name}.json"
        for place in ((each.model, each.part), ("all", "")):
            counts = expected[place]
            counts[0] += 1
            counts[1] += record.is_file()
            counts[2] += each.config.epochs
            counts[3] += len(json.loads(record.read_bytes())["evaluations"]) if record.is_file() else 0
            counts[4] += sum(file.stat().st_size for file in (folder / "weights").rglob(f"{name}.safetensors"))
    shown = {place: [*map(int, row[:4]), row[4]] for place, row in cells(said).items()}
    assert shown == {place: [*row[:4], f"{row[4] / 1e6:.1f}"] for place, row in expected.items()}
    assert f"{expected['all', ''][1]} of {len(plan('study').runs)} runs are on record." in said


def test_the_table_of_runs_says_the_time_of_each_part_and_where_it_was_taken(results_folder, timed):
    timed([600.0], train_size=512)
    timed([5.0], train_size=512, seed=1, quantization=LSQ, place="NVIDIA H100")
    timed([7200.0], train_size=512, model="mobilenet_v2_050", place="NVIDIA H100")
    said = driver.describe("smoke", only=["07", "05"])
    times = {place: row[-1] for place, row in cells(said).items()}
    main, sweep = 3 * 2 * 600, 2 * 600
    assert times["resnet20", "main"] == f"{main / 60:.0f} min"
    assert times["resnet20", "target"] == f"{sweep / 60:.0f} min"
    assert times["mobilenet_v2_050", "main"] == "12.0 h"
    assert times["all", ""] == f"{(5 * sweep + 4 * 2 * 7200) / 3600:.1f} h"
    assert "estimated for resnet20 from records made on AVX512." in said
    assert "estimated for mobilenet_v2_050 from records made on NVIDIA H100." in said
    assert "\n05_kurtosis_target           main, target, coefficient     9\n07_bit_width" in said
    assert "\n06_" not in said


def test_a_time_that_no_record_tells_is_unknown(results_folder, timed):
    said = driver.describe("imagenet")
    assert {row[-1] for row in cells(said).values()} == {"unknown"} and "Time:" not in said
    missing = "0 of 13 runs are on record. Training the others takes an unknown time: no record of mobilenet_v2 on "
    assert missing in " ".join(said.split())
    assert cells(driver.describe("imagenet", only=["07"]))["all", ""][0] == "9", "the main arms of three networks"
    assert driver.describe("imagenet", only=["01"]).startswith("0 of 0 runs are on record.")
    assert "No notebook reads this profile yet." in driver.describe("large")
    with pytest.raises(KureError, match="no notebook '77'"):
        driver.describe("imagenet", only=["77"])


def test_workers_take_turns_with_the_gpus(monkeypatch):
    eight = [str(i) for i in range(8)]
    monkeypatch.setattr(device, "gpus", lambda: eight)
    assert driver.workers() == 8
    taken = [place["CUDA_VISIBLE_DEVICES"] for place in driver._places(10)]
    assert taken == [*eight, "0", "1"], "more jobs than GPUs share them, none falls to the processor"
    monkeypatch.setattr(device, "gpus", lambda: [])
    assert driver._places(2) == [{}, {}] and driver.workers() == device.cores()


def test_runs_that_share_gpus_take_turns_with_groups_of_them(monkeypatch):
    monkeypatch.setenv("KURE_GPUS_PER_RUN", "2")
    monkeypatch.setattr(device, "gpus", lambda: ["0", "1", "GPU-8a", "3", "4"])
    assert driver.workers() == 2
    assert [place["CUDA_VISIBLE_DEVICES"] for place in driver._places(3)] == ["0,1", "GPU-8a,3", "0,1"]
    runs = plan("quick").runs
    assert {run.config.replicas for run in runs} == {2}
    monkeypatch.delenv("KURE_GPUS_PER_RUN")
    assert not {run.config.key for run in runs} & {run.config.key for run in plan("quick").runs}


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


def test_runs_that_share_a_label_are_all_listed_and_trained(results_folder, monkeypatch, timed):
    """Networks pre-trained for 2 and for 4 epochs, and what starts from them, have the same label."""
    planned = plan("smoke")
    assert len({run.config.label for run in planned.runs}) < len(planned.runs)
    assert f"0 of {len(planned.runs)} runs are on record." in driver.describe("smoke")
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
    driver.run("smoke", jobs=2)
    declared = {QuantizationSpec(weight_bits=bits).key for bits in (None, 4, 3)}
    assert seen == [declared]
    assert set(records.find(planned.runs[0].config).evaluations) == {*declared, QuantizationSpec(weight_bits=2).key}
    said = capsys.readouterr().out
    assert "evaluations to make: 3\n" in said
    assert "evaluations made by notebooks, which no cell tagged `needs` asks for: 1\n" in said
    assert (paths.results() / "tables" / "made.csv").exists()
