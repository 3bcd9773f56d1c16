"""GPTQ against the recursion it was derived from, against nearest rounding, and as a view of whole networks."""

import pytest
import torch
from helpers import same_weights
from torch import nn
from torch.nn.functional import unfold

from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import gptq, layerwise
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.grids import FP4_E2M1, MID_RISE, MID_TREAD, SIGNED_INT
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, best_step, per_block

GRIDS = pytest.mark.parametrize("grid", [MID_RISE, MID_TREAD, SIGNED_INT], ids=lambda grid: grid.name)


def layer(seed, groups=2, rows=6, columns=10, bits=3, grid=MID_RISE):
    """Weights, steps and the moment of inputs that depend on each other, float64."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=draw, dtype=torch.float64)
    mixing = torch.randn(groups, columns, columns, generator=draw, dtype=torch.float64)
    seen = mixing @ torch.randn(groups, columns, 50, generator=draw, dtype=torch.float64)
    return weight, best_step(weight, bits, grid).double().expand_as(weight), seen @ seen.mT / 50


def error(levels, weight, moment):
    difference = levels - weight
    return torch.einsum("gri,gij,grj->", difference, moment, difference).item()


def by_the_book(weight, step, bits, grid, moment):
    """Optimal brain quantization of one row in a fixed order: inverse Hessian, and Gaussian elimination from it."""
    inverse = torch.linalg.inv(moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype))
    weight, levels = weight.clone(), torch.empty_like(weight)
    for q in range(len(weight)):
        levels[q] = quantize(weight[q], step[q], bits, grid)
        weight -= (weight[q] - levels[q]) / inverse[q, q] * inverse[:, q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # the weight is fixed: its row and column are zero and not read again
    return levels


@GRIDS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_optimal_brain_quantization_in_a_fixed_order(grid, bits):
    for seed in range(5):
        weight, step, moment = layer(seed, bits=bits, grid=grid)
        expected = [
            [by_the_book(*row, bits, grid, of_group) for row in zip(*rows, strict=True)]
            for *rows, of_group in zip(weight, step, moment, strict=True)
        ]
        expected = torch.stack([torch.stack(rows) for rows in expected])
        assert (gptq.rounded(weight, step, bits, grid, moment) - expected).abs().max() < 1e-6


@GRIDS
def test_it_lowers_the_error_of_the_layer(grid):
    ratios = []
    for seed in range(30):
        weight, step, moment = layer(seed, grid=grid)
        levels = gptq.rounded(weight, step, 3, grid, moment)
        ratios.append(error(levels, weight, moment) / error(quantize(weight, step, 3, grid), weight, moment))
    assert sum(ratios) / len(ratios) < 0.8


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest_level():
    weight, step, moment = layer(0)
    for diagonal in (torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1)), torch.zeros_like(moment)):
        assert torch.equal(gptq.rounded(weight, step, 3, MID_RISE, diagonal), quantize(weight, step, 3))


CONVOLUTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"groups": 4}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"},
     {"padding": (0, 1), "groups": 2, "stride": (2, 1)}],
    ids=str,
)  # fmt: skip


@CONVOLUTIONS
def test_the_patches_are_what_a_convolution_multiplies_its_weights_by(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, bias=False, **options), torch.randn(2, 4, 7, 9)
    made = torch.einsum("grc,gpc->grp", layerwise._matrix(conv, conv.weight), layerwise.patches(conv, x))
    out = conv(x)
    assert torch.allclose(made.flatten(0, 1), out.transpose(0, 1).flatten(1), atol=1e-5)


@pytest.mark.parametrize("dims", [1, 3])
def test_patches_have_any_dimension_and_padding(dims):
    torch.manual_seed(0)
    conv = (nn.Conv1d, None, nn.Conv3d)[dims - 1](4, 6, 3, padding=1, padding_mode="circular", bias=False)
    x = torch.randn(2, 4, *[5] * dims)
    made = layerwise.patches(conv, x)[0] @ conv.weight.flatten(1).T
    assert torch.allclose(made.T, conv(x).transpose(0, 1).flatten(1), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_the_linear_layers_of_its_groups_on_unfolded_patches(groups):
    torch.manual_seed(groups)
    x, conv = torch.randn(8, 4, 6, 6), nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    columns = unfold(x, 3, padding=1, stride=2).unflatten(1, (groups, -1))  # [N, groups, columns, positions]
    step = best_step(conv.weight, 3, scope=PER_CHANNEL)
    spec = QuantizationSpec(weight_bits=3, scope=PER_CHANNEL, reconstruction="gptq")
    made = layerwise.rounded(nn.Sequential(conv), conv, "0", step, x, spec)
    for group in range(groups):
        rows = slice(group * 8 // groups, (group + 1) * 8 // groups)
        linear = nn.Linear(len(columns[0, group]), 8 // groups, bias=False)
        linear.weight.data = conv.weight[rows].flatten(1).detach()
        seen = columns[:, group].mT  # [N, positions, columns]
        own = layerwise.rounded(nn.Sequential(linear), linear, "0", step[rows].flatten(1), seen, spec)
        assert torch.allclose(own, made[rows].flatten(1), atol=1e-6)


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"scope": PER_CHANNEL}, {"grid": SIGNED_INT, "step_ratio": 1.1},
     {"scope": per_block(4), "step_rule": "max_abs"}],
    ids=str,
)  # fmt: skip


@OPTIONS
def test_the_view_sees_each_layer_after_those_before_it_and_leaves_no_trace(tiny_model, options):
    """What the view holds is made here by hand, layer by layer, writing into a copy of the network."""
    images = torch.randn(100, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    spec = QuantizationSpec(weight_bits=3, reconstruction="gptq", **options)
    with torch.inference_mode(), quantized(tiny_model, spec, images) as view:
        made = {name: layer.weight.clone() for name, layer in quantized_layers(view).items()}
    assert same_weights(before, tiny_model.state_dict())
    with torch.no_grad():
        for at, name in ((2, "2"), (4, "4"), (5, "5")):
            conv = tiny_model[at]
            x = tiny_model[:at](images)
            columns = unfold(x, conv.kernel_size).unflatten(1, (conv.groups, -1)).double()
            moment = torch.einsum("ngip,ngjp->gij", columns, columns)
            step = best_step(conv.weight, 3, spec.grid, spec.step_rule, spec.scope) * spec.step_ratio
            matrix, steps = (
                v.reshape(conv.groups, -1, columns.shape[2]) for v in (conv.weight, step.expand_as(conv.weight))
            )
            levels = gptq.rounded(matrix, steps, 3, spec.grid, moment).reshape(conv.weight.shape)
            assert (levels != made[name]).float().mean() < 0.01  # a tie in float32 may fall to the other side
            conv.weight.copy_(made[name])


def test_a_codebook_is_rounded_to_its_levels(tiny_model):
    images = torch.randn(20, 1, 10, 10)
    with quantized(tiny_model, weight_bits=4, grid=FP4_E2M1, reconstruction="gptq", images=images) as view:
        weight, step = view[5].weight, best_step(view[5].parametrizations.weight.original, 4, FP4_E2M1)
        assert torch.allclose(quantize(weight, step, 4, FP4_E2M1), weight)


def test_with_folded_batch_norms_the_copy_is_rounded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                          nn.Flatten(), nn.Linear(64, 2)).eval()  # fmt: skip
    with torch.no_grad():
        model[4].weight.mul_(3)
    images = torch.randn(10, 1, 8, 8)
    options = {"weight_bits": 2, "images": images, "fold_batch_norm": True}
    with quantized(model, reconstruction="gptq", **options) as view, quantized(model, **options) as nearest:
        assert view is not model and isinstance(view[4], nn.Identity)
        assert view[3].weight.abs().unique().tolist() == nearest[3].weight.abs().unique().tolist()


@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
def test_a_network_is_closer_to_itself_than_with_nearest_rounding(tiny_model, scope):
    torch.manual_seed(0)
    images, new = torch.randn(2, 200, 1, 10, 10).unbind()
    with torch.no_grad():
        expected, distance = tiny_model(new), []
        for reconstruction in ("gptq", None):
            with quantized(
                tiny_model, weight_bits=3, scope=scope, reconstruction=reconstruction, images=images
            ) as view:
                distance.append((view(new) - expected).square().mean())
    assert distance[0] < distance[1]


def test_calibration_images_are_needed_and_must_reach_the_layer(tiny_model):
    with (
        pytest.raises(KureError, match="give at least one"),
        quantized(tiny_model, weight_bits=3, reconstruction="gptq"),
    ):
        pass

    class Spared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x))

    model = Spared()
    with (
        pytest.raises(KureError, match="do not reach layer 'spare'"),
        quantized(model, weight_bits=3, reconstruction="gptq", images=torch.randn(3, 4)),
    ):
        pass
    assert not hasattr(model.spare, "parametrizations") and not model.spare._forward_pre_hooks
