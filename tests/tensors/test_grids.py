"""Bit-widths of weights and activations: read, written, refused."""

import pytest
import torch

from kure_lib.findings import paper
from kure_lib.paths import KureError
from kure_lib.tensors.grids import Bits, levels
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step


@pytest.mark.parametrize(
    ("name", "bits", "widths"),
    [
        ("FP", Bits(), (32, 32)),
        ("4/FP", Bits(4), (4, 32)),
        ("FP/8", Bits(None, 8), (32, 8)),
        ("6/6", Bits(6, 6), (6, 6)),
    ],
)
def test_a_name_and_its_bit_widths_stand_for_each_other(name, bits, widths):
    assert Bits.named(name) == bits and str(bits) == name and bits.widths == widths


def test_every_setting_of_table_1_is_read_and_written_back():
    settings = list(paper.TABLE_1.setting.unique())
    assert [str(Bits.named(setting)) for setting in settings] == settings
    widths = paper.TABLE_1[["weight_bits", "activation_bits"]].itertuples(index=False, name=None)
    assert [Bits.named(setting).widths for setting in paper.TABLE_1.setting] == list(widths)


@pytest.mark.parametrize("name", ["", "4", "4/", "four/FP", "4/8/8", "fp", "-4/FP", "4.0/8"])
def test_a_name_that_cannot_be_read_is_an_error(name):
    with pytest.raises(KureError, match=f"'{name}'"):
        Bits.named(name)


@pytest.mark.parametrize("bits", [0, 17, 2.5, True])
def test_bit_widths_that_no_grid_has_are_refused(bits):
    with pytest.raises(KureError, match=f"to {bits} bits"):
        Bits(4, bits)


def test_a_name_in_place_of_a_grid_is_one_sentence():
    x = torch.linspace(-1, 1, 9)
    for ask in (lambda: quantize(x, 0.5, 2, "mid_rise"), lambda: best_step(x, 2, "mid_rise"), lambda: levels(2, "fp")):
        with pytest.raises(KureError, match="is no grid: give one itself, such as MID_RISE"):
            ask()
