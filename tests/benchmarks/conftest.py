"""Fixtures of the benchmarks; what they measured is printed, and a table that is whole is also kept.

`pytest -m benchmark tests/benchmarks` with `and not slow` leaves out `test_commands.py`, which takes minutes a row.
`--trial` measures once and shows that everything works; its numbers, and those of a selection with -k, are not kept.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from measuring import Side, Taken, limits, machine, slug, turns
from reporting import TABLES, Table, save, update_page

from kure_lib import paths

PROCESSES = 5  # fresh ones of each side, one after another
FOUND = pytest.StashKey[dict[str, dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trial", action="store_true", help="measure every benchmark once, and keep nothing")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.benchmark)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {name: {} for name in TABLES}


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line of progress, past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", end="", flush=True)

    return line


@pytest.fixture
def measure(request: pytest.FixtureRequest, say) -> Callable[..., list[list[Taken]]]:
    """Let sides take turns, in fresh processes again and again: a list for each time, with what each side took."""
    times = 1 if request.config.getoption("--trial") else PROCESSES

    def measured(words: str, sides: list[Side], rounds: int) -> list[list[Taken]]:
        found = []
        for i in range(times):
            found.append(turns(sides, rounds))
            say(f"{words}: {i + 1} of {times}")
        return found

    return measured


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[str, str, object], None]:
    """Take down a result under its name in one of `TABLES`."""
    return lambda table, name, result: request.config.stash[FOUND][table].update({name: result})


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """Print the tables; one that is whole is also kept, and shown in the documentation."""
    about = machine()
    whole = exitstatus == 0 and not config.getoption("--trial")
    for name, found in config.stash[FOUND].items():
        if found:
            table: Table = TABLES[name](found, about, limits() if name == "benchmarks" else {})
            terminalreporter.section(name)
            terminalreporter.write(f"{table.markdown()}\n")
            if not (whole and table.is_whole()):
                terminalreporter.write("not kept: only a whole table of a run with nothing failed is\n")
                continue
            stem = slug(about) if name == "benchmarks" else f"{slug(about)}-{name}"
            save(paths.all_results() / "benchmarks" / stem, table.content(), table.markdown())
            shown = update_page(paths.ROOT / "docs" / "speed.md", name, table.markdown())
            terminalreporter.write(f"kept in results/benchmarks/{stem}.md{' and in docs/speed.md' * shown}\n")
