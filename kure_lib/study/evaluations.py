"""Every accuracy that a profile has measured, as one tidy table beside its records, and what its columns mean."""

from typing import Any

import pandas as pd

from kure_lib.files import write_atomically
from kure_lib.paths import results
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import plans, records

#: The data dictionary. A cell is empty where the column does not apply.
COLUMNS = {
    "record": "Key of the run: the end of the name of its record in `records/`.",
    "model": "Network.",
    "data": "Data set that it was trained and tested on.",
    "part": "Question of the study that the run was trained for; `main` holds the three main arms.",
    "arm": "Training arm: `pretrained`, `control`, `kure` (K_T = 1.8 and λ = 1 in the part `main`) or a rival.",
    "seed": "Seed of the training.",
    "epochs": "Epochs of this stage of the training.",
    "learning_rate": "Its highest learning rate.",
    "weight_decay": "Its weight decay.",
    "target": "Target K_T of the KURE term.",
    "coefficient": "Coefficient λ of the KURE term.",
    "strength": "Strength of the rival regularizer.",
    "trained_with": "Quantizer of quantization-aware training and its bits of weights / activations.",
    "tested_on": "Images of the accuracy: `test`, or `held out` of training to choose settings by.",
    "weight_bits": "Bits of the weights; empty in full precision.",
    "activation_bits": "Bits of the activations; empty in full precision.",
    "layers": "Names of the layers whose weights were quantized; empty for all but the first and the last.",
    "step_rule": "Rule that chose the steps: `mse`, `lapq`, those of formats, or the trained `dorefa` and `lsq`.",
    "grid": "Grid or number format of the weights.",
    "scope": "Which weights share a step.",
    "step_ratio": "Factor Δ/Δ̃ on every weight step.",
    "activation_ratio": "Factor on every activation step.",
    "power_of_two": "Whether every step was rounded to a power of two.",
    "bias_correction": "Whether each output channel kept its mean and variance.",
    "fold_batch_norm": "Whether batch norms were folded into the convolutions first.",
    "reestimate_batch_norm": "Whether batch-norm statistics were taken anew from the quantized network, or which.",
    "calibration": "Number of training images that steps or statistics were learned from.",
    "search": "Number of evaluations of the loss that the search by `lapq` could use.",
    "rounding": "How weights lost bits when they were made from an 8-bit copy.",
    "reconstruction": "How weights were rounded by layers' outputs, not to the nearest level: `gptq`, `adaround`.",
    "iterations": "Number of steps in which `adaround` learned to round a layer.",
    "perturbation": "What a device did to the weights beside: `steps` off by layer, `flips` of bits, `stochastic`.",
    "draw": "Which random numbers the perturbation took.",
    "equalized": "Whether the ranges of successive convolutions were equalized after folding.",
    "accumulator_bits": "Bits of the accumulators in which sums wrapped around; empty where they were wide enough.",
    "transform": "How the inputs of linear layers were changed before, at no loss: `smoothed` or `rotated`.",
    "refit": "Whether a network of quantization-aware training took steps of least squared error.",
    "top1": "Top-1 accuracy, percent.",
    "loss": "Mean cross-entropy, nats.",
    "precision": "Arithmetic of the evaluation, where it is on record.",
}


def table(profile: str) -> pd.DataFrame:
    """One row an evaluation on record, runs in the order of the plan; the columns are those of `COLUMNS`."""
    rows: list[dict[str, Any]] = []
    for run in plans.open(profile).runs:
        if record := records.find(run.config):
            config = run.config
            about = config.model_dump() | {
                "record": config.key, "part": run.part, "arm": run.arm, "target": run.target,
                "coefficient": run.coefficient, "strength": config.rival.strength if config.rival else None,
                "trained_with": run.quantizer, "tested_on": "held out" if config.held_out else "test",
            }  # fmt: skip
            for key, evaluation in sorted(record.evaluations.items()):
                spec = QuantizationSpec.named(key)
                named = {"grid": spec.grid.name, "scope": str(spec.scope)}
                named |= {"layers": " ".join(spec.layers)} if spec.layers else {}
                rows.append(about | dict(spec) | named | evaluation._asdict())
    numbers = "weight_bits", "activation_bits", "calibration", "search", "iterations", "draw", "accumulator_bits"
    whole = dict.fromkeys(numbers, "Int64")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(whole)


def write(profile: str) -> pd.DataFrame:
    """Write the table to `evaluations.csv` of the profile, and `COLUMNS` beside it; nothing where nothing is on record.

    Returns the table.
    """
    found = table(profile)
    if len(found):
        file = results() / "evaluations.csv"
        write_atomically(file, found.to_csv(index=False, float_format="%.9g", lineterminator="\n"))
        columns = pd.Series(COLUMNS, name="meaning").rename_axis("column").reset_index().to_markdown(index=False)
        lines = ["# Every accuracy on record", "", "One row of `evaluations.csv` is one accuracy.", "", columns, ""]
        write_atomically(file.with_suffix(".md"), "\n".join(lines))
    return found
