"""What a profile comes to: the tables of its runs, and how long training takes by the records there are."""

import json
import re
from collections import defaultdict

import pytest

from kure_lib import overview
from kure_lib.networks import data, device
from kure_lib.paths import KureError
from kure_lib.study.plans import KURE, plan
from kure_lib.study.records import Record
from kure_lib.training.configs import QatConfig, RunConfig


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Puts records of seconds per epoch in the place of the committed ones; one run at a time would be trained."""
    monkeypatch.setattr(overview, "COMMITTED", tmp_path)
    monkeypatch.setattr(device, "workers", lambda: 1)
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
    assert overview.duration([run(epochs=4)]) == "about 8 min with 1 at a time"
    assert overview.duration([run(epochs=4, quantization=LSQ)]) == "about 20 min with 1 at a time"
    assert overview.duration([run(), run(seed=1), run(quantization=LSQ)]) == "about 27 min with 1 at a time"


def test_the_time_grows_with_the_number_of_training_images(timed):
    timed([120.0], train_size=30_000)
    timed([200.0], seed=1, held_out=10_000)  # of 60,000: as many seconds for an image
    assert overview.duration([run(epochs=1)]) == "about 4 min with 1 at a time"
    assert overview.duration([run(epochs=10, train_size=15_000)]) == "about 10 min with 1 at a time"


def test_where_no_record_is_of_the_same_kind_those_of_the_network_tell_the_time(timed):
    timed([60.0], precision="float32")
    timed([120.0], precision="float32", regularizer=KURE)
    timed([180.0], precision="float32", quantization=LSQ)
    assert overview.duration([run(epochs=1)]) == "about 2 min with 1 at a time"


def test_a_source_says_how_many_training_images_it_has():
    assert len(data.load("fashion_mnist", "train")) == data.SOURCES["fashion_mnist"].training_images


def test_several_workers_share_the_time(timed, monkeypatch):
    timed([60.0])
    monkeypatch.setattr(device, "workers", lambda: 4)
    assert overview.duration([run(epochs=8)]) == "about 2 min with 4 at a time"


def test_the_time_of_a_network_without_a_record_is_unknown(timed):
    timed([60.0])
    timed([], model="resnet18", data="imagenet", epochs=0)
    said = overview.duration([run(), run(model="resnet18", data="imagenet"), run(model="resnet50", epochs=0)])
    assert said == "an unknown time: no record of resnet18 on imagenet says how long an epoch takes"


def test_the_time_on_a_gpu_is_not_that_of_a_processor(timed, monkeypatch):
    timed([60.0] * 9)
    timed([6.0], place="NVIDIA H100", seed=1)
    assert overview.duration([run(epochs=1)]) == "about 1 min with 1 at a time"
    monkeypatch.setattr(device, "provenance", lambda: {"device": "NVIDIA H100"})
    assert overview.duration([run(epochs=10)]) == "about 1 min with 1 at a time"
    monkeypatch.setattr(device, "provenance", lambda: {"device": "NVIDIA T4"})
    said = overview.duration([run(epochs=1)])
    assert said == ("about 1 min with 1 at a time, if NVIDIA T4 is as fast as AVX512, on which the records were made")
    assert overview.estimates([run(epochs=1)]) == {run(epochs=1): overview.Time(60.0, "AVX512")}


def cells(said: str) -> dict[tuple[str, str], list[str]]:
    """The columns after the arms, in every row of the table of runs, by network and part."""
    rows = [re.split(r"  +", line) for line in said.partition("\n\n")[0].splitlines()[2:]]
    return {(row[0], row[1] if row[0] != "all" else ""): row[-6:] for row in rows}


def test_the_table_of_runs_counts_what_the_plan_and_the_files_hold(monkeypatch):
    monkeypatch.delenv("KURE_RESULTS", raising=False)
    monkeypatch.setenv("KURE_PROFILE", "study")
    said = overview.describe("study")
    assert max(map(len, said.splitlines())) <= 100
    expected = defaultdict(lambda: [0, 0, 0, 0, 0.0])
    folder = overview.COMMITTED.parent
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
    said = overview.describe("smoke", only=["07", "05"])
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
    said = overview.describe("imagenet")
    assert {row[-1] for row in cells(said).values()} == {"unknown"} and "Time:" not in said
    missing = "0 of 13 runs are on record. Training the others takes an unknown time: no record of mobilenet_v2 on "
    assert missing in " ".join(said.split())
    assert cells(overview.describe("imagenet", only=["07"]))["all", ""][0] == "9", "the main arms of three networks"
    assert overview.describe("imagenet", only=["01"]).startswith("0 of 0 runs are on record.")
    assert "No notebook reads this profile yet." in overview.describe("large")
    with pytest.raises(KureError, match="no notebook '77'"):
        overview.describe("imagenet", only=["77"])
