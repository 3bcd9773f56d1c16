"""A Ray cluster of two machines, played by two node processes on this one: the same results, whatever is killed.

The machines share no results: the driver alone reads and writes. Run by `pytest -m cluster tests/test_cluster.py`.
"""

import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from helpers import TINY

from kure_lib import driver, engine
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import records, runs
from kure_lib.study.plans import KURE, Plan, Planned
from kure_lib.training.configs import RunConfig

pytestmark = pytest.mark.cluster
PATIENCE = {  # what a busy machine needs: seconds, milliseconds, and missed answers to health checks
    "RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
PORTS = ("metrics_agent_port", "runtime_env_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def node() -> dict:
    """A node with one core; its ports are said, as it waits only 15 seconds until its agents have found some."""
    sockets = [socket.socket() for _ in PORTS]
    for each in sockets:
        each.bind(("", 0))
    ports = {name: each.getsockname()[1] for name, each in zip(PORTS, sockets, strict=True)}
    for each in sockets:
        each.close()
    return {"num_cpus": 1, "object_store_memory": 100 * 2**20, **ports}


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PATIENCE, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        machines = Cluster(initialize_head=True, head_node_args={**node(), "include_dashboard": False})
        machines.add_node(**node())
        yield machines
        machines.shutdown()


def tiny_plan(epochs: int = 1) -> Plan:
    """A run, and two that start from it and last so many epochs."""
    settings = {"model": "resnet20", **TINY, "train_size": 128, "epochs": 1}
    first = RunConfig(**settings)
    tuned = {**settings, "start": first, "epochs": epochs}
    return Plan("trial", (
        Planned("resnet20", "pretrained", "main", first),
        Planned("resnet20", "control", "main", RunConfig(**tuned)),
        Planned("resnet20", "kure", "main", RunConfig(**tuned, regularizer=KURE)),
    ))  # fmt: skip


def digests(planned: Plan) -> list[str]:
    return [records.find(run.config).weights_sha256 for run in planned.runs]


@pytest.fixture
def alone(results_folder, monkeypatch):
    """The digests of the weights that one process here trains."""

    def train(planned: Plan) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("KURE_RESULTS", str(results_folder.parent / "alone"))
            return [runs.get(run.config).weights_sha256 for run in planned.runs]

    return train


def when(condition, act, until=lambda: False) -> threading.Thread:
    """Acts as soon as the condition holds, if that is before the other."""

    def watch() -> None:
        deadline = time.monotonic() + 500
        while not condition() and not until() and time.monotonic() < deadline:
            time.sleep(0.05)
        if condition():
            act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_two_machines_train_what_one_process_does_bit_for_bit(cluster, alone):
    planned = tiny_plan()
    driver.train(planned, cluster=cluster.address)
    assert digests(planned) == alone(planned)


def test_two_machines_evaluate_what_one_process_does_to_the_last_bit(cluster, results_folder, monkeypatch):
    monkeypatch.setattr(engine, "Pool", None)
    configs = [runs.get(run.config).config for run in tiny_plan().runs[:2]]
    specs = [QuantizationSpec(), *(QuantizationSpec(weight_bits=3, step_ratio=ratio) for ratio in (0.8, 1.0))]
    driver.evaluate({config: {spec.key: spec for spec in specs} for config in configs}, cluster=cluster.address)
    for record in map(records.find, configs):
        made = dict(record.evaluations)
        record.evaluations.clear()
        records.write(record)
        assert made == {spec.key: runs.evaluate(record, spec) for spec in specs}


def test_a_killed_worker_goes_on_to_the_same_weights(cluster, alone, capsys):
    planned = tiny_plan(epochs=12)
    kure = planned.runs[-1].config
    name, killed = records.run_name(kure), []

    def kill() -> None:
        (worker,) = [p for p in psutil.process_iter(["cmdline"]) if f"ray::{name}" in (p.info["cmdline"] or ())]
        worker.kill()
        killed.append(worker.pid)

    killer = when(records.checkpoint_path(kure).exists, kill)
    driver.train(planned, cluster=cluster.address)
    killer.join()
    assert killed, "the run was over before its worker could be killed"
    said = capsys.readouterr().out
    assert said.count(f"{name} epoch 1/12") == 1, "it goes on where it was"
    assert digests(planned) == alone(planned)


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import test_cluster
from kure_lib import driver
driver.train(test_cluster.tiny_plan({epochs}), cluster={address!r})
"""


def test_a_driver_that_was_killed_trains_nothing_twice(cluster, alone, capsys):
    planned = tiny_plan(epochs=12)
    first, _, kure = (run.config for run in planned.runs)
    folder = str(__file__).rpartition("/")[0]
    script = DRIVER.format(tests=folder, epochs=12, address=cluster.address)
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        when(records.checkpoint_path(kure).exists, process.kill).join()
    assert records.find(first) and not records.find(kure)
    driver.train(planned, cluster=cluster.address)
    said = capsys.readouterr().out
    epochs = (f"{records.run_name(first)} epoch 1/1", f"{records.run_name(kure)} epoch 1/12")
    assert said and not any(epoch in said for epoch in epochs)
    assert digests(planned) == alone(planned)


def test_the_tasks_of_a_machine_that_is_gone_move_to_another(cluster, alone):
    planned = tiny_plan(epochs=100)  # the second begins before the first has ended
    tuned = [run.config for run in planned.runs[1:]]
    gone = when(
        lambda: all(records.checkpoint_path(config).exists() for config in tuned),
        lambda: cluster.remove_node(cluster.worker_nodes.copy().pop()),
        until=lambda: all(map(records.find, tuned)),
    )
    driver.train(planned, cluster=cluster.address)
    gone.join()
    assert not cluster.worker_nodes, "both machines were at work when one of them went"
    assert digests(planned) == alone(planned)
