"""AdaRound against every rounding there is, for layers of few weights, and as a view of whole networks."""

from itertools import product

import pytest
import torch
from helpers import same_weights
from torch import nn

from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import adaround, layerwise
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.grids import MID_RISE, MID_TREAD, SIGNED_INT
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, best_step

COLUMNS = 10
UPS = torch.tensor(list(product((0.0, 1.0), repeat=COLUMNS)))  # [1024, columns]


def drawn(seed, grid, bits, scope):
    """100 rows of weights, their steps, and what they see: patches in full precision and quantized, as columns."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(100, COLUMNS, generator=draw)
    full = torch.randn(COLUMNS, COLUMNS, generator=draw) @ torch.randn(COLUMNS, 200, generator=draw)
    seen = full + 0.3 * torch.randn(COLUMNS, 200, generator=draw)
    return weight, best_step(weight, bits, grid, scope=scope).expand_as(weight), full, seen


@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
@pytest.mark.parametrize(("grid", "bits"), [(MID_RISE, 2), (MID_RISE, 3), (MID_TREAD, 3), (SIGNED_INT, 4)])
def test_it_is_close_to_the_best_of_all_roundings(grid, bits, scope):
    """Of all 1024 roundings of each row up or down the best is known: half of the rows reach it within a twentieth."""
    weight, step, full, seen = drawn(0, grid, bits, scope)
    moment, cross = (x @ seen.T / 200 for x in (seen, full))

    def error(levels):
        return (levels @ seen - weight @ full).square().mean(-1)

    low = (weight / step - grid.offset).floor()
    codes = (low[:, None] + UPS).clamp(grid.lowest(bits), grid.highest(bits))  # [rows, 1024, columns]
    every = (codes + grid.offset) * step[:, None]
    best = (every @ seen - (weight @ full)[:, None]).square().mean(-1).min(1).values
    made = adaround.rounded(weight[None], step[None], bits, grid, moment[None], cross[None])[0]
    assert (every == made[:, None]).all(-1).any(1).all()  # up or down, nothing else
    ratio, nearest = error(made) / best, error(quantize(weight, step, bits, grid)) / best
    assert ratio.min() > 0.999 and ratio.median() < 1.05 and ratio.mean() < 1.25
    assert ratio.mean() - 1 < 0.3 * (nearest.mean() - 1)


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest_level():
    weight, step, *_ = drawn(0, MID_RISE, 3, PER_TENSOR)
    diagonal = torch.diag(torch.linspace(1, 2, COLUMNS))
    made = adaround.rounded(weight[None], step[None], 3, MID_RISE, diagonal[None], diagonal[None])[0]
    far = (weight / step).frac().abs().sub(0.5).abs() < 0.45  # from the middle between two levels, a whole number
    assert torch.allclose(made[far], quantize(weight, step, 3, MID_RISE)[far])


def test_weights_that_are_levels_stay_where_they_are():
    weight, _, full, _ = drawn(0, MID_RISE, 3, PER_TENSOR)
    levels, step = quantize(weight, 0.5, 3, MID_RISE)[None], torch.full((1, *weight.shape), 0.5)
    moment = (full @ full.T / 200)[None]
    assert torch.equal(adaround.rounded(levels, step, 3, MID_RISE, moment, moment, iterations=100), levels)


def test_inputs_that_are_always_zero_leave_finite_levels():
    weight, step, *_ = drawn(0, MID_RISE, 3, PER_TENSOR)
    zero = torch.zeros(1, COLUMNS, COLUMNS)
    made = adaround.rounded(weight[None], step[None], 3, MID_RISE, zero, zero)[0]
    assert torch.allclose(quantize(made, step, 3, MID_RISE), made)


@pytest.mark.parametrize("options", [{}, {"scope": PER_CHANNEL}, {"grid": SIGNED_INT, "power_of_two": True}], ids=str)
def test_the_view_fits_each_layer_to_its_output_in_full_precision_and_leaves_no_trace(tiny_model, options, float32):
    images = torch.randn(100, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    spec = QuantizationSpec(weight_bits=3, reconstruction="adaround", iterations=300, **options)
    with torch.inference_mode(), quantized(tiny_model, spec, images) as view:
        made = {name: layer.weight.clone() for name, layer in quantized_layers(view).items()}
        with pytest.raises(KureError, match="quantized already"), quantized(view, spec, images):
            pass
    with torch.no_grad(), quantized(tiny_model, spec, images) as again:
        assert all(torch.equal(made[name], layer.weight) for name, layer in quantized_layers(again).items())
    assert same_weights(before, tiny_model.state_dict())
    with torch.no_grad(), quantized(tiny_model, spec.model_copy(update={"reconstruction": None})) as nearest:
        levels = {name: layer.weight.clone() for name, layer in quantized_layers(nearest).items()}
    seen = images
    for at, layer in enumerate(tiny_model[:6]):  # up to the last quantized layer, each after its better predecessors
        with torch.no_grad():
            if str(at) in made:
                target = tiny_model[: at + 1](images)
                error = [
                    torch.func.functional_call(layer, {"weight": weights[str(at)]}, seen).sub(target).square().mean()
                    for weights in (made, levels)
                ]
                assert error[0] < error[1]
            seen = torch.func.functional_call(layer, {"weight": made[str(at)]} if str(at) in made else {}, seen)


def test_groups_are_layers_of_their_own():
    torch.manual_seed(0)
    x, conv = torch.randn(8, 4, 6, 6), nn.Conv2d(4, 8, 3, groups=2, bias=False)
    step, spec = best_step(conv.weight, 3), QuantizationSpec(weight_bits=3, reconstruction="adaround", iterations=300)
    made = layerwise.rounded(nn.Sequential(conv), nn.Sequential(conv), "0", step, x, spec)
    same = 0.0
    for group in range(2):
        rows, part = slice(4 * group, 4 * group + 4), nn.Conv2d(2, 4, 3, bias=False)
        part.weight.data = conv.weight[rows].detach()
        alone = nn.Sequential(part)
        own = layerwise.rounded(alone, alone, "0", step, x[:, 2 * group : 2 * group + 2], spec)
        same += (own == made[rows]).float().mean().item() / 2
    assert same > 0.95  # the two share one unit of error and one mean of the regularizer, no more
