"""Published numbers, each checked against the authors' supplement or released files; one row a number.

Top-1 accuracies are in %, on ImageNet; 32 bits means not quantized; `arm` is "none" or "KURE"; `source`
names the table or figure. The tables stand as printed in `published.toml`. A number that we could not check
is not here; of one row, `TARGET_1_6`, it is said that it was not published.
"""

import tomllib
from pathlib import Path

import pandas as pd

from kure_lib.tensors.grids import Bits

TYPES = {"weight_bits": int, "bits": int, "ratios": int, "target": float, "ratio": float}


def _tidy(source: str, keys: str, over: str, at: str, rows: str, value: str = "top1") -> pd.DataFrame:
    """One row a number from a table as printed in `published.toml`."""
    names, entries = keys.split(), at.split()
    records = []
    for line in rows.strip().splitlines():
        cells = line.split()
        labels = dict(zip(names, cells, strict=False))
        for entry, number in zip(entries, cells[len(names) :], strict=True):
            if number != "–":
                records.append(labels | {over: entry, value: float(number), "source": source})
    frame = pd.DataFrame(records)
    return frame.astype({name: kind for name, kind in TYPES.items() if name in frame})


def _published(name: str) -> pd.DataFrame:
    """The table of that name; of several parts one after the other."""
    tables = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))["table"]
    parts = [
        _tidy(**{key: text for key, text in table.items() if key != "name"})
        for table in tables
        if table["name"] == name
    ]
    return pd.concat(parts, ignore_index=True)


TABLE_1 = _published("TABLE_1")
TABLE_1[["weight_bits", "activation_bits"]] = [Bits.named(setting).widths for setting in TABLE_1.setting]
FIG_3C = _published("FIG_3C")
QAT_BITS = _published("QAT_BITS")
QAT_BITS["trained_bits"] = QAT_BITS.trained_at.str.extract(r"W(\d)").astype(int)
SUPP_TABLE_5 = _published("SUPP_TABLE_5")
STEP_SIZE_POINTS = _published("STEP_SIZE_POINTS")
STEP_SIZE_FILES = _published("STEP_SIZE_FILES")
MAX_1960 = _published("MAX_1960")

# An earlier, unpublished row for K_T = 1.6 has six values where the axis of its plot has five bit-widths.
# Which value is spare is not known, so the values keep their order and get no bit-widths.
TARGET_1_6 = pd.DataFrame(
    {
        "position": range(1, 7),
        "target": 1.6,
        "top1": [56.9, 67.4, 68.3, 69.6, 69.8, 69.8],
        "source": "authors' earlier notebook",
    }
)
TARGET_1_6_AXIS = (3, 4, 5, 6, 32)

# Divisors of the mean over layers of KURE, written in the authors' code by the name of the architecture.
DIVISORS = pd.DataFrame(
    {"model": ["resnet18", "resnet50", "mobilenet_v2"], "divisor": [19, 52, 51], "source": "authors' code"}
)

# Run-to-run spread of DoReFa + KURE.
SUPP_TABLE_6 = pd.DataFrame(
    [("DoReFa", "KURE", "4/4", 3, 68.4, 0.09, "Supp. Table 6")],
    columns=["quantizer", "arm", "setting", "runs", "top1", "spread", "source"],
)

# Fine-tuning from torchvision's weights; K_T = 1.8 and λ = 1 in every row, settings not listed are those of
# pre-training. The rate of the last row is not listed on its own.
HYPER_PARAMETERS = pd.DataFrame(
    [
        ("PTQ", "ResNet-18", "", "", 1e-3, 256, "83", "÷10 every 30 epochs"),
        ("PTQ", "ResNet-50", "", "", 1e-3, 128, "49–50", "÷10 every 30 epochs"),
        ("PTQ", "MobileNet-V2", "", "", 1e-3, 256, "83", "÷10 every 30 epochs"),
        ("QAT, step size", "ResNet-18", "DoReFa", "4/4", 1e-4, 256, "80", "÷10 every 30 epochs"),
        ("QAT, step size", "MobileNet-V2", "DoReFa", "4/8", 5e-5, 128, "10", "×0.98 every epoch"),
        ("QAT, bit-width", "ResNet-18", "LSQ", "6/6", 1e-3, 128, "60", "÷10 every 20 epochs"),
        ("QAT, bit-width", "ResNet-18", "LSQ", "4/4", 1e-3, 128, "60", "÷10 every 20 epochs"),
        ("QAT, bit-width", "ResNet-50", "LSQ", "6/8", float("nan"), 64, "50", "÷10 every 20 epochs"),
    ],
    columns=["experiment", "model", "quantizer", "setting", "learning_rate", "batch_size", "epochs", "schedule"],
).assign(target=1.8, coefficient=1.0, source="Supp. Tables 1–4")
