"""Published numbers, each checked against the authors' supplement or released files; one row a number.

Top-1 accuracies are in %, on ImageNet; 32 bits means not quantized; `arm` is "none" or "KURE"; `source`
names the table or figure. A number that was not published, or that we could not check, is not here.
"""

import pandas as pd

from kure_lib.tensors.grids import Bits


def _tidy(source: str, keys: str, over: str, at: str, rows: str, value: str = "top1") -> pd.DataFrame:
    """One row a number from a table as printed: a line holds its keys, then a number for each entry of `at`.

    The column `over` gets the entries of `at`; "–" is a number that was not published.
    """
    names, entries = keys.split(), at.split()
    records = []
    for line in rows.strip().splitlines():
        cells = line.split()
        labels = dict(zip(names, cells, strict=False))
        for entry, number in zip(entries, cells[len(names) :], strict=True):
            if number != "–":
                records.append(labels | {over: entry, value: float(number), "source": source})
    return pd.DataFrame(records)


# Post-training quantization by LAPQ.
TABLE_1 = _tidy(
    "Table 1",
    keys="model arm",
    over="setting",
    at="FP 4/FP 3/FP 2/FP 6/6 5/5 4/4 3/3",
    rows="""
        ResNet-50     none  76.1 71.8 62.9 10.3 74.8 72.9 70.0 38.4
        ResNet-50     KURE  76.3 75.6 73.6 64.2 76.2 75.8 74.3 66.5
        ResNet-18     none  69.7 62.6 52.4  0.5 68.6 65.4 59.8 44.3
        ResNet-18     KURE  70.3 68.3 62.6 40.2 70.0 69.7 66.9 57.3
        MobileNet-V2  none  71.8 60.4 31.8   –  69.7 64.6 48.1  3.7
        MobileNet-V2  KURE  71.4 67.6 56.6   –  70.0 66.9 59.0 24.4
    """,
)
TABLE_1[["weight_bits", "activation_bits"]] = [Bits.named(setting).widths for setting in TABLE_1.setting]

# ResNet-18, post-training; the target of the pre-trained network is missing (nan).
FIG_3C = _tidy(
    "Fig. 3c",
    keys="arm target",
    over="weight_bits",
    at="2 3 4 5 8 32",
    rows="""
        KURE  1.8  40.2 62.6 68.1 69.8 70.2 70.3
        KURE  3.0  20.9 61.1 68.2 69.4 70.6 70.6
        KURE  4.0   7.5 58.8 66.3 69.3 70.6 70.7
        KURE  6.0   4.1 52.0 65.6 68.8 70.7 70.8
        none  nan   0   44.3 61.9 65.4 69.6 69.7
    """,
).astype({"target": float, "weight_bits": int})

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

# Quantization-aware training at `trained_at`, evaluated at other weight bits. The series of MobileNet-V2
# is bias-corrected and does not state its activation bits.
QAT_BITS = pd.concat(
    [
        _tidy(source, keys="model quantizer trained_at arm", over="weight_bits", at=at, rows=rows).astype(
            {"weight_bits": int}
        )
        for source, at, rows in (
            (
                "Fig. 5",
                "3 4 5 6 8 32",
                """
            ResNet-18     LSQ     W4A4  none  44.1 68.4 66.3 66.3 66.4 30.1
            ResNet-18     LSQ     W4A4  KURE  60.8 68.2 66.5 66.8 67.0 67.1
            ResNet-18     DoReFa  W4A4  none   4.8 68.7 59.5 56.8 57.2 56.8
            ResNet-18     DoReFa  W4A4  KURE  51.9 68.5 66.4 65.8 66.1 66.2
            MobileNet-V2  DoReFa  W4    none   2.3 66.8 53.4 51.5 50.9 50.7
            MobileNet-V2  DoReFa  W4    KURE  17.0 66.9 63.0 63.2 63.1 63.3
        """,
            ),
            (
                "Supp. Fig. 1",
                "2 3 4 5 6 8 32",
                """
            ResNet-18     DoReFa  W6A6  none   0.1  0.3 47.3 68.7 70.3 69.7 69.7
            ResNet-18     DoReFa  W6A6  KURE   0.2 47.5 67.6 69.1 69.6 69.5 69.5
            ResNet-18     DoReFa  W5A8  none   0.1 13.3 62.9 70.2 69.1 68.9 68.9
            ResNet-18     DoReFa  W5A8  KURE   0.2 56.3 67.9 69.6 69.3 69.3 69.3
        """,
            ),
            (
                "Supp. Fig. 1",
                "3 4 5 6 8 32",
                """
            ResNet-50     LSQ     W4A8  none  54.8 76.9 75.3 75.4 75.5  1.0
            ResNet-50     LSQ     W4A8  KURE  70.2 75.7 74.8 75.1 75.0 75.0
        """,
            ),
        )
    ],
    ignore_index=True,
)
QAT_BITS["trained_bits"] = QAT_BITS.trained_at.str.extract(r"W(\d)").astype(int)

# The step size as found, and rounded to a power of two; weights only.
SUPP_TABLE_5 = _tidy(
    "Supp. Table 5",
    keys="model weight_bits arm",
    over="step",
    at="optimal power-of-two",
    rows="""
        ResNet-50  4  none  71.8 63.6
        ResNet-50  4  KURE  75.6 74.2
        ResNet-50  3  none  62.9 53.2
        ResNet-50  3  KURE  73.6 71.6
        ResNet-18  4  none  62.6 61.4
        ResNet-18  4  KURE  68.3 66.2
        ResNet-18  3  none  52.4 37.5
        ResNet-18  3  KURE  62.6 55.8
    """,
).astype({"weight_bits": int})

# Accuracy against Δ/Δ̃ of ResNet-50 at 4 weight bits, post-training: eight points of the two released curves.
STEP_SIZE_POINTS = _tidy(
    "authors' step-size curves",
    keys="model weight_bits arm",
    over="ratio",
    at="0.65 1.0 1.3 1.4",
    rows="""
        ResNet-50  4  none  61.892 71.608 67.350 35.468
        ResNet-50  4  KURE  20.550 75.622 75.402 75.328
    """,
).astype({"weight_bits": int, "ratio": float})

# All 20 curves of the release, one line a file: the accuracy at Δ̃; the mean over the other ratios within 0.7–1.3
# (0.9–1.1 for ResNet-18 with 41 ratios); and for ResNet-18 the accuracies at the two ratios next to 1, where "–"
# means that they are not quoted. `arm` is the tag in the folder's name, `corrected` the tag for bias correction.
STEP_SIZE_FILES = _tidy(
    "authors' step-size curves",
    keys="model quantizer weight_bits arm corrected ratios",
    over="at",
    at="below Δ̃ above mean",
    rows="""
        ResNet-50     LAPQ    4  none  yes  60      –  71.608      –  69.083
        ResNet-50     LAPQ    4  KURE  yes  60      –  75.622      –  71.492
        ResNet-50     LAPQ    3  none  yes  60      –  62.792      –  45.440
        ResNet-50     LAPQ    3  KURE  yes  60      –  73.324      –  64.772
        ResNet-50     LAPQ    2  none  yes  60      –  10.336      –   1.837
        ResNet-50     LAPQ    2  KURE  yes  60      –  64.156      –  37.046
        ResNet-18     DoReFa  4  none  no   21 11.775  69.850  7.500  19.384
        ResNet-18     DoReFa  4  none  no   41 15.475  68.350  3.875  15.657
        ResNet-18     DoReFa  4  none  no   61 12.520  68.580  3.820  17.650
        ResNet-18     DoReFa  4  none  yes  61 10.640  68.140 62.000  32.214
        ResNet-18     DoReFa  4  KURE  no   21 62.275  68.625 58.775  63.788
        ResNet-18     DoReFa  4  KURE  no   41 62.525  68.650 60.375  62.969
        ResNet-18     DoReFa  4  KURE  no   61 63.560  68.820 57.160  63.768
        ResNet-18     DoReFa  4  KURE  yes  61 66.720  69.200 67.660  58.413
        MobileNet-V2  DoReFa  4  none  yes  21      –  68.880      –  55.945
        MobileNet-V2  DoReFa  4  none  yes  41      –  69.500      –  56.071
        MobileNet-V2  DoReFa  4  none  yes  61      –  67.520      –  55.919
        MobileNet-V2  DoReFa  4  KURE  yes  21      –  67.800      –  32.835
        MobileNet-V2  DoReFa  4  KURE  yes  41      –  68.860      –  33.721
        MobileNet-V2  DoReFa  4  KURE  yes  61      –  68.720      –  33.567
    """,
).astype({"weight_bits": int, "ratios": int})

# Divisors of the mean over layers of KURE, written in the authors' code by the name of the architecture.
DIVISORS = pd.DataFrame(
    {"model": ["resnet18", "resnet50", "mobilenet_v2"], "divisor": [19, 52, 51], "source": "authors' code"}
)

# Run-to-run spread of DoReFa + KURE.
SUPP_TABLE_6 = pd.DataFrame(
    [
        {
            "quantizer": "DoReFa",
            "arm": "KURE",
            "setting": "4/4",
            "runs": 3,
            "top1": 68.4,
            "spread": 0.09,
            "source": "Supp. Table 6",
        }
    ]
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

# Step size, in standard deviations, of the best uniform mid-rise quantizer of a normal variable.
MAX_1960 = _tidy(
    "Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6 (1960)",
    keys="distribution",
    over="bits",
    at="1 2 3 4 5 6",
    value="step",
    rows="normal 1.596 0.9957 0.5860 0.3352 0.1881 0.1041",
).astype({"bits": int})
