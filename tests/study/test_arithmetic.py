"""Networks that are compared were trained in one arithmetic, and evaluated in one, or are known not to have been."""

from collections import Counter

import pytest

from kure_lib.study import plans, records

#: Pairs of which one was trained in float32 and the other in bfloat16, as docs/reproducibility.md admits: part of the
#: sweep of λ. A new one must not come in unseen.
MIXED = {("resnet20", "coefficient"): 7, ("mobilenet_v2_050", "coefficient"): 4}

#: Evaluations in bfloat16 of networks whose control was evaluated by an earlier version, as the same page admits.
UNSAID = {
    ("resnet20", "rivals", "bfloat16", None): 252,
    ("resnet20", "target", "bfloat16", None): 72,
    ("resnet20", "activations", "bfloat16", None): 4,
}


@pytest.fixture
def pairs(monkeypatch):
    """Every fine-tuned network of the committed study with the control of its start and quantizer."""
    monkeypatch.delenv("KURE_RESULTS", raising=False)
    monkeypatch.setenv("KURE_PROFILE", "study")  # which opening the plan sets, and what a test sets is undone
    tuned = [run for run in plans.open("study").runs if run.config.start]
    found = {run.config: records.find(run.config) for run in tuned}
    controls = {(run.config.start, run.quantizer): run for run in reversed(tuned) if run.arm == "control"}
    together = [(run, controls.get((run.config.start, run.quantizer))) for run in tuned if run.arm != "control"]
    return [(run, found[run.config], found[control.config]) for run, control in together if control]


def test_a_network_was_trained_in_the_arithmetic_of_its_control(pairs):
    mixed = [run for run, one, two in pairs if one.provenance["precision"] != two.provenance["precision"]]
    assert len(pairs) > 80 and Counter((run.model, run.part) for run in mixed) == MIXED


def test_what_is_compared_was_evaluated_in_one_arithmetic(pairs):
    """Evaluations of earlier versions do not say in which, and are compared among themselves, but for `UNSAID`."""
    said = Counter()
    for run, one, two in pairs:
        for key in one.evaluations.keys() & two.evaluations.keys():
            said[run.model, run.part, one.evaluations[key].precision, two.evaluations[key].precision] += 1
    assert {key: count for key, count in said.items() if key[2] != key[3]} == UNSAID and sum(said.values()) > 4000
