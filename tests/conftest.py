"""Results and caches in temporary folders, and a run small enough to be trained within a second."""

import os

import pytest
import torch
from helpers import TINY

from kure_lib.networks import device
from kure_lib.training.configs import KureConfig, RunConfig


@pytest.fixture(scope="session", autouse=True)
def unpacked_data(tmp_path_factory):
    """The data set is unpacked anew for every session, so that no old copy at home can hide a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    """An empty results folder of a profile of its own, outside check mode; returns the profile's folder."""
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "trial")
    monkeypatch.delenv("KURE_CHECK", raising=False)
    return tmp_path / "trial"


@pytest.fixture
def float32():
    """Networks compute in float32, on a machine with bfloat16, too: for what is compared with an oracle in float32."""
    with device.in_float32():
        yield


@pytest.fixture
def tiny() -> RunConfig:
    return RunConfig(model="resnet20", **TINY)


@pytest.fixture
def tiny_kure(tiny) -> RunConfig:
    """Fine-tuning of `tiny` with the KURE term."""
    return RunConfig(model="resnet20", **TINY, start=tiny, regularizer=KureConfig())


@pytest.fixture
def tiny_model() -> torch.nn.Module:
    """Four convolutions, one of them with a bias, and a linear layer, with weights that are always the same."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1, bias=False), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    model(torch.zeros(1, 1, 10, 10))
    return model.eval()


@pytest.fixture
def environment():
    """For child processes: one thread, so that a test does not crowd out what else runs on the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
