"""Published numbers: their shape, and the relations that must hold between tables."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch.nn import Conv2d
from torchvision.models import get_model, get_model_weights

from kure_lib.findings import paper

FRAMES = {name: frame for name, frame in vars(paper).items() if isinstance(frame, pd.DataFrame)}
ACCURACIES = {name: frame for name, frame in FRAMES.items() if "top1" in frame}


def top1(frame, **wanted):
    """The one accuracy with the wanted entries."""
    for column, entry in wanted.items():
        frame = frame[frame[column] == entry]
    (value,) = frame.top1
    return value


@pytest.mark.parametrize("name", FRAMES)
def test_every_number_has_a_source_and_no_row_stands_twice(name):
    frame = FRAMES[name]
    assert frame.source.str.len().gt(0).all()
    assert not frame.duplicated().any()


@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracies_are_percentages(name):
    assert ACCURACIES[name].top1.between(0, 100).all()


def test_table_1_has_three_models_two_arms_and_all_settings_but_two():
    settings = paper.TABLE_1.groupby(["model", "arm"]).setting.nunique()
    expected = {"ResNet-50": 8, "ResNet-18": 8, "MobileNet-V2": 7}  # MobileNet-V2 has no 2/FP
    assert settings.to_dict() == {(m, k): n for m, n in expected.items() for k in ("none", "KURE")}


def test_settings_become_bits():
    bits = paper.TABLE_1.drop_duplicates("setting").set_index("setting")[["weight_bits", "activation_bits"]]
    assert bits.loc["FP"].tolist() == [32, 32]
    assert bits.loc["3/FP"].tolist() == [3, 32]
    assert bits.loc["6/6"].tolist() == [6, 6]


def test_table_1_falls_with_the_bits():
    """A mistyped digit would most likely break the order, along weights only or along equal bits of both."""
    weights_only = paper.TABLE_1[paper.TABLE_1.activation_bits == 32]
    both = paper.TABLE_1[paper.TABLE_1.activation_bits == paper.TABLE_1.weight_bits]
    for frame in (weights_only, both):
        for _, row in frame.sort_values("weight_bits").groupby(["model", "arm"]):
            assert row.top1.is_monotonic_increasing


def test_kure_gains_everywhere_in_table_1_but_at_full_precision_of_mobilenet():
    wide = paper.TABLE_1.pivot(index=["model", "setting"], columns="arm", values="top1")
    gain = wide.KURE - wide["none"]
    losses = gain.index[gain < 0]
    assert losses.tolist() == [("MobileNet-V2", "FP")]


def test_fig_3c_weight_only_rows_agree_with_table_1():
    for bits, setting in ((2, "2/FP"), (3, "3/FP"), (32, "FP")):
        figure = top1(paper.FIG_3C, target=1.8, weight_bits=bits)
        assert figure == top1(paper.TABLE_1, model="ResNet-18", arm="KURE", setting=setting)


def test_gap_at_3_bits_is_10_like_for_like_and_18_in_the_figure():
    gap_in_table = top1(paper.TABLE_1, model="ResNet-18", arm="KURE", setting="3/FP") - top1(
        paper.TABLE_1, model="ResNet-18", arm="none", setting="3/FP"
    )
    gap_in_figure = top1(paper.FIG_3C, target=1.8, weight_bits=3) - top1(paper.FIG_3C, arm="none", weight_bits=3)
    assert gap_in_table == pytest.approx(10.2)
    assert gap_in_figure == pytest.approx(18.3)


@pytest.mark.parametrize(("bits", "setting"), [(3, "3/3"), (5, "5/5")])
def test_pretrained_row_of_fig_3c_holds_values_with_quantized_activations(bits, setting):
    figure = top1(paper.FIG_3C, arm="none", weight_bits=bits)
    assert figure == top1(paper.TABLE_1, model="ResNet-18", arm="none", setting=setting)


def test_row_of_target_1_6_has_one_value_too_many_and_so_no_bits():
    assert len(paper.TARGET_1_6) == len(paper.TARGET_1_6_AXIS) + 1
    assert "weight_bits" not in paper.TARGET_1_6


def test_supplement_table_5_starts_from_table_1():
    optimal = paper.SUPP_TABLE_5[paper.SUPP_TABLE_5.step == "optimal"]
    for row in optimal.itertuples():
        setting = f"{row.weight_bits}/FP"
        assert row.top1 == top1(paper.TABLE_1, model=row.model, arm=row.arm, setting=setting)


def test_power_of_two_steps_cost_less_with_kure_but_at_4_bits_of_resnet_18():
    wide = paper.SUPP_TABLE_5.pivot(index=["model", "weight_bits", "arm"], columns="step", values="top1")
    cost = (wide["optimal"] - wide["power-of-two"]).unstack("arm")
    saving = cost["none"] - cost.KURE
    dearer = saving.index[saving < 0]
    assert (cost > 0).all(axis=None)
    assert dearer.tolist() == [("ResNet-18", 4)]


def test_qat_series_contain_the_bits_of_training_and_full_precision():
    for _, series in paper.QAT_BITS.groupby(["model", "quantizer", "trained_at", "arm"]):
        assert {series.trained_bits.iloc[0], 32} <= set(series.weight_bits)
        assert series.weight_bits.is_monotonic_increasing
    assert len(paper.QAT_BITS) == 4 * 2 * 6 + 2 * 2 * 7


def test_kure_costs_accuracy_at_the_bits_of_training_in_most_qat_series():
    trained = paper.QAT_BITS[paper.QAT_BITS.weight_bits == paper.QAT_BITS.trained_bits]
    wide = trained.pivot(index=["model", "quantizer", "trained_at"], columns="arm", values="top1")
    gains = (wide.KURE - wide["none"]).round(1)
    assert gains[gains > 0].to_dict() == {("MobileNet-V2", "DoReFa", "W4"): 0.1}
    assert gains.min() == -1.2  # ResNet-50 by LSQ


def test_authors_own_curve_is_robust_on_one_side_only():
    curve = paper.STEP_SIZE_POINTS.pivot(index="ratio", columns="arm", values="top1")
    gain = curve.KURE - curve["none"]
    assert gain[0.65] < 0
    assert (gain[1.0:] > 0).all()


def step_size_files(at):
    """The accuracies at Δ̃ or next to it, or the means, with one row a file."""
    frame = paper.STEP_SIZE_FILES[paper.STEP_SIZE_FILES["at"] == at]
    return frame.set_index(["model", "weight_bits", "arm", "corrected", "ratios"]).top1


def test_every_curve_of_the_release_has_its_best_step_and_its_mean():
    assert len(step_size_files("Δ̃")) == len(step_size_files("mean")) == 20
    assert (step_size_files("Δ̃") > step_size_files("mean")).all()


def test_curves_agree_with_the_points_quoted_from_the_same_files():
    for row in paper.STEP_SIZE_POINTS.query("ratio == 1").itertuples():
        assert step_size_files("Δ̃")[row.model, row.weight_bits, row.arm, "yes", 60] == row.top1


@pytest.mark.parametrize(
    ("model", "ratios", "images"),
    [
        ("ResNet-50", 60, 50_000),
        ("ResNet-18", 21, 4_000),
        ("ResNet-18", 41, 4_000),
        ("ResNet-18", 61, 5_000),
        ("MobileNet-V2", 21, 5_000),
        ("MobileNet-V2", 41, 5_000),
        ("MobileNet-V2", 61, 5_000),
    ],
)
def test_accuracies_of_a_file_are_whole_numbers_of_images(model, ratios, images):
    """A mistyped digit would most likely not be one."""
    rows = paper.STEP_SIZE_FILES.query("model == @model and ratios == @ratios and `at` != 'mean'")
    right = rows.top1 * images / 100
    np.testing.assert_allclose(right, right.round(), atol=1e-6)


def test_means_of_mobilenet_are_the_other_way_round_by_folder():
    means = step_size_files("mean").unstack("arm")
    gain = means.KURE - means["none"]
    assert (gain.loc["MobileNet-V2"] < 0).all()
    assert (gain.drop("MobileNet-V2") > 0).all()


def test_pretrained_networks_of_table_1_are_those_of_torchvision():
    for model, builder in (("ResNet-18", "resnet18"), ("ResNet-50", "resnet50"), ("MobileNet-V2", "mobilenet_v2")):
        own = get_model_weights(builder).IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert top1(paper.TABLE_1, model=model, arm="none", setting="FP") == pytest.approx(own, abs=0.1)


def test_divisors_count_every_convolution_but_the_first():
    for row in paper.DIVISORS.itertuples():
        network = get_model(row.model)
        assert sum(isinstance(layer, Conv2d) for layer in network.modules()) - 1 == row.divisor


def test_hyper_parameters_have_one_row_a_recipe():
    assert len(paper.HYPER_PARAMETERS) == 8
    assert (paper.HYPER_PARAMETERS.target == 1.8).all()
    assert paper.HYPER_PARAMETERS.learning_rate.isna().sum() == 1


@pytest.mark.parametrize(("bits", "step"), list(zip(paper.MAX_1960.bits, paper.MAX_1960.step, strict=True)))
def test_steps_of_max_minimise_the_mse_of_a_normal_variable(bits, step):
    best = minimize_scalar(lambda trial: normal_mse(trial, bits), bounds=(0.01, 3), method="bounded")
    assert best.x == pytest.approx(step, abs=5e-4 if bits == 1 else 1e-4)  # the digits printed


def normal_mse(step, bits):
    """E[(X − Q(X))²] of a standard normal X on the mid-rise grid, by integration over its cells."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    levels, edges = (codes + 0.5) * step, np.append(codes, 0) * step
    low, high = np.r_[-40.0, edges[1:-1]], np.r_[edges[1:-1], 40.0]
    mass = norm.cdf(high) - norm.cdf(low)
    first = norm.pdf(low) - norm.pdf(high)
    second = mass + low * norm.pdf(low) - high * norm.pdf(high)
    return np.sum(second - 2 * levels * first + levels**2 * mass)
