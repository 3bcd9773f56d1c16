"""KURE on networks that are not the study's: transformers, shared or frozen weights, half precision, two processes."""

import subprocess
import sys
from itertools import pairwise
from textwrap import dedent

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import VisionTransformer

from kure_lib.networks.layers import regularized_layers
from kure_lib.paths import KureError
from kure_lib.tensors import kurtosis as kurtosis_module
from kure_lib.tensors import samples
from kure_lib.tensors.steps import best_step
from kure_lib.training.regularizers import KurtosisRegularizer


def term_by_scipy(*weights, target=1.8):
    kurtoses = [scipy_kurtosis(w.detach().double().numpy(), axis=None, fisher=False) for w in weights]
    return np.mean([(k - target) ** 2 for k in kurtoses])


def perceptron(*widths):
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    for layer in layers:
        nn.init.normal_(layer.weight)  # what PyTorch begins with is uniform already
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def test_of_a_transformer_every_linear_layer_but_the_last_is_regularized():
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    wanted = [f"{block}.{name}" for block in blocks for name in ("self_attention.out_proj", "mlp.0", "mlp.3")]
    assert list(regularized_layers(model)) == wanted  # neither the patches' convolution nor the head
    assert KurtosisRegularizer(model)().item() == pytest.approx(
        term_by_scipy(*(model.get_submodule(name).weight for name in wanted)), rel=1e-5
    )


def test_convolutions_of_any_dimension_and_linear_layers_stand_together():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(4, 4), nn.Linear(4, 2))
    assert list(regularized_layers(model)) == ["1", "2", "3"]


def test_weights_that_are_not_trained_are_left_out_and_that_is_said(capsys):
    model = perceptron(8, 16, 16, 4)
    model[0].weight.requires_grad_(False)
    term = KurtosisRegularizer(model)
    assert list(term.layers) == ["2"]
    assert "leaves out 1 of 2 layers, whose weights are not trained: 0" in capsys.readouterr().err
    model[2].weight.requires_grad_(False)
    with pytest.raises(KureError, match="trainable weights"):
        KurtosisRegularizer(model)


def test_shared_weights_count_once():
    model = perceptron(8, 8, 8, 8, 4)
    model[4].weight = model[0].weight
    term = KurtosisRegularizer(model)
    assert list(term.layers) == ["0", "2"]
    assert term().item() == pytest.approx(term_by_scipy(model[0].weight, model[2].weight), rel=1e-5)


def test_a_parametrized_weight_is_the_one_that_the_layer_uses():
    model = perceptron(8, 16, 4)
    parametrizations.orthogonal(model[0])
    assert KurtosisRegularizer(model)().item() == pytest.approx(term_by_scipy(model[0].weight), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_computed_in_float32(dtype):
    model = perceptron(64, 256, 4).to(dtype)
    term = KurtosisRegularizer(model)()
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(term_by_scipy(model[0].weight), rel=1e-5)
    term.backward()
    gradient, step = model[0].weight.grad, 1e-3
    assert gradient.dtype == dtype and gradient.abs().max() > 0
    doubled = model[0].weight.detach().double()
    moved = term_by_scipy(doubled - step * gradient.double() / gradient.double().norm())
    slope = (moved - term_by_scipy(doubled)) / step
    assert slope == pytest.approx(-gradient.double().norm().item(), rel=0.02)


@pytest.fixture(params=["numba", "torch alone"])
def compiled(request, monkeypatch):
    """With what numba compiles, and as where numba is not installed."""
    if request.param == "torch alone":
        for module in (kurtosis_module, samples):
            monkeypatch.setattr(module, "compiled", None)
    assert (samples.compiled is None) == (request.param == "torch alone")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_without_numba_the_term_and_its_gradient_are_the_same(compiled, dtype, tolerance):
    x = (torch.randn(40, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5).to(dtype)
    x.requires_grad_(True)
    value = kurtosis_module.kurtosis(x)
    (gradient,) = torch.autograd.grad(value, x)
    w = x.detach().double().numpy()
    d, n = w - w.mean(), w.size
    m2, m3, k = (d**2).mean(), (d**3).mean(), scipy_kurtosis(w, axis=None, fisher=False)
    wanted = 4 / (n * m2**2) * (d**3 - m3 - k * m2 * d)
    assert value.dtype == dtype and value.item() == pytest.approx(k, rel=tolerance)
    assert gradient.double().numpy() == pytest.approx(wanted, rel=100 * tolerance, abs=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [3, 5000, samples.LARGE + 1])
def test_without_numba_the_best_step_is_the_same(monkeypatch, bits, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(bits))
    with_numba = best_step(x, bits)
    monkeypatch.setattr(samples, "compiled", None)
    torch.testing.assert_close(best_step(x, bits), with_numba, rtol=1e-6, atol=0)


def test_a_compiled_step_trains_the_same_weights():
    def trained(compile):
        model, x = perceptron(8, 16, 16, 4), torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        penalty = KurtosisRegularizer(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def loss():
            return model(x).square().mean() + penalty()

        loss = torch.compile(loss, backend="aot_eager", fullgraph=True) if compile else loss
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return model

    for one, other in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


MANY = """
    import sys, torch
    from torch import distributed, nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from kure_lib import KurtosisRegularizer

    rank, way, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    if way == "ddp":
        ours = DistributedDataParallel(model)
    else:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        ours = fully_shard(model, mesh=mesh)
    penalty = KurtosisRegularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (ours(x[rank::2]).square().mean() + penalty()).backward()
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    if not rank:
        torch.save([w.detach() for w in weights], sys.argv[4])
    distributed.destroy_process_group()
"""


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_the_weights_of_one(way, tmp_path):
    command = [sys.executable, "-c", dedent(MANY)]
    where = [str(tmp_path / "store"), str(tmp_path / "weights")]
    processes = [subprocess.Popen([*command, rank, way, *where], stderr=subprocess.PIPE) for rank in ("0", "1")]
    said = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    penalty, optimizer = KurtosisRegularizer(model), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty()).backward()
        optimizer.step()
    for one, other in zip(torch.load(tmp_path / "weights"), model.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12)
