"""Notebooks, each executed by papermill in a process that can be stopped.

Papermill believes too easily: a misspelled parameter is a warning, `sys.exit(0)` in the third cell is a
success, and its time-outs are per cell. Here an execution counts when the process ended with 0, no cell
raised, and every verdict that `claims.toml` expects of the notebook was written by this very execution.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import psutil
from filelock import FileLock
from nbformat import NotebookNode

from kure_lib import files, paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError

TIMEOUT = 3600  # seconds, for one cell
GRACE = 120  # seconds more for the whole notebook, so that its kernel can start and end
TAIL = 12  # lines of a traceback worth showing


def available() -> list[str]:
    """The notebooks' names without `.ipynb`, in reading order."""
    return sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def select(names: Iterable[str] | None = None) -> list[str]:
    """The notebooks meant by numbers or full names, in reading order; all of them for `None`.

    Raises `KureError` for a name that is no notebook.
    """
    known = available()
    if names is None:
        return known
    wanted = {name.removesuffix(".ipynb") for name in names}
    if unknown := wanted - set(known) - {stem[:2] for stem in known}:
        choice = ", ".join(stem[:2] for stem in known)
        raise KureError(f"There is no notebook {min(unknown)!r}: choose from {choice}.")
    return [stem for stem in known if {stem, stem[:2]} & wanted]


def execute(
    stem: str,
    profile: str,
    destination: Path | None = None,
    timeout: float = TIMEOUT,
    parameters: Mapping[str, object] | None = None,
    threads: int | None = None,
) -> Path:
    """Execute a notebook from top to bottom; keep the executed copy whole, or not at all.

    `destination` is `results/<profile>/notebooks/<stem>.ipynb` unless given. `timeout` (seconds) is for one
    cell and, with `GRACE` added, for the notebook. Only parameters that differ from the notebook's own are
    injected, so that under its own profile the copy has the same cells. The kernel computes with that many
    `threads`, unless the environment already says with how many. Returns `destination`.
    Raises `KureError` for an unknown notebook or parameter, a cell that fails or takes too long, a kernel
    that dies, and a verdict that was not written; it says where the part that was executed lies.
    """
    source = paths.NOTEBOOKS / f"{stem}.ipynb"
    if not source.is_file():
        raise KureError(f"There is no notebook {stem!r}: choose from {', '.join(available())}.")
    changes = _changes(source, {"profile": profile, **(parameters or {})})
    results = paths.RESULTS / profile
    partial = results / "notebooks" / f"{stem}.partial.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(partial.with_suffix(".lock")):  # a second copy of the study waits for its turn
        partial.unlink(missing_ok=True)
        before = {} if paths.checking() else _verdicts(results, stem)  # in check mode none is written
        trouble = _papermill(source, partial, changes, timeout, threads)
        after = _verdicts(results, stem)
        if not trouble and (missing := [id for id in after if after[id] in (None, before.get(id))]):
            trouble = f"did not write its verdict on {', '.join(missing)}."
        if trouble:
            raise KureError(f"Notebook {stem} {trouble}\nWhat was executed lies in {partial}.")
        destination = destination or partial.with_name(f"{stem}.ipynb")
        files.write_atomically(destination, _without_noise(nbformat.read(partial, as_version=4)))
        partial.unlink()
    return destination


@contextmanager
def running(command: list, **options) -> Iterator[subprocess.Popen]:
    """A process, as of `subprocess.Popen`, that ends with the block, and with it all that it started.

    After Ctrl-C too: a kernel is in a session of its own, where the signal does not reach it.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def defaults(source: Path) -> dict[str, object]:
    """The names and values in a notebook's cell tagged `parameters`."""
    import papermill  # takes a second to import, which only an execution should cost

    found = papermill.inspect_notebook(source)
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


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
    source: Path, partial: Path, changes: Mapping[str, object], timeout: float, threads: int | None
) -> str | None:
    """Execute `source` into `partial`; None if all went well, otherwise the trouble, to follow the name."""
    command = [sys.executable, "-m", "papermill", source, partial, "--kernel", "python3", "--no-progress-bar"]
    command += ["--cwd", source.parent, "--execution-timeout", f"{timeout:.0f}"]
    command += ["--parameters_yaml", json.dumps(changes)] if changes else []
    ours = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment = {**ours, **os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # else a warning in the outputs
    with tempfile.TemporaryFile() as log:
        with running(command, env=environment, stdout=log, stderr=log) as process:
            try:
                exit_code = process.wait(timeout + GRACE)
            except subprocess.TimeoutExpired:
                exit_code = None
        log.seek(0)
        return _trouble(partial, exit_code, log.read().decode(errors="replace"), timeout)


def _trouble(partial: Path, exit_code: int | None, log: str, timeout: float) -> str | None:
    """What the exit code (None: stopped by us), papermill's log and the notebook tell; None if all is well.

    Papermill marks cells that never ran as completed: the last one with a start time is the one that failed.
    """
    try:
        cells = nbformat.read(partial, as_version=4).cells
    except (FileNotFoundError, ValueError):  # not begun, or stopped while it was written
        cells = []
    started = [cell for cell in cells if cell.cell_type == "code" and cell.metadata.papermill.start_time]
    outputs = started[-1].outputs if started else []
    error = next((output for output in outputs if output.output_type == "error"), None)
    where = f"in the cell that begins with `{_first_line(started[-1])}`" if started else "before any cell"
    if exit_code is None:
        return f"did not end within {timeout + GRACE:.0f} s and was stopped {where}."
    if "CellTimeoutError" in log:
        return f"took more than {timeout:.0f} s {where}."
    if "DeadKernelError" in log:
        return f"lost its kernel, perhaps for want of memory, {where}."
    if error:
        return f"failed {where}: {error.ename}: {error.evalue}\n{_tail(*error.traceback)}"
    return f"could not be executed, papermill ended {where}.\n{_tail(log)}" if exit_code else None


def _first_line(cell: NotebookNode) -> str:
    return cell.source.strip().partition("\n")[0]


def _tail(*text: str) -> str:
    """The last lines of a traceback, indented and without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(text)).strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL:])


def _without_noise(notebook: NotebookNode) -> str:
    """The notebook as JSON, without what differs from one execution or machine to the next."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    return nbformat.writes(notebook) + "\n"
