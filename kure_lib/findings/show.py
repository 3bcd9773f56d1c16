"""One look for every figure and table, each kept beside the data it shows."""

import io
import platform
from importlib.metadata import version
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Image, Markdown, display
from scipy.stats import t as student_t

from kure_lib import files, paths
from kure_lib.networks import device
from kure_lib.paths import KureError

FIGURE_SIZE = (8.0, 4.5)  # inches
DPI = 150

# One look per thing in every notebook: Okabe and Ito's colours, and line styles that survive greyscale.
LINE: dict[str, dict[str, Any]] = {
    # training arms
    "pretrained": {"color": "#7F7F7F", "linestyle": "-.", "marker": "^"},
    "control": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "kure": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "scratch": {"color": "#56B4E9", "linestyle": ":", "marker": "D"},
    "activations": {"color": "#009E73", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "v"},
    # rivals: other statistics that flatten weights have one colour, what leaves their shape alone another
    "range": {"color": "#D55E00", "linestyle": "-", "marker": "<"},
    "outliers": {"color": "#D55E00", "linestyle": "--", "marker": "D"},
    "entropy": {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
    "variation": {"color": "#D55E00", "linestyle": ":", "marker": "X"},
    "l2": {"color": "#CC79A7", "linestyle": "-", "marker": "P"},
    "gradient_l1": {"color": "#CC79A7", "linestyle": "--", "marker": "p"},
    "gradient_l1_own": {"color": "#CC79A7", "linestyle": "-.", "marker": "h"},
    "gradient_l1_strong": {"color": "#CC79A7", "linestyle": ":", "marker": "*"},
    "noise": {"color": "#CC79A7", "linestyle": "-", "marker": "v"},
    "sam": {"color": "#CC79A7", "linestyle": "--", "marker": ">"},
    "ema": {"color": "#CC79A7", "linestyle": "-.", "marker": "d"},
    "kure_outliers": {"color": "#0072B2", "linestyle": ":", "marker": "D"},
    # distributions: dense curves, so no markers
    "uniform": {"color": "#0072B2", "linestyle": "-"},
    "normal": {"color": "#E69F00", "linestyle": "--"},
    "laplace": {"color": "#CC79A7", "linestyle": "-."},
    # grids
    "mid_rise": {"color": "#009E73", "linestyle": "-", "marker": "o"},
    "mid_tread": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "signed_int": {"color": "#CC79A7", "linestyle": "-.", "marker": "^"},
    # number formats: integers are the mid-rise grid's
    "int8": {"color": "#009E73", "linestyle": "--", "marker": "s"},
    "int4": {"color": "#009E73", "linestyle": "-", "marker": "o"},
    "int3": {"color": "#009E73", "linestyle": ":", "marker": "o"},
    "fp8_e4m3": {"color": "#E69F00", "linestyle": "-", "marker": "v"},
    "fp8_e5m2": {"color": "#E69F00", "linestyle": ":", "marker": "^"},
    "fp6_e2m3": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "fp6_e3m2": {"color": "#D55E00", "linestyle": ":", "marker": "x"},
    "fp4_e2m1": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "nf4": {"color": "#CC79A7", "linestyle": "-.", "marker": "^"},
    "pot4": {"color": "#7F7F7F", "linestyle": ":", "marker": "v"},
    "mxfp4": {"color": "#56B4E9", "linestyle": "--", "marker": "D"},
    "mxfp6": {"color": "#56B4E9", "linestyle": "--", "marker": "D"},
    "nvfp4": {"color": "#0072B2", "linestyle": "-", "marker": "P"},
    # pipelines
    "plain": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "lapq": {"color": "#56B4E9", "linestyle": "--", "marker": "s"},
    "per channel": {"color": "#CC79A7", "linestyle": ":", "marker": "^"},
    "practice": {"color": "#009E73", "linestyle": "-.", "marker": "D"},
    # other ways to choose the step of a tensor
    "third norm": {"color": "#8C6D00", "linestyle": ":", "marker": "v"},
    "re-estimated": {"color": "#5D3A9B", "linestyle": "-", "marker": "P"},
    # rounding by layers' outputs
    "gptq": {"color": "#882255", "linestyle": "-", "marker": "<"},
    "gptq, re-estimated": {"color": "#882255", "linestyle": ":", "marker": ">"},
    "adaround": {"color": "#999933", "linestyle": "-", "marker": "*"},
    # what is done to ranges before
    "folded": {"color": "#332288", "linestyle": ":", "marker": "s"},
    "equalized": {"color": "#117733", "linestyle": "-", "marker": "P"},
    # what is done to a linear layer and its input before
    "smoothed": {"color": "#44AA99", "linestyle": ":", "marker": "<"},
    "rotated": {"color": "#AA4499", "linestyle": "-", "marker": "P"},
    # statistics of weights that may foretell a loss
    "mean kurtosis": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "highest kurtosis": {"color": "#56B4E9", "linestyle": "--", "marker": "s"},
    "largest weight / σ": {"color": "#CC79A7", "linestyle": ":", "marker": "^"},
    "distortion": {"color": "#D55E00", "linestyle": "-.", "marker": "D"},
    # published values beside ours
    "paper": {"color": "#000000", "linestyle": ":", "marker": "x"},
}
COLOR = {name: line["color"] for name, line in LINE.items()}

#: What a reader sees in place of the names of arms, networks and formats in records.
NAME = {
    "pretrained": "pre-trained", "control": "control", "kure": "KURE", "scratch": "KURE from scratch",
    "l2": "stronger L2", "gradient_l1": "gradient ℓ1", "gradient_l1_own": "gradient ℓ1, plain decay",
    "gradient_l1_strong": "gradient ℓ1, stronger", "range": "range",
    "outliers": "outliers", "entropy": "entropy", "variation": "variation of |w|",
    "noise": "weight noise", "sam": "SAM", "ema": "EMA", "kure_outliers": "KURE + outliers",
    "activations": "KURE of activations",
    "resnet20": "ResNet-20", "resnet20_group_norm": "ResNet-20, group norm", "mobilenet_v2_050": "MobileNet-V2 0.5",
    "vit_small_images": "ViT",
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNet-V2",
    "int8": "INT8", "int4": "INT4", "int3": "INT3", "fp8_e4m3": "FP8 E4M3", "fp8_e5m2": "FP8 E5M2",
    "fp6_e2m3": "FP6 E2M3", "fp6_e3m2": "FP6 E3M2", "fp4_e2m1": "FP4 E2M1", "nf4": "NF4", "pot4": "power of two",
    "mxfp4": "MXFP4", "mxfp6": "MXFP6 E2M3", "nvfp4": "NVFP4",
    "lapq": "LAPQ", "gptq": "GPTQ", "gptq, re-estimated": "GPTQ, re-estimated", "adaround": "AdaRound",
}  # fmt: skip


def style() -> None:
    """Set matplotlib's defaults: one size, a light grid, fonts that can be read at half the printed size."""
    plt.rcParams.update({
        "figure.figsize": FIGURE_SIZE, "figure.constrained_layout.use": True, "font.family": "DejaVu Sans",
        "font.size": 14, "axes.titlesize": 14, "axes.labelsize": 14, "xtick.labelsize": 13, "ytick.labelsize": 13,
        "legend.fontsize": 13, "legend.frameon": False, "lines.linewidth": 2.0, "lines.markersize": 7.0,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.8,
    })  # fmt: skip


def figure(fig: plt.Figure, name: str, data: pd.DataFrame, tolerance: float = files.RELATIVE_TOLERANCE) -> None:
    """Keep a figure as `figures/<name>.png` and the numbers it plots as `<name>.csv`, show it and close it.

    What is shown is the very image that is kept. Check mode compares its numbers and draws nothing anew: pixels vary by
    machine. `tolerance` is relative; widen it for what amplifies rounding, such as a long descent.
    """
    file = paths.results() / "figures" / f"{name}.png"
    image = io.BytesIO()
    if not paths.checking():
        fig.savefig(image, format="png", dpi=DPI, metadata={"Software": None})  # no version in it: stable bytes
    plt.close(fig)
    files.keep(file.with_suffix(".csv"), _csv(data), tolerance)
    if not paths.checking():
        files.write_atomically(file, image.getvalue())
    elif not file.is_file():
        raise KureError(f"{file} is missing: run its notebook with KURE_CHECK unset and commit the file.")
    kept(name)


def kept(name: str) -> None:
    """Show a figure that another notebook keeps, or a sentence where that was not executed under this profile."""
    file = paths.results() / "figures" / f"{name}.png"
    if file.is_file():
        width = round(100 * plt.imread(file).shape[1] / DPI)  # as wide as `figure` shows it
        display(Image(file.read_bytes(), width=width, alt=name.replace("_", " ")))
    else:
        display(Markdown(f"*The figure {name} is missing: its notebook was not executed under this profile.*"))


def table(
    frame: pd.DataFrame, name: str, caption: str | None = None, tidy: pd.DataFrame | None = None,
    tolerance: float = files.RELATIVE_TOLERANCE,
) -> None:  # fmt: skip
    """Keep a table as `tables/<name>.md`, as shown, and as `<name>.csv` for machines; display it as Markdown.

    `frame` may hold strings formatted by the notebook; `tidy` then holds the plain numbers for the CSV file.
    `tolerance` is as for `figure`.
    """
    file = paths.results() / "tables" / f"{name}.md"
    text = (f"**{caption}**\n\n" if caption else "") + _markdown(frame)
    files.keep(file, text, tolerance)
    files.keep(file.with_suffix(".csv"), _csv(frame if tidy is None else tidy), tolerance)
    display(Markdown(text))


def band(axis: plt.Axes, frame: pd.DataFrame, x: str, y: str, name: str = "", **line: Any) -> None:
    """Draw the mean of `y` over `x` as a line, in a band from the smallest to the largest value over seeds.

    Args:
        axis: Where to draw.
        frame: One row a measurement.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        name: Key of `LINE` and `NAME`: the look of the line and its label.
        **line: Properties of the line that differ from the look.
    """
    look = LINE.get(name, {}) | {"label": NAME.get(name, name)} | line
    labels = {"xlabel": axis.get_xlabel(), "ylabel": axis.get_ylabel()}  # seaborn would write the columns' names there
    sns.lineplot(frame, x=x, y=y, errorbar=("pi", 100), ax=axis, legend=False, err_kws={"linewidth": 0}, **look)
    axis.set(**labels)


def forest(axis: plt.Axes, frame: pd.DataFrame, y: str, x: str, hue: str) -> None:
    """Draw every value of `x` as a small dot, and the mean of each group in rows, with its 95 % Student interval.

    A group of fewer than three values has no interval: of two it is so wide that nothing else could be seen.

    Args:
        axis: Where to draw; the first row stands at the top.
        frame: One row a measurement.
        y: Column of the rows.
        x: Column of the effect; the line at zero says that there is none.
        hue: Column of the groups within a row, keys of `LINE` and `NAME`.
    """
    groups = list(dict.fromkeys(frame[hue]))
    shared = {"x": x, "y": y, "hue": hue, "orient": "h", "ax": axis, "legend": False}
    apart = 0.8 * (1 - 1 / len(groups))  # as far as the strips of dots are apart
    axis.axvline(0, color="black", linewidth=1)
    sns.pointplot(
        frame, dodge=apart, errorbar=_student, linestyle="none", capsize=0.1, err_kws={"linewidth": 2},
        palette=COLOR, markers=[LINE[group]["marker"] for group in groups], **shared,
    )  # fmt: skip
    sns.stripplot(
        frame, dodge=True, jitter=False, size=3, palette=["black"] * len(groups),
        zorder=9, **shared,
    )  # fmt: skip
    for group in groups:
        axis.plot([], [], label=NAME.get(group, group), **LINE[group] | {"linestyle": "none"})
    axis.set(xlabel="", ylabel="")
    axis.grid(axis="y", visible=False)


def _student(values: pd.Series) -> tuple[float, float]:
    """The ends of the 95 % Student interval of the mean, on the mean where there are fewer than three values."""
    if len(values) < 3:
        return values.mean(), values.mean()
    low, high = student_t.interval(0.95, len(values) - 1, values.mean(), values.sem())
    return float(low), float(high)


def environment() -> None:
    """Print versions, device, threads and precision: a notebook's last cell, whose output is not compared."""
    packages = ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib")
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    machine = torch.cuda.get_device_name() if device.device().type == "cuda" else cpu
    print(f"Python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{machine}, {torch.get_num_threads()} threads, networks in {device.precision()}")
    print(f"profile {paths.profile()}")


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """A named index becomes columns; a hierarchy of column names becomes one name each."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    parts = [name if isinstance(name, tuple) else (name,) for name in frame.columns]
    return frame.set_axis([" ".join(map(str, part)).strip() for part in parts], axis=1)


def _csv(frame: pd.DataFrame) -> str:
    return _flat(frame).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _markdown(frame: pd.DataFrame) -> str:
    """A Markdown table; columns of numbers are aligned to the right, a missing value is a dash."""
    cells = _flat(frame).map(_cell)
    numeric = [column.astype(str).str.match(r"[+-]?\d|–").all() for _, column in cells.items()]
    alignment = ["right" if is_numeric else "left" for is_numeric in numeric]
    names = [_cell(name) for name in cells.columns]
    return f"{cells.to_markdown(headers=names, index=False, disable_numparse=True, colalign=alignment)}\n"


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value).replace("|", r"\|")
