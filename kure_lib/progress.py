"""How far a long computation is, said where somebody looks, and never in what a notebook puts out.

On a terminal that is tqdm's bar. In a notebook that the driver executes it is a line in the file that `KURE_PROGRESS`
names, which the driver shows; in one that a person has open it is a line below the cell, gone in the end. Where nobody
looks, as in a log and under papermill or nbval, nothing is said.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from kure_lib.paths import say

FILE = "KURE_PROGRESS"
SECONDS = 1.0  # between two lines of a bar
WIDTH = 80  # columns of a line below a cell


def bar(total: int, what: str, unit: str, few: int = 0) -> tqdm:
    """A bar of `total` steps of `what`, to be used in a `with` block; hidden where they are no more than `few`.

    Several may be open at once, one within the other.
    """
    hidden = True if total <= few else None  # None: unless it is a terminal
    if hidden or not (os.environ.get(FILE) or _asked_by_a_person()):
        return tqdm(total=total, desc=what, unit=unit, disable=hidden, leave=False)
    return _Line(total=total, desc=what, bar_format="{desc} {n_fmt} of {total_fmt}")


@contextmanager
def waiting(what: str, sentence: str) -> Iterator[None]:
    """While it lasts, the driver is told that `what` is waited for; where it does not listen, `sentence` is said."""
    if os.environ.get(FILE):
        with _Line(desc=f"waiting for {what}", bar_format="{desc}"):
            yield
    else:
        say(sentence)
        yield


def _asked_by_a_person() -> bool:
    """Whether this is a notebook's kernel, and who runs the cell can be asked, unlike papermill and nbval."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    return bool(kernel and kernel.get_parent().get("content", {}).get("allow_stdin"))


class _Line(tqdm):
    """A bar that is part of one line: those of all that are open, as they are now."""

    shown: ClassVar[dict[tqdm, None]] = {}  # in order

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, mininterval=SECONDS, file=io.StringIO(), leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """What tqdm calls to show a bar and, with an empty `msg`, to close it."""
        if msg == "":
            self.shown.pop(self, None)
        else:
            self.shown[self] = None
        line = ", ".join(map(str, self.shown))
        with suppress(OSError):
            if told := os.environ.get(FILE):
                Path(told).write_text(line)
            else:
                print(f"\r{line:{WIDTH}}", end="" if line else "\r", file=sys.stderr, flush=True)
