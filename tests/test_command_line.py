"""The faults a user can make or meet, each of them made: what is said, what is left, what ends with it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import nbformat
import psutil
import pytest

from kure_lib import __main__ as command_line
from kure_lib import driver, notebooks, paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError
from kure_lib.study import profiles
from kure_lib.study.plans import plan

STEM = "90_tiny"
PATIENCE = 300  # seconds; a busy machine is slow to start Python, torch and a kernel


# The command line


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--profile", "huge"], ["huge", "smoke", "quick", "study", "imagenet", "large"]),
        (["--profil", "quick"], ["--profil"]),
        (["--jobs", "0"], ["'0'", "above 0"]),
        (["--gpus-per-run", "0"], ["'0'", "above 0"]),
        (["--faults", "0"], ["'0'", "above 0"]),
        (["--on\nly"], ["--on ly"]),
        (["--list", "--test"], ["--list", "--test"]),
        (["--list", "--lab"], ["--list", "--lab"]),
        (["--list", "--", "--no-browser"], ["--no-browser", "--lab"]),
    ],
)
def test_a_wrong_option_is_one_sentence(argv, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert all(name in said for name in names)


def test_the_profiles_of_the_command_line_are_those_of_the_study():
    assert list(command_line.PROFILES) == list(profiles.PROFILES)


def test_the_large_profile_is_trained_and_no_notebook_executed(results_folder, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        driver, "train", lambda planned, jobs, cluster: trained.append((planned.profile, jobs, cluster))
    )
    monkeypatch.setattr(driver, "run", None)
    assert command_line.main(["--profile", "large", "--jobs", "2", "--cluster", "auto"]) == 0
    assert trained == [("large", 2, "auto")]
    assert f"0 of {len(plan('large').runs)} runs are on record." in capsys.readouterr().out
    assert command_line.main(["--profile", "large", "--only", "05"]) == 1
    assert capsys.readouterr().err == "Error: No notebook reads the profile large: leave --only out.\n"


@pytest.mark.parametrize("option", ["--only", "--lab"])
def test_an_unknown_notebook_is_one_sentence(option, capsys):
    assert command_line.main([option, "77"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: There is no notebook '77': choose from 00, 01, ") and said.count("\n") == 1


def test_an_unknown_notebook_is_not_listed_and_none_at_all_is_no_success(tmp_path, monkeypatch, capsys):
    assert command_line.main(["--only", "99", "--list"]) == 1
    assert "no notebook '99'" in capsys.readouterr().err
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "gone")
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    for argv in ([], ["--list"], ["--lab", "05"]):
        assert command_line.main(["--profile", "smoke", *argv]) == 1
        assert "There are no notebooks in" in capsys.readouterr().err
    assert not (tmp_path / "smoke").exists()


def test_the_campaign_of_faults_is_done_so_many_times_and_its_failure_is_ours(monkeypatch):
    asked = []
    monkeypatch.setattr(command_line, "_python", lambda *command, **variables: asked.append(command) or 1)
    for argv, times in ((["--faults"], "20"), (["--faults", "3"], "3")):
        assert command_line.main(argv) == 1
        assert asked[-1][:2] == ("-m", "pytest") and "tests/faults" in asked[-1]
        assert asked[-1][asked[-1].index("--faults") + 1] == times


def test_stopping_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "run", interrupted)
    assert command_line.main(["--profile", "smoke", "--fresh", "--jobs", "2"]) == 130
    assert capsys.readouterr().err.endswith("go on with ./run_all.sh --profile smoke --jobs 2\n")


def test_what_is_new_on_the_board_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    committed = paths.ROOT / "results" / "study" / "verdicts"
    folder = tmp_path / "smoke" / "verdicts"

    def run(*arguments, **options):
        shutil.copytree(committed, folder, dirs_exist_ok=True)
        return tmp_path / "index.html"

    monkeypatch.setattr(driver, "run", run)
    said = []
    for _ in range(3):
        assert command_line.main(["--profile", "smoke"]) == 0
        said.append(re.findall("New since the last run: .*", capsys.readouterr().out))
        if len(said) == 2:
            other = json.loads((folder / "W1.json").read_text()) | {"outcome": "undecided"}
            (folder / "W1.json").write_text(json.dumps(other))
    was = json.loads((committed / "W1.json").read_text())["outcome"]
    assert said == [[], ["New since the last run: nothing."], [f"New since the last run: W1 {was} (was undecided)."]]


def test_what_was_not_tested_is_counted_and_not_listed(results_folder):
    committed = paths.ROOT / "results" / "study" / "verdicts" / "L1.json"
    assert (
        command_line.scoreboard({})
        == f"{len(verdicts.claims())} claims and questions: {len(verdicts.claims())} not tested."
    )
    (results_folder / "verdicts").mkdir(parents=True)
    shutil.copy(committed, results_folder / "verdicts")
    first, *totals = command_line.scoreboard({}).splitlines()
    assert first.startswith("L1 ") and verdicts.claims()["L1"].statement in first
    assert len(totals) == 1 and f" {len(verdicts.claims()) - 1} not tested" in totals[0]


def test_the_site_is_shown_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(driver, "run", lambda *arguments, **options: tmp_path / "index.html")
    monkeypatch.setattr(command_line, "scoreboard", lambda before: "the board")
    monkeypatch.setattr(webbrowser, "open", shown.append)
    assert command_line.main(["--profile", "smoke"]) == 0
    assert f"Site: {tmp_path / 'index.html'}" in capsys.readouterr().out and shown == []
    assert command_line.main(["--profile", "smoke", "--open"]) == 0
    assert shown == [f"file://{tmp_path}/index.html"]


def test_a_failed_part_fails_the_tests_and_the_last_line_says_which(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_python", lambda *command, **variables: int("--nbval" in command))
    assert command_line.main(["--test"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "tests and notebooks FAILED in 0 s, smoke study passed in 0 s"


# JupyterLab

OPENED = "--LabApp.default_url=/lab/tree/05_target.ipynb"


@pytest.mark.parametrize(
    ("argv", "opened"),
    [
        (["--lab"], []),
        (["--lab", "05"], [OPENED]),
        (["--lab", "notebooks/05_target.ipynb", "--", "--port", "9000"], [OPENED]),
        (["--profile", "smoke", "--lab", "--", "--port", "9000"], []),
    ],
)
def test_jupyterlab_is_started_on_the_notebooks_in_the_environment_of_the_study(argv, opened, tmp_path, monkeypatch):
    for name in ("05_target", "06_step"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    for name, value in {"KURE_PROFILE": "quick", "KURE_CHECK": "1", "KURE_RESULTS": "elsewhere"}.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments) or sys.exit())
    with pytest.raises(SystemExit):
        command_line.main(argv)
    (program, command, environment), *others = started
    assert program == command[0] == sys.executable and not others
    assert command[1:4] == ["-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path}"]
    assert [word for word in command if "default_url" in word] == opened
    assert command[-2:] == ["--port", "9000"] if "--" in argv else "9000" not in command
    assert "KURE_PROFILE" not in environment and "KURE_CHECK" not in environment
    assert environment["KURE_RESULTS"] == "elsewhere"


def test_jupyterlab_serves_the_notebooks_until_ctrl_c(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--port-retries=0", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "kure_lib", "--lab", "00", "--", *options]
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **own, "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "0"}
    kernel = tmp_path / "DATA" / "kernels" / "python3" / "kernel.json"  # the user's own, of another environment
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["elsewhere"], "display_name": "Python 3", "language": "python"}')
    with (
        (tmp_path / "log").open("w+") as log,
        notebooks.running(
            command, cwd=paths.ROOT, env=environment, stdout=log, stderr=log, preexec_fn=_hear_ctrl_c
        ) as process,
    ):
        served = json.loads(_answer(f"http://127.0.0.1:{port}/api/contents", process))
        kernels = json.loads(_answer(f"http://127.0.0.1:{port}/api/kernelspecs", process))
        process.send_signal(signal.SIGINT)
        exit_code = process.wait(PATIENCE)
        log.seek(0)
        assert f"/lab/tree/{notebooks.available()[0]}.ipynb" in log.read()
    assert exit_code == 0
    assert {f"{stem}.ipynb" for stem in notebooks.available()} <= {item["name"] for item in served["content"]}
    assert kernels["kernelspecs"]["python3"]["spec"]["argv"] != ["elsewhere"]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job inherits that it is ignored


def _answer(address: str, process: subprocess.Popen) -> bytes:
    """What a server that is about to start answers."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError), urlopen(address) as answer:
            return answer.read()
        time.sleep(0.2)
    raise TimeoutError(address)


# Notebooks


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the notebook `STEM`, given the sources of its code cells; it owes a verdict on X1."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(verdicts, "claims", lambda: {"X1": verdicts.Claim("X1", "", "", "", "more", "", 1.0, (STEM,))})

    def write(*sources, parameters='profile = "study"  # type: str scale'):
        cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
        cells[0].metadata.tags = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, tmp_path / f"{STEM}.ipynb")

    return write


VERDICT = """
import os, pathlib
folder = pathlib.Path(os.environ["KURE_RESULTS"]) / profile / "verdicts"
folder.mkdir(exist_ok=True)
(folder / "X1.new").write_text(profile)
_ = (folder / "X1.new").replace(folder / "X1.json")
"""


def failure(**options) -> str:
    with pytest.raises(KureError) as error:
        notebooks.execute(STEM, "quick", **options)
    return str(error.value)


def test_a_notebook_that_does_all_it_should(write, tmp_path):
    write("import time\nprint(profile, flush=True)\ntime.sleep(0.5)\nprint('later')", VERDICT)
    executed = notebooks.execute(STEM, "quick")
    assert executed == tmp_path / "results" / "quick" / "notebooks" / f"{STEM}.ipynb"
    cells = nbformat.read(executed, as_version=4).cells
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4]  # with the injected parameters
    assert [output.text for output in cells[2].outputs] == ["quick\nlater\n"], "pieces are one output"
    assert not list(executed.parent.glob("*.partial.ipynb"))


@pytest.mark.parametrize("profile", ["study", "quick"])
def test_a_reading_of_the_committed_study_says_so_where_the_records_are_others(write, tmp_path, profile):
    write("print(profile)", VERDICT)
    source = tmp_path / f"{STEM}.ipynb"
    notebook = nbformat.read(source, as_version=4)
    cells = [nbformat.v4.new_markdown_cell("It is *so*.\n\nAnd so."), nbformat.v4.new_markdown_cell("A reason.")]
    cells[0].metadata.tags = ["reading"]
    notebook.cells += cells
    nbformat.write(notebook, source)
    executed = nbformat.read(notebooks.execute(STEM, profile), as_version=4).cells
    boxed = "> **In the committed study:**\n>\n> It is *so*.\n>\n> And so."
    assert executed[-2].source == ("It is *so*.\n\nAnd so." if profile == "study" else boxed)
    assert executed[-1].source == "A reason."


def test_a_notebook_has_the_environment_it_is_given(write, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    write("import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])", VERDICT)
    given = {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    cells = nbformat.read(notebooks.execute(STEM, "study", environment=given), as_version=4).cells
    assert cells[1].outputs[0].text == "3 \n"


def test_under_its_own_profile_a_notebook_keeps_its_cells_and_its_bytes(write, tmp_path):
    write("print(profile)", VERDICT)
    source = tmp_path / f"{STEM}.ipynb"
    notebooks.execute(STEM, "study", destination=source)
    once = source.read_bytes()
    notebooks.execute(STEM, "study", destination=source)
    assert source.read_bytes() == once
    assert len(nbformat.read(source, as_version=4).cells) == 3
    assert b"papermill" not in once


BARS = """
import time
from kure_lib import progress
with progress.bar(9, "evaluations", "evaluation", few=3) as outer, progress.bar(5, "LAPQ", "loss") as inner:
    outer.update(2)
    time.sleep(1.5)
    inner.update(4)
    {end}
"""


@pytest.fixture
def said(monkeypatch, tmp_path):
    """What a notebook reports while it is executed, looked at often; temporary files lie in a folder of their own."""
    monkeypatch.setattr(notebooks, "LOOK", 0.1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return []


def test_a_notebook_reports_what_it_is_at_and_puts_nothing_of_it_out(write, said, tmp_path):
    write(BARS.format(end="time.sleep(3)"), VERDICT + "time.sleep(2)")
    cells = nbformat.read(notebooks.execute(STEM, "study", report=said.append), as_version=4).cells
    assert all(cell.outputs == [] for cell in cells if cell.cell_type == "code")
    assert said[0] == "begins"
    first = said.index("cell 2 of 3, evaluations 0 of 9, LAPQ 0 of 5")
    assert "cell 2 of 3, evaluations 2 of 9, LAPQ 4 of 5" in said[first:]
    assert said[-1] == "cell 3 of 3", "a bar that is closed is no longer told"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_of_a_kernel_that_dies_no_progress_is_left(write, said, tmp_path):
    write(BARS.format(end="import os; os._exit(1)"))
    assert "lost its kernel" in failure(report=said.append)
    assert any("evaluations 0 of 9" in line for line in said)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_misspelled_parameter(write):
    write(VERDICT, parameters='profile = "study"  # type: str scale\nbits = 4  # type: int weight bits')
    assert failure(parameters={"bit": 3}) == f"{STEM}.ipynb has no parameter 'bit'; it has profile, bits."


def test_a_cell_that_fails(write, tmp_path):
    write("x = 1", "# divides\nx / 0", VERDICT)
    said = failure()
    assert f"Notebook {STEM} failed in the cell that begins with `# divides`: ZeroDivisionError" in said
    assert "----> 2 x / 0" in said
    partial = Path(said.rsplit(" lies in ")[-1].removesuffix("."))
    assert nbformat.read(partial, as_version=4).cells[-1].execution_count is None
    assert not (partial.parent / f"{STEM}.ipynb").exists()


def test_a_cell_that_takes_too_long(write, monkeypatch):
    monkeypatch.setattr(notebooks, "TIMEOUT", 1)
    write("import time\ntime.sleep(60)", VERDICT)
    assert "took more than 1 s in the cell" in failure()


def test_a_notebook_that_takes_too_long(write, monkeypatch):
    monkeypatch.setattr(notebooks, "TIMEOUT", 2)
    monkeypatch.setattr(notebooks, "GRACE", 1)
    write("import time", *["time.sleep(1)"] * 4, VERDICT)
    assert "did not end within 3 s and was stopped" in failure()


def test_a_kernel_that_dies(write):
    write("import os\nos._exit(1)", VERDICT)
    said = failure()
    assert "lost its kernel, perhaps for want of memory, in the cell that begins with `import os`" in said


def test_a_notebook_that_exits_early_with_success(write):
    write("import sys\nsys.exit(0)", VERDICT)
    assert "in the cell that begins with `import sys`: SystemExit" in failure()


def test_a_verdict_that_is_not_written_or_not_written_anew(write):
    write("x = 1")
    assert "did not write its verdict on X1" in failure()
    write(VERDICT)
    notebooks.execute(STEM, "quick")
    write("x = 1")  # the verdict of the last execution is still there
    assert "did not write its verdict on X1" in failure()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_the_kernel_too(stop, write, tmp_path):
    note = tmp_path / "kernel"
    write("import os, pathlib, time", f"_ = pathlib.Path({str(note)!r}).write_text(str(os.getpid()))", "time.sleep(60)")
    script = f"""
import signal, sys
from pathlib import Path
from kure_lib import __main__ as command_line, driver, notebooks, paths
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
paths.NOTEBOOKS = Path({str(tmp_path)!r})
driver.run = lambda *arguments, **options: notebooks.execute({STEM!r}, "quick")
sys.exit(command_line.main(["--profile", "quick"]))
"""
    with notebooks.running([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        kernel = psutil.Process(int(_content(note)))
        process.send_signal(stop)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Stopped. What was finished is kept" in said
    assert "Traceback" not in said
    psutil.wait_procs([kernel], timeout=PATIENCE)
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE


def _content(file: Path) -> str:
    """The text of a file that is about to appear."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if file.exists() and (text := file.read_text()):
            return text
        time.sleep(0.1)
    raise TimeoutError(file)


# run_all.sh, with a Python that only notes down what it is asked

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    -c*) exit "${TOO_OLD:-0}" ;;
    --version) echo "Python 3.9.2" ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
echo "$*" >>asked
[[ $* != *requirement* ]] || { sleep "${SLOW:-0}"; exit "${BROKEN:-0}"; }
"""

FAKE_MAMBA = """#!/usr/bin/env bash
echo "mamba $*" >>asked
mkdir -p .conda/bin && cp "$PYTHON" .conda/bin/python
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts `run_all.sh` in a folder of its own; `asked` tells what Python was then asked to do."""
    for name in ("run_all.sh", "requirements.txt", "pyproject.toml", "environment.yml"):
        shutil.copy(paths.ROOT / name, tmp_path)
    python = tmp_path / "bin with space" / "python3"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))

    def start(*arguments, **variables) -> subprocess.Popen:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        command = [tmp_path / "run_all.sh", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in variables:
            monkeypatch.delenv(name)
        return process

    return start


def asked(tmp_path: Path) -> list[str]:
    """What Python was asked since the last time."""
    log = tmp_path / "asked"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


INSTALL = [
    "-m pip install --requirement requirements.txt",
    "-m pip install --no-deps --no-build-isolation --editable .",
]
RUN = ["-m kure_lib --only 05 07"]


def test_only_the_first_start_installs(start, tmp_path):
    assert start("--only", "05", "07").wait() == 0
    assert asked(tmp_path) == ["-m venv --clear .venv", *INSTALL, *RUN]
    assert start("--only", "05", "07").wait() == 0
    assert asked(tmp_path) == RUN


def test_changed_pins_are_installed(start, tmp_path):
    start("--only", "05", "07").wait()
    asked(tmp_path)
    with (tmp_path / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert start("--only", "05", "07").wait() == 0
    assert asked(tmp_path) == [*INSTALL, *RUN]


def test_an_installation_that_failed_starts_again(start, tmp_path):
    assert start("--only", "05", "07", BROKEN="1").wait() != 0
    assert RUN[0] not in asked(tmp_path)
    assert start("--only", "05", "07").wait() == 0
    assert asked(tmp_path) == [*INSTALL, *RUN]


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock a second start does not wait")
def test_two_starts_at_once_install_once(start, tmp_path):
    first, second = start(SLOW="1"), start(SLOW="1")
    assert (first.wait(), second.wait()) == (0, 0)
    assert sum("--requirement" in line for line in asked(tmp_path)) == 1


def test_python_too_old_or_missing(start, tmp_path):
    _, said = start(TOO_OLD="1").communicate()
    assert said.count("\n") == 1
    assert "Python 3.11 to 3.14 with venv is needed, and" in said and "is Python 3.9.2" in said
    _, said = start(PYTHON="nowhere/python3").communicate()
    assert said.count("\n") == 1 and "nowhere/python3 is missing" in said
    assert not (tmp_path / ".venv").exists()


def test_conda(start, tmp_path, monkeypatch):
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "env", "dirname", "cat", "cmp", "mkdir", "cp", "rm", "sleep"):
        (bare / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(bare))
    process = start("--conda")
    assert "needs conda, mamba or micromamba" in process.communicate()[1] and process.returncode == 1
    mamba = bare / "mamba"
    mamba.write_text(FAKE_MAMBA)
    mamba.chmod(0o755)
    assert start("--conda").wait() == 0
    environment = f"mamba env create --prefix {tmp_path}/.conda --file environment.yml"
    assert asked(tmp_path) == [environment, *INSTALL, "-m kure_lib --conda"]


WITHOUT_PACKAGES = f"""#!/usr/bin/env bash
[[ $* != *ensurepip* ]] || exit 1  # as on Debian without python3-venv
exec {sys.executable} -I -S "$@"
"""


def test_help_needs_no_installation(start, tmp_path):
    shutil.copytree(paths.ROOT / "kure_lib", tmp_path / "kure_lib")
    bare = tmp_path / "bare"
    bare.write_text(WITHOUT_PACKAGES)
    bare.chmod(0o755)
    process = start("--help", PYTHON=str(bare))
    assert "usage: ./run_all.sh" in process.communicate()[0] and process.returncode == 0
    assert not (tmp_path / ".venv").exists()
