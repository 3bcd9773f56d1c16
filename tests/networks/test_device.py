"""Which GPUs and cores are used: those that the user, the affinity and the cgroup leave, and no others."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from kure_lib.networks import device
from kure_lib.paths import KureError
from kure_lib.study.plans import plan


@pytest.fixture
def seen(monkeypatch):
    """Lets PyTorch see so many GPUs, and `CUDA_VISIBLE_DEVICES` say this; this machine has none."""

    def make(count: int, said: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if said is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)

    return make


@pytest.mark.parametrize(
    ("count", "said", "names"),
    [
        (2, None, ["0", "1"]),
        (1, "3", ["3"]),
        (4, "4,5,6,7", ["4", "5", "6", "7"]),
        (2, " 5, GPU-8a3f", ["5", "GPU-8a3f"]),
        (1, "MIG-1f,MIG-2e", ["MIG-1f", "MIG-2e"]),  # of which CUDA shows a process the first
        (2, "0,1,-1,2", ["0", "1"]),  # CUDA reads up to the first that is no GPU
        (0, None, []),
        (0, "", []),
        (0, "-1", []),
        (0, "NoDevFiles", []),  # what Slurm says to a job without GPUs
    ],
)
def test_the_gpus_keep_the_names_that_the_user_gave(seen, count, said, names):
    seen(count, said)
    assert device.gpus() == names
    assert device.device().type == ("cuda" if names else "cpu")


@pytest.mark.parametrize("said", ["9", "0,1", "GPU-8a3f", "MIG-1f"])
def test_where_a_named_gpu_is_missing_nothing_falls_to_the_processor(seen, said):
    seen(0, said)
    for ask in (device.device, device.gpus):
        with pytest.raises(KureError, match=f"names {said}, and PyTorch sees no GPU: correct it"):
            ask()


@pytest.mark.parametrize(("said", "count"), [("0,9", 1), ("0,0", 1)])
def test_where_some_of_the_named_gpus_are_missing_the_others_are_not_taken(seen, said, count):
    seen(count, said)
    with pytest.raises(KureError, match=f"names {said}, and PyTorch sees 1 of these 2: name only"):
        device.gpus()


@pytest.mark.parametrize(("major", "precision"), [(7, "float32"), (8, "bfloat16"), (9, "bfloat16")])
def test_emulated_bfloat16_does_not_count(seen, monkeypatch, major, precision):
    seen(1)
    properties = SimpleNamespace(major=major, minor=0)  # 7.0 and 7.5 are a V100 and a T4
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    assert device._of_machine.__wrapped__() == precision


def test_what_is_to_agree_between_machines_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(device, "_of_machine", lambda: "bfloat16")
    x = torch.ones(8, 8)
    assert device.precision() == "bfloat16"
    with pytest.raises(ZeroDivisionError), device.in_float32(), device.autocast():
        assert device.precision() == "float32" and (x @ x).dtype == torch.float32
        raise ZeroDivisionError
    with device.autocast():
        assert device.precision() == "bfloat16" and (x @ x).dtype == torch.bfloat16


def test_without_git_a_record_says_that_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert device.provenance()["commit"] == "unknown"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_cores_are_those_of_the_affinity():
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", "from kure_lib.networks import device; print(device.cores())"]
    bound = ["taskset", "--cpu-list", str(core), *command]
    assert subprocess.run(bound, capture_output=True, text=True, check=True).stdout == "1\n"


def test_no_more_cores_are_counted_than_the_machine_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 64, raising=False)
    monkeypatch.setattr(device, "_quota", lambda: math.inf)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64 if logical else 32)
    assert device.cores() == 32, "two threads of one core do not compute twice as fast"
    monkeypatch.setattr(device, "_quota", lambda: 3)
    assert device.cores() == 3


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"a": "max 100000", "a/b": "max 100000"}, math.inf),
        ({"a": "max 100000", "a/b": "150000 100000"}, 2),
        ({"a": "400000 100000", "a/b": "max 100000"}, 4),
        ({"a": "50000 100000", "a/b": "400000 100000"}, 1),
        ({"a/b": "damaged"}, math.inf),
    ],
)
def test_the_cgroups_limits_hold_from_the_outermost_in(tmp_path, limits, cores):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, text in limits.items():
        (tmp_path / folder / "cpu.max").write_text(text + "\n")
    own = tmp_path / "own"
    own.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    assert device._quota(tmp_path, own) == cores
    assert device._quota(tmp_path / "a" / "b", tmp_path / "missing") == math.inf


def test_workers_take_turns_with_the_gpus(monkeypatch):
    eight = [str(i) for i in range(8)]
    monkeypatch.setattr(device, "gpus", lambda: eight)
    assert device.workers() == 8
    taken = [place["CUDA_VISIBLE_DEVICES"] for place in device.places(10)]
    assert taken == [*eight, "0", "1"], "more jobs than GPUs share them, none falls to the processor"
    monkeypatch.setattr(device, "gpus", lambda: [])
    assert device.places(2) == [{}, {}] and device.workers() == device.cores()


def test_runs_that_share_gpus_take_turns_with_groups_of_them(monkeypatch):
    monkeypatch.setenv("KURE_GPUS_PER_RUN", "2")
    monkeypatch.setattr(device, "gpus", lambda: ["0", "1", "GPU-8a", "3", "4"])
    assert device.workers() == 2
    assert [place["CUDA_VISIBLE_DEVICES"] for place in device.places(3)] == ["0,1", "GPU-8a,3", "0,1"]
    runs = plan("quick").runs
    assert {run.config.replicas for run in runs} == {2}
    monkeypatch.delenv("KURE_GPUS_PER_RUN")
    assert not {run.config.key for run in runs} & {run.config.key for run in plan("quick").runs}
