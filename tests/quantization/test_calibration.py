"""Activations and batch norms learned from images, folding, and steps that are chosen by the loss."""

import io

import numpy as np
import pytest
import torch
from helpers import same_weights
from torch import nn

from kure_lib import progress
from kure_lib.networks import activations, device, models
from kure_lib.networks.layers import quantized_layers
from kure_lib.paths import KureError
from kure_lib.quantization import calibration, lapq, view
from kure_lib.quantization.spec import SEARCH, QuantizationSpec
from kure_lib.quantization.view import quantized
from kure_lib.tensors.quantizers import quantize
from kure_lib.tensors.steps import best_step


@pytest.fixture(scope="module")
def images():
    return calibration.images("fashion_mnist", 64)


@pytest.fixture(params=["resnet20", "mobilenet_v2_050"])
def network(request):
    """A network whose batch norms have statistics of their own, as after training."""
    torch.manual_seed(0)
    model = models.build(request.param, 1, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_calibration_images_are_the_first_of_training_not_augmented(images):
    batch, labels = images
    again, _ = calibration.images("fashion_mnist", 8)
    assert batch.shape == (64, 1, 28, 28) and labels.shape == (64,)
    assert torch.equal(batch[:8], again)


def test_without_images_there_is_no_calibration():
    with pytest.raises(KureError, match="empty: give at least one image"):
        calibration.images("fashion_mnist", 0)


def test_activations_are_seen_where_they_are_quantized(network, images):
    observed = calibration.observe(network, images[0])
    assert list(observed) == activations.quantized_sites(network, images[0])
    site = list(observed)[3]
    kept = {}
    with activations.replaced(network, lambda name, x: kept.setdefault(name, x.clone())), torch.inference_mode():
        network(images[0])
    assert observed[site].values.size == min(kept[site].numel(), calibration.KEPT)
    assert set(observed[site].values) <= set(kept[site].flatten().numpy())
    assert observed[site].mean_abs == pytest.approx(kept[site].abs().mean().item(), rel=0.01)


def test_of_many_activations_all_channels_and_positions_are_looked_at(monkeypatch):
    class Counting(nn.Module):
        """A site that puts out 0, 1, 2, …, and one before and after it."""

        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            ends = self.relu(x)
            self.relu(torch.arange(8 * 6 * 49.0).reshape(8, 6, 7, 7))
            return self.relu(ends)

    monkeypatch.setattr(calibration, "KEPT", 8 * 6 * 7)  # a seventh, of maps of seven columns
    (seen,) = calibration.observe(Counting(), torch.zeros(1, 1, 2, 2)).values()  # all but the first and the last
    assert seen.values.size == 8 * 6 * 7 and len(set(seen.values)) == 8 * 6 * 7
    assert {int(value) // 49 % 6 for value in seen.values} == set(range(6))
    assert {int(value) % 7 for value in seen.values} == {int(value) // 7 % 7 for value in seen.values} == set(range(7))


def test_inside_activations_lie_on_the_unsigned_grid_and_the_ends_do_not(network, images):
    sites = activations.sites(network, images[0])
    distinct = {}
    count = activations.replaced(network, lambda site, x: distinct.setdefault(site, len(x.unique())) and x)
    with quantized(network, activation_bits=2, images=images[0]), count, torch.inference_mode():
        network(images[0])
    assert all(distinct[site] <= 4 for site in sites[1:-1])
    assert min(distinct[sites[0]], distinct[sites[-1]]) > 4


def test_a_wrong_activation_step_is_the_ratio_times_the_best(network, images):
    observed = calibration.observe(network, images[0])
    steps = calibration.activation_steps(observed, 4)
    wider = {site: 1.5 * step for site, step in steps.items()}
    with quantized(network, weight_bits=4, activation_bits=4, images=images[0], activation_ratio=1.5), torch.no_grad():
        by_ratio = network(images[0])
    with quantized(network, weight_bits=4, activation_bits=4, images=images[0], steps=wider), torch.no_grad():
        assert torch.equal(by_ratio, network(images[0]))


def test_activations_that_calibration_did_not_reach_are_an_error_that_names_them():
    class Gate(nn.Module):
        """Uses its ReLU once more for bright images than for dark ones."""

        def __init__(self):
            super().__init__()
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            for _ in range(4 if x.mean() > 0 else 3):
                x = self.relu(self.conv(x) + 1)
            return x

    model = Gate().eval()
    dark = -torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    block = quantized(model, activation_bits=4, images=dark)
    with block, pytest.raises(KureError, match="'relu:3' were never calibrated"):
        model(-dark)
    assert not model.relu._forward_hooks


def test_a_dead_activation_is_an_error_that_names_it(network, images):
    site = activations.quantized_sites(network, images[0])[0]
    name = site.rpartition(":")[0]
    before = dict(network.named_modules())[name.rpartition(".")[0]]
    norm = next(module for module in before.modules() if isinstance(module, nn.BatchNorm2d))
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, -1)
    block = quantized(network, weight_bits=4, activation_bits=4, images=images[0])
    with pytest.raises(KureError, match=f"'{site}' cannot be calibrated.*zero everywhere"), block:
        pass


@pytest.mark.parametrize("options", [{"activation_bits": 4}, {"reestimate_batch_norm": True}])
@pytest.mark.parametrize("batch", [None, torch.empty(0, 1, 28, 28)])
def test_what_is_calibrated_needs_images(network, options, batch):
    with (
        pytest.raises(KureError, match="give at least one"),
        quantized(network, weight_bits=4, images=batch, **options),
    ):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_network_is_what_it_was(network, images, fails):
    before, expected = state(network), network(images[0][:4])
    try:
        with quantized(
            network,
            weight_bits=3,
            activation_bits=4,
            images=images[0],
            bias_correction=True,
            reestimate_batch_norm=True,
        ) as view:
            assert not torch.allclose(view(images[0][:4]), expected)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert same_weights(before, state(network)) and not network.training
    assert torch.equal(network(images[0][:4]), expected)
    assert not any(module._forward_hooks for module in network.modules())


def test_reestimated_statistics_are_those_of_the_quantized_layers_output(network, images):
    seen = {}
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    with quantized(network, weight_bits=2, images=images[0], reestimate_batch_norm=True), torch.no_grad():
        first = next(iter(norms))  # what it sees does not depend on other statistics
        handle = norms[first].register_forward_pre_hook(lambda _, inputs: seen.setdefault(first, inputs[0]))
        network(images[0])
        handle.remove()
        mean, var = seen[first].mean((0, 2, 3)), seen[first].var((0, 2, 3))
        assert torch.allclose(norms[first].running_mean, mean, atol=2e-2)
        assert torch.allclose(norms[first].running_var, var, rtol=5e-2, atol=1e-3)


def test_a_folded_network_computes_the_same_without_batch_norms(network, images):
    network = network.double()
    before = state(network)
    folded = view.folded(network)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert quantized_layers(folded).keys() == quantized_layers(network).keys()
    with torch.no_grad():
        assert torch.allclose(folded(images[0].double()), network(images[0].double()), atol=1e-9)
    assert same_weights(before, state(network))


class Crossed(nn.Module):
    """Norms made in another order than they are used, one convolution with two readers, and one with dimension 1."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.shared, self.flat = (
            nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 3)
        )  # fmt: skip
        self.after_two, self.after_shared, self.after_one = (nn.BatchNorm2d(4) for _ in range(3))
        self.after_flat = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.after_two(self.two(self.after_one(self.one(x)).relu())).relu()
        shared = self.shared(x)
        return self.after_flat(self.flat((self.after_shared(shared) + shared).flatten(2)))


def crossed():
    torch.manual_seed(0)
    model = Crossed().eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 2)
    return model


def test_a_norm_is_folded_into_the_convolution_that_it_reads_alone():
    model, x = crossed(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    folded = view.folded(model)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == ["after_shared"]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))


def test_a_network_that_chooses_its_way_is_not_folded():
    class Forked(Crossed):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(KureError, match=r"cannot be followed from layer to layer .*: leave fold_batch_norm out"):
        view.folded(Forked())


def test_statistics_are_means_over_images_for_norms_of_any_dimension(float32):
    model, images = crossed().float(), torch.randn(260, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images[-4:] += 10  # 260 images are two batches
    trained = model.after_flat.running_mean.clone()
    with quantized(model, weight_bits=8, images=images, reestimate_batch_norm=True), torch.no_grad():
        assert [len(each) for each in calibration.parts(images)] == [130, 130]
        torch.testing.assert_close(model.after_one.running_mean, model.one(images).mean((0, 2, 3)))
        assert model.after_flat.num_batches_tracked == 2 and not torch.equal(model.after_flat.running_mean, trained)


@pytest.mark.parametrize(
    "options",
    [{"activation_bits": 4}, {"reestimate_batch_norm": True}, {"reestimate_batch_norm": "means"},
     {"reconstruction": "gptq"}], ids=str,
)  # fmt: skip
def test_every_module_is_in_evaluation_within_the_block_and_as_it_was_after_it(options):
    blocks = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5)) for _ in range(4)]
    model, images = nn.Sequential(*blocks).train(), torch.randn(8, 2, 5, 5)
    model[0][1].eval()
    modes = {module: module.training for module in model.modules()}
    with quantized(model, weight_bits=4, images=images, **options):
        assert not any(module.training for module in modes)
    assert {module: module.training for module in model.modules()} == modes
    with pytest.raises(RuntimeError):
        activations.sites(model, torch.randn(1, 5, 10, 10))
    assert {module: module.training for module in model.modules()} == modes


def test_bias_correction_keeps_the_mean_and_variance_of_every_channel():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3) * torch.linspace(0.5, 2, 8)[:, None, None, None] + 0.1
    levels = (weight / 0.7).round().clamp(-2, 1) * 0.7
    kept = view.corrected(levels, weight)
    dims = (1, 2, 3)
    assert torch.allclose(kept.mean(dims), weight.mean(dims), atol=1e-6)
    assert torch.allclose(kept.var(dims), weight.var(dims), rtol=1e-5)
    flat = torch.cat([torch.zeros(1, 4, 3, 3), levels[1:]])  # a channel that fell on one level
    assert torch.allclose(view.corrected(flat, weight)[0], weight[0].mean().expand(4, 3, 3))


def test_steps_are_quantized_anew_only_where_they_moved(network, images):
    layers = quantized_layers(network)
    steps = {name: best_step(layer.weight, 4) for name, layer in layers.items()}
    first, second, *_ = layers
    with quantized(network, weight_bits=4, steps=steps), torch.no_grad():
        one, two = layers[first].weight, layers[second].weight
        assert layers[first].weight is one
        steps[first].mul_(1.3)
        assert layers[second].weight is two and not torch.equal(layers[first].weight, one)
        original = layers[first].parametrizations.weight.original
        assert torch.equal(layers[first].weight, quantize(original, steps[first], 4))


def test_the_lowest_point_of_a_parabola():
    p = np.array([2.0, 2.5, 3.0, 3.5, 4.0])
    assert lapq.lowest_point(p, 3 + 2 * (p - 2.7) ** 2) == pytest.approx(2.7)
    assert lapq.lowest_point(p, 3 + 2 * (p - 9) ** 2) == 4.0  # not outside of what was tried
    assert lapq.lowest_point(p, np.array([1.0, 2.0, 2.5, 2.0, 0.5])) == 4.0  # no valley


@pytest.fixture
def short(monkeypatch, images):
    """Eight of the images, and starts that cost less: of few values each, for three norms, enough for a parabola."""
    monkeypatch.setattr("kure_lib.tensors.steps.SAMPLE", 2**10)
    monkeypatch.setattr(lapq, "NORMS", (2.0, 3.0, 4.0))
    return images[0][:8], images[1][:8]


def lapq_spec(weight_bits, activation_bits, search=SEARCH):
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    return QuantizationSpec(step_rule="lapq", search=search, **bits)


def test_loss_aware_steps_lower_the_calibration_loss_and_see_nothing_else(short):
    torch.manual_seed(0)
    network = models.build("resnet20", 1, 10).eval()
    batch, _ = short
    labels = network(batch).argmax(1)  # a task at which full precision is best
    found = lapq.loss_aware_steps(network, batch, labels, lapq_spec(3, 3, search=60))
    assert found.keys() == {*quantized_layers(network), *activations.quantized_sites(network, batch)}

    def loss(steps=None, rule="mse"):
        spec = QuantizationSpec(weight_bits=3, activation_bits=3, step_rule=rule)
        with quantized(network, spec, batch, steps=steps), torch.no_grad(), device.autocast():
            return nn.functional.cross_entropy(network(batch).float(), labels).item()

    assert loss(found) <= min(loss(rule=f"lp:{p}") for p in lapq.NORMS) + 1e-4
    again = lapq.loss_aware_steps(network, batch, labels, lapq_spec(3, 3, search=60))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_loss_aware_steps_are_those_of_the_named_layers(network, short):
    name = list(quantized_layers(network))[3]
    spec = lapq_spec(2, None, search=20).model_copy(update={"layers": (name,)})
    assert lapq.loss_aware_steps(network, *short, spec).keys() == {name}


@pytest.mark.parametrize("bits", [(3, 3), (None, 3)])
def test_remembering_blocks_spares_work_and_finds_the_same(network, short, monkeypatch, bits):
    forwards = []
    blocks = dict(lapq._blocks(network))
    assert len(blocks) in (9, 17)  # residual blocks of the two networks
    deepest = list(blocks.values())[-1]
    deepest.register_forward_hook(lambda *_: forwards.append("asked"))
    inner = next(module for module in next(iter(blocks.values())).modules() if isinstance(module, nn.Conv2d))
    inner.register_forward_hook(lambda *_: forwards.append("computed"))

    found = lapq.loss_aware_steps(network, *short, lapq_spec(*bits, search=40))
    spared = forwards.count("asked") - forwards.count("computed")
    forwards.clear()
    monkeypatch.setattr(lapq, "KEPT", 0)  # nothing is worth remembering
    again = lapq.loss_aware_steps(network, *short, lapq_spec(*bits, search=40))
    assert forwards.count("asked") == forwards.count("computed")
    assert spared > 20
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    assert all("forward" not in vars(block) for block in blocks.values())


def test_a_search_that_fails_leaves_the_network_as_it_was(network, short):
    before, labels = state(network), torch.full((8,), 99)  # no such class
    with pytest.raises((IndexError, RuntimeError)):
        lapq.loss_aware_steps(network, short[0], labels, lapq_spec(4, 4, search=5))
    assert same_weights(before, state(network))
    assert not any("forward" in vars(module) or module._forward_hooks for module in network.modules())


def test_the_search_keeps_to_its_budget_and_says_how_far_it_is(network, short, monkeypatch):
    bars = []

    class Bar(progress.tqdm):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr(progress, "tqdm", Bar)
    lapq.loss_aware_steps(network, *short, lapq_spec(4, None, search=30))
    (bar,) = bars
    assert bar.desc == "LAPQ" and bar.unit == "loss"
    assert len(lapq.NORMS) < bar.n <= bar.total + 1 == len(lapq.NORMS) + 32


def test_a_search_without_images_bits_or_a_budget_is_an_error(network, images):
    with pytest.raises(KureError, match="calibration set is empty"):
        lapq.loss_aware_steps(network, images[0][:0], images[1][:0], lapq_spec(4, 4))
    with pytest.raises(KureError, match="something to quantize"):
        lapq.loss_aware_steps(network, *images, lapq_spec(None, None))
    with pytest.raises(KureError, match="LAPQ needs a specification of its own"):
        lapq.loss_aware_steps(network, *images, QuantizationSpec(weight_bits=4))


def test_weights_that_cannot_be_quantized_name_their_layer(network, images):
    name, layer = list(quantized_layers(network).items())[2]
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(KureError, match=f"Layer '{name}' cannot be quantized.*NaN"):
        lapq.loss_aware_steps(network, *images, lapq_spec(4, None))


@pytest.mark.parametrize("which", ["means", "variances"])
def test_one_statistic_is_taken_anew_and_the_other_stays_as_it_was_trained(network, images, which, float32):
    """Layer by layer as the definition says: every norm sees what the norms before it, half renewed, make of images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    old = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    seen = {}
    with quantized(network, weight_bits=2, images=images[0], reestimate_batch_norm=which), torch.no_grad():
        hooks = [norm.register_forward_pre_hook(lambda norm, x: seen.update({norm: x[0]})) for norm in norms]
        network(images[0])
        for norm, (mean, variance) in zip(norms, old, strict=True):
            new_mean, new_variance = seen[norm].mean((0, 2, 3)), seen[norm].var((0, 2, 3))
            wanted = (new_mean, variance) if which == "means" else (mean, new_variance)
            torch.testing.assert_close(norm.running_mean, wanted[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(norm.running_var, wanted[1], rtol=1e-3, atol=1e-4)
            assert "forward" not in vars(norm)
        for hook in hooks:
            hook.remove()
    for norm, (mean, variance) in zip(norms, old, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_a_norm_computes_as_before_when_renewing_fails(network):
    class Stop(Exception):
        pass

    def batches():
        raise Stop
        yield

    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    with pytest.raises(Stop), calibration.reestimated_batch_norm(network, batches(), "means"):
        pass
    assert "forward" not in vars(norm) and torch.equal(norm.running_mean, before) and not norm.training


def test_an_unknown_statistic_is_refused():
    with pytest.raises(KureError, match="reestimate_batch_norm"):
        QuantizationSpec(weight_bits=2, reestimate_batch_norm="medians")


def test_norms_see_what_the_layers_before_them_put_out(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)
    ).eval()
    batch = images[0].cpu()
    seen = calibration.seen_by_norms(model, batch)
    with torch.no_grad():
        puts_out = [model[:1](batch), model[:4](batch)]
    for (variance, mean), x in zip(seen, puts_out, strict=True):
        channels = x.transpose(0, 1).flatten(1).numpy()
        assert variance.numpy() == pytest.approx(channels.var(axis=1, ddof=1), rel=1e-4)
        assert mean.numpy() == pytest.approx(channels.mean(axis=1), abs=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
