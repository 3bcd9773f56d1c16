"""The one way in which a file is written: whole or not at all, and in check mode compared instead."""

import csv
import io
import json
import math
import os
import re
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from kure_lib.paths import KureError, checking

RELATIVE_TOLERANCE = 1e-4


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a half of it.

    Raises `KureError` naming the file if the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
        os.replace(unfinished, path)
    except OSError as error:
        raise KureError(
            f"Cannot write {path} ({error.strerror}): make room or give access there, "
            "or set KURE_RESULTS to another folder."
        ) from error
    finally:
        with suppress(OSError):  # gone already, as it should be
            unfinished.unlink()


def keep(path: Path, text: str, tolerance: float = RELATIVE_TOLERANCE) -> None:
    """Write a result (CSV, Markdown or JSON); in check mode compare it with the committed one instead.

    Numbers may differ by `tolerance` of their size or, near zero, by its square; everything else must be equal.
    Raises `KureError` naming the file, and the row and column in which it first differs.
    """
    path = Path(path)
    if not checking():
        write_atomically(path, text)
        return
    remedy = "run its notebook with KURE_CHECK unset and commit the file"
    try:
        committed = _rows(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KureError(f"{path} is missing: {remedy}.") from None
    except ValueError as error:
        raise KureError(f"{path} is damaged ({error}): restore it, or {remedy}.") from error
    if difference := _first_difference(committed, _rows(path, text), tolerance):
        raise KureError(f"{path} differs from its notebook, {difference}: find the cause, or {remedy}.")


def _rows(path: Path, text: str) -> list[list[str]]:
    """The cells of a CSV file, of a Markdown file's lines, or of a JSON object as a table of one row."""
    if path.suffix == ".csv":
        return list(csv.reader(io.StringIO(text)))
    if path.suffix == ".json":
        fields = json.loads(text)
        return [list(fields), [json.dumps(value, ensure_ascii=False) for value in fields.values()]]
    ruling = re.compile(r"[|:\- ]+")  # the line under a table's header
    lines = [line for line in text.splitlines() if not ruling.fullmatch(line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))] for line in lines]


def _first_difference(committed: list[list[str]], made: list[list[str]], tolerance: float) -> str | None:
    """Where two tables first differ, in words, or None; the first row of several cells is the header."""
    start = next((i for i, row in enumerate(made) if len(row) > 1), 0)
    header = made[start] if made else []
    for i, (old_row, new_row) in enumerate(zip_longest(committed, made, fillvalue=())):
        for j, (old, new) in enumerate(zip_longest(old_row, new_row)):
            if not _agree(old, new, tolerance):
                column = header[j] if j < len(header) else j + 1
                return f"row {i - start} of column {column} is {new or 'nothing'} and was {old or 'nothing'}"
    return None


def _agree(old: str | None, new: str | None, tolerance: float) -> bool:
    """Equal as text, or both numbers and close."""
    if old == new or old is None or new is None:
        return old == new
    try:
        return math.isclose(float(old), float(new), rel_tol=tolerance, abs_tol=tolerance**2)
    except ValueError:
        return False
