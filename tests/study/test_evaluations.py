"""The table of every accuracy holds what the records hold, and says what its columns mean."""

import json

import pandas as pd

from kure_lib.paths import ROOT
from kure_lib.study import evaluations

STUDY = ROOT / "results" / "study"
TABLE = pd.read_csv(STUDY / "evaluations.csv", keep_default_na=False, dtype=str)


def test_the_committed_table_holds_every_evaluation_of_the_records():
    """If this fails and the records are meant, write the table anew: ./run_all.sh --manifest."""
    on_record = [json.loads(file.read_text("utf-8")) for file in (STUDY / "records").glob("*.json")]
    wanted = sorted((each["key"], *values[:2]) for each in on_record for values in each["evaluations"].values())
    rows = zip(TABLE.record, TABLE.top1.astype(float), TABLE.loss.astype(float), strict=True)
    found = sorted((key, top1, loss) for key, top1, loss in rows)
    assert len(wanted) > 7000 and [row[:2] for row in found] == [row[:2] for row in wanted]
    assert max(abs(one[2] - two[2]) / max(two[2], 1) for one, two in zip(found, wanted, strict=True)) < 1e-8


def test_a_row_says_how_the_network_was_quantized():
    every = [
        json.loads(file.read_text("utf-8")) for file in (STUDY / "records").glob("resnet20-kure-1.8-1-seed0-*.json")
    ]
    (content,) = [each for each in every if each["config"]["start"]["epochs"] == 10]
    chosen = TABLE[(TABLE.record == content["key"]) & (TABLE.grid == "signed_int") & (TABLE.scope == "per channel")]
    chosen = chosen[(chosen.rounding == "even") & (chosen.weight_bits == "2")]
    chosen = chosen[chosen.reestimate_batch_norm == "True"]
    fields = {"calibration": 512, "grid": "signed_int", "master": "even", "per_channel": True}
    key = json.dumps(fields | {"reestimate_batch_norm": True, "weight_bits": 2})
    assert chosen.top1.astype(float).tolist() == [content["evaluations"][key][0]]
    assert set(chosen.arm) == {"kure"} and set(chosen.part) == {"main"} and set(chosen.target) == {"1.8"}


def test_the_columns_are_explained():
    text = (STUDY / "evaluations.md").read_text("utf-8")
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == list(TABLE)
    assert list(TABLE) == list(evaluations.COLUMNS)


def test_nothing_is_written_where_nothing_is_on_record(results_folder):
    assert len(evaluations.write("smoke")) == 0
    assert not (results_folder.parent / "smoke" / "evaluations.csv").exists()
