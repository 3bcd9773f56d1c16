"""The commands of the README, in a fresh clone; run by `pytest -m "benchmark and slow" tests/benchmarks`."""

import os
import subprocess
import sys
import time

import pytest
from reporting import COMMANDS, Command

from kure_lib import paths


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS)
def test_command(keep, say, tmp_path, name: str, command: Command):
    """In a clone with results of its own and this environment, as the installation is timed by nobody's network."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(paths.ROOT), str(clone)], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("KURE_")}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kure_lib", *command.options], cwd=clone,
                   env=env | {"PYTHONPATH": str(clone)}, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    keep("commands", name, time.perf_counter() - began)
    say(f"{command.words}: {(time.perf_counter() - began) / 60:.1f} minutes")
