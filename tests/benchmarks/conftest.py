"""Fixtures of the benchmarks; what they measured is printed, and kept if the run was complete.

`pytest -m benchmark tests/benchmarks` runs them; a run of all tests leaves them out. `--rounds 1` is a trial that shows
whether everything works; its numbers, and those of a selection with -k, are shown and not kept.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from measuring import limits, machine, seconds, slug
from reporting import TARGETS, Row, markdown, save, update_page

from kure_lib import paths

ROWS = pytest.StashKey[dict[str, Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="rounds of every benchmark, for a trial")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.benchmark)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Callable[..., Row]:
    """Let two contenders take turns, after one round of each that does not count."""

    def measure(
        name: str, rival: Callable[[], object], ours: Callable[[], object], rounds: int,
        rival_amount: float = 1, ours_amount: float = 1, flops: float | None = None,
    ) -> Row:  # fmt: skip
        rival_seconds: list[float] = []
        rounds = request.config.getoption("--rounds", None) or rounds

        def rivals_turn() -> None:  # before each of our rounds, outside the clock of pytest-benchmark
            rival_seconds.append(seconds(rival))

        benchmark.pedantic(ours, setup=rivals_turn, rounds=rounds, warmup_rounds=1)
        ours_seconds = tuple(benchmark.stats.stats.data)
        row = Row(name, tuple(rival_seconds[1:]), ours_seconds, rival_amount, ours_amount, flops)
        request.config.stash[ROWS][name] = row
        return row

    return measure


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """Print the table; of a complete run, also keep it."""
    measured = config.stash[ROWS]
    rows = [measured[name] for name in TARGETS if name in measured]
    if not rows:
        return
    about, bounds = machine(), limits()
    text = markdown(rows, about, bounds)
    terminalreporter.section("measured side by side")
    terminalreporter.write(f"{text}\n")
    if exitstatus == 0 and len(rows) == len(TARGETS) and not config.getoption("--rounds", None):
        path = save(paths.RESULTS / "benchmarks", slug(about), rows, about, bounds)
        shown = " and in docs/speed.md" if update_page(paths.ROOT / "docs" / "speed.md", text) else ""
        terminalreporter.write(f"kept in {path}{shown}\n")
    else:
        terminalreporter.write("not kept: only a whole run with nothing failed is\n")
