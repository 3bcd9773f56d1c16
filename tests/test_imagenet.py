"""The profile `imagenet` from end to end: folders in ImageNet's format, and a folder of weights.

Cut are the images, the epochs, the calibration and what `smoke` cuts of the notebooks (`imagenet_cut`); networks are
torchvision's at 224 × 224 with 1,000 classes, with random weights in place of the published ones.
"""

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
from imagenet_cut import PARAMETERS, few, recipes
from PIL import Image
from torchvision import models

from kure_lib import driver, engine, notebooks
from kure_lib.findings import verdicts
from kure_lib.networks import device, published
from kure_lib.quantization import calibration
from kure_lib.study import profiles, records
from kure_lib.study.plans import plan

CLASSES = 1000
UNTRAINED = {"S2", "V1", "W2", "R1", "Q11"}  # of quantization-aware training, of several seeds and of rivals


class Here:
    """Carries out tasks in this process: a spawned one takes seconds to start each process that reads images."""

    retries, at_once = 0, 1

    def __init__(self, places):
        self.reports = Queue()

    def submit(self, task, inputs):
        future = Future()
        future.set_result(task.work(lambda *sent: self.reports.put((task.name, *sent)), *inputs))
        return future

    def error(self, future):
        return future.exception()

    def cancel(self):
        pass


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet's folders with one picture a class, of many sizes and some without color."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(CLASSES):
            name = f"n{i:08}"
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            shape = (*rng.integers(30, 90, 2), *[3] * (i % 10 > 0))
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}_{i}.JPEG")
    monkeypatch.setenv("KURE_IMAGENET", str(tmp_path / "images"))
    monkeypatch.setenv("KURE_WEIGHTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def cut(imagenet, monkeypatch):
    """Cuts the profile to its first networks, here and, by IPython's startup files, in the kernels of notebooks."""

    def cut(networks: int) -> None:
        monkeypatch.setitem(profiles.PROFILES, "imagenet", recipes(networks))
        monkeypatch.setitem(profiles.PARAMETERS, "imagenet", PARAMETERS)
        monkeypatch.setattr(calibration, "images", few(calibration.images))
        startup = imagenet / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        lines = [
            "import sys",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "import imagenet_cut",
            f"imagenet_cut.apply({networks})",
        ]
        (startup / "cut.py").write_text("\n".join(lines))
        monkeypatch.setenv("IPYTHONDIR", str(imagenet / "ipython"))
        for recipe in profiles.PROFILES["imagenet"]:
            torch.manual_seed(0)
            weights = imagenet / f"{recipe.model}-{published.DIGITS[recipe.model]}.pth"
            torch.save(models.get_model(recipe.model).state_dict(), weights)
            with (imagenet / published.SUMS).open("a") as sums:
                sums.write(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n")

    return cut


@pytest.mark.slow
@pytest.mark.parametrize("networks", [1, 3])
def test_the_profile_imagenet_runs_from_end_to_end(networks, cut, results_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(engine, "Pool", Here)
    monkeypatch.setattr(device, "cores", lambda: 1)
    cut(networks)
    page = driver.run("imagenet", jobs=2)
    folder = results_folder.parent / "imagenet"
    assert page == folder / "site" / "index.html" and page.is_file()
    planned = plan("imagenet")
    assert planned.models == ["resnet18", "resnet50", "mobilenet_v2"][:networks]
    assert all(records.find(run.config) for run in planned.runs)
    assert {file.stem for file in (folder / "notebooks").glob("*.ipynb")} == set(notebooks.available())
    outcomes = {file.stem: json.loads(file.read_text())["outcome"] for file in (folder / "verdicts").glob("*.json")}
    assert set(outcomes) == set(verdicts.claims())
    assert {id for id, outcome in outcomes.items() if outcome == "not tested"} >= UNTRAINED
