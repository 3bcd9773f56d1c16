"""Folders, the ambient profile, and the error that a user can mend.

Three environment variables steer this module, read at the time of asking and inherited by child processes:
`KURE_RESULTS` moves the results, `KURE_PROFILE` holds the ambient profile, and `KURE_CHECK=1` is check mode:
nothing under `results/` is written, and what a notebook makes must agree with the committed file.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"


class KureError(Exception):
    """A mistake the user can mend; its message is one sentence that says what, where and what to do."""


def say(sentence: str) -> None:
    """Tell the user, on stderr, what is done about something that is no error."""
    print(sentence, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str:
    """What an error says, short enough to stand in a sentence."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def check_known(kind: str, value: object, known: Iterable) -> None:
    """Raise `KureError` with the allowed names unless `value` is one of them."""
    if value not in known:
        raise KureError(f"Unknown {kind} {value!r}: choose one of {', '.join(map(str, known))}.")


def __getattr__(name: str) -> Path:
    """`RESULTS`, the folder of all profiles, follows `KURE_RESULTS` (if relative, from `ROOT`)."""
    if name == "RESULTS":
        return ROOT / (os.environ.get("KURE_RESULTS") or "results")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def use_profile(name: str) -> None:
    """Make `name` the ambient profile of this process and of the processes it starts."""
    os.environ["KURE_PROFILE"] = name


def profile() -> str:
    """The ambient profile, "quick" unless `use_profile` has set another."""
    return os.environ.get("KURE_PROFILE") or "quick"


def results() -> Path:
    """The folder of the ambient profile's results; it need not exist yet."""
    return __getattr__("RESULTS") / profile()


def checking() -> bool:
    """Whether this is check mode."""
    return os.environ.get("KURE_CHECK") == "1"
