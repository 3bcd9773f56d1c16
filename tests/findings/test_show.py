"""Figures, tables and intervals: what is kept, what is shown, and what check mode notices."""

import itertools
import math

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from nbclient import NotebookClient
from PIL import Image
from scipy import stats
from scipy.stats import t as student_t

from kure_lib import paths
from kure_lib.findings import show, statistics
from kure_lib.networks import device
from kure_lib.paths import KureError

GROUPS = [
    ("pretrained", "control", "kure", "scratch", "activations", "paper"),
    ("uniform", "normal", "laplace", "paper"),
    ("mid_rise", "mid_tread", "signed_int"),
    ("plain", "lapq", "per channel", "practice"),
]
SAMPLES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


@pytest.fixture
def checked(results_folder, monkeypatch):
    """Turns check mode on when called, and returns what the folder then holds."""

    def turn_on():
        monkeypatch.setenv("KURE_CHECK", "1")
        return snapshot(results_folder)

    return turn_on


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def curve(scale=1.0):
    arms = ["kure", "control", "kure"]
    return pd.DataFrame({"bits": [2, 3, 4], "arm": arms, "top1": [85.7, 91.7 * scale, 1 / 3]})


def draw(frame, name="curve"):
    fig, ax = plt.subplots()
    ax.plot(frame.bits, frame.top1, **show.LINE["kure"])
    show.figure(fig, name, frame)


# Figures


def test_a_figure_is_kept_with_its_data_at_a_fixed_size(results_folder):
    show.style()
    draw(curve())
    image = Image.open(results_folder / "figures/curve.png")
    assert image.size == tuple(round(show.DPI * inches) for inches in show.FIGURE_SIZE)
    assert "Software" not in image.info
    kept = pd.read_csv(results_folder / "figures/curve.csv")
    pd.testing.assert_frame_equal(kept, curve(), check_dtype=False, rtol=1e-6)


def test_a_figure_is_closed_and_drawn_to_the_same_bytes_again(results_folder):
    draw(curve())
    first = snapshot(results_folder)
    draw(curve())
    assert snapshot(results_folder) == first
    assert plt.get_fignums() == []


def test_a_figure_appears_once_in_a_notebook(results_folder):
    source = [
        "import pandas as pd, matplotlib.pyplot as plt\nfrom kure_lib import show\nshow.style()",
        "fig, ax = plt.subplots()\n_ = ax.plot([1, 2])\nshow.figure(fig, 'once', pd.DataFrame({'y': [1, 2]}))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in source])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": paths.ROOT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.output_type for output in outputs] == ["display_data"]
    assert "image/png" in outputs[0].data


def test_a_figure_kept_by_one_notebook_is_shown_by_another(results_folder, monkeypatch):
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    show.kept("curve")
    draw(curve())
    show.kept("curve")
    missing, drawn, again = shown
    assert "not executed under this profile" in missing.data
    assert (again.data, again.width, again.alt) == (drawn.data, drawn.width, drawn.alt)


def test_check_mode_passes_on_equal_figures_and_writes_nothing(results_folder, checked):
    draw(curve())
    before = checked()
    draw(curve(scale=1 + 5e-5))  # within the tolerance
    assert snapshot(results_folder) == before


def test_check_mode_shows_the_committed_image(results_folder, checked, monkeypatch):
    draw(curve())
    committed = (results_folder / "figures/curve.png").read_bytes()
    checked()
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    monkeypatch.setattr(plt.Figure, "savefig", None)
    draw(curve())
    assert [image.data for image in shown] == [committed] and plt.get_fignums() == []


def test_check_mode_detects_one_changed_number_of_a_figure(results_folder, checked):
    draw(curve())
    before = checked()
    with pytest.raises(KureError, match=r"curve\.csv differs .* row 2 of column top1 is 91\.7\d+ and was 91"):
        draw(curve(scale=1 + 2e-4))
    assert snapshot(results_folder) == before


def test_check_mode_misses_a_figure_without_its_image(results_folder, checked):
    draw(curve())
    (results_folder / "figures/curve.png").unlink()
    checked()
    with pytest.raises(KureError, match=r"curve\.png is missing"):
        draw(curve())


# Tables


def test_a_table_is_kept_as_shown_and_as_numbers(results_folder):
    shown = pd.DataFrame({"arm": ["kure", "a|b"], "top-1 (%)": ["91.60", "–"]})
    show.table(shown, "t", caption="Accuracy", tidy=pd.DataFrame({"arm": ["kure"], "top1": [91.6049]}))
    assert (results_folder / "tables/t.md").read_text().splitlines() == [
        "**Accuracy**",
        "",
        "| arm   |   top-1 (%) |",
        "|:------|------------:|",
        "| kure  |       91.60 |",
        "| a\\|b  |           – |",
    ]
    assert (results_folder / "tables/t.csv").read_text() == "arm,top1\nkure,91.6049\n"


def test_a_pivoted_table_becomes_flat(results_folder):
    wide = curve().pivot(index="arm", columns="bits", values=["top1"])
    show.table(wide, "wide")
    assert (results_folder / "tables/wide.md").read_text().splitlines()[0].split() == [
        "|",
        "arm",
        "|",
        "top1",
        "2",
        "|",
        "top1",
        "3",
        "|",
        "top1",
        "4",
        "|",
    ]
    assert (results_folder / "tables/wide.csv").read_text().splitlines()[1] == "control,,91.7,"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": ["kure", "kure", "kure"]}, "row 2 of column arm is kure and was control"),
        ({"bits": [2, 3, 5]}, "row 3 of column bits is 5 and was 4"),
        ({"extra": [1, 2, 3]}, "row 0 of column extra is extra and was nothing"),
    ],
)
def test_check_mode_names_the_row_and_column_of_a_changed_table(results_folder, checked, change, message):
    show.table(curve(), "t", caption="Caption")
    checked()
    with pytest.raises(KureError, match=rf"t\.md differs .*{message}"):
        show.table(curve().assign(**change), "t", caption="Caption")


def test_check_mode_compares_the_numbers_behind_a_formatted_table(results_folder, checked):
    shown = pd.DataFrame({"top1": ["91.6"]})
    show.table(shown, "t", tidy=curve())
    checked()
    with pytest.raises(KureError, match=r"t\.csv differs .* row 2 of column top1"):
        show.table(shown, "t", tidy=curve(scale=1.001))


def test_check_mode_notices_missing_rows_captions_and_files(checked):
    show.table(curve(), "t", caption="One")
    checked()
    with pytest.raises(KureError, match="row 3 of column bits is nothing and was 4"):
        show.table(curve().head(2), "t", caption="One")
    with pytest.raises(KureError, match=r"Two.* and was .*One"):
        show.table(curve(), "t", caption="Two")
    with pytest.raises(KureError, match=r"absent\.md is missing"):
        show.table(curve(), "absent")


# Intervals


@given(SAMPLES)
def test_mean_interval_is_the_interval_of_scipy(values):
    mean, half_width = statistics.mean_interval(values)
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    if spread > 0:
        low, high = student_t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread)
        assert (mean - half_width, mean + half_width) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(SAMPLES, st.floats(-1e3, 1e3))
def test_a_shift_common_to_all_pairs_has_no_spread(values, shift):
    mean, half_width = statistics.paired_interval([value + shift for value in values], values)
    assert (mean, half_width) == pytest.approx((shift, 0), abs=1e-8)


def test_pairing_removes_what_seeds_share():
    control, kure = [60.0, 70.0, 80.0], [63.0, 72.9, 83.1]
    assert statistics.paired_interval(kure, control)[1] < 0.1 * statistics.mean_interval(kure)[1]


def test_intervals_need_values_and_pairs():
    with pytest.raises(KureError, match="No values"):
        statistics.mean_interval([])
    with pytest.raises(KureError, match="Cannot pair 2 values with 1"):
        statistics.paired_interval([1, 2], [1])


MEASURED = pd.DataFrame({
    "model": "resnet20", "arm": ["kure", "kure", "control", "control"], "seed": [1, 0, 0, 1],
    "w_bits": 4, "top1": [91.0, 93.0, 92.5, 90.0],
})  # fmt: skip


def test_a_gain_is_paired_by_seed_whatever_the_order():
    gain = statistics.gain(MEASURED, ["model", "w_bits"]).set_index("seed").gain
    assert gain.to_dict() == {0: 0.5, 1: 1.0}


def test_a_pivot_gives_means_with_intervals_under_the_names_readers_see():
    shown = statistics.pivot(MEASURED, ["model", "arm"], "w_bits", digits=2)
    assert shown.index.names == ["network", "arm"] and list(shown.columns) == [4]
    half_width = student_t.ppf(0.975, 1) * np.std([91.0, 93.0], ddof=1) / 2**0.5
    assert shown.loc[("ResNet-20", "KURE"), 4] == f"92.00 ± {half_width:.2f}"
    gain = statistics.pivot(statistics.gain(MEASURED, ["model"]), ["model"], "seed", "gain", sign=True)
    assert list(gain.loc["ResNet-20"]) == ["+1.0 (indicative)", "+0.5 (indicative)"]


def test_a_band_is_the_range_around_the_mean():
    frame = pd.DataFrame({"bits": [2, 2, 3, 3], "top1": [80.0, 90.0, 91.0, 91.0]})
    _, axis = plt.subplots()
    show.band(axis, frame, "bits", "top1", "kure", markersize=3)
    (line,), (fill,) = axis.lines, axis.collections
    assert line.get_xydata().tolist() == [[2, 85], [3, 91]]
    assert (line.get_color(), line.get_label(), line.get_markersize()) == (show.COLOR["kure"], "KURE", 3)
    assert {tuple(point) for point in fill.get_paths()[0].vertices} == {(2, 80), (2, 90), (3, 91)}
    plt.close()


def test_one_value_is_only_indicative():
    assert statistics.format_interval([91.64]) == "91.6 (indicative)"
    assert statistics.format_interval([-0.26, -0.24], digits=2, sign=True) == "-0.25 ± 0.13"


# The environment


def test_effects_are_named_by_what_readers_see():
    frame = pd.DataFrame(
        {"model": ["resnet20"] * 2, "a_bits": [4, 4], "K": [1.8, 3.0], "seed": [0, 1], "x": [1.0, 2.0]}
    )
    found = statistics.effects(frame, ["model", "a_bits", "K"], "x")
    assert found.setting.tolist() == ["ResNet-20, a4, 1.8", "ResNet-20, a4, 3"]
    assert found.effect.tolist() == [1.0, 2.0] and found.seed.tolist() == [0, 1]
    assert "seed" not in statistics.effects(frame.drop(columns="seed"), ["model"], "x")


def test_a_forest_shows_every_seed_and_student_intervals():
    values = {("4/FP", "plain"): [1.0, 2.0, 4.0], ("4/FP", "lapq"): [0.0, 0.5, 0.1], ("3/FP", "plain"): [3.0],
              ("3/FP", "lapq"): [0.2, 0.4]}  # fmt: skip
    frame = pd.DataFrame([(y, hue, x) for (y, hue), xs in values.items() for x in xs], columns=["y", "hue", "x"])
    _, axis = plt.subplots()
    show.forest(axis, frame, "y", "x", "hue")
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["4/FP", "3/FP"]
    drawn = [line.get_xdata() for line in axis.lines]
    for xs in values.values():
        if len(xs) > 1:
            interval = stats.ttest_1samp(xs, 0).confidence_interval(0.95)
            found = any(len(line) >= 2 and np.allclose([min(line), max(line)], interval) for line in drawn)
            assert found == (len(xs) > 2)
    dots = np.concatenate([collection.get_offsets()[:, 0] for collection in axis.collections])
    assert sorted(dots.tolist()) == sorted(frame.x)


def test_the_environment_names_versions_device_precision_and_profile(results_folder, capsys):
    show.environment()
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__.split('+')[0]}" in lines[0]
    assert f"{torch.get_num_threads()} threads, networks in {device.precision()}" in lines[1]
    assert lines[2] == "profile trial"


# Colours


def lightness(color):
    """Relative luminance in [0, 1] (ITU-R BT.709)."""
    return float(np.dot(np.power(to_rgb(color), 2.2), [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize(("one", "other"), [p for group in GROUPS for p in itertools.combinations(group, 2)])
def test_lines_drawn_together_differ_without_colour(one, other):
    """In greyscale two things of a group must differ in lightness, or else in line style and marker."""
    a, b = show.LINE[one], show.LINE[other]
    light = sorted((lightness(a["color"]), lightness(b["color"])))
    contrast = (light[1] + 0.05) / (light[0] + 0.05)
    assert contrast > 1.5 or a["linestyle"] != b["linestyle"]
    assert a["color"] != b["color"]


@pytest.mark.parametrize("name", show.COLOR)
def test_lines_stand_out_from_white(name):
    assert 1.05 / (lightness(show.COLOR[name]) + 0.05) > 2
