"""Several processes that want the same thing at once: each gets it or one sentence, and it is made once."""

import time

import numpy as np
from children import RUNS, Child
from PIL import Image

from kure_lib.findings import verdicts
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import runs


def several(chance, *works):
    """Start children one after the other, after a moment each; returns what came of them."""
    children = []
    for work in works:
        children.append(Child(*work))
        time.sleep(chance.uniform(0, 0.5))
    return [child.outcome() for child in children]


def test_one_run_is_trained_once(chance, whole, results_folder):
    config = RUNS[chance.integers(len(RUNS))]
    found = [value for value, _ in several(chance, *[("train", config)] * 3)]
    assert {digest for digest, _ in found} == {whole(config)[0]}
    assert sum(epochs for _, epochs in found) == config.epochs


def test_no_evaluation_is_lost(chance, finished):
    widths = [chance.permutation([2, 3, 4, 5])[:3].tolist() for _ in range(3)]
    found = several(chance, *[("evaluate", finished, asked) for asked in widths])
    record = runs.find(finished)
    for asked, (values, _) in zip(widths, found, strict=True):
        assert [record.evaluations[QuantizationSpec(weight_bits=bits).key] for bits in asked] == values
    kept = dict(record.evaluations)
    record.evaluations.clear()
    assert runs.evaluate(record, QuantizationSpec(weight_bits=widths[0][0])) in kept.values()


def test_data_are_unpacked_into_one_cache(chance, tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_CACHE", str(tmp_path / "cache"))
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(picture)
    found = several(chance, *[("decode", [picture])] * 3)
    assert all(value == [np.full((3, 8, 8), 7).tolist()] for value, _ in found)


def test_a_claim_that_two_notebooks_judge(chance, results_folder):
    claim = verdicts.claims()["Q8"]
    effects = {stem: [{"setting": stem, "seed": seed, "effect": 2.0 + seed} for seed in range(3)]
               for stem in claim.notebooks}  # fmt: skip
    assert len(effects) == 2
    found = several(chance, *[("judge", "Q8", effects[stem], stem) for stem in chance.permutation(claim.notebooks)])
    assert [sentence for _, sentence in found] == [None, None]
    parts = verdicts._read("Q8")["parts"]
    assert {stem: parts[stem]["effects"] for stem in parts} == effects


def test_a_profile_is_studied_by_one_process(chance, results_folder):
    said = [sentence for _, sentence in several(chance, *[("study", 5.0)] * 2)]
    assert sorted(said) == sorted(["enough of it.", f"Another study is writing to {results_folder.parent / 'smoke'}: "
                                   "wait until it is done, or stop it."])  # fmt: skip
