"""The one way in which a file is written: whole or not at all, and in check mode compared instead."""

import io
import os
import re
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import pandas as pd
from pandas.testing import assert_frame_equal

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
        committed = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KureError(f"{path} is missing: {remedy}.") from None
    except ValueError as error:
        raise KureError(f"{path} is damaged ({error}): restore it, or {remedy}.") from error
    try:
        _compare_tables(committed, text, tolerance) if path.suffix == ".csv" else _compare_lines(committed, text)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise KureError(f"{path} differs from its notebook ({reason}): find the cause, or {remedy}.") from None


def _compare_tables(committed: str, made: str, tolerance: float) -> None:
    """Raise AssertionError that names the first column in which two CSV files differ."""
    old, new = (pd.read_csv(io.StringIO(text)) for text in (committed, made))
    assert_frame_equal(new, old, check_dtype=False, rtol=tolerance, atol=tolerance**2, obj="Table")


def _compare_lines(committed: str, made: str) -> None:
    """Raise AssertionError that shows the first line in which two texts differ by more than a table's padding."""
    old, new = (
        [re.sub(r"--+", "-", " ".join(line.split())) for line in text.splitlines()] for text in (committed, made)
    )
    for number, (was, now) in enumerate(zip_longest(old, new, fillvalue="nothing"), start=1):
        if now != was:
            raise AssertionError(f"line {number} is {now!r} and was {was!r}")
