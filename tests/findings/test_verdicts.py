"""Claims and their verdicts: complete, checked, merged from parts, and shown on the scoreboard."""

import json
import re

import pytest

from kure_lib import paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError

PAPER_CLAIMS = ["L1", "L2", "L3", "T4", "O1", "B1", "K1", "K2", "S1", "S2", "S3", "W1", "W2", "R1", "V1"]
OURS = ["P1"]
QUESTIONS = [f"Q{number}" for number in range(1, 14)]
FIRST, SECOND = "03_kurtosis_regularization", "05_kurtosis_target"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """An empty folder of results, under a profile of its own."""
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "trial")
    monkeypatch.delenv("KURE_CHECK", raising=False)
    return tmp_path / "trial"


def kept(results, id):
    return json.loads((results / "verdicts" / f"{id}.json").read_text(encoding="utf-8"))


# Claims


def test_every_claim_and_every_question_is_there_in_order():
    assert sorted(verdicts.claims()) == sorted(PAPER_CLAIMS + OURS + QUESTIONS)
    assert list(verdicts.claims())[-13:] == QUESTIONS


@pytest.mark.parametrize("id", PAPER_CLAIMS + OURS + QUESTIONS)
def test_a_claim_is_one_sentence_with_a_source_and_a_refutation(id):
    claim = verdicts.claims()[id]
    assert claim.source
    assert claim.statement.endswith("?" if id in OURS + QUESTIONS else ".")
    assert len(re.findall(r"[.?](?=\s|$)", claim.statement)) == 1
    assert claim.refuted_by.endswith(".")
    assert claim.notebooks
    assert all(re.fullmatch(r"(0\d|1[0-3])_[a-z_]+", stem) for stem in claim.notebooks)


def test_one_number_means_one_notebook_and_existing_ones_have_the_name_used():
    stems = {stem for claim in verdicts.claims().values() for stem in claim.notebooks}
    assert len({stem[:2] for stem in stems}) == len(stems)
    existing = {file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")}
    assert {stem for stem in existing if stem[:2] in {s[:2] for s in stems}} <= stems


# Verdicts


def test_a_verdict_is_kept_and_printed(results, capsys):
    verdicts.record("S3", "holds", "KURE loses 0.4 points,\n    the control 2.1.")
    assert capsys.readouterr().out == "S3 · holds · KURE loses 0.4 points, the control 2.1.\n"
    assert kept(results, "S3") == {
        "id": "S3",
        "outcome": "holds",
        "evidence": "KURE loses 0.4 points, the control 2.1.",
        "notebook": "06_step_size_robustness",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("S3", "hold", "1."), "Unknown outcome 'hold': choose one of holds, partly, fails, not tested"),
        (("S9", "holds", "1."), "Unknown claim 'S9': choose one of L1, L2"),
        (("S3", "holds", "  "), "S3 has no evidence"),
        (("K1", "holds", "1."), f"K1 is judged in {FIRST}, {SECOND}: say which"),
        (("K1", "holds", "1.", "05"), f"Unknown notebook of K1 '05': choose one of {FIRST}, {SECOND}"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed_and_writes_nothing(results, arguments, message):
    with pytest.raises(KureError, match=message):
        verdicts.record(*arguments)
    assert not results.exists()


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [("holds", "holds", "holds"), ("holds", "fails", "partly"), ("fails", "fails", "fails")],
)
def test_parts_merge_in_the_order_of_the_notebooks(results, first, second, outcome):
    verdicts.record("K1", second, "A network reaches 1.81.", notebook=SECOND)
    verdicts.record("K1", first, "A tensor reaches 1.80.", notebook=FIRST)
    assert kept(results, "K1") == {
        "id": "K1",
        "outcome": outcome,
        "evidence": "A tensor reaches 1.80. A network reaches 1.81.",
        "notebook": f"{FIRST}, {SECOND}",
        "parts": {
            FIRST: {"outcome": first, "evidence": "A tensor reaches 1.80."},
            SECOND: {"outcome": second, "evidence": "A network reaches 1.81."},
        },
    }


def test_a_part_judged_again_replaces_itself_alone(results):
    verdicts.record("K1", "fails", "Old.", notebook=FIRST)
    verdicts.record("K1", "holds", "Network.", notebook=SECOND)
    verdicts.record("K1", "holds", "New.", notebook=FIRST)
    assert kept(results, "K1")["outcome"] == "holds"
    assert kept(results, "K1")["evidence"] == "New. Network."


@pytest.mark.parametrize(
    ("outcome", "evidence", "changed"), [("fails", "Gap 1.", "outcome"), ("holds", "Gap 2.", "evidence")]
)
def test_check_mode_detects_a_changed_verdict(results, monkeypatch, outcome, evidence, changed):
    verdicts.record("S3", "holds", "Gap 1.")
    before = kept(results, "S3")
    monkeypatch.setenv("KURE_CHECK", "1")
    verdicts.record("S3", "holds", "Gap 1.")
    with pytest.raises(KureError, match=rf"S3\.json differs .* column {changed}"):
        verdicts.record("S3", outcome, evidence)
    assert kept(results, "S3") == before


def test_check_mode_compares_a_part_and_misses_an_absent_verdict(monkeypatch):
    verdicts.record("K1", "holds", "Tensor.", notebook=FIRST)
    verdicts.record("K1", "fails", "Network.", notebook=SECOND)
    monkeypatch.setenv("KURE_CHECK", "1")
    verdicts.record("K1", "fails", "Network.", notebook=SECOND)
    with pytest.raises(KureError, match=r"K1\.json differs"):
        verdicts.record("K1", "holds", "Network.", notebook=SECOND)
    with pytest.raises(KureError, match=r"W1\.json is missing"):
        verdicts.record("W1", "holds", "Gain 1.")


def test_a_damaged_verdict_is_named(results):
    verdicts.record("S3", "holds", "Gap 1.")
    (results / "verdicts/S3.json").write_text("{")
    with pytest.raises(KureError, match=r"S3\.json is damaged"):
        verdicts.scoreboard()


# The scoreboard


def test_the_scoreboard_has_every_claim_and_its_verdict():
    verdicts.record("S3", "holds", "Gap 1.")
    board = verdicts.scoreboard().set_index("id")
    assert list(board.index) == list(verdicts.claims())
    assert board.loc["S3", ["outcome", "evidence"]].tolist() == ["holds", "Gap 1."]
    assert (board.drop("S3").outcome == "not tested").all()
    assert board.loc["K1", "notebook"] == f"{FIRST}, {SECOND}"


def test_the_scoreboard_counts_and_links_existing_notebooks_only(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    (tmp_path / f"{FIRST}.ipynb").touch()
    verdicts.record("K1", "partly", "a|b 1.", notebook=FIRST)
    text = verdicts.scoreboard_markdown()
    total = len(verdicts.claims())
    assert text.startswith(
        f"{total} claims and questions (profile `trial`): holds 0, partly 1, fails 0, not tested {total - 1}.\n"
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| K1 ")]
    assert row.endswith(f"| **partly** | a\\|b 1. | [03](notebooks/{FIRST}.ipynb) 05 |")
    assert f"[03]({FIRST}.ipynb)" in verdicts.scoreboard_markdown(folder="")
    assert "a\\|b 1." not in verdicts.scoreboard_markdown(evidence=False)


def test_the_readme_changes_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\n\nEnd.\n", encoding="utf-8")
    verdicts.record("S3", "holds", "Gap 1.")
    verdicts.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert (
        text == f"# Title\n\n{verdicts.BEGIN}\n{verdicts.scoreboard_markdown(evidence=False)}\n{verdicts.END}\n\nEnd.\n"
    )
    verdicts.update_readme(readme)
    assert readme.read_text(encoding="utf-8") == text


def test_check_mode_notices_an_outdated_readme(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"{verdicts.BEGIN}\n{verdicts.END}\n", encoding="utf-8")
    verdicts.update_readme(readme)
    verdicts.record("S3", "holds", "Gap 1.")
    monkeypatch.setenv("KURE_CHECK", "1")
    with pytest.raises(KureError, match=r"README\.md differs"):
        verdicts.update_readme(readme)


def test_a_readme_without_markers_is_refused_and_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{verdicts.BEGIN}\nno end\n", encoding="utf-8")
    with pytest.raises(KureError, match="lacks the lines"):
        verdicts.update_readme(readme)
    assert readme.read_text(encoding="utf-8") == f"{verdicts.BEGIN}\nno end\n"


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"outcome": "proved", "evidence": ""}',
                                     '{"outcome": "holds", "evidence": 3}', '{"outcome": ["holds"], "evidence": ""}',
                                     '{"outcome": "holds", "evidence": "", "parts": {"a": 1}}'])  # fmt: skip
def test_a_file_that_holds_no_verdict_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "trial")
    file = tmp_path / "trial" / "verdicts" / "S1.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(KureError, match=rf"{file} is damaged .*: delete it and run its notebook again"):
        verdicts.scoreboard()
