"""A quantized model is a view: right inside the block, gone without a trace after it."""

import copy

import pytest
import torch
from helpers import same_weights
from torch import nn
from torch.nn.utils import prune
from torchvision import models as torchvision_models

from kure_lib.networks import models
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import ROOT, KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.grids import FP4_E2M1, MID_RISE, MID_TREAD, NF4, SIGNED_INT
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import PER_CHANNEL, PER_TENSOR, best_step, per_block

RECORDS = sorted((ROOT / "results" / "study" / "records").glob("*.json"))


class Snapshot:
    """All there is to see of a model from outside, to be compared later."""

    def __init__(self, model):
        self.state = copy.deepcopy(model.state_dict())
        self.parameters = [(name, id(p)) for name, p in model.named_parameters()]
        self.types = [type(m) for m in model.modules()]
        self.own = [sorted(vars(m)) for m in model.modules()]

    def is_of(self, model):
        return (
            same_weights(self.state, model.state_dict())
            and list(self.state) == list(model.state_dict())
            and self.parameters == [(name, id(p)) for name, p in model.named_parameters()]
            and self.types == [type(m) for m in model.modules()]
            and self.own == [sorted(vars(m)) for m in model.modules()]
        )


@pytest.fixture(params=["tiny", "resnet20", "mobilenet_v2_050"])
def model(request, tiny_model):
    torch.manual_seed(0)
    return tiny_model if request.param == "tiny" else models.build(request.param, 1, 10).eval()


@pytest.mark.parametrize(("architecture", "count"), [("resnet18", 19), ("mobilenet_v2", 51), ("resnet50", 52)])
def test_all_convolutions_and_linear_layers_but_the_first_and_the_last_are_quantized(architecture, count):
    with torch.device("meta"):
        net = torchvision_models.get_model(architecture, weights=None)
    weighted = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(quantized_layers(net)) == weighted[1:-1]
    assert len(quantized_layers(net)) == count


@pytest.mark.parametrize("grid", [MID_RISE, MID_TREAD, SIGNED_INT], ids=lambda grid: grid.name)
@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
def test_inside_the_weights_are_quantized_and_the_ends_are_not(tiny_model, grid, scope):
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    with quantized(tiny_model, weight_bits=3, grid=grid, scope=scope, step_ratio=1.25) as view:
        assert view is tiny_model
        for name in ("2", "4", "5"):
            weight = before[f"{name}.weight"]
            step = best_step(weight, 3, grid, scope=scope) * 1.25
            assert torch.equal(view.get_submodule(name).weight, quantize(weight, step, 3, grid))
        for name in ("0", "7"):
            assert torch.equal(view.get_submodule(name).weight, before[f"{name}.weight"])
        assert torch.equal(view[2].bias, before["2.bias"])


def test_the_method_chooses_the_step(tiny_model):
    weight = tiny_model[4].weight.detach().clone()
    with quantized(tiny_model, weight_bits=4, step_rule="max_abs"):
        assert torch.equal(tiny_model[4].weight, quantize(weight, best_step(weight, 4, rule="max_abs"), 4))


def test_the_network_computes_with_the_quantized_weights(tiny_model):
    image = torch.randn(3, 1, 10, 10)
    twin = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for name in ("2", "4", "5"):
            weight = twin.get_submodule(name).weight
            weight.copy_(quantize(weight, best_step(weight, 2), 2))
    with quantized(tiny_model, weight_bits=2):
        assert torch.equal(tiny_model(image), twin(image))
    assert not torch.equal(tiny_model(image), twin(image))


def test_afterwards_the_model_is_what_it_was(model):
    snapshot = Snapshot(model)
    with quantized(model, weight_bits=4):
        assert not snapshot.is_of(model)
    assert snapshot.is_of(model)


def test_also_when_an_exception_leaves_the_block(model):
    snapshot = Snapshot(model)
    with pytest.raises(ZeroDivisionError), quantized(model, weight_bits=4):
        1 / 0  # noqa: B018
    assert snapshot.is_of(model)


def test_only_named_layers_are_quantized(tiny_model):
    before = tiny_model[2].weight.detach().clone(), tiny_model[4].weight.detach().clone()
    with quantized(tiny_model, weight_bits=2, layers=["4"]):
        assert torch.equal(tiny_model[2].weight, before[0])
        assert tiny_model[4].weight.unique().numel() <= 4 < before[1].unique().numel()


def test_no_bits_is_the_model_itself(tiny_model):
    snapshot = Snapshot(tiny_model)
    with quantized(tiny_model) as view:
        assert view is tiny_model and snapshot.is_of(view)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (0.0, "zero everywhere")])
def test_weights_that_cannot_be_quantized_name_the_layer_and_leave_the_others(tiny_model, value, said):
    with torch.no_grad():
        tiny_model[4].weight.fill_(value)
    parameters = list(map(id, tiny_model.parameters()))
    names = list(tiny_model.state_dict())
    with (
        pytest.raises(KureError, match=rf"Layer '4' cannot be quantized: .*{said}"),
        quantized(tiny_model, weight_bits=4),
    ):
        pass
    assert list(map(id, tiny_model.parameters())) == parameters and list(tiny_model.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": ["9"]}, "layer '9': choose one of 2, 4, 5"), ({"layers": ["0"]}, "layer '0'"),
        ({"step_ratio": 0}, "step_ratio=0: .*greater than 0"), ({"step_ratio": float("nan")}, "step_ratio=nan"),
        ({"weight_bits": 0}, "weight_bits=0"), ({"weight_bits": 17}, "weight_bits=17"),
        ({"activation_bits": 0}, "activation_bits=0"), ({"activation_bits": 17}, "activation_bits=17"),
        ({"step_rule": "lapq"}, "'lapq'"), ({"step_rule": "kl"}, "per tensor 'kl'"),
        ({"step_ratio": float("inf")}, "step_ratio=inf"), ({"grid": "fp8"}, "grid 'fp8'"),
        ({"step_rule": "lapq", "scope": PER_CHANNEL}, "LAPQ chooses one step a tensor"),
        ({"scope": per_block(8)}, "per block of 8 'mse'"), ({"scope": "row"}, "scope='row'"),
        ({"spec": QuantizationSpec()}, "or by its fields"), ({"method": "mse"}, "method='mse'"),
        ({"step_rule": "dorefa"}, "evaluate its record"), ({"rounding": "odd"}, "rounding 'odd'"),
    ],
)  # fmt: skip
def test_wrong_options_are_errors_that_change_nothing(tiny_model, options, said):
    snapshot = Snapshot(tiny_model)
    with pytest.raises(KureError, match=said), quantized(tiny_model, **{"weight_bits": 4, **options}):
        pass
    assert snapshot.is_of(tiny_model)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scope", [PER_TENSOR, PER_CHANNEL])
def test_a_step_that_is_to_be_a_power_of_two_is_one(tiny_model, power_of_two, scope):
    with quantized(tiny_model, weight_bits=3, step_ratio=1.1, scope=scope, power_of_two=power_of_two):
        (used,) = tiny_model[4].parametrizations.weight
        exponents = torch.log2(used.step)
        assert used.step.shape == ((8, 1, 1, 1) if scope == PER_CHANNEL else ())
    assert torch.equal(exponents, exponents.round()) == power_of_two


def test_blocks_with_other_layers_may_be_nested(tiny_model):
    snapshot = Snapshot(tiny_model)
    with quantized(tiny_model, weight_bits=4, layers=["2"]):
        with quantized(tiny_model, weight_bits=2, layers=["4"]):
            assert tiny_model[2].weight.unique().numel() > 4 >= tiny_model[4].weight.unique().numel()
        assert tiny_model[4].weight.unique().numel() > 16 >= tiny_model[2].weight.unique().numel()
    assert snapshot.is_of(tiny_model)


def test_a_layer_is_not_quantized_twice(tiny_model):
    snapshot = Snapshot(tiny_model)
    with quantized(tiny_model, weight_bits=4):
        inside = tiny_model[5].weight.detach().clone()
        with pytest.raises(KureError, match="Layer '2' is quantized already"), quantized(tiny_model, weight_bits=2):
            pass
        assert torch.equal(tiny_model[5].weight, inside)
    assert snapshot.is_of(tiny_model)


def test_gradients_reach_the_weights_through_the_view(tiny_model):
    with quantized(tiny_model, weight_bits=4):
        tiny_model(torch.randn(2, 1, 10, 10)).square().sum().backward()
    assert tiny_model[4].weight.grad.abs().sum() > 0


def test_under_inference_mode_the_view_computes_the_same(tiny_model):
    images = torch.randn(4, 1, 10, 10)
    with torch.no_grad(), quantized(tiny_model, weight_bits=3) as view:
        expected = view(images)
    with torch.inference_mode(), quantized(tiny_model, weight_bits=3) as view:
        assert torch.equal(view(images), expected)


FORMATS = pytest.mark.parametrize(
    ("grid", "bits", "options"),
    [
        (FP4_E2M1, 4, {}),
        (NF4, 4, {"scope": PER_CHANNEL}),
        (FP4_E2M1, 4, {"step_rule": "mx", "scope": per_block(32)}),
        (FP4_E2M1, 4, {"step_rule": "nvfp4", "scope": per_block(16)}),
        (MID_RISE, 3, {"step_rule": "max_abs", "scope": per_block(8)}),
    ],
    ids=["tensor", "channel", "mx", "nvfp4", "integers by block"],
)


@FORMATS
def test_number_formats_are_a_view_too(tiny_model, grid, bits, options):
    before = Snapshot(tiny_model)
    weights = {name: layer.weight.detach().clone() for name, layer in quantized_layers(tiny_model).items()}
    with quantized(tiny_model, weight_bits=bits, grid=grid, **options) as view:
        for name, weight in weights.items():
            chosen = {"rule" if name == "step_rule" else name: value for name, value in options.items()}
            wanted = quantize(weight, best_step(weight, bits, grid, **chosen), bits, grid)
            assert torch.equal(view.get_submodule(name).weight, wanted)
    assert before.is_of(tiny_model)


def test_a_format_with_other_bits_is_an_error(tiny_model):
    with pytest.raises(KureError, match=r"fp4_e2m1 has 4 bits"):
        QuantizationSpec(weight_bits=3, grid=FP4_E2M1)


# Networks that cannot be quantized, or not wholly


class Attention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


def refused(said, model, **options):
    with pytest.raises(KureError, match=said) as error, quantized(model, **{"weight_bits": 4, **options}):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_of_torchscript_is_refused(tiny_model):
    for compiled in (torch.jit.script(tiny_model), torch.jit.trace(tiny_model, torch.zeros(1, 1, 10, 10))):
        refused("compiled by torch.jit.*before it was scripted or traced", compiled)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))], ids=str)
def test_where_nothing_would_be_quantized_it_is_said(model):
    refused("There is no layer to quantize", model)


def test_an_empty_choice_of_layers_is_refused(tiny_model):
    refused("There is no layer to quantize", tiny_model, layers=[])


def test_convolutions_of_any_dimension_are_quantized():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    full = model[1].weight.detach().clone()
    with quantized(model, weight_bits=2, scope=PER_CHANNEL):
        assert torch.equal(model[1].weight, quantize(full, best_step(full, 2, scope=PER_CHANNEL), 2))


def test_weights_of_attention_are_not_left_in_full_precision_silently():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 2)).eval()
    refused(r"'1\.attention' \(MultiheadAttention\) has weights that would stay in full precision", model)
    refused("There is no activation to quantize", model[::2], weight_bits=None, activation_bits=8,
            images=torch.randn(2, 3, 8))  # fmt: skip
    with quantized(model, weight_bits=2, layers=["1.mlp.0"]):
        assert model[1].mlp[0].weight.unique().numel() <= 4
        assert model(torch.randn(2, 3, 8)).isfinite().all()


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_that_cannot_be_is_refused(tiny_model, step):
    refused("The step of '4' is", tiny_model, steps={"4": torch.tensor(step)})
    refused("The step of '4' is", tiny_model, steps={"4": torch.tensor([1.0] * 7 + [step]).view(8, 1, 1, 1)})
    images = torch.randn(4, 1, 10, 10)
    tiny_model[6] = nn.Sequential(nn.ReLU(), nn.Flatten())
    refused("The step of '3:0' is", tiny_model, activation_bits=8, images=images, steps={"3:0": torch.tensor(step)})


def test_a_ratio_that_makes_a_step_infinite_is_refused(tiny_model):
    refused("The step of '2' is inf", tiny_model, step_ratio=1e60)


@pytest.mark.parametrize("name", ["0", "9", "3:0"])
def test_a_step_for_what_is_not_quantized_is_refused(tiny_model, name):
    refused(
        f"layer or site that is quantized '{name}': choose one of 2, 4, 5", tiny_model, steps={name: torch.ones(())}
    )


def test_a_step_of_another_shape_is_refused(tiny_model):
    refused(r"A step of shape \(3,\) does not suit the weights", tiny_model, steps={"5": torch.ones(3)})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda layer: nn.utils.weight_norm(layer), "computes its weight"),
        (lambda layer: nn.utils.spectral_norm(layer), "computes its weight"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "computes its weight"),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer), r"parametrized \(_WeightNorm\)"),
        (lambda layer: nn.utils.parametrizations.orthogonal(layer), r"parametrized \(_Orthogonal\)"),
    ],
    ids=["weight norm", "spectral norm", "pruned", "parametrized weight norm", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_no_plain_parameter_is_refused(tiny_model, make, said):
    make(tiny_model[5])
    snapshot = Snapshot(tiny_model)
    refused(f"layer '5'.*{said}|Layer '5' {said}", tiny_model)
    assert snapshot.is_of(tiny_model)
