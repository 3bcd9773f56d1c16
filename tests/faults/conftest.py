"""The campaign: a fault is a test, a file holds the faults of one kind, and what chance decides is drawn many times.

`./run_all.sh --faults N` does them all, each that is drawn N times, and prints how many of each kind were handled: they
ended in the right result or in one sentence, and lost nothing that was finished. A run of all tests does one draw of
each, as with N = 1, and leaves out those marked `campaign`, which take long. With `--seed` the draws are others.
"""

import zlib
from collections import Counter

import numpy as np
import pytest
from children import RUNS, Child


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, help="do the whole campaign, with so many draws of each fault")
    parser.addoption("--seed", type=int, help="of what is drawn, 0 if left out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each draw; `draws(n)`, of what takes milliseconds, asks for n times as many."""
    if "chance" in metafunc.fixturenames:
        asked, marker = metafunc.config.getoption("--faults", None), metafunc.definition.get_closest_marker("draws")
        count = (asked or 1) * (marker.args[0] if marker else 1)
        metafunc.parametrize("chance", range(count), indirect=True)


@pytest.fixture
def chance(request) -> np.random.Generator:
    """What decides a draw: always the same for a test and its number, whatever other tests are chosen."""
    seed = request.config.getoption("--seed", None) or 0
    return np.random.default_rng([seed, zlib.crc32(request.node.name.encode()), request.param])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Of a campaign, how many faults of each kind were tried and handled."""
    if not config.getoption("--faults", None):
        return
    tried, handled = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = report.nodeid.partition("::")[0].rpartition("test_")[2].removesuffix(".py").replace("_", " ")
            tried[kind] += 1
            handled[kind] += outcome == "passed"
    terminalreporter.section("faults")
    rows = [*((kind, tried[kind], handled[kind]) for kind in sorted(tried)), ("all", tried.total(), handled.total())]
    for row in rows:
        terminalreporter.write_line("{:12}{:6} tried {:6} handled".format(*row))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Trains one of `RUNS` undisturbed, once: what its weights' SHA-256 should be, and the seconds that it took."""
    known = {}

    def train(config):
        if config.key not in known:
            folder = tmp_path_factory.mktemp("whole")
            child = Child("train", config, KURE_RESULTS=str(folder), KURE_PROFILE="trial", KURE_CHECK="0")
            digest, epochs = child.result()
            assert epochs == config.epochs
            known[config.key] = digest, child.seconds
        return known[config.key]

    return train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The files of a finished run, by name, for tests that put them elsewhere: its configuration, and their content."""
    folder, config = tmp_path_factory.mktemp("trained"), RUNS[0].model_copy(update={"epochs": 1})
    Child("train", config, KURE_RESULTS=str(folder), KURE_PROFILE="trial", KURE_CHECK="0").result()
    names = [f"{part}/{config.label}-{config.key}.{end}" for part, end in
             (("records", "json"), ("weights/local", "safetensors"))]  # fmt: skip
    return config, {name: (folder / "trial" / name).read_bytes() for name in names}


@pytest.fixture
def finished(trained, results_folder):
    """A finished run in the test's own results folder; returns its configuration."""
    config, contents = trained
    for name, content in contents.items():
        (results_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (results_folder / name).write_bytes(content)
    return config
