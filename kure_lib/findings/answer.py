"""What was found, in a few sentences for a front page: numbers are computed, and a sentence supposes its verdicts."""

import re
from pathlib import Path

import pandas as pd

from kure_lib import files, paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError

FINDINGS = "<!-- findings -->", "<!-- /findings -->"
BOARD = "<!-- scoreboard -->", "<!-- /scoreboard -->"


def markdown() -> str:
    """These sentences under the ambient profile, as a Markdown list with links to the notebooks in `notebooks/`.

    Raises `KureError` naming the claim if a verdict is not the one that a sentence supposes.
    """
    board = verdicts.scoreboard().set_index("id")

    def suppose(**outcomes: str) -> None:
        for id, supposed in outcomes.items():
            if board.outcome[id] != supposed:
                raise KureError(f"A sentence in {__name__} supposes that {id} ends in {supposed!r}, and it ends in "
                                f"{board.outcome[id]!r}: write the sentence anew.")  # fmt: skip

    def link(id: str) -> str:
        stem = board.notebook[id].partition(", ")[0]
        return f"([{id}](notebooks/{stem}.ipynb))"

    suppose(
        K1="holds", K3="mixed", P8="mixed", W1="mixed", P2="mixed", P4="mixed", P3="undecided", Q6="yes", K2="mixed",
        S2="fails", P6="no", M1="yes", G2="no", D5="no", N1="yes", N3="yes", A1="mixed", A2="no",
    )  # fmt: skip

    def ahead_of_higher(id: str, setting: str) -> pd.Series:
        gains = verdicts.means(id)
        found = [re.fullmatch(setting, str(name)) for name in gains.index]
        return gains[[match is not None and float(match[1]) > 1.8 for match in found]]

    missed = verdicts.means("K1").abs().max()
    plain, practice = ahead_of_higher("K3", r"K_T = (\S+) at w2"), ahead_of_higher("P8", r"practice, K_T = (\S+), w2")
    gains = pd.read_csv(paths.results() / "figures" / "gain_by_pipeline.csv")
    two_bits = gains[(gains.model == "resnet20") & (gains.setting == "2/FP")].groupby("steps").gain.mean()
    lengths = pd.read_csv(paths.results() / "figures" / "longer_training.csv").query("w_bits == 2")
    longer = lengths[lengths.epochs == lengths.epochs.max()].groupby("pipeline").saved.mean()
    served = pd.read_csv(paths.results() / "tables" / "one_model_share.csv").query("w_bits == 'all'")
    share = served[served.model == "resnet20"].groupby("arm").served.mean()
    robust = 50 + verdicts.means("K2")
    lost = verdicts.means("S2")
    renewed = pd.read_csv(paths.results() / "figures" / "qat_renewed.csv")
    asked = renewed.query("quantizer == 'dorefa 4/4' and arm == 'control' and tested == '2 bits'")
    at_two = asked.groupby("way").lost.mean()
    back = 50 + verdicts.means("M1")
    controls = pd.read_csv(paths.results() / "tables" / "18_accuracy.csv").query("arm == 'control'")
    best = controls[controls.pipeline == "not quantized"].groupby("model").top1.mean()
    rounded = controls[controls.w_bits == 2].groupby(["pipeline", "model"]).top1.mean()
    nearest, learned = best - rounded["plain"], rounded["adaround"] - rounded["plain"]
    returned = 100 * learned / nearest
    natural, natural_back = verdicts.means("N1"), 50 + verdicts.means("N3")
    sums = verdicts.means("D5")
    vit = pd.read_csv(paths.results() / "figures" / "transformer_activations.csv").query("case == 'plain'")
    at_stake = vit[(vit.arm == "control") & (vit.setting == "2/FP")].lost.mean()
    spared = verdicts.means("A1")["plain, 2/FP"]
    lines = [
        f"**The penalty works.** Mean kurtosis ends within {missed:.2f} of every target {link('K1')}. At 2 bits the "
        f"paper's, 1.8, is {plain.min():.0f} to {plain.max():.0f} points better than higher ones with plain steps, and "
        f"no lower one is shown to be worse {link('K3')}; in today's practice it is {practice.min():.1f} to "
        f"{practice.max():.1f} better {link('P8')}.",
        f"**The gain depends on the pipeline.** A ResNet-20 at 2 bits gains {two_bits['plain']:.1f} points with plain "
        f"steps, {two_bits['lapq']:.1f} with LAPQ and {two_bits['practice']:.1f} with today's practice {link('P2')}; "
        f"pre-trained for {lengths.epochs.max():.0f} epochs, {longer['plain']:.1f}, {longer['lapq']:.1f} and "
        f"{longer['practice']:.1f} {link('P4')}, which leaves undecided whether it grows {link('P3')}.",
        f"**One model rules more, not all.** With plain steps one set of a ResNet-20's weights serves "
        f"{share['kure']:.0f} % of the deployments tried within a point of full precision, and "
        f"{share['control']:.0f} % without KURE {link('Q6')}.",
        f"**Robustness is one-sided.** At 4 bits KURE makes {robust['Δ = 1.1 Δ̃, w4']:.0f} % of the layers less "
        f"sensitive to a step 10 % too large, and {robust['Δ = 0.9 Δ̃, w4']:.0f} % to one 10 % too small {link('K2')}.",
        f"**Quantization-aware networks need no rescue here.** A step 2 % off costs the DoReFa control "
        f"{lost['dorefa 4/4, 2 % off costs the control']:.1f} points {link('S2')}; 2 bits cost it "
        f"{at_two['as trained']:.0f}, and {at_two['new statistics']:.0f} with new batch-norm statistics {link('P6')}.",
        f"**Few bits move channel statistics.** Where they cost the control 2 points or more, new batch-norm "
        f"statistics alone give back {back.min():.0f} to {back.max():.0f} % of the loss {link('M1')}.",
        f"**A better rounding does as much.** At 2 bits AdaRound gives the controls of ResNet-20 and MobileNet-V2 back "
        f"{returned['resnet20']:.0f} and {returned['mobilenet_v2_050']:.0f} % of what nearest rounding costs them, "
        f"without training; KURE adds {verdicts.means('G2').max():.1f} points on average at most {link('G2')}.",
        f"**Flat weights make larger sums.** Where 4-bit codes are summed in 10 bits that wrap around, KURE loses "
        f"{-sums['plain, ResNet-20, sums in 10 bits']:.0f} points more than its control {link('D5')}.",
        f"**Natural images agree.** The paper's ResNet-18 on Tiny ImageNet gains {natural.min():.1f} to "
        f"{natural.max():.1f} points with plain steps {link('N1')}, and new statistics alone give its control back "
        f"{natural_back.min():.0f} to {natural_back.max():.0f} % of the loss {link('N3')}.",
        f"**A transformer has little to lose.** With layer norms in place of batch norms, 2 bits and plain steps cost "
        f"a small one {at_stake:.1f} points, of which KURE saves {spared:.1f} {link('A1')}; "
        f"with a step for each channel it saves nothing worth a point {link('A2')}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def update_readme(path: Path) -> None:
    """Replace the findings and the boards of a Markdown file, which stand between markers, and nothing else in it."""
    files.fill(path, *FINDINGS, markdown())
    files.fill(path, *BOARD, verdicts.scoreboard_markdown(folded=True))
