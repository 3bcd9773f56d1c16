"""The look at the weights of a network, against SciPy and distributions that are known."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import nn

from kure_lib import check
from kure_lib.__main__ import main
from kure_lib.paths import KureError
from kure_lib.quantization.check import check_file
from kure_lib.tensors.grids import SIGNED_INT


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 400), nn.Linear(400, 10)
    )
    nn.init.normal_(model[1].weight)
    nn.init.uniform_(model[3].weight, -2, 2)
    return model


def test_every_layer_has_its_numbers(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = {layer.name: layer for layer in check(network).layers}
    assert list(found) == ["0", "1", "3", "4"]
    assert [layer.regularized for layer in found.values()] == [False, True, True, False]
    for name, layer in found.items():
        w = network.get_submodule(name).weight.detach().double().numpy().ravel()
        uniform = stats.uniform(w.mean() - np.sqrt(3) * w.std(), 2 * np.sqrt(3) * w.std())
        assert layer.kurtosis == pytest.approx(stats.kurtosis(w, fisher=False), rel=1e-5)
        assert layer.distance == pytest.approx(stats.kstest(w, uniform.cdf).statistic, abs=1e-6)
    assert {name: torch.equal(value, before[name]) for name, value in network.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_the_distortion_is_that_of_the_best_uniform_quantizers(network):
    """On 2^M levels a uniform variable has SQNR 2^2M; of a normal one Max (1960, table 2) gives the error."""
    found = {layer.name: layer.sqnr for layer in check(network).layers}
    for bits in (8, 4, 3, 2):
        assert found["3"][bits] == pytest.approx(20 * np.log10(2.0**bits), abs=0.1)
    for bits, error in {2: 0.1188, 3: 0.03744, 4: 0.01154}.items():
        assert found["1"][bits] == pytest.approx(-10 * np.log10(error), abs=0.15)


def test_bits_and_grid_may_be_chosen(network):
    (first, *_) = check(network, bits=[5], grid=SIGNED_INT).layers
    assert list(first.sqnr) == [5] and first.sqnr != check(network, bits=[5]).layers[0].sqnr


def test_a_table_and_a_figure_come_of_it(network, tmp_path):
    found = check(network)
    head, *lines = str(found).splitlines()
    assert head.split()[:3] == ["layer", "weights", "kurtosis"]
    assert [line[0] for line in lines[:4]] == [" ", "*", "*", " "]
    assert lines[1].split()[1:4] == ["1", "36,864", f"{found.layers[1].kurtosis:.2f}"]
    above, below = found.figure().axes
    drawn = {tuple(line.get_ydata()) for line in below.lines}
    assert drawn == {tuple(layer.sqnr[bits] for layer in found.layers) for bits in (8, 4, 3, 2)}
    assert above.get_ylabel() == "kurtosis"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w: w.fill_(0.5), "Layer '1' cannot be looked at: Kurtosis is not defined for zero variance"),
        (lambda w: w[0].fill_(torch.nan), "Layer '1' cannot be looked at: .*infinite or NaN"),
    ],
)
def test_weights_that_say_nothing_are_refused_by_name(network, spoil, said):
    with torch.no_grad():
        spoil(network[1].weight)
    with pytest.raises(KureError, match=said):
        check(network)
    with pytest.raises(KureError, match="no layer to look at"):
        check(nn.ReLU())


def test_the_shell_reads_a_file_of_weights(network, tmp_path, capsys):
    weights = {f"blocks.{i}.weight": network[1].weight.detach().clone() for i in (10, 9)}
    weights |= {"step": torch.tensor(3), "bias": torch.zeros(4), "tiny": torch.ones(1, 2)}
    save_file(weights, tmp_path / "weights.safetensors")
    assert [layer.name for layer in check_file(tmp_path / "weights.safetensors").layers] == [
        "blocks.9.weight",
        "blocks.10.weight",
    ]
    assert main(["check", str(tmp_path / "weights.safetensors"), "--figure", str(tmp_path / "look.png")]) == 0
    assert capsys.readouterr().out == f"{check_file(tmp_path / 'weights.safetensors')}\n"
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, b"", b"\0" * 40, b"{"])
def test_a_file_that_is_none_is_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main(["check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"Error: {path} ") and err.count("\n") == 1
