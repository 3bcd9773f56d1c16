"""Notebooks, each executed by papermill in a process that can be stopped.

Papermill takes a misspelled parameter for a warning and `sys.exit(0)` in the third cell for a success, and its
time-outs are per cell. Here an execution succeeds if the process ended with 0, no cell raised an error, and every
verdict that `claims.toml` expects of the notebook was written by this very execution.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from textwrap import indent
from typing import Any
from unittest.mock import patch

import psutil
from filelock import FileLock

from kure_lib import files, paths, progress
from kure_lib.engine import die_with_parent
from kure_lib.findings import verdicts
from kure_lib.paths import KureError

TIMEOUT = 3600  # seconds, for one cell
GRACE = 120  # seconds more for the whole notebook, so that its kernel can start and end
LOOK = 5  # seconds between two looks at its progress
PARAMETERS, NEEDS = "parameters", "needs"  # tags of the cells that say what is evaluated; see `ask`
READING = "reading"  # tag of a text cell that is about the committed study
COMMITTED_STUDY = "**In the committed study:**"
TAIL = 12  # lines of a traceback worth showing


def available() -> list[str]:
    """The notebooks' names without `.ipynb`, in reading order."""
    return sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def select(names: Iterable[str] | None = None) -> list[str]:
    """The notebooks of these numbers, names or files, in reading order; all of them for `None`.

    Raises `KureError` for one that does not exist, and if there are none at all.
    """
    known = available()
    if not known:
        raise KureError(f"There are no notebooks in {paths.NOTEBOOKS}: restore them from the repository.")
    if names is None:
        return known
    wanted = {Path(name).stem for name in names}
    if unknown := wanted - set(known) - {stem[:2] for stem in known}:
        choice = ", ".join(stem[:2] for stem in known)
        raise KureError(f"There is no notebook {min(unknown)!r}: choose from {choice}.")
    return [stem for stem in known if {stem, stem[:2]} & wanted]


def execute(
    stem: str,
    profile: str,
    destination: Path | None = None,
    parameters: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda said: None,
) -> Path:
    """Execute a notebook from top to bottom; keep the executed copy whole, or not at all.

    Args:
        stem: The notebook's name.
        profile: The scale, which is a parameter of every notebook.
        destination: Where the copy goes; `results/<profile>/notebooks/<stem>.ipynb` if None.
        parameters: Others to set. Only those that differ from the notebook's own are injected, so that under its own
            profile the copy has the same cells.
        environment: Environment variables of its process: the GPU it computes on, the number of its threads.
        report: Called every few seconds with what it is at, such as "cell 7 of 23, evaluations 34 of 126".

    Returns:
        The path of the copy.

    Raises:
        KureError: The notebook or a parameter is unknown, a cell fails or takes too long, the kernel dies, or a verdict
            is not written. The message says where the part that was executed lies.

    Example:
        `execute("06_step_size_robustness", "quick", parameters={"points": 9})`
    """
    source = paths.NOTEBOOKS / f"{stem}.ipynb"
    if not source.is_file():
        raise KureError(f"There is no notebook {stem!r}: choose from {', '.join(available())}.")
    changes = _changes(source, {"profile": profile, **(parameters or {})})
    results = paths.all_results() / profile
    partial = results / "notebooks" / f"{stem}.partial.ipynb"
    files.make_folder(partial.parent)
    with FileLock(partial.with_suffix(".lock")):  # a second copy of the study waits for its turn
        partial.unlink(missing_ok=True)
        before = {} if paths.checking() else _verdicts(results, stem)  # in check mode none is written
        trouble = _papermill(source, partial, changes, environment or {}, report)
        after = _verdicts(results, stem)
        if not trouble and (missing := [id for id in after if after[id] in (None, before.get(id))]):
            trouble = f"did not write its verdict on {', '.join(missing)}."
        if trouble:
            raise KureError(f"Notebook {stem} {trouble}\nWhat was executed lies in {partial}.")
        destination = destination or partial.with_name(f"{stem}.ipynb")
        read = _without_noise(partial, boxed=profile != defaults(source).get("profile"))
        files.write_atomically(destination, read)
        partial.unlink()
    return destination


def ask(stem: str, parameters: Mapping[str, object]) -> None:
    """Carry out the cells of a notebook tagged `parameters` and `needs`, within `runs.asking`: what will it evaluate?

    It is check mode, so that no result is written. A statement may fail where it draws from what is not evaluated yet,
    and spares the next; so what depends on a result is not found. A notebook that cannot be read asks for nothing, and
    its execution says why.
    """
    names: dict[str, Any] = {}
    quiet = warnings.catch_warnings(action="ignore")
    with quiet, suppress(Exception), open(os.devnull, "w") as nowhere, patch.dict(os.environ, KURE_CHECK="1"):
        for cell in json.loads((paths.NOTEBOOKS / f"{stem}.ipynb").read_bytes())["cells"]:
            tags = {PARAMETERS, NEEDS} & set(cell["metadata"].get("tags", ()))
            for statement in ast.parse("".join(cell["source"])).body if tags else ():
                with suppress(Exception), redirect_stdout(nowhere), redirect_stderr(nowhere):
                    exec(compile(ast.Module([statement], []), stem, "exec"), names)
            names |= parameters if PARAMETERS in tags else {}


@contextmanager
def running(command: list, **options: Any) -> Iterator[subprocess.Popen]:
    """A process, with the options of `subprocess.Popen`, that ends with the block, and with it all that it started.

    It does so after Ctrl-C too, which a kernel does not notice: it runs in a session of its own.
    """
    process = subprocess.Popen(command, start_new_session=True, **{"preexec_fn": die_with_parent} | options)
    try:
        yield process
    finally:
        kill_children(process.pid)
        process.kill()
        process.wait()


def kill_children(process: int) -> None:
    """Kill all that a process has started, and what these have started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


def defaults(source: Path) -> dict[str, object]:
    """The names and values in a notebook's cell tagged `parameters`; `KureError` if it is no notebook."""
    import papermill  # like nbformat, takes seconds to import, which `--list` should not cost

    try:
        found = papermill.inspect_notebook(source)
        return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}
    except Exception as error:  # what is wrong with its JSON has no common class of errors
        raise KureError(f"{source} is damaged ({paths.in_words(error)}): restore it.") from error


def _changes(source: Path, wanted: Mapping[str, object]) -> dict[str, object]:
    """What of `wanted` differs from the notebook's own parameters; `KureError` for a name it lacks."""
    own = defaults(source)
    for name in wanted:
        if name not in own:
            allowed = ", ".join(own) or "none, as no cell is tagged `parameters`"
            raise KureError(f"{source.name} has no parameter {name!r}; it has {allowed}.")
    return {name: value for name, value in wanted.items() if own[name] != value}


def _verdicts(results: Path, stem: str) -> dict[str, tuple[int, int] | None]:
    """For each claim the notebook owes: what every writing of its verdict changes, None without a verdict."""
    owed = [claim.id for claim in verdicts.claims().values() if stem in claim.notebooks]
    files = {id: results / "verdicts" / f"{id}.json" for id in owed}
    return {id: (f.stat().st_mtime_ns, f.stat().st_ino) if f.exists() else None for id, f in files.items()}


def _papermill(
    source: Path,
    partial: Path,
    changes: Mapping[str, object],
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> str | None:
    """Execute `source` into `partial`. Returns None, or what went wrong, in words that follow the notebook's name."""
    command = [sys.executable, "-m", "papermill", source, partial, "--kernel", "python3", "--no-progress-bar"]
    command += ["--cwd", source.parent, "--execution-timeout", str(TIMEOUT)]
    command += ["--parameters_yaml", json.dumps(changes)] if changes else []
    environment = {**os.environ, **environment, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # else a warning in the outputs
    with tempfile.TemporaryFile() as log, tempfile.NamedTemporaryFile("r", prefix="kure-progress-") as line:
        with running(command, env={**environment, progress.FILE: line.name}, stdout=log, stderr=log) as process:
            end, exit_code = time.monotonic() + TIMEOUT + GRACE, None
            while exit_code is None and (left := end - time.monotonic()) > 0:
                try:
                    exit_code = process.wait(min(left, LOOK))
                except subprocess.TimeoutExpired:
                    line.seek(0)
                    report(", ".join(filter(None, [_cell(partial), line.read()])) or "begins")
        log.seek(0)
        return _trouble(partial, exit_code, log.read().decode(errors="replace"))


def _cell(partial: Path) -> str:
    """The number of the cell that is executed, among those with code; empty before the first."""
    with suppress(OSError, ValueError, KeyError):  # not begun, or read while it was written
        cells = [cell for cell in json.loads(partial.read_bytes())["cells"] if cell["cell_type"] == "code"]
        if begun := sum(bool(cell["metadata"]["papermill"]["start_time"]) for cell in cells):
            return f"cell {begun} of {len(cells)}"
    return ""


def _trouble(partial: Path, exit_code: int | None, log: str) -> str | None:
    """What went wrong, as the exit code (None: stopped here), papermill's log and the notebook tell, or None.

    Papermill marks cells that never ran as completed: the last one with a start time is the one that failed.
    """
    import nbformat

    try:
        cells = nbformat.read(partial, as_version=4).cells
    except (FileNotFoundError, ValueError):  # not begun, or stopped while it was written
        cells = []
    started = [cell for cell in cells if cell.cell_type == "code" and cell.metadata.papermill.start_time]
    outputs = started[-1].outputs if started else []
    error = next((output for output in outputs if output.output_type == "error"), None)
    first_line = started[-1].source.strip().partition("\n")[0] if started else ""
    where = f"in the cell that begins with `{first_line}`" if started else "before any cell"
    if exit_code is None:
        return f"did not end within {TIMEOUT + GRACE} s and was stopped {where}."
    if "CellTimeoutError" in log:
        return f"took more than {TIMEOUT} s {where}."
    if "DeadKernelError" in log:
        return f"lost its kernel, perhaps for want of memory, {where}."
    if error:
        traceback = "\n".join(error.traceback)
        return f"failed {where}: {error.ename}: {error.evalue}\n{_tail(traceback)}"
    return f"could not be executed, papermill ended {where}.\n{_tail(log)}" if exit_code else None


def _tail(text: str) -> str:
    """The last lines of a traceback, indented and without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return indent("\n".join(lines[-TAIL:]), "    ")


def _without_noise(executed: Path, boxed: bool) -> str:
    """The notebook as JSON, without what differs from one execution or machine to the next.

    A text cell tagged `reading` says what the committed study found. `boxed`, for a notebook of other records, puts it
    into a block quote that says so.
    """
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    notebook = nbformat.read(executed, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # a slow kernel prints in several pieces
    notebook.metadata.get("language_info", {}).pop("version", None)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    for cell in notebook.cells if boxed else ():
        if READING in cell.metadata.get("tags", ()):
            lines = [COMMITTED_STUDY, "", *cell.source.splitlines()]
            cell.source = "\n".join(f"> {line}".rstrip() for line in lines)
    return nbformat.writes(notebook) + "\n"
