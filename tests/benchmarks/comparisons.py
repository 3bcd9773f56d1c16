"""What is measured: each comparison's own side, its rivals, and the ratio that is wanted against each of them."""

from dataclasses import dataclass
from functools import cache

import ours
import rivals
from measuring import THREADS, Prepare, Side

from kure_lib.networks import device

BFLOAT16 = device.precision() == "bfloat16"
TIMED = 20  # of the steps that a rival tries
TWO_RUNS = "training {}, batch 256: two runs at once, 1 thread each, together"
USUAL = "usual script: float32, `DataLoader` with 2 workers, one run with all threads"
EXPERT = "expert's script, two runs at once, 1 thread each"
LABELS = {"resnet20": "ResNet-20", "mobilenet_v2_050": "MobileNet-V2 0.5",
          "resnet18": "ResNet-18 at 64 × 64", "mobilenet_v2": "MobileNet-V2 at 64 × 64"}  # fmt: skip


@dataclass(frozen=True)
class Rival:
    """What ours is held against, and what is wanted: at least `faster` times, or at most `within` times its time."""

    words: str
    side: Side
    faster: float | None = None
    within: float | None = None

    @property
    def target(self) -> str:
        if self.faster is None and self.within is None:
            return "–"
        return f"≥ {self.faster:g} × faster" if self.faster else f"≤ {self.within:g} × the time"


@dataclass(frozen=True)
class Comparison:
    """A path of the library; `unit` is how both sides are shown, and `flops` the products of one unit of amount."""

    path: str
    unit: str
    ours: Side
    rivals: tuple[Rival, ...]
    rounds: int = 1
    flops: float = 0


def _training(name: str, steps: int, rounds: int, usual: float, expert: float) -> Comparison:
    images = steps * ours.BATCH
    usually = Side(rivals.usual_training, (name, steps), THREADS, amount=images)
    expertly = Side(rivals.expert_training, (name, steps), processes=2, amount=2 * images)
    return Comparison(
        TWO_RUNS.format(LABELS[name]), "images/s", Side(ours.training, (name, steps), processes=2, amount=2 * images),
        (Rival(USUAL, usually, faster=usual), Rival(EXPERT, expertly, faster=expert)),
        rounds, flops=ours.flops(name, backward=True),
    )  # fmt: skip


def _searching(prepare: Prepare) -> Side:
    return Side(prepare, (TIMED,), amount=TIMED / rivals.POINTS)


@cache
def comparisons() -> dict[str, Comparison]:
    """All by name, in the order of the table."""
    by_formula = "autograd of `(((w - w.mean()) / w.std()) ** 4).mean()`, 1 thread"
    tried = f"{rivals.POINTS} steps tried by quantizing, 1 thread; {TIMED} timed"
    term = "KURE term of ResNet-18 (19 layers, 11.2 M weights), forward and backward, 1 thread"
    spec, ratios, resnets, mobilenets = ours.SPEC, (0.9, 1.1), 4 if BFLOAT16 else 1, 3
    losses = spec.search + 6
    return {
        "kure": Comparison(
            term, "ms", Side(ours.kure_term, (False,)),
            (Rival(by_formula, Side(rivals.kure_term, (False,)), faster=6),
             Rival("1.5 copies of the weights: two reads, one write", Side(ours.copies, amount=1 / 1.5), within=3)),
            rounds=25,
        ),
        "kure_per_channel": Comparison(
            term.replace(" (", ", per channel (", 1), "ms", Side(ours.kure_term, (True,)),
            (Rival(by_formula.replace("1 thread", "by channel, 1 thread"), Side(rivals.kure_term, (True,)), faster=6),),
            rounds=10,
        ),
        "kure_step": Comparison(
            "ResNet-20 training step with KURE, batch 256, 1 thread", "ms",
            Side(ours.training_with_kure, ("resnet20", 2), amount=2),
            (Rival("the step without it", Side(ours.training, ("resnet20", 2), amount=2), within=1.02),),
            rounds=12,
        ),
        "mse_step": Comparison(
            "MSE-optimal steps of 2.4 M weights, 2, 3, 4, 5, 6 and 8 bits, 1 thread", "ms",
            Side(ours.steps_at_six_bits), (Rival(tried, _searching(rivals.steps_at_six_bits), faster=50),),
        ),
        "network_steps": Comparison(
            "MSE-optimal steps of the 19 layers of ResNet-18, 4 bits, 1 thread", "ms",
            Side(ours.steps_of_a_network), (Rival(tried, _searching(rivals.steps_of_a_network)),),
        ),
        "channel_steps": Comparison(
            "MSE-optimal steps of 512 channels of 4,608 weights, 4 bits, 1 thread", "ms",
            Side(ours.steps_by_channel),
            (Rival(tried.replace("by quantizing", "for all channels at once"),
                   _searching(rivals.steps_by_channel)),),
        ),
        "resnet20": _training("resnet20", 8, 2, resnets, 1.15),
        "mobilenet_v2_050": _training("mobilenet_v2_050", 8, 2, mobilenets, 4),
        "resnet18": _training("resnet18", 2, 1, resnets, 1.15),
        "mobilenet_v2": _training("mobilenet_v2", 2, 1, mobilenets, 4),
        "variants": Comparison(
            "accuracy of a quantized ResNet-20, 10,000 images, all threads", "s",
            Side(ours.variants, (ratios,), THREADS, amount=len(ratios)),
            (Rival("usual script: float32, a copy for each, steps given, `DataLoader` with 2 workers",
                   Side(rivals.usual_variants, (1,), THREADS), faster=5),
             Rival("expert's script: steps given, images normalized in memory",
                   Side(rivals.expert_variants, (2,), THREADS, amount=2), faster=2)),
            flops=10_000 * ours.flops("resnet20", backward=False),
        ),
        "lapq": Comparison(
            f"LAPQ of ResNet-20 at {spec.bits}, {ours.BATCH} images, {losses} losses, 1 thread", "s",
            Side(ours.loss_aware_steps),
            (Rival("Powell's method, the whole network for every loss",
                   Side(rivals.loss_aware_steps, (losses, *spec.bits.widths)), faster=5),),
        ),
    }  # fmt: skip
