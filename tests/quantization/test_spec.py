"""Specifications: what cannot be is refused where it is made, and their keys are those of the records."""

import json
from dataclasses import replace

import pytest

from kure_lib.paths import ROOT, KureError
from kure_lib.quantization.spec import IMAGES, PIPELINES, ROUNDINGS, SEARCH, QuantizationSpec
from kure_lib.tensors.grids import FP4_E2M1, MID_RISE, MID_TREAD, SIGNED_INT, Bits
from kure_lib.tensors.steps import PER_CHANNEL, Scope, per_block

RECORDS = sorted((ROOT / "results" / "study" / "records").glob("*.json"))
STORED = {"weight_bits": 4, "grid": SIGNED_INT, "rounding": "even"}


def test_the_keys_of_all_records_are_written_as_they_stand():
    """The key of a specification is the name of its evaluation in every record: new fields must not change it."""
    keys = {key for file in RECORDS for key in json.loads(file.read_text())["evaluations"]}
    assert len(keys) > 500
    assert [key for key in keys if QuantizationSpec.named(key).key != key] == []


def test_the_key_counts_what_is_not_a_default_by_the_names_of_the_records():
    assert QuantizationSpec().key == QuantizationSpec(step_ratio=1.0, grid="mid_rise").key == "{}"
    spec = QuantizationSpec(weight_bits=4, grid=FP4_E2M1, step_rule="mx", scope=per_block(32))
    assert json.loads(spec.key) == {"weight_bits": 4, "grid": "fp4_e2m1", "method": "mx", "block": 32}
    spec = QuantizationSpec(**STORED, scope=PER_CHANNEL)
    assert json.loads(spec.key) == {"weight_bits": 4, "grid": "signed_int", "master": "even", "per_channel": True}


def test_a_grid_is_given_by_its_name_or_itself():
    assert QuantizationSpec(weight_bits=2, grid="mid_tread") == QuantizationSpec(weight_bits=2, grid=MID_TREAD)
    assert QuantizationSpec(weight_bits=2, activation_bits=8).bits == Bits(2, 8)


def test_what_needs_calibration_images_names_their_number():
    assert QuantizationSpec(weight_bits=4).calibration is None
    reconstruction = {"reconstruction": "gptq", "weight_bits": 4}
    for fields in ({"activation_bits": 4}, {"step_rule": "lapq", "weight_bits": 4}, {"reestimate_batch_norm": True},
                   reconstruction):  # fmt: skip
        assert QuantizationSpec(**fields).calibration == IMAGES
        assert json.loads(QuantizationSpec(**fields, calibration=64).key)["calibration"] == 64
    assert QuantizationSpec(step_rule="lsq", weight_bits=4, activation_bits=4).calibration is None


def test_only_lapq_names_how_long_it_searches_and_the_usual_length_is_not_in_the_key():
    assert QuantizationSpec(weight_bits=4).search is None
    usual, short = QuantizationSpec(weight_bits=4, step_rule="lapq"), {"weight_bits": 4, "method": "lapq", "search": 30}
    assert usual == QuantizationSpec(weight_bits=4, step_rule="lapq", search=400) and usual.search == SEARCH == 400
    assert json.loads(usual.key) == {"weight_bits": 4, "method": "lapq", "calibration": IMAGES}
    spec = QuantizationSpec(weight_bits=4, step_rule="lapq", search=30)
    assert json.loads(spec.key) == short | {"calibration": IMAGES}
    assert QuantizationSpec.named(spec.key) == spec and QuantizationSpec.named(usual.key) == usual


def test_only_adaround_names_its_iterations_and_the_usual_number_is_not_in_the_key():
    usual, few = ({"weight_bits": 4, "reconstruction": "adaround"} | more for more in ({}, {"iterations": 30}))
    assert QuantizationSpec(**usual).iterations == 1000 and "iterations" not in QuantizationSpec(**usual).key
    assert json.loads(QuantizationSpec(**few).key)["iterations"] == 30
    for spec in (QuantizationSpec(**usual), QuantizationSpec(**few)):
        assert QuantizationSpec.named(spec.key) == spec
    assert QuantizationSpec(weight_bits=4, reconstruction="gptq").iterations is None


def test_what_is_none_is_what_is_left_out():
    for fields in (
        {"step_rule": "lapq", "weight_bits": 4},
        {"activation_bits": 4},
        {"weight_bits": 4},
        {"weight_bits": 4, "perturbation": "stochastic"},
        {"weight_bits": 4, "reconstruction": "adaround"},
    ):
        unsaid = dict.fromkeys(QuantizationSpec.model_fields.keys() - fields.keys())
        assert QuantizationSpec(**unsaid, **fields) == QuantizationSpec(**fields)
        assert QuantizationSpec.model_validate(QuantizationSpec(**fields)) == QuantizationSpec(**fields)


def test_layers_are_named_in_any_order_and_travel_in_the_key():
    one, other = (QuantizationSpec(weight_bits=3, layers=names) for names in (["b", "a"], ("a", "b", "a")))
    assert one == other and json.loads(one.key) == {"weight_bits": 3, "layers": ["a", "b"]}
    assert QuantizationSpec.named(one.key) == one


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_goes_with_bits_scope_and_batch_norms(rounding):
    spec = QuantizationSpec(**STORED | {"rounding": rounding, "scope": PER_CHANNEL}, reestimate_batch_norm=True)
    assert spec.rounding == rounding and spec.calibration == IMAGES


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weight_bit": 4}, "weight_bit=4"),
        ({"step_rule": "kl"}, "per tensor 'kl': choose one of mse, max_abs"),
        ({"step_rule": "lp:two"}, "'lp:two' cannot be read"),
        ({"step_rule": "percentile:0"}, "percentile"),
        ({"step_rule": "mx"}, "per tensor 'mx'"),
        ({"step_rule": "lapq"}, "something to quantize"),
        ({"weight_bits": 3, "grid": FP4_E2M1}, "fp4_e2m1 has 4 bits"),
        ({"step_ratio": float("inf")}, "step_ratio=inf"),
        ({"activation_ratio": -1}, "activation_ratio=-1"),
        ({"calibration": 0}, "calibration=0"),
        ({"step_rule": "lapq", "weight_bits": 4, "search": 0}, "search=0"),
        ({"weight_bits": 4, "search": 30}, "Only LAPQ searches: leave search=30 out"),
        ({"step_rule": "lsq", "weight_bits": 4, "search": 30}, "Only LAPQ searches: leave search=30 out"),
        ({"step_rule": "dorefa", "weight_bits": 4, "scope": PER_CHANNEL}, "by dorefa cannot take scope"),
        ({"step_rule": "lsq", "weight_bits": 4, "power_of_two": True}, "by lsq cannot take power_of_two"),
        (STORED | {"rounding": "odd"}, "rounding 'odd': choose one of step, even"),
        (STORED | {"weight_bits": 9}, "1 to 8 bits"),
        (STORED | {"scope": per_block(8)}, "per tensor or per channel"),
        (STORED | {"step_ratio": 1.1}, "8-bit copy cannot take step_ratio"),
        (STORED | {"grid": MID_TREAD}, "8-bit copy cannot take grid"),
        (STORED | {"reconstruction": "gptq"}, "8-bit copy cannot take reconstruction"),
        ({"step_rule": "lsq", "weight_bits": 4, "reconstruction": "gptq"}, "by lsq cannot take reconstruction"),
        ({"step_rule": "lapq", "weight_bits": 4, "reconstruction": "gptq"}, "nearest level: leave reconstruction out"),
        ({"weight_bits": 4, "reconstruction": "gptq", "bias_correction": True}, "leave bias_correction out"),
        ({"activation_bits": 4, "reconstruction": "gptq"}, "no weights to round by gptq: give weight_bits"),
        ({"weight_bits": 4, "grid": FP4_E2M1, "reconstruction": "adaround"}, "even grid, which fp4_e2m1 is not"),
        ({"weight_bits": 4, "reconstruction": "gptq", "iterations": 9}, "Only AdaRound learns: leave iterations=9 out"),
        ({"weight_bits": 4, "reconstruction": "adaround", "iterations": 0}, "iterations=0"),
        ({"weight_bits": 4, "reconstruction": "obq"}, "reconstruction='obq'"),
        ({"weight_bits": 4, "scope": Scope("row")}, "no scope .*: take PER_TENSOR, PER_CHANNEL or per_block"),
        ({"weight_bits": 4, "scope": Scope("block")}, "no scope"),
        ({"weight_bits": 4, "grid": replace(MID_RISE, offset=0.25)}, "not the grid that records call mid_rise"),
        ({"weight_bits": 4, "grid": replace(MID_RISE, name="mine")}, "quantization grid 'mine': choose one of"),
        ({"activation_bits": 4, "scope": per_block(32), "step_rule": "mx"}, "per tensor 'mx'"),
        (STORED | {"rounding": ""}, "rounding ''"),
        ({"weight_bits": 4, "calibration": 64}, "Nothing here looks at images: leave calibration=64 out"),
        ({"layers": ["0"]}, "Named layers have weights to quantize: give weight_bits"),
        ({"weight_bits": 4, "layers": "0"}, "layers='0'"),
        ({"step_rule": "lsq", "weight_bits": 4, "layers": ["0"]}, "by lsq cannot take layers"),
        (STORED | {"layers": ["0"]}, "8-bit copy cannot take layers"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields, said):
    with pytest.raises(KureError, match=said) as error:
        QuantizationSpec(**fields)
    assert "\n" not in str(error.value)


def test_the_pipelines_are_specifications_and_their_keys_those_of_the_records():
    keys = {name: json.loads(QuantizationSpec(weight_bits=3, **fields).key) for name, fields in PIPELINES.items()}
    assert keys["plain"] == {"weight_bits": 3}
    assert keys["lapq"] == {"weight_bits": 3, "method": "lapq", "calibration": IMAGES}
    found = {key for file in RECORDS for key in json.loads(file.read_text())["evaluations"]}
    assert {json.dumps(key, sort_keys=True) for key in keys.values()} <= found
