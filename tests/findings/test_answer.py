"""The sentences of the front page hold the numbers of verdicts and figures, and are refused when these change."""

import json
import shutil

import pandas as pd
import pytest

from kure_lib.findings import answer, verdicts
from kure_lib.paths import ROOT, KureError

STUDY = ROOT / "results" / "study"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the committed verdicts and of the figure's data, as the ambient results."""
    for name in ("verdicts", "figures", "tables"):
        shutil.copytree(STUDY / name, tmp_path / "study" / name, ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.delenv("KURE_CHECK", raising=False)
    return tmp_path / "study"


def test_the_numbers_are_those_of_the_results(copied):
    lines = answer.markdown().splitlines()
    gains = pd.read_csv(copied / "figures" / "gain_by_pipeline.csv")
    plain = gains.query("model == 'resnet20' and setting == '2/FP' and steps == 'plain'").gain
    assert len(lines) == 10 and f"gains {plain.sum() / len(plain):.1f} points with plain" in lines[1]
    rows = json.loads((copied / "verdicts" / "P4.json").read_text("utf-8"))["parts"]["22_longer_training"]["effects"]
    for steps, before in {"LAPQ": ", ", "practice": " and "}.items():
        longer = [row["effect"] for row in rows if row["setting"] == f"{steps}, w2"]
        assert f"{before}{sum(longer) / len(longer):.1f}" in lines[1].partition("for 60 epochs")[2]
    rows = json.loads((copied / "verdicts" / "S2.json").read_text("utf-8"))["parts"]["06_step_size_robustness"][
        "effects"
    ]
    costs = [row["effect"] for row in rows if row["setting"] == "dorefa 4/4, 2 % off costs the control"]
    assert f"control {sum(costs) / len(costs):.1f} points" in lines[4]
    everything = pd.read_csv(STUDY / "evaluations.csv", low_memory=False)
    changed = ["power_of_two", "bias_correction", "fold_batch_norm", "equalized", "refit"]
    weights = everything[
        (everything.model == "resnet20") & (everything.part == "main") & (everything.step_rule == "mse")
        & ~everything[changed].any(axis=1) & (everything.reestimate_batch_norm.astype(str) == "False")
        & everything[["activation_bits", "rounding", "reconstruction", "perturbation"]].isna().all(axis=1)
    ].set_index(["arm", "seed"])  # fmt: skip
    deployed = weights[weights.step_ratio.isin([0.8, 0.9, 1, 1.1, 1.2, 1.3]) & weights.weight_bits.between(2, 8)]
    deployed = deployed[deployed.layers.isna()]
    deployed = deployed[~deployed.scope.str.startswith("block") & ~deployed.grid.str.contains("fp|nf|pot")]
    served = (deployed.top1 - weights.top1[weights.weight_bits.isna()]).round(2) >= -1
    assert len(served.loc["kure"]) == 10 * 252
    shares = 100 * served.groupby("arm").mean()
    assert f"serves {shares.kure:.0f} % of the deployments tried" in lines[2]
    assert f"full precision, and {shares.control:.0f} % without KURE" in lines[2]
    tested = everything.query(
        "trained_with == 'dorefa 4/4' and arm == 'control' and activation_bits == 4 and step_ratio == 1 and not refit"
    )
    renewed = tested.reestimate_batch_norm.astype(str) == "True"
    means = [tested[renewed & (tested.weight_bits == 2)].top1.mean()]
    means += [tested[~renewed & (tested.weight_bits == bits)].top1.mean() for bits in (4, 2)]
    assert f"2 bits cost it {means[1] - means[2]:.0f}, and {means[1] - means[0]:.0f} with new" in lines[4]
    apart = pd.read_csv(copied / "figures" / "16_taken_apart.csv").query("arm == 'control'")
    wide = apart.pivot(index=["model", "w_bits", "seed", "full"], columns="norms", values="top1").reset_index()
    back = 100 * (wide["both new"] - wide["as trained"]) / (wide.full - wide["as trained"])
    lost = (wide.full - wide["as trained"]).groupby([wide.model, wide.w_bits]).mean()
    means = back.groupby([wide.model, wide.w_bits]).mean()[lost >= 2]
    assert f"give back {means.min():.0f} to {means.max():.0f} % of the loss" in lines[5]
    controls = everything[(everything.part == "main") & (everything.arm == "control")]
    plainly = controls[
        (controls.step_rule == "mse") & (controls.scope == "per tensor") & (controls.grid == "mid_rise")
        & (controls.step_ratio == 1) & ~controls[changed].any(axis=1)
        & (controls.reestimate_batch_norm.astype(str) == "False")
        & controls[["activation_bits", "layers", "rounding", "reconstruction", "perturbation"]].isna().all(axis=1)
    ]  # fmt: skip
    learned = controls[(controls.reconstruction == "adaround") & (controls.weight_bits == 2)]
    full, nearest, learned = (
        rows.groupby("model").top1.mean()
        for rows in (plainly[plainly.weight_bits.isna()], plainly[plainly.weight_bits == 2], learned)
    )
    share = 100 * (learned - nearest) / (full - nearest)
    assert f"back {share.resnet20:.0f} and {share.mobilenet_v2_050:.0f} % of what nearest" in lines[6]
    rounded = everything[(everything.part == "main") & (everything.reconstruction == "adaround")]
    tops = rounded.pivot(index=["model", "weight_bits", "seed"], columns="arm", values="top1")
    added = (tops.kure - tops.control).groupby(["model", "weight_bits"]).mean()
    assert len(added) == 2 * 3 and f"KURE adds {added.max():.1f} points on average at most" in lines[6]
    tried = pd.read_csv(copied / "figures" / "fig_3c_targets.csv").query("w_bits == 2 and arm == 'kure'")
    ours = tried.groupby(tried.series.astype(float)).top1.mean()
    ahead = (ours[1.8] - ours)[ours.index > 1.8]
    assert f"the paper's, 1.8, is {ahead.min():.0f} to {ahead.max():.0f} points better than higher ones" in lines[0]
    careful = pd.read_csv(STUDY / "tables" / "target_pipelines.csv").query("pipeline == 'practice' and w_bits == 2")
    ahead = careful[careful.against.isin(["2.4", "3", "4", "6"])].groupby("against").points.mean()
    assert f"in today's practice it is {ahead.min():.1f} to {ahead.max():.1f} better" in lines[0]
    spared = pd.read_csv(copied / "figures" / "20_spared.csv").query(
        "error == 'sums in 10 bits' and pipeline == 'plain'"
    )
    assert f"KURE loses {-spared.gain.sum() / len(spared):.0f} points more than its control" in lines[7]
    natural = pd.read_csv(copied / "figures" / "17_pipelines.csv").query("pipeline == 'plain' and arm != 'pretrained'")
    arms = natural.pivot(index=["w_bits", "seed"], columns="arm", values="top1")
    gains = (arms.kure - arms.control).groupby("w_bits").mean()
    assert f"gains {gains.min():.1f} to {gains.max():.1f} points with plain steps" in lines[8]
    vit = pd.read_csv(copied / "figures" / "transformer_gain.csv").query("case == 'plain' and setting == '2/FP'")
    lost = pd.read_csv(copied / "figures" / "transformer_activations.csv")
    lost = lost.query("case == 'plain' and setting == '2/FP' and arm == 'control'").lost
    assert f"{lost.sum() / len(lost):.1f} points, of which KURE saves {vit.gain.sum() / len(vit):.1f}" in lines[9]


def test_a_sentence_about_another_verdict_is_refused(copied):
    file = copied / "verdicts" / "K1.json"
    file.write_text(file.read_text("utf-8").replace('"outcome": "holds"', '"outcome": "mixed"'), "utf-8")
    with pytest.raises(KureError, match="supposes that K1 ends in 'holds', and it ends in 'mixed'"):
        answer.markdown()


def test_a_readme_changes_between_its_markers_only(copied, monkeypatch):
    readme = copied / "README.md"
    frame = "# Title\n\n{0[0]}\n{1}\n{0[1]}\n\nBetween.\n\n{2[0]}\n{3}\n{2[1]}\n\nEnd.\n".format
    readme.write_text(frame(answer.FINDINGS, "old", answer.BOARD, "old"), "utf-8")
    answer.update_readme(readme)
    board = verdicts.scoreboard_markdown(folded=True)
    wanted = frame(answer.FINDINGS, answer.markdown(), answer.BOARD, board)
    assert readme.read_text("utf-8") == wanted
    monkeypatch.setenv("KURE_CHECK", "1")
    answer.update_readme(readme)
    readme.write_text(wanted.replace("**holds**", "**fails**", 1), "utf-8")
    with pytest.raises(KureError, match=r"README\.md differs"):
        answer.update_readme(readme)


@pytest.mark.parametrize("lacking", [answer.FINDINGS[1], answer.BOARD[0]])
def test_a_readme_without_markers_is_refused(lacking, copied):
    readme = copied / "README.md"
    readme.write_text("\n".join(mark for mark in (*answer.FINDINGS, *answer.BOARD) if mark != lacking), "utf-8")
    with pytest.raises(KureError, match="lacks the lines"):
        answer.update_readme(readme)
