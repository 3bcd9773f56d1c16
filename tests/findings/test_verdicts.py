"""Claims, the rule that decides them, and their verdicts: complete, checked, merged from parts, shown on two boards."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from scipy import stats

from kure_lib import paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError

PAPER_CLAIMS = ["L1", "L2", "L3", "T4", "O1", "B1", "K1", "K2", "K3", "K4", "S1", "S2", "S3", "W1", "W2", "R1", "V1"]
OURS = [f"{letter}{n}" for letter, most in {"P": 8, "M": 5, "N": 6, "G": 2, "F": 2, "D": 5, "E": 1, "A": 6}.items()
        for n in range(1, most + 1)]  # fmt: skip
QUESTIONS = [f"Q{number}" for number in range(1, 14) if number != 2]  # Q2 is S3
FIRST, SECOND = "04_training", "09_rival_regularizers"  # judge Q8 together
USUAL = {("more", "points"): 1, ("same", "points"): 0.5, ("same", "nats"): 0.02, ("more", "nats"): 0.02,
         ("more", "percentage points"): 5}  # fmt: skip


@pytest.fixture(autouse=True)
def results(results_folder):
    return results_folder


def kept(results, id):
    return json.loads((results / "verdicts" / f"{id}.json").read_text(encoding="utf-8"))


def effects(**settings):
    """Effects by setting, one a seed."""
    rows = [(name, seed, effect) for name, values in settings.items() for seed, effect in enumerate(values)]
    return pd.DataFrame(rows, columns=["setting", "seed", "effect"])


GAIN = effects(w3=[2.0, 2.2, 2.4])
NONE = effects(w3=[0.0, 0.1, -0.1])


# Claims


def test_every_claim_and_every_question_is_there_in_order():
    assert sorted(verdicts.claims()) == sorted(PAPER_CLAIMS + OURS + QUESTIONS)
    assert list(verdicts.claims())[-12:] == QUESTIONS


@pytest.mark.parametrize("id", PAPER_CLAIMS + OURS + QUESTIONS)
def test_a_claim_is_a_short_sentence_with_an_effect_and_a_margin(id):
    claim = verdicts.claims()[id]
    assert claim.source and claim.effect and claim.unit and claim.kind in verdicts.KINDS and claim.margin >= 0
    assert claim.statement.endswith("?" if id in OURS + QUESTIONS else ".")
    assert len(re.findall(r"[.?](?=\s|$)", claim.statement)) == 1
    words = [word for word in claim.statement.split() if re.search(r"[^\W_]", word)]
    assert len(words) <= 12
    assert claim.is_question is (id in OURS + QUESTIONS)
    assert claim.notebooks and all(re.fullmatch(r"[0-2]\d_[a-z_]+", stem) for stem in claim.notebooks)


def test_another_margin_than_the_usual_one_has_its_reason():
    claims = verdicts.claims().values()
    assert [c.id for c in claims if not c.reason and USUAL.get((c.kind, c.unit)) != c.margin] == []
    assert {USUAL[c.kind, c.unit] - c.margin for c in claims if (c.kind, c.unit) in USUAL} == {0}


def test_one_number_means_one_notebook_and_existing_ones_have_the_name_used():
    stems = {stem for claim in verdicts.claims().values() for stem in claim.notebooks}
    assert len({stem[:2] for stem in stems}) == len(stems)
    existing = {file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")}
    assert {stem for stem in existing if stem[:2] in {s[:2] for s in stems}} <= stems


def test_the_rules_of_a_notebook_name_its_claims_margins_and_kinds():
    text = verdicts.rules("06_step_size_robustness")
    assert [id for id in verdicts.claims() if f"**{id}**" in text] == ["S1", "S2", "S3", "V1"]
    assert text.count("margin 1, in points;") == 4 and verdicts.KINDS["more"] in text and verdicts.CHANCE in text
    assert verdicts.CHANCE not in verdicts.rules("01_step_size_sensitivity")
    with pytest.raises(KureError, match="Unknown notebook with claims '00_start_here': choose one of 01_"):
        verdicts.rules("00_start_here")


# The rule


@pytest.mark.parametrize("settings", [1, 5, 14])
def test_intervals_are_simultaneous_student_intervals(settings):
    rng = np.random.default_rng(settings)
    drawn = {f"setting {i}": rng.normal(i, 2, size=4) for i in range(settings)}
    decided = verdicts.decide(effects(**drawn), "more", 1.0).set_index("setting")
    for name, values in drawn.items():
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95 ** (1 / settings))
        mean, half = decided.loc[name, ["mean", "half"]]
        assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_noise_is_called_an_effect_in_no_more_than_one_claim_of_forty():
    """Monte Carlo, true effects of zero in ten settings: one side of 95 %, 400 claims, standard error 0.8 points."""
    rng, tries = np.random.default_rng(0), 400
    frame = pd.DataFrame({"setting": np.repeat(range(10), 3), "seed": [0, 1, 2] * 10})
    drawn = [frame.assign(effect=rng.normal(size=30)) for _ in range(tries)]
    called = sum("supported" in set(verdicts.decide(each, "more", 0.01).decision) for each in drawn)
    assert 0.025 - 3 * 0.008 < called / tries < 0.025 + 3 * 0.008


@pytest.mark.parametrize(
    ("kind", "values", "decision"),
    [
        ("more", [2.0, 2.1, 2.2], "supported"), ("more", [0.9, 1.0, 1.1], "supported"),
        ("more", [0.5, 0.5, 0.5], "refuted"), ("more", [-3.0, -3.1, -3.2], "refuted"),
        ("more", [-1.0, 2.0, 5.0], "undecided"), ("more", [9.0], "undecided"),
        ("same", [0.1, 0.0, -0.1], "supported"), ("same", [3.0, 3.1, 3.2], "refuted"),
        ("same", [-3.0, -3.1, -3.2], "refuted"), ("same", [-1.0, 1.0, 0.5], "undecided"), ("same", [0.0], "undecided"),
        ("exact", [1.0], "supported"), ("exact", [1.001], "refuted"), ("exact", [-5.0], "supported"),
    ],
)  # fmt: skip
def test_a_setting_is_decided_by_its_interval_and_the_margin(kind, values, decision):
    (found,) = verdicts.decide(effects(w3=values), kind, margin=1.0).decision
    assert found == decision


@pytest.mark.parametrize(
    ("decisions", "outcome"),
    [
        ("s", "holds"), ("su", "holds"), ("suu", "undecided"), ("r", "fails"), ("ruuuu", "fails"), ("sr", "mixed"),
        ("sruuuu", "mixed"), ("u", "undecided"), ("", "not tested"),
    ],
)  # fmt: skip
def test_settings_add_up_to_an_outcome(decisions, outcome):
    words = {"s": "supported", "r": "refuted", "u": "undecided"}
    assert verdicts.outcome([words[letter] for letter in decisions]) == outcome


# Verdicts


def test_a_verdict_is_kept_and_printed(results, capsys):
    verdicts.judge("S3", GAIN, "KURE loses 0.4 points,\n    the control 2.6.")
    printed = capsys.readouterr().out
    assert printed.startswith("S3 · holds · Of 1 settings supported 1, refuted 0, undecided 0. ")
    assert "KURE loses 0.4 points, the control 2.6." in printed and "w3  3 +2.2 ± 0.5 supported" in printed
    verdict = kept(results, "S3")
    assert verdict["outcome"] == "holds" and verdict["decided_by"] == "+2.2 ± 0.5 points (w3)"
    assert pd.DataFrame(verdict["parts"]["06_step_size_robustness"]["effects"]).equals(GAIN)


def test_a_question_is_answered_by_yes_or_no(results):
    for effect, answer in ((GAIN, "yes"), (NONE, "no")):
        verdicts.judge("Q6", effect.assign(effect=10 * effect.effect))
        assert kept(results, "Q6")["outcome"] == answer


def test_what_a_profile_does_not_measure_is_not_tested(results):
    verdicts.judge("R1", pd.DataFrame())
    assert kept(results, "R1")["outcome"] == "not tested" and kept(results, "R1")["decided_by"] == ""


@pytest.mark.parametrize(
    ("id", "settings", "decided_by"),
    [
        ("S3", {"sure": [2.0, 2.1, 2.2], "large": [4.0, 6.0, 9.0]}, "+2.1 ± 0.4 points (sure)"),
        (
            "S3",
            {"much": [3.0, 3.1, 3.2], "none": [0.0, 0.1, 0.2]},
            "+3.1 ± 0.4 points (much); +0.1 ± 0.4 points (none)",
        ),
        ("S3", {"narrow": [1.0, 1.1, 0.0], "wide": [-9.0, 9.0, 1.0]}, "+0.7 ± 2.2 points (narrow)"),
        ("Q12", {"near": [0.0, 0.001, 0.0], "far": [0.01, 0.011, 0.01]}, "+0.010 ± 0.002 nats (far)"),
    ],
)
def test_the_number_that_decided_is_named(results, id, settings, decided_by):
    verdicts.judge(id, effects(**settings))
    assert kept(results, id)["decided_by"] == decided_by


@pytest.mark.parametrize(
    ("id", "frame", "notebook", "message"),
    [
        ("S9", GAIN, None, "Unknown claim 'S9': choose one of L1, L2"),
        ("S3", GAIN.drop(columns="seed"), None, "lack the column 'seed': give setting, seed, effect"),
        ("S3", pd.concat([GAIN, GAIN]), None, "3 effects occur twice"),
        ("S3", effects(w3=[1.0, float("nan")]), None, "The effect in setting 'w3' is not a finite number"),
        ("Q8", GAIN, None, f"Q8 is judged in {FIRST}, {SECOND}: say which"),
        ("Q8", GAIN, "05", f"Unknown notebook of Q8 '05': choose one of {FIRST}, {SECOND}"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed_and_writes_nothing(results, id, frame, notebook, message):
    with pytest.raises(KureError, match=message):
        verdicts.judge(id, frame, notebook=notebook)
    assert not results.exists()


def test_an_unknown_kind_is_named():
    with pytest.raises(KureError, match="Unknown kind 'less': choose one of more, same, exact"):
        verdicts.decide(GAIN, "less", 1.0)


def test_the_effects_of_several_notebooks_are_decided_together(results):
    verdicts.judge("Q8", NONE.replace("w3", "tuned"), "Second.", SECOND)
    assert kept(results, "Q8")["outcome"] == "no"
    verdicts.judge("Q8", GAIN, "First.", FIRST)
    verdict = kept(results, "Q8")
    assert "Of 2 settings supported 1, refuted 1, undecided 0." in verdict["evidence"]
    together = verdicts.decide(pd.concat([GAIN, NONE.replace("w3", "tuned")]), "more", 1.0)
    assert all(f"± {half:.1f} points" in verdict["decided_by"] for half in together.half)
    assert verdict["outcome"] == "mixed" and verdict["evidence"].endswith("First. Second.")
    assert verdict["notebook"] == f"{FIRST}, {SECOND}"
    verdicts.judge("Q8", NONE, "Anew.", FIRST)  # replaces its own part alone
    assert kept(results, "Q8")["outcome"] == "no" and kept(results, "Q8")["evidence"].endswith("Anew. Second.")


def test_check_mode_detects_a_changed_verdict(results, monkeypatch):
    verdicts.judge("S3", GAIN, "Gap 1.")
    before = kept(results, "S3")
    monkeypatch.setenv("KURE_CHECK", "1")
    verdicts.judge("S3", GAIN, "Gap 1.")
    for frame, remark, changed in ((NONE, "Gap 1.", "outcome"), (GAIN, "Gap 2.", "evidence")):
        with pytest.raises(KureError, match=rf"S3\.json differs .* column {changed}"):
            verdicts.judge("S3", frame, remark)
    assert kept(results, "S3") == before
    with pytest.raises(KureError, match=r"W1\.json is missing"):
        verdicts.judge("W1", GAIN)


def test_the_rounding_of_another_machine_is_no_change(results, monkeypatch):
    verdicts.judge("L2", pd.DataFrame({"setting": ["M = 4"], "effect": [3e-16]}))
    monkeypatch.setenv("KURE_CHECK", "1")
    verdicts.judge("L2", pd.DataFrame({"setting": ["M = 4"], "effect": [7e-16]}))


def test_a_damaged_verdict_is_named(results):
    verdicts.judge("S3", GAIN)
    (results / "verdicts/S3.json").write_text("{")
    with pytest.raises(KureError, match=r"S3\.json is damaged"):
        verdicts.scoreboard()


# The boards


def test_the_scoreboard_has_every_claim_and_its_verdict():
    verdicts.judge("S3", GAIN)
    board = verdicts.scoreboard().set_index("id")
    assert list(board.index) == list(verdicts.claims())
    assert board.loc["S3", ["outcome", "decided_by"]].tolist() == ["holds", "+2.2 ± 0.5 points (w3)"]
    assert (board.drop("S3").outcome == "not tested").all()
    assert board.loc["Q8", "notebook"] == f"{FIRST}, {SECOND}"


def test_two_boards_count_and_link_existing_notebooks_only(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    (tmp_path / f"{FIRST}.ipynb").touch()
    verdicts.judge("Q8", GAIN, "a|b 1.", notebook=FIRST)
    text = verdicts.scoreboard_markdown()
    assert text.startswith(
        "17 claims of the paper (profile `trial`): holds 0, mixed 0, undecided 0, fails 0, not tested"
    )
    questions = len(OURS + QUESTIONS)
    totals = f"yes 1, mixed 0, undecided 0, no 0, not tested {questions - 1}"
    assert f"{questions} questions of its readers (profile `trial`): {totals}." in text
    (row,) = [line for line in text.splitlines() if line.startswith("| Q8 ")]
    assert "<summary>+2.2 ± 0.5 points (w3)</summary>Of 1 settings" in row and r"a\|b 1.</details>" in row
    assert row.endswith(f"| [04](notebooks/{FIRST}.ipynb) 09 |")
    assert f"[04]({FIRST}.ipynb)" in verdicts.scoreboard_markdown(folder="")


def test_a_folded_board_shows_its_totals_and_hides_its_rows():
    verdicts.judge("S3", GAIN, "why")
    front, whole = verdicts.scoreboard_markdown(folded=True), verdicts.scoreboard_markdown()
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(front)
    boards = re.findall(r"<details>\n<summary>([^<]*)</summary>\n(<table>.*?</table>)\n</details>", page, re.DOTALL)
    totals = [line.replace("`", "") for line in whole.splitlines() if line.endswith(".") and not line.startswith("|")]
    assert [summary for summary, _ in boards] == totals and len(totals) == 2
    assert [table.count("<tr>") - 1 for _, table in boards] == [len(PAPER_CLAIMS), len(OURS + QUESTIONS)]
    assert re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL).strip() == ""
    assert "2.2" not in front and "<strong>holds</strong>" in boards[0][1]


SOUND = {"outcome": "holds", "decided_by": "", "evidence": "", "parts": {}}
DAMAGED = [[], None, 3, {}, SOUND | {"outcome": "proved"}, SOUND | {"evidence": 3}, SOUND | {"outcome": ["holds"]},
           SOUND | {"parts": {"a": 1}}]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=str)
def test_a_file_that_holds_no_verdict_is_named(content, results):
    file = results / "verdicts" / "S1.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(SOUND))
    assert verdicts.scoreboard().set_index("id").outcome["S1"] == "holds"
    file.write_text(json.dumps(content))
    with pytest.raises(KureError, match=rf"{file} is damaged .*: delete it and run its notebook again"):
        verdicts.scoreboard()
