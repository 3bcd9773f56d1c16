"""What a profile trains, and how its notebooks are executed: the design of the experiment, as data."""

from dataclasses import dataclass, field, replace
from typing import Any

DECAYS = (1, 5, 25)  # times the weight decay of the recipe
TUNING_SIZE = 25_000  # images that a contender is trained on while it is tuned
KEPT_SEEDS = {"main": 5, "activations": 3}  # fine-tuned, whose weights are committed; of all else those of seed 0 are


@dataclass(frozen=True)
class Contender:
    """An arm of the comparison with rivals: a `name` of `RivalConfig` or none, with `kure` or without.

    `strengths` were tried at the recipe's own weight decay, then `decays`, in multiples of it, at the best of them, on
    images held out of training; `strength` and `decay` are what was best there, which notebook 09 checks.
    """

    arm: str
    rival: str | None = None
    strength: float | None = None
    decay: float = 1
    strengths: tuple[float, ...] = ()
    decays: tuple[float, ...] = DECAYS
    kure: bool = False


@dataclass(frozen=True)
class Recipe:
    """How one architecture is trained: from scratch, then fine-tuned with KURE and, as long, without.

    `seeds` for the three main arms, `target_seeds` for other K_T and `coefficient_seeds` for other λ, and
    `scratch_seeds` for KURE from the first epoch on, and `activation_seeds` for fine-tuning with KURE of the
    activations in place of the weights. `quantizers` are those of quantization-aware training,
    each with its number of seeds: ("lsq 4/8", 1) is LSQ with 4 bits for weights and 8 for activations. It goes
    as `fine_tuning` does, but for what `quantized_tuning` says. `contenders` are fine-tuned with `rival_seeds`, and
    where `held_out` is not zero also tuned, on that many images held out; `schedules` are other learning rates for
    control and KURE, with `schedule_seeds`; `lengths` are other numbers of epochs of pre-training for the three main
    arms, with `length_seeds`. `part` is that of the three main arms: `main`, or `natural` for a network on natural
    images and `transformer`, which have notebooks of their own, or `group_norm` for one whose norms are no batch norms.
    """

    model: str
    pretraining: dict
    fine_tuning: dict
    part: str = "main"
    seeds: int = 1
    targets: tuple[float, ...] = ()
    target_seeds: int = 1
    coefficients: tuple[float, ...] = ()
    coefficient_seeds: int = 1
    scratch_seeds: int = 0
    activation_seeds: int = 0
    quantizers: tuple[tuple[str, int], ...] = ()
    quantized_tuning: dict = field(default_factory=dict)
    contenders: tuple[Contender, ...] = ()
    rival_seeds: int = 0
    held_out: int = 0
    schedules: tuple[dict, ...] = ()
    schedule_seeds: int = 0
    lengths: tuple[int, ...] = ()
    length_seeds: int = 0


SMALL_RESNET = Recipe(
    "resnet20",
    pretraining={"epochs": 10, "learning_rate": 0.2, "weight_decay": 5e-4},
    fine_tuning={"epochs": 4, "learning_rate": 0.04, "weight_decay": 5e-4},
)
SMALL_MOBILENET = Recipe(
    "mobilenet_v2_050",
    pretraining={"epochs": 8, "learning_rate": 0.2, "weight_decay": 1e-4},
    fine_tuning={"epochs": 5, "learning_rate": 0.05, "weight_decay": 1e-4},
)
ADAMW: dict[str, Any] = {"weight_decay": 0.05, "batch_size": 128, "optimizer": "adamw", "kept": "float16"}
SMALL_TRANSFORMER = Recipe(
    "vit_small_images",
    pretraining={"epochs": 10, "learning_rate": 1e-3, **ADAMW},
    fine_tuning={"epochs": 4, "learning_rate": 2e-4, **ADAMW},
    part="transformer",
)


def _with(recipe: Recipe, pretraining: dict | None = None, fine_tuning: dict | None = None, **changes: Any) -> Recipe:
    """The recipe with some settings of its two stages, and some fields, replaced."""
    pretraining = recipe.pretraining | (pretraining or {})
    return replace(recipe, pretraining=pretraining, fine_tuning=recipe.fine_tuning | (fine_tuning or {}), **changes)


def _imagenet(model: str, batch_size: int, epochs: int, **sweeps: Any) -> Recipe:
    """Fine-tuning of torchvision's weights as in Supp. Tables 1 and 2, with the targets of Fig. 3c."""
    shared = {"data": "imagenet", "weight_decay": 1e-4, "decay_every": 30, "batch_size": batch_size}
    return Recipe(
        model,
        pretraining={**shared, "pretrained": True, "epochs": 0, "learning_rate": 1e-3},
        fine_tuning={**shared, "epochs": epochs, "learning_rate": 1e-3},
        **sweeps,
    )


def _tiny_imagenet(model: str, **sweeps: Any) -> Recipe:
    """One of torchvision's networks, unchanged, trained from scratch on images of 64 × 64."""
    shared = {"data": "tiny_imagenet", "weight_decay": 2e-4, "kept": "float16"}
    return Recipe(
        model,
        pretraining={**shared, "epochs": 24, "learning_rate": 0.2},
        fine_tuning={**shared, "epochs": 5, "learning_rate": 0.04},
        seeds=3,
        **sweeps,
    )


#: Of these `study` has what is made, as its part `natural`. The rest needs a GPU: until it is made, with every
#: evaluation that the notebooks read, it has a profile of its own. Then `*LARGE` takes the place of `NATURAL` there.
LARGE = (
    _tiny_imagenet(
        "resnet18",
        targets=(1.4, 3.0, 4.0, 6.0),
        quantizers=(("dorefa 4/4", 3), ("lsq 4/4", 3)),
        lengths=(6, 12, 48),
        length_seeds=1,
    ),
    _tiny_imagenet("mobilenet_v2"),
)
NATURAL = _tiny_imagenet("resnet18", part="natural", lengths=(6, 12), length_seeds=1)

CONTENDERS = (
    Contender("l2", decay=25),
    Contender("gradient_l1", "gradient_l1", 1e-5, 25, strengths=(1e-5, 1e-4, 1e-3)),
    Contender("gradient_l1_own", "gradient_l1", 1e-5, decays=()),  # at the weight decay of the control
    Contender("gradient_l1_strong", "gradient_l1", 1e-3, decays=()),
    Contender("range", "range", 1.0, strengths=(0.01, 0.1, 1.0, 10.0)),
    Contender("outliers", "outliers", 1e3, strengths=(1.0, 10.0, 100.0, 1e3, 1e4)),
    Contender("entropy", "entropy", 1.0, 25, strengths=(0.1, 1.0, 10.0)),
    Contender("variation", "variation", 1e3, strengths=(1.0, 10.0, 100.0, 1e3)),
    Contender("noise", "noise", 0.1, 5, strengths=(0.05, 0.1, 0.2)),
    Contender("sam", "sam", 0.02, strengths=(0.02, 0.05, 0.2)),
    Contender("ema", "ema", 0.998, strengths=(0.95, 0.99, 0.998)),
    Contender("kure", kure=True),  # tuned as the others are; with what is best, it is the main arm
    Contender("kure_outliers", "outliers", 1e3, decays=(), kure=True),  # with the best of the others
)
ONCE_DIFFERENTIABLE = tuple(c for c in CONTENDERS if c.rival != "gradient_l1")  # what depthwise convolutions allow
SCHEDULES = (
    {"learning_rate": 0.02, "decay_every": 100},  # constant
    {"learning_rate": 0.02, "decay_every": 2},  # a tenth in the second half
)

TINY = {"train_size": 512, "test_size": 128, "epochs": 2}
#: A quick look: a quarter of the images, in batches half as large, and test images that tell 90 % to ± 2 points.
FEW = {"train_size": 16_000, "test_size": 1000, "batch_size": 128}
GROUP_NORM: dict[str, Any] = {"model": "resnet20_group_norm", "part": "group_norm"}
SWEEP: dict[str, Any] = {"targets": (1.4, 1.6, 2.4, 3.0, 4.0, 6.0), "coefficients": (0.01, 0.1, 0.3, 3.0)}

PROFILES: dict[str, tuple[Recipe, ...]] = {
    "smoke": (
        _with(SMALL_RESNET, TINY, TINY, targets=(3.0,), coefficients=(0.1,), scratch_seeds=1, activation_seeds=1,
              quantizers=(("dorefa 4/4", 1), ("lsq 4/4", 1)), contenders=CONTENDERS[::3], rival_seeds=1,
              schedules=SCHEDULES[:1], schedule_seeds=1, lengths=(4,), length_seeds=1),
        _with(SMALL_MOBILENET, TINY, TINY, coefficients=(0.1,)),
        _with(SMALL_RESNET, TINY, TINY, **GROUP_NORM),
        _with(SMALL_TRANSFORMER, TINY, TINY),
    ),
    "quick": (
        _with(SMALL_RESNET, {"epochs": 4, **FEW}, {"epochs": 3, **FEW}, targets=(3.0,), coefficients=(0.1,),
              quantizers=(("dorefa 4/4", 1),), quantized_tuning={"epochs": 1}),
        _with(SMALL_MOBILENET, {"epochs": 4, "learning_rate": 0.05, **FEW}, {"epochs": 3, **FEW}),
    ),
    "study": (
        _with(SMALL_RESNET, seeds=10, target_seeds=5, coefficient_seeds=3, scratch_seeds=1, activation_seeds=5, **SWEEP,
              contenders=CONTENDERS, rival_seeds=5, held_out=10_000, schedules=SCHEDULES, schedule_seeds=2,
              lengths=(60,), length_seeds=4,
              quantizers=(("dorefa 4/4", 5), ("lsq 4/4", 5), ("dorefa 3/3", 1), ("lsq 3/3", 1), ("dorefa 5/8", 1),
                          ("dorefa 6/6", 1), ("lsq 4/8", 1), ("lsq 6/6", 1))),
        _with(SMALL_MOBILENET, seeds=5, coefficients=SWEEP["coefficients"], lengths=(24,), length_seeds=3,
              contenders=ONCE_DIFFERENTIABLE, rival_seeds=1,
              quantizers=(("dorefa 4/8", 1), ("lsq 4/8", 1))),
        _with(SMALL_RESNET, {"learning_rate": 0.1}, seeds=3, **GROUP_NORM),  # at 0.2 its training is unstable
        NATURAL,
        _with(SMALL_TRANSFORMER, seeds=3),
    ),
    "imagenet": (
        _imagenet("resnet18", 256, 83, targets=(3.0, 4.0, 6.0), coefficients=(0.1,)),
        _imagenet("resnet50", 128, 50), _imagenet("mobilenet_v2", 256, 83),
    ),
    "large": LARGE,
}  # fmt: skip


ONLY_TRAINED = ("large",)  # profiles without notebooks

#: Parameters of notebooks, other than the profile, that a profile changes.
PARAMETERS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {
        "00": {"weight_bits": [3], "calibration_size": 32, "search": 30},
        "02": {"networks": 1, "alone": [3]},
        "05": {"calibration": 32, "search": 30},
        "06": {"points": 3, "calibration": 32, "search": 30},
        "07": {"settings": "3/FP", "calibration": 32, "search": 30, "repeats": 1},
        "09": {"points": 3, "calibration": 32, "search": 30},
        "11": {"rows": 128},
        "12": {"networks": 1, "bits": [4, 2], "ratios": [0.8, 1.0], "searched": [3], "calibration": 32, "search": 30},
        "13": {"settings": "3/FP", "calibration": 32, "search": 30},
        "14": {"networks": 1, "bits": [4, 2], "images": 500},
        "15": {"weight_bits": [3], "calibration": 32, "search": 30},
        "16": {"images": 32, "shown": 200},
        "17": {"bits_shown": [3, 2]},
        "18": {"bits_shown": [3, 2], "calibration": 32, "search": 30, "iterations": 20},
        "19": {"images": 32},
        "20": {"bits_shown": [[3]], "bits_stored": [4], "rates": [1.0e-3], "accumulators": [11], "calibration": 32},
        "21": {"bits_shown": [[3], [6]]},
        "22": {"bits_shown": [3], "calibration": 32, "search": 30},
        "23": {"bits_shown": ["3/FP", "3/8"], "calibration": 32, "search": 30},
    },
    "quick": {
        "00": {"weight_bits": [3], "calibration_size": 64, "search": 50},
        "02": {"networks": 1, "alone": [3]},
        "05": {"calibration": 64, "search": 50},
        "06": {"points": 5, "calibration": 64, "search": 50},
        "07": {"settings": "3/FP 4/4", "calibration": 64, "search": 50, "repeats": 0},
        "09": {"calibration": 64, "search": 50},
        "12": {
            "networks": 1,
            "bits": [4, 2],
            "ratios": [0.8, 1.0, 1.2],
            "searched": [3],
            "calibration": 64,
            "search": 50,
        },
        "13": {"settings": "3/FP 4/4", "calibration": 64, "search": 50},
        "14": {"networks": 1, "bits": [4, 2], "images": 2000},
        "15": {"weight_bits": [3], "calibration": 64, "search": 50},
        "18": {"bits_shown": [3, 2], "calibration": 64, "search": 50, "iterations": 50},
        "20": {"bits_shown": [[3, 2]], "rates": [1.0e-3], "calibration": 64},
    },
    "imagenet": {
        "02": {"networks": 3, "alone": [3]},
        "12": {"networks": 3},
        "14": {"networks": 3},
        "16": {"images": 8},
        "19": {"images": 8},
        "20": {
            "pipelines": [["plain"]] * 3,
            "bits_shown": [[4]] * 3,
            "bits_stored": [4],
            "rates": [1.0e-4],
            "accumulators": [14],
        },
        "21": {"bits_shown": [[4, 3], [4, 3], [8, 6, 4]]},
    },
}

#: Parts of the plan that a notebook reads; a notebook that is not named here trains nothing.
NEEDS = {
    "00": {"main"},
    "02": {"main"},
    "04": {"main", "coefficient", "scratch"},
    "05": {"main", "target", "coefficient"},
    "06": {"main", "qat"},
    "07": {"main"},
    "08": {"main", "qat"},
    "09": {"main", "target", "coefficient", "rivals", "tuning", "schedules", "scratch"},
    "10": {"main", "activations"},
    "11": {"main", "target"},
    "12": {"main"},
    "13": {"main", "qat"},
    "14": {"main"},
    "15": {"main", "target", "coefficient", "scratch"},
    "16": {"main", "group_norm"},
    "17": {"main", "natural", "lengths"},
    "18": {"main"},
    "19": {"main", "target", "coefficient", "rivals", "activations", "scratch", "schedules", "lengths", "natural"},
    "20": {"main"},
    "21": {"main"},
    "22": {"main", "lengths"},
    "23": {"transformer"},
}
