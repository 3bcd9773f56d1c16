"""Sums wrap around as numpy's integers do, no earlier than the safe width says, and only where codes meet codes."""

import numpy as np
import pytest
import torch
from helpers import same_weights
from torch import nn

from kure_lib.networks import activations, device, models
from kure_lib.paths import KureError
from kure_lib.quantization.accumulators import safe_bits, wrapped
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.study.views import choosing
from kure_lib.tensors.grids import SIGNED_INT
from kure_lib.tensors.steps import PER_CHANNEL, per_block

WHOLE = {"weight_bits": 4, "activation_bits": 4, "grid": "signed_int"}
IMAGES = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    """Convolutions of three kinds and linear layers, with ReLUs of which the first and the last are not quantized."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 12), nn.ReLU(), nn.Linear(12, 8),
        nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("bits", "kind"), [(8, np.int8), (16, np.int16)])
def test_sums_wrap_around_as_numpy_s_integers_do(bits, kind):
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**23), 2**23, 10_000)
    assert np.array_equal(wrapped(torch.tensor(sums, dtype=torch.float32), bits).numpy(), sums.astype(kind))


def test_the_order_of_additions_does_not_matter():
    """Wrapped after every addition, in two orders, by numpy: what is left is the sum wrapped once."""
    products = np.random.default_rng(1).integers(-120, 121, (300, 50)).astype(np.int8)
    with np.errstate(over="ignore"):
        forwards = np.add.accumulate(products, axis=1, dtype=np.int8)[:, -1]
        backwards = np.add.accumulate(products[:, ::-1], axis=1, dtype=np.int8)[:, -1]
    once = wrapped(torch.tensor(products.sum(1, dtype=np.int64)).float(), 8).numpy()
    assert np.array_equal(forwards, once) and np.array_equal(backwards, once)
    assert (products.sum(1, dtype=np.int64) != once).mean() > 0.2  # many did run over


@pytest.mark.parametrize("activation_bits", [1, 2])
def test_the_safe_width_is_that_of_the_worst_input(activation_bits):
    """Every input is tried: no sum runs over at the safe width, and one does with a bit less."""
    codes = torch.tensor([[3.0, -4.0, 1.0, -1.0], [2.0, 3.0, -1.0, 0.0]])
    bits, values = safe_bits(codes, activation_bits), torch.arange(2**activation_bits).float()
    sums = torch.cartesian_prod(*[values] * 4) @ codes.T
    assert torch.equal(wrapped(sums, bits), sums) and not torch.equal(wrapped(sums, bits - 1), sums)


def integer_sums(weight, step, x, unit, layer, bits):
    """A convolution or a product in numpy's 64-bit integers, wrapped as an integer type of so many bits would be."""
    codes, inputs = ((a.double() / s.double()).round().long() for a, s in ((weight, step), (x, unit)))
    if isinstance(layer, nn.Linear):
        sums = inputs @ codes.T
    else:  # a patch at a time
        size = codes.shape[-1]
        patches = inputs.unfold(2, size, 1).unfold(3, size, 1)
        groups = layer.groups
        patches = patches.unflatten(1, (groups, -1))
        sums = torch.einsum("ngchwij,gocij->ngohw", patches, codes.unflatten(0, (groups, -1))).flatten(1, 2)
    low = -(2 ** (bits - 1))
    return (sums - low) % 2**bits + low, step.double().flatten()


@pytest.mark.parametrize("scope", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [6, 20])
def test_every_layer_whose_input_is_codes_sums_them_in_its_accumulator(model, scope, bits):
    fields = WHOLE | ({"scope": PER_CHANNEL} if scope == "channel" else {})
    seen, inputs = {}, {}

    def note(name):
        def hook(layer, given, output):
            inputs[name], seen[name] = given[0], output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in ("2", "4", "6", "9", "11")]
    with torch.no_grad(), quantized(model, images=IMAGES, **fields, accumulator_bits=bits):
        model(IMAGES)
        moved = 0
        for name in ("4", "6", "11"):
            layer = model.get_submodule(name)
            step, x = layer.parametrizations.weight[0].step, inputs[name]
            unit = torch.unique(x)[1]  # the lowest code above zero
            sums, steps = integer_sums(layer.weight, step, x, unit, layer, bits)
            ones = (1,) * (sums.dim() - 2)
            expected = sums * (steps * unit.double()).reshape(-1, *ones)
            expected = expected + (0 if layer.bias is None else layer.bias.double().reshape(-1, *ones))
            assert torch.allclose(seen[name].double(), expected, rtol=1e-5, atol=1e-5)
            usual = type(layer).forward(layer, x)
            moved += int(((seen[name] - usual).abs() > 1e-3).sum())
        assert (moved > 0) is (bits == 6)
        for name in ("2", "9"):  # whose inputs are in full precision, or do not say of which step they are
            layer = model.get_submodule(name)
            assert torch.equal(seen[name], type(layer).forward(layer, inputs[name]))
    for hook in hooks:
        hook.remove()


def test_a_residual_network_is_what_it_was_with_wide_sums_and_after_the_view():
    torch.manual_seed(0)
    network = models.build("resnet20", 1, 10).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(16, 1, 28, 28)
    scores = {}
    for bits in (None, 24, 7):
        with torch.inference_mode(), quantized(network, images=images, **WHOLE, accumulator_bits=bits) as view:
            scores[bits] = view(images)
    assert torch.allclose(scores[None], scores[24], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scores[None], scores[7], rtol=0.1, atol=0.1)
    assert same_weights(before, network.state_dict()) and "forward" not in vars(network.layer1[0].conv1)
    assert activations.sites(network, images[:1])  # and it runs


def test_sums_that_float32_cannot_hold_are_made_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3),
                          nn.ReLU(), nn.Conv2d(64, 2, 3)).eval()  # fmt: skip
    images, kept = torch.randn(4, 1, 12, 12), {}
    spec = {"weight_bits": 16, "activation_bits": 8, "grid": SIGNED_INT, "accumulator_bits": 12}
    hook = model[4].register_forward_hook(lambda _, given, output: kept.update(x=given[0], y=output))
    with torch.no_grad(), device.in_float32(), quantized(model, images=images, **spec):
        model(images)
        step, x = model[4].parametrizations.weight[0].step, kept["x"]
        unit = x.step
        codes, weights = (
            (value.double() / size.double()).round() for value, size in ((x, unit), (model[4].weight, step))
        )
        sums = nn.functional.conv2d(codes, weights)
        assert sums.abs().max() > 2**24
        wanted = ((sums + 2**11) % 2**12 - 2**11) * (step.double() * unit.double()) + model[4].bias.double().view(
            -1, 1, 1
        )
    hook.remove()
    torch.testing.assert_close(kept["y"].double(), wanted, rtol=1e-4, atol=1e-7)


def test_steps_are_chosen_without_looking_at_the_accumulator():
    assert choosing(QuantizationSpec(**WHOLE, accumulator_bits=12)) == choosing(QuantizationSpec(**WHOLE))


def test_it_has_a_key():
    spec = QuantizationSpec(**WHOLE, accumulator_bits=12)
    assert (
        spec.key.startswith('{"accumulator_bits": 12, "activation_bits": 4')
        and QuantizationSpec.named(spec.key) == spec
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation_bits": None}, "give weight_bits, activation_bits of at most 8"),
        ({"weight_bits": None}, "give weight_bits, activation_bits of at most 8"),
        ({"activation_bits": 9}, "give weight_bits, activation_bits of at most 8"),
        ({"scope": per_block(4), "step_rule": "max_abs"}, "a step a tensor or a channel"),
        ({"grid": "mid_rise"}, "which grid=.* does not leave"),
        ({"bias_correction": True}, "which bias_correction=True does not leave: take bias_correction=False"),
        ({"reconstruction": "gptq"}, "which reconstruction='gptq' does not leave"),
        ({"perturbation": "stochastic"}, "which perturbation='stochastic' does not leave"),
        ({"accumulator_bits": 1}, "accumulator_bits"),
        ({"accumulator_bits": 25}, "accumulator_bits"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields, said):
    with pytest.raises(KureError, match=said) as error:
        QuantizationSpec(**WHOLE | {"accumulator_bits": 12} | fields)
    assert "\n" not in str(error.value)
