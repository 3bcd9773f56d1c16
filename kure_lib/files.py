"""The one way in which a file is written: whole or not at all, and in check mode compared instead."""

import errno
import io
import json
import os
import re
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from kure_lib.paths import KureError, checking

RELATIVE_TOLERANCE = 1e-4


def make_folder(folder: Path) -> None:
    """Make a folder if it is not there; `KureError` naming it if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> KureError:
    return KureError(f"Cannot write {path} ({error.strerror}): make room or give access there, or set KURE_RESULTS, "
                     "for data KURE_CACHE, to another folder.")  # fmt: skip


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a half of it.

    Raises `KureError` naming the file if the disk is full or the folder cannot be written to.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
        os.replace(unfinished, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # gone already, as it should be
            unfinished.unlink()


def sweep(folder: Path) -> None:
    """Delete what processes that were killed while they wrote have left behind, and nothing of those alive."""
    for file in folder.rglob(".*"):
        owner = file.name.rpartition(".")[2]
        if owner.isdecimal() and file.is_file() and not psutil.pid_exists(int(owner)):
            file.unlink(missing_ok=True)


def read_sums(path: Path) -> dict[str, str]:
    """The SHA-256 of files by name, as `sha256sum` writes them.

    Raises `KureError` naming the file if it is missing, or holds none or anything else.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KureError(f"{path} is missing ({error.strerror}): restore it.") from None
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*)", line) for line in text.splitlines()]
    if not found or not all(found):
        raise KureError(f"{path} is damaged: restore it; every line is a SHA-256 and the name of a file.")
    return {line[2]: line[1] for line in found}


def keep(path: Path, text: str, tolerance: float = RELATIVE_TOLERANCE) -> None:
    """Write a result (CSV, Markdown or JSON); in check mode compare it with the committed one instead.

    Numbers may differ by `tolerance` of their size or, near zero, by its square; everything else must be equal.
    Raises `KureError` naming the file, and the row and column in which it first differs.
    """
    if not checking():
        write_atomically(path, text)
        return
    remedy = "run its notebook with KURE_CHECK unset and commit the file"
    try:
        committed = _cells(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KureError(f"{path} is missing: {remedy}.") from None
    except ValueError as error:
        raise KureError(f"{path} is damaged ({str(error).strip()}): restore it, or {remedy}.") from error
    if difference := _first_difference(committed, _cells(path, text), tolerance):
        raise KureError(f"{path} differs from its notebook, {difference}: find the cause, or {remedy}.")


def fill(path: Path, begin: str, end: str, text: str) -> None:
    """Keep a Markdown file with `text` between the lines `begin` and `end`, and nothing else in it changed.

    Raises `KureError` naming the file if it lacks one of them.
    """
    before, opened, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise KureError(f"{path} lacks the lines {begin} and {end}: put them where this belongs.")
    keep(path, f"{before}{begin}\n{text.strip()}\n{end}{after}")


def _cells(path: Path, text: str) -> pd.DataFrame:
    """The cells, as text, of a CSV file, of the lines of a Markdown file, or of a JSON object as a table of one row."""
    if path.suffix == ".csv":
        return pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False)
    if path.suffix == ".json":
        fields = json.loads(text)
        return pd.DataFrame([[*fields], [json.dumps(value, ensure_ascii=False) for value in fields.values()]])
    lines = [line for line in text.splitlines() if not re.fullmatch(r"[|:\- ]+", line)]  # no rule under a header
    rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))] for line in lines)
    return pd.DataFrame(list(zip_longest(*rows))).T  # short rows are filled up


def _first_difference(old: pd.DataFrame, new: pd.DataFrame, tolerance: float) -> str | None:
    """Where two tables first differ, in words, or None; the first row of several cells is the header."""
    header = int(new.notna().sum(axis=1).gt(1).argmax())
    old, new = old.align(new)
    was, now = (frame.apply(pd.to_numeric, errors="coerce").to_numpy(float) for frame in (old, new))
    close = np.isclose(now, was, rtol=tolerance, atol=tolerance**2)
    differing = np.argwhere(~(close | (old == new) | (old.isna() & new.isna())).to_numpy())
    if not len(differing):
        return None
    i, j = differing[0]
    shown: list[Any] = [old.iat[i, j], new.iat[i, j], new.iat[header, j]]
    before, after, column = ("nothing" if pd.isna(value) or value == "" else value for value in shown)
    return f"row {i - header} of column {column} is {after} and was {before}"
