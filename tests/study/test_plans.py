"""The plan of each profile: which runs it has, where each starts, and how they are selected."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest

from kure_lib import paths, progress
from kure_lib.networks.evaluation import Evaluation
from kure_lib.paths import ROOT, KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import plans, runs
from kure_lib.study.plans import ARMS, ASIDE, COLUMNS, KURE, Plan, Planned, needed, plan
from kure_lib.study.profiles import NEEDS, PROFILES
from kure_lib.training.configs import KureConfig

EVERY_PROFILE = pytest.mark.parametrize("profile", PROFILES)


def test_the_profiles_have_the_runs_of_the_design():
    counts = {name: len(plan(name).runs) for name in PROFILES}
    tuning = 1 + 2 * 3 + 5 * (3 + 2) + 2 * (4 + 2) + (5 + 2)
    rivals = 12 * 5 + 2 * 2 * 2 + tuning
    assert counts == {
        "smoke": (3 + 1 + 1 + 2 * 2 + 1 + 1) + (3 + 1) + 5 + 2 + 3 + 3 + 3,
        "quick": (3 + 1 + 1 + 2) + 3,
        "study": (10 * 3 + 5 * 6 + 3 * 4 + 2 * (2 * 5 + 6) + 5 + 1)
        + (5 * 3 + 4 + 2 * 2 + 9)
        + rivals
        + 3 * 3
        + (3 * 3 + 2 * 3)
        + 3 * 3
        + (4 * 3 + 3 * 3),
        "imagenet": 3 * 3 + (3 + 1),
        "large": (3 * 3 + 4 + 2 * 2 * 3 + 3 * 3) + 3 * 3,
    }
    main = {arm: len(plan("study").select(arm=arm, part="main")) for arm in ("pretrained", "control", "kure")}
    assert main == {"pretrained": 15, "control": 15, "kure": 15}
    assert plan("study").models == ["resnet20", "mobilenet_v2_050"]
    assert {run.seed for run in plan("study").select(model="resnet20")} == set(range(10))
    assert {run.seed for run in plan("study").select(model="mobilenet_v2_050")} == set(range(5))


@EVERY_PROFILE
def test_every_run_comes_after_its_start_and_once(profile):
    seen = set()
    for run in plan(profile).runs:
        assert run.config.start is None or run.config.start in seen
        seen.add(run.config)
        assert (run.model, run.seed) == (run.config.model, run.config.seed)
        assert run.arm in ARMS or run.part in ("rivals", "tuning")
    assert len(seen) == len({config.key for config in seen}) == len(plan(profile).runs)


@EVERY_PROFILE
def test_control_and_kure_differ_in_the_regularizer_alone(profile):
    """Q8: equal start, epochs, learning rate and weight decay in every arm."""
    runs = [run for run in plan(profile).runs if run.part != "tuning"]
    controls = {run.config for run in runs if run.arm == "control"}
    kure = {run.config for run in runs if run.arm == "kure"}
    assert controls and all(config.regularizer is None and config.start.regularizer is None for config in controls)
    assert {config.model_copy(update={"regularizer": KURE}) for config in controls} <= kure
    assert {config.model_copy(update={"regularizer": None}) for config in kure} == controls


@EVERY_PROFILE
def test_contenders_differ_from_the_control_in_their_method_and_weight_decay_alone(profile):
    planned = plan(profile)
    for run in planned.select(part="rivals"):
        (control,) = planned.select(model=run.model, arm="control", part="main", seed=run.seed)
        same = {"rival": None, "regularizer": None, "weight_decay": control.config.weight_decay}
        assert run.config != control.config and run.config.model_copy(update=same) == control.config


def test_every_contender_is_tuned_on_the_same_images_and_never_on_those_it_is_tested_on():
    planned = plan("study")
    tuned, tested = planned.select(part="tuning"), planned.select(part="rivals")
    assert {(run.config.held_out, run.config.train_size) for run in tuned if run.config.start} == {(10_000, 25_000)}
    assert all(run.config.start is None or run.config.start.held_out == 10_000 for run in tuned)
    for run in (run for run in tested if run.seed == 0 and run.model == "resnet20"):
        chosen = {"start": None, "held_out": 0, "train_size": None}
        assert run.arm not in {t.arm for t in tuned} or run.config.model_copy(update={"start": None}) in {
            t.config.model_copy(update=chosen) for t in tuned}  # fmt: skip


def test_a_setting_is_shared_by_the_seeds_of_an_arm_and_by_nothing_else():
    runs = plan("study").runs
    assert all(run.setting == run.config.key for run in runs if run.seed == 0)
    assert len({(run.setting, run.seed) for run in runs}) == len({run.config for run in runs})
    of_setting = defaultdict(set)
    for run in runs:
        of_setting[run.setting].add((run.model, run.arm, run.part, run.target, run.coefficient, run.quantizer))
    assert {len(places) for places in of_setting.values()} == {1}
    main = {run.setting for run in runs if run.part == "main" and run.model == "resnet20"}
    assert len(main) == len(("pretrained", "control", "kure"))


@EVERY_PROFILE
def test_scratch_differs_from_pretraining_in_the_regularizer_alone(profile):
    planned = plan(profile)
    for run in planned.select(arm="scratch"):
        (pretrained,) = planned.select(model=run.model, arm="pretrained", seed=run.seed)
        assert run.config.model_copy(update={"regularizer": None}) == pretrained.config


def test_other_lengths_of_pretraining_repeat_the_main_arms(monkeypatch):
    """Their keys are those under which the runs were trained."""
    small, *others = PROFILES["study"]
    monkeypatch.setitem(PROFILES, "study", (replace(small, lengths=(60,), length_seeds=2), *others))
    longer = plan("study").select(part="lengths", model="resnet20")
    assert [(run.arm, run.seed, run.config.key) for run in longer] == [
        ("pretrained", 0, "01c6ab978a"), ("control", 0, "dc85e733e0"), ("kure", 0, "656d4e1a10"),
        ("pretrained", 1, "255ee88083"), ("control", 1, "3746e049f4"), ("kure", 1, "c473248f57"),
    ]  # fmt: skip
    main = plan("study").select(model="resnet20", part="main", seed=[0, 1])
    for run, usual in zip(longer, main, strict=True):
        assert (run.config.start or run.config).epochs == 60
        start = usual.config.start and usual.config.start.model_copy(update={"epochs": 60})
        same = {"start": start} if start else {"epochs": 60}
        assert run.config == usual.config.model_copy(update=same)


def test_profiles_differ_in_scale():
    for profile, images in {"smoke": 512, "quick": 16_000, "study": None}.items():
        assert {run.config.train_size for run in plan(profile).runs if run.part != "tuning"} == {images}
    for profile in ("quick", "study"):
        on_clothes = [run for run in plan(profile).runs if run.model != "resnet18"]
        assert {run.config.data for run in on_clothes} == {"fashion_mnist"}
    for run in plan("imagenet").runs:
        pretraining = run.config.start or run.config
        assert pretraining.pretrained and pretraining.epochs == 0 and run.config.data == "imagenet"
        assert (run.config.learning_rate, run.config.decay_every) == (1e-3, 30)


def test_the_study_has_the_large_profiles_resnet_as_a_part_that_is_asked_for_by_name():
    large = {run.config for run in plan("large").runs}
    natural = [run for run in plan("study").runs if run.config.data == "tiny_imagenet"]
    assert {run.config for run in natural} <= large
    assert [run.config.epochs for run in natural if run.part == "natural" and run.arm == "pretrained"] == [24] * 3
    assert [run.config.epochs for run in natural if run.part == "lengths" and run.arm == "pretrained"] == [6, 12]
    assert plan("study").networks == [*plan("study").models, "resnet20_group_norm", "resnet18", "vit_small_images"]
    assert not set(plan("study").select(arm=["control", "kure"])) & set(natural)


def test_the_large_profile_trains_torchvisions_networks_on_tiny_imagenet():
    for run in (run for run in plan("large").runs if run.part != "lengths"):
        recipe = (run.config.epochs, run.config.learning_rate, run.config.weight_decay, run.config.batch_size)
        assert recipe == ((5, 0.04, 2e-4, 256) if run.config.start else (24, 0.2, 2e-4, 256))
        assert run.config.data == "tiny_imagenet" and run.config.momentum == 0.9 and not run.config.pretrained
        assert run.config.kept == "float16", "of ten times the size"
    assert plan("large").models == ["resnet18", "mobilenet_v2"]


def test_an_unknown_profile_is_told_the_known_ones():
    with pytest.raises(KureError, match=r"'huge'.*smoke, quick, study, imagenet, large"):
        plan("huge")


def test_selecting_kure_means_the_papers_setting_unless_one_is_named():
    planned = plan("study")
    assert {run.config.regularizer for run in planned.select(arm="kure")} == {KURE}
    (swept,) = planned.select(arm="kure", target=3.0, seed=1)
    assert swept.config.regularizer == KureConfig(target=3.0) and swept.model == "resnet20"
    found = planned.select(arm="kure", coefficient=0.1, seed=0)
    assert [run.model for run in found] == ["resnet20", "mobilenet_v2_050"]
    assert [run.seed for run in planned.select(model="resnet20", arm="control")] == list(range(10))
    assert [run.seed for run in planned.select(model="resnet20", arm="control", kept=True)] == [0, 1, 2, 3, 4]
    assert [run.seed for run in planned.select(model="resnet20", arm="pretrained", part="main", kept=True)] == [0]
    assert [run.seed for run in planned.select(arm="activations", kept=True)] == [0, 1, 2]
    assert len(planned.select(part="target", arm="kure")) == 5 * 6
    assert planned.select(arm="kure", target=7.5) == []
    assert planned.select() == [run for run in planned.runs if not run.quantizer and run.part not in ASIDE]
    assert {run.config.held_out for run in planned.select(arm="kure")} == {0}


def test_quantized_training_is_selected_by_its_quantizer():
    planned = plan("study")
    harder = ["dorefa 3/3", "lsq 3/3", "dorefa 5/8", "dorefa 6/6", "lsq 4/8", "lsq 6/6"]
    assert planned.quantizers("resnet20") == ["dorefa 4/4", "lsq 4/4", *harder]
    assert planned.quantizers("mobilenet_v2_050") == ["dorefa 4/8", "lsq 4/8"]
    found = planned.select(model="resnet20", arm="kure", quantizer="lsq 4/4")
    assert [run.seed for run in found] == [0, 1, 2, 3, 4] and {run.part for run in found} == {"qat"}
    assert {run.config.quantization.quantizer for run in found} == {"lsq"}
    with pytest.raises(KureError, match=r"Unknown quantizer 'lsq 2/2': choose one of .*lsq 4/4"):
        planned.select(quantizer="lsq 2/2")


def test_a_sweep_is_completed_by_the_main_runs_of_its_networks_and_seeds():
    sweep = plan("study").sweep("target")
    labels = [(run.arm, run.config.regularizer.target if run.config.regularizer else None) for run in sweep.runs]
    assert labels == [
        *[("pretrained", None)] * 5, *[("control", None)] * 5,
        *[("kure", target) for target in (1.4, 1.6, 1.8, 2.4, 3.0, 4.0, 6.0) for _ in range(5)],
    ]  # fmt: skip
    assert [run.seed for run in sweep.runs] == [0, 1, 2, 3, 4] * 9
    assert sweep.models == ["resnet20"] and plan("study").sweep("coefficient").models == plan("study").models
    assert plan("quick").sweep("coefficient").models == ["resnet20"]
    assert plan("quick").sweep("scratch").runs == ()
    with pytest.raises(KureError, match=r"Unknown arm of a sweep 'l2': choose one of pretrained, control, kure"):
        plan("study").sweep("rivals")


def test_notebooks_name_the_runs_they_need():
    planned = plan("study")
    assert needed(planned, []).runs == needed(planned, ["01_step_size_sensitivity"]).runs == ()
    assert {run.part for run in needed(planned, ["07_bit_width_robustness_ptq"]).runs} == {"main"}
    every = needed(planned, [f"{number:02}_x" for number in range(24)])
    assert every == planned, "a run that no notebook reads"
    for stem in NEEDS:
        chosen = {run.config for run in needed(planned, [stem]).runs}
        assert all(config.start is None or config.start in chosen for config in chosen)


def test_opening_a_profile_makes_it_the_ambient_one(results_folder):
    assert plans.open("smoke") == plan("smoke")
    assert paths.results() == results_folder.parent / "smoke"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"arm": "kurre"}, "Unknown arm 'kurre': .*pretrained, control, kure"),
        ({"arm": ["control", "kurre"]}, "Unknown arm 'kurre'"),
        ({"part": "mian"}, "Unknown part 'mian': .*main"),
        ({"model": "resnet"}, "Unknown model 'resnet': .*resnet20, mobilenet_v2_050"),
        ({"seed": 99}, "Unknown seed 99: .*0, 1, 2, 3, 4"),
        ({"quantizer": "lsq 9/9"}, "Unknown quantizer 'lsq 9/9': .*lsq 4/4"),
        ({"modle": "resnet20"}, "Unknown choice 'modle': .*model"),
    ],
)
def test_what_does_not_exist_cannot_be_selected_or_measured(wanted, said):
    for ask in (plan("study").select, plan("study").records, lambda **wanted: plan("study").measure([], **wanted)):
        with pytest.raises(KureError, match=said):
            ask(**wanted)


def test_a_part_that_a_profile_lacks_is_empty_not_an_error():
    frame = plan("quick").measure([], part="rivals")
    assert frame.empty and list(frame.columns) == list(COLUMNS)


def test_lists_select_what_single_values_select_in_the_order_of_the_lists():
    study, arms, seeds = plan("study"), ["kure", "control"], [2, 0]
    one_by_one = [run for arm in arms for seed in seeds for run in study.select(arm=arm, seed=seed, part="main")]
    assert study.select(arm=arms, seed=seeds, part="main") == one_by_one
    assert len(one_by_one) == 2 * 2 * 2  # arms, seeds, networks
    by_quantizer = study.select(model="resnet20", quantizer=["lsq 4/4", "dorefa 4/4"], seed=0)
    assert [run.quantizer for run in by_quantizer] == 2 * ["lsq 4/4"] + 2 * ["dorefa 4/4"]


def test_measurements_are_the_evaluations_on_record(monkeypatch):
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.setenv("KURE_CHECK", "1")
    specs = [QuantizationSpec(weight_bits=bits, activation_bits=bits) for bits in (None, 4)]
    frame = plan("study").measure(specs, model="resnet20", arm=["control", "kure"], seed=[0, 1])
    assert frame.arm.tolist() == 4 * ["control"] + 4 * ["kure"] and frame.seed.tolist() == 2 * [0, 0, 1, 1]
    assert frame.bits.tolist() == 4 * ["FP", "4/4"] and frame.w_bits.tolist() == 4 * [32, 4]
    (run,) = plan("study").select(model="resnet20", arm="kure", seed=1)
    path = ROOT / "results" / "study" / "records" / f"{run.config.label}-{run.config.key}.json"
    kept = json.loads(path.read_text())
    assert frame.iloc[-1][["top1", "loss"]].tolist() == kept["evaluations"][specs[1].key]
    assert frame.train_loss.iloc[-1] == kept["curves"]["train_loss"][-1]


def test_a_bar_counts_the_evaluations_that_are_made(results_folder, tiny, monkeypatch):
    """Those on record, and one asked for twice, are not made; few are made without a word."""
    bars, made = [], progress.bar
    monkeypatch.setattr(progress, "bar", lambda *given, **options: bars.append(made(*given, **options)) or bars[-1])
    monkeypatch.setattr(runs.evaluation, "evaluate", lambda model, split: Evaluation(50.0, 1.0))
    planned = Plan("trial", (Planned("resnet20", "pretrained", "main", tiny),))
    widths = [QuantizationSpec(weight_bits=bits) for bits in (8, 6, 5, 4, 3, 2)]
    for specs in (widths[:2], widths, [*widths, QuantizationSpec(weight_bits=7), widths[0]]):
        assert len(planned.measure(specs)) == len(specs)
    assert [bar.total for bar in bars] == [2, 4, 1]
    assert all(bar.disable for bar in bars), "nobody looks"
    monkeypatch.setenv(progress.FILE, str(results_folder / "line"))
    others = [QuantizationSpec(weight_bits=4, step_ratio=ratio) for ratio in (0.7, 0.8, 0.9, 1.1)]
    planned.measure([*others, *others, widths[0]])
    assert (bars[-1].disable, bars[-1].n, bars[-1].total) == (True, 4, 4), "it counted them, and is closed"
    planned.measure([QuantizationSpec(weight_bits=3, step_ratio=ratio) for ratio in (0.7, 0.8, 0.9)])
    assert (bars[-1].n, bars[-1].total) == (0, 3), "a few are made without a word"
