"""Fixtures of the benchmarks; what they measured is printed, and kept if the run was complete.

`pytest -m benchmark tests/benchmarks` runs them; a run of all tests leaves them out. `--rounds 1` is a trial that shows
whether everything works; its numbers, and those of a selection with -k, are shown and not kept.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from measuring import limits, machine, seconds, slug
from reporting import (
    GROWTH,
    TARGETS,
    Growth,
    Row,
    content,
    growth_content,
    growth_markdown,
    markdown,
    save,
    update_page,
)

from kure_lib import paths

ROWS = pytest.StashKey[dict[str, Row]]()
GROWN = pytest.StashKey[dict[str, Growth]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="rounds of every benchmark, for a trial")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.benchmark)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[GROWN] = {}, {}


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


@pytest.fixture
def grow(request: pytest.FixtureRequest) -> Callable[[Growth], None]:
    """Take down how something grows."""
    return lambda growth: request.config.stash[GROWN].update({growth.name: growth})


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """Print the tables; one that is complete is also kept, and shown in the documentation."""
    measured, about = config.stash[ROWS], machine()
    rows, grown = [measured[name] for name in TARGETS if name in measured], list(config.stash[GROWN].values())
    trial = exitstatus != 0 or config.getoption("--rounds", None)
    if rows:
        bounds = limits()
        text, facts = markdown(rows, about, bounds), content(rows, about, bounds)
        _report(terminalreporter, "benchmarks", text, facts, slug(about), len(rows) == len(TARGETS) and not trial)
    if grown:
        text, facts = growth_markdown(grown, about), growth_content(grown, about)
        _report(
            terminalreporter, "growth", text, facts, f"{slug(about)}-growth", len(grown) == len(GROWTH) and not trial
        )


def _report(terminalreporter, name: str, text: str, facts: dict, stem: str, keep: bool) -> None:
    terminalreporter.section(name)
    terminalreporter.write(f"{text}\n")
    if not keep:
        terminalreporter.write("not kept: only a whole table of a run with nothing failed is\n")
        return
    save(paths.RESULTS / "benchmarks" / stem, facts, text)
    shown = update_page(paths.ROOT / "docs" / "speed.md", name, text)
    terminalreporter.write(f"kept in results/benchmarks/{stem}.md{' and in docs/speed.md' * shown}\n")
