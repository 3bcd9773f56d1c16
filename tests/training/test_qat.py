"""Quantization-aware training: each method against a few-line reference, the view, and a run from end to end."""

import copy

import pytest
import torch
from helpers import same_weights
from torch import nn
from torch.nn.functional import cross_entropy

from kure_lib.networks import activations, device, models
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import records, runs, views
from kure_lib.tensors.grids import Bits
from kure_lib.tensors.steps import PER_CHANNEL
from kure_lib.training import qat
from kure_lib.training.configs import KureConfig, QatConfig, RunConfig
from kure_lib.training.loop import fit
from kure_lib.training.qat import DoReFaWeight, LearnedStepQuantize, LsqWeight, QuantizationAwareTraining
from kure_lib.training.regularizers import KurtosisRegularizer

IMAGES = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
LSQ, DOREFA = (QatConfig(quantizer=name, weight_bits=3, activation_bits=4) for name in ("lsq", "dorefa"))


def lsq_reference(x, step, low, high):
    """Esser et al., Eqs. 1 and 2, differentiated by autograd with their detach trick."""
    clipped = torch.clamp(x / step, low, high)
    return (clipped + (clipped.round() - clipped).detach()) * step


@pytest.mark.parametrize(("low", "high"), [(-4, 3), (-2, 1), (0, 15), (-128, 127)])
def test_learned_steps_have_the_values_and_gradients_of_lsq(low, high):
    torch.manual_seed(0)
    x = (torch.randn(1000, dtype=torch.float64) * high).requires_grad_()
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(1000, dtype=torch.float64)
    expected = lsq_reference(x, step, low, high)
    wanted = torch.autograd.grad(expected, (x, step), gradient)
    found = LearnedStepQuantize.apply(x, step, low, high, 0.25)
    to_x, to_step = torch.autograd.grad(found, (x, step), gradient)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(to_x, wanted[0], rtol=1e-12)
    assert to_step.item() == pytest.approx(0.25 * wanted[1].item(), rel=1e-10)


def test_the_gradient_of_a_step_is_that_of_the_smoothed_quantizer():
    """Dithering (uniform noise of one step) makes rounding smooth: its mean slope can be had by differences.

    For x inside the limits E[Q(x)] = x whatever the step, so the slope is 0; outside it is the outermost code.
    LSQ replaces round(v) − v by its value without noise, whose mean over a cell is 0 as well.
    """
    generator = torch.Generator().manual_seed(0)
    step, high = 0.5, 3
    x = torch.rand(200_000, generator=generator, dtype=torch.float64) * 3 * high * step - 1.5 * high * step

    def total(step):
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
        return (x / step + noise).round().clamp(-high - 1, high).mul(step).mean().item()

    smooth = (total(step * 1.05) - total(step / 1.05)) / (step * (1.05 - 1 / 1.05))
    learned = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    LearnedStepQuantize.apply(x, learned, -high - 1, high, 1.0).mean().backward()
    assert learned.grad.item() == pytest.approx(smooth, abs=0.03)


def test_dorefa_weights_are_those_of_its_formula():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    unit = weight.tanh() / (2 * weight.tanh().abs().max()) + 0.5
    assert torch.allclose(DoReFaWeight(3)(weight), 2 * (unit * 7).round() / 7 - 1, atol=1e-6)
    assert torch.allclose(DoReFaWeight(None)(weight), 2 * unit - 1, atol=1e-6)
    assert DoReFaWeight(3, ratio=0.5)(weight).abs().max() == pytest.approx(0.5)


def test_a_learned_step_keeps_its_clipping_range_at_other_bit_widths():
    weight = torch.linspace(-3, 3, 1001)
    step = nn.Parameter(torch.tensor(0.25))
    lowest = [LsqWeight(step, 4, bits)(weight).min().item() for bits in (2, 3, 4, 6, 8)]
    assert lowest == [-2.0] * 5
    assert len(LsqWeight(step, 4, 6)(weight).unique()) == 64
    assert torch.equal(LsqWeight(step, 4, None)(weight), weight)
    assert LsqWeight(step, 4, 4, ratio=1.2)(weight).min().item() == pytest.approx(-2.4)


def test_initial_steps_are_two_mean_absolute_values_over_the_root_of_the_highest_code():
    model = models.build("resnet20", 1, 10).eval()
    steps = qat.initial_steps(model, LSQ, IMAGES)
    weight = model.layer1[0].conv1.weight
    assert steps["layer1.0.conv1"].item() == pytest.approx((2 * weight.abs().mean() / 3**0.5).item(), rel=1e-6)
    assert len(steps) == 20 + len(activations.quantized_sites(model, IMAGES[:1]))
    assert qat.initial_steps(model, DOREFA, IMAGES) == {}
    name, layer = list(quantized_layers(model).items())[3]
    nn.init.zeros_(layer.weight)
    with pytest.raises(KureError, match=f"'{name}' is zero everywhere, so that LSQ has no step to begin with"):
        qat.initial_steps(model, LSQ, IMAGES)


def build(config):
    torch.manual_seed(0)
    model = models.build("mobilenet_v2_050", 1, 10).eval()
    return model, qat.initial_steps(model, config, IMAGES), activations.quantized_sites(model, IMAGES[:1])


@pytest.mark.parametrize("config", [LSQ, DOREFA], ids=["lsq", "dorefa"])
def test_in_the_view_everything_is_quantized_and_learns_and_afterwards_nothing_is_changed(config):
    model, steps, sites = build(config)
    before, seen = copy.deepcopy(model.state_dict()), {}
    parameters = [id(p) for p in model.parameters()]
    with qat.quantized(model, config, steps, sites) as view:
        with activations.replaced(view, lambda site, output: seen.setdefault(site, output)):
            loss = cross_entropy(view(IMAGES), torch.arange(8))
        loss.backward()
        assert all(len(output.unique()) <= 2**4 for site, output in seen.items() if site in sites)
        assert len(seen) == len(sites) + 2
        assert len(view.features[3].conv[1][0].weight.unique()) <= 2**3
    assert [id(p) for p in model.parameters()] == parameters
    assert same_weights(model.state_dict(), before)
    latent = [p.grad for name, p in model.named_parameters() if name.endswith("0.weight")]
    assert all(gradient.abs().sum() > 0 for gradient in latent)
    assert all(step.grad.abs() > 0 for step in steps.values())


def test_kure_acts_on_the_latent_weights():
    model, _, _ = build(LSQ)
    regularizer = KurtosisRegularizer(model)
    outside = regularizer()
    with QuantizationAwareTraining(model, LSQ, IMAGES).view():
        assert torch.equal(regularizer(), outside)


@pytest.mark.parametrize("bits", [Bits(2, 4), Bits(None, 4), Bits(3, None)], ids=str)
def test_the_view_can_have_other_bit_widths_than_training(bits):
    model, steps, sites = build(LSQ)
    outputs = {}
    with qat.quantized(model, LSQ, steps, sites, bits) as view:
        weight = view.features[3].conv[1][0].weight.detach().clone()
        with torch.no_grad(), activations.replaced(view, lambda site, output: outputs.setdefault(site, output)):
            view(IMAGES)
    assert (len(weight.unique()) <= 4) == (bits.weight == 2)
    assert torch.equal(weight, model.features[3].conv[1][0].weight) == (bits.weight is None)
    assert (len(outputs[sites[0]].unique()) <= 2**4) == (bits.activation == 4)


@pytest.mark.parametrize("wrong", [{"weight_bits": 1}, {"weight_bits": 17}, {"activation_bits": 0}])
def test_a_wrong_configuration_is_an_error(wrong):
    with pytest.raises(KureError, match=f"cannot have {next(iter(wrong))}="):
        QatConfig(**{"quantizer": "lsq", "weight_bits": 4, "activation_bits": 4, **wrong})
    with pytest.raises(KureError, match="Unknown quantizer 'pact': choose one of dorefa, lsq"):
        QatConfig(quantizer="pact", weight_bits=4, activation_bits=4)


def test_a_configuration_has_a_name_and_the_bits_in_it():
    assert (LSQ.name, LSQ.bits) == ("lsq 3/4", Bits(3, 4))
    assert QatConfig.named("lsq 3/4") == LSQ and QatConfig.named("dorefa 3/4") == DOREFA
    with pytest.raises(KureError, match="Cannot read the bit-widths 'x'"):
        QatConfig.named("lsq x")
    with pytest.raises(KureError, match="cannot have activation_bits=None"):
        QatConfig.named("lsq 4/FP")


@pytest.fixture(scope="module", params=[LSQ, DOREFA], ids=["lsq", "dorefa"])
def trained(request, tmp_path_factory):
    config = RunConfig(model="resnet20", train_size=256, epochs=2, learning_rate=0.05, weight_decay=1e-4,
                       regularizer=KureConfig(), quantization=request.param)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KURE_RESULTS", str(tmp_path_factory.mktemp("qat")))
        patch.setenv("KURE_PROFILE", "trial")
        patch.delenv("KURE_CHECK", raising=False)
        yield runs.get(config)


def at(quantizer, bits, **options):
    return QuantizationSpec(step_rule=quantizer, weight_bits=bits, **({"activation_bits": 4} | options))


def test_evaluated_as_trained_it_has_the_accuracy_of_training_to_the_image(trained):
    quantizer = trained.config.quantization.quantizer
    assert runs.evaluate(trained, at(quantizer, 3)).top1 == trained.curves["test_top1"][-1]
    assert trained.config.label == f"resnet20-{quantizer}-3-4-kure-1.8-1-scratch-seed0"
    assert bool(trained.steps) == (quantizer == "lsq")


def test_at_other_settings_it_is_another_network(trained):
    quantizer = trained.config.quantization.quantizer
    losses = [runs.evaluate(trained, spec).loss for spec in (
        at(quantizer, 3), at(quantizer, 2), at(quantizer, None), at(quantizer, 3, step_ratio=1.3),
        at(quantizer, 3, activation_bits=None))]  # fmt: skip
    assert len(set(losses)) == 5
    assert records.find(trained.config).evaluations.keys() >= {at(quantizer, 2).key}


@pytest.mark.parametrize("ratio", [1.0, 1.2])
def test_refit_weights_have_the_least_error_that_a_step_can_give(trained, ratio):
    quantizer, model = trained.config.quantization.quantizer, trained.network()
    with views.quantized(trained, at(quantizer, None)):  # latent ones, squashed by DoReFa
        full = {name: layer.weight.detach().double() for name, layer in quantized_layers(model).items()}
    with views.quantized(trained, at(quantizer, 3, refit=True, step_ratio=ratio)):
        made = {name: layer.weight.detach().double() for name, layer in quantized_layers(model).items()}
    codes = torch.arange(-4, 4, dtype=torch.float64) + (0.5 if quantizer == "dorefa" else 0)
    for name, weight in list(full.items())[::5]:
        tried = weight.abs().max() * torch.linspace(0.02, 0.6, 500, dtype=torch.float64)
        nearest = [step * codes[(weight[..., None] - step * codes).abs().argmin(-1)] for step in tried]
        errors = torch.stack([(weight - levels).square().mean() for levels in nearest])
        error = (weight - made[name]).square().mean()
        assert made[name].unique().numel() <= 8, name
        if ratio == 1:
            assert error <= 1.001 * errors.min()
        else:  # the step is that much larger
            best = tried[errors.argmin()].item()
            assert made[name].unique().diff().min().item() == pytest.approx(ratio * best, rel=0.03)


def test_a_quantizer_that_was_trained_can_have_its_statistics_renewed(trained):
    quantizer, model = trained.config.quantization.quantizer, trained.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = calibration.images("fashion_mnist", 64)[0]
    spec = at(quantizer, 2, refit=True, reestimate_batch_norm=True, calibration=64)
    with device.in_float32(), views.quantized(trained, spec), torch.no_grad():
        seen = calibration.seen_by_norms(model, images)
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        for (name, norm), (variance, mean) in zip(norms.items(), seen, strict=True):
            for value, kept in ((mean, "running_mean"), (variance, "running_var")):
                stale = (before[f"{name}.{kept}"] - value).norm()
                # Not equal: batches were normalized by biased variances, which 4-bit activations round elsewhere.
                assert (norm.get_buffer(kept) - value).norm() < 0.1 * stale, (name, kept)
    assert same_weights(model.state_dict(), before)
    ways = [{}, {"refit": True}, {"reestimate_batch_norm": True}, {"refit": True, "reestimate_batch_norm": True}]
    specs = [at(quantizer, 2, **renewed) for renewed in ways]
    assert [spec.calibration for spec in specs] == [None, None, 512, 512]
    assert len({runs.evaluate(trained, spec).loss for spec in specs}) == 4


@pytest.mark.parametrize("fields", [{"weight_bits": 3}, {"step_rule": "lsq"}])
def test_only_steps_that_training_left_are_refit(fields):
    with pytest.raises(KureError, match="give weight_bits and the step_rule of the training, dorefa or lsq"):
        QuantizationSpec(refit=True, **fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation_bits": 6}, "activation_bits 4, as it was trained"),
        ({"scope": PER_CHANNEL}, "leave it out"),
        ({"calibration": 64}, "cannot take calibration=64: leave it out"),
    ],
)
def test_what_the_trained_quantizer_cannot_do_is_an_error(trained, options, said):
    with pytest.raises(KureError, match=said):
        runs.evaluate(trained, at(trained.config.quantization.quantizer, 3, **options))


def test_a_network_that_was_not_trained_so_is_an_error(trained):
    other = {"lsq": "dorefa", "dorefa": "lsq"}[trained.config.quantization.quantizer]
    with pytest.raises(KureError, match=f"not trained with {other}"):
        runs.evaluate(trained, at(other, 3))


def test_an_interrupted_run_goes_on_to_the_same_weights_and_steps(trained, tmp_path):
    class Stopped(Exception):
        pass

    def stop(epoch, values):
        raise Stopped

    with pytest.raises(Stopped):
        fit(trained.config, checkpoint=tmp_path / "c.pt", on_epoch=stop)
    model, history = fit(trained.config, checkpoint=tmp_path / "c.pt")
    assert same_weights(model.state_dict(), trained.weights)
    assert history.steps == trained.steps
