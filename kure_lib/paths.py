"""Folders, the ambient profile, and the error that a user can mend.

Environment variables steer this module, read at the time of asking and inherited by child processes: `KURE_RESULTS`
moves the results, `KURE_CACHE` the unpacked data, `KURE_PROFILE` holds the ambient profile, `KURE_GPUS_PER_RUN` the
number of GPUs that share a run, and `KURE_CHECK=1` is check mode: nothing under `results/` is written, and what a
notebook makes must agree with the committed file.
"""

import os
import re
import reprlib
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
YES, NO = ("1", "true", "yes"), ("0", "false", "no", "")


class KureError(Exception):
    """A mistake the user can mend; its message is one sentence that says what, where and what to do."""


def say(sentence: str) -> None:
    """Tell the user, on stderr, what is done about something that is no error; it is done too if nobody can be told."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str:
    """What an error says, short enough to stand in a sentence."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def refusal(what: str, error: ValidationError) -> KureError:
    """The error that says which field of `what` cannot be so."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "these values"
    if first["type"] == "missing":
        return KureError(f"{what} needs the field {field}: give it.")
    return KureError(f"{what} cannot have {field}={reprlib.repr(first['input'])}: {first['msg']}.")


def check_known(kind: str, value: object, known: Iterable) -> None:
    """Raise `KureError` with the allowed names unless `value` is one of them."""
    if value not in known:
        raise KureError(f"Unknown {kind} {value!r}: choose one of {', '.join(map(str, known))}.")


def all_results() -> Path:
    """The folder of the results of all profiles; it follows `KURE_RESULTS` (if relative, from `ROOT`)."""
    return ROOT / (os.environ.get("KURE_RESULTS") or "results")


def use_profile(name: str) -> None:
    """Make `name` the ambient profile of this process and of the processes it starts."""
    os.environ["KURE_PROFILE"] = _plain(name)


def profile() -> str:
    """The ambient profile, "quick" unless `use_profile` has set another."""
    return _plain(os.environ.get("KURE_PROFILE") or "quick")


def use_gpus_per_run(count: int) -> None:
    """Let every run of a plan be trained on so many GPUs, in this process and those it starts."""
    os.environ["KURE_GPUS_PER_RUN"] = str(count)


def gpus_per_run() -> int:
    """How many GPUs share a run: one unless `use_gpus_per_run` or the user has said another number."""
    said = os.environ.get("KURE_GPUS_PER_RUN") or "1"
    if not re.fullmatch(r"[1-9][0-9]*", said):
        raise KureError(f"KURE_GPUS_PER_RUN cannot be {said!r}: give a whole number above 0.")
    return int(said)


def _plain(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]*", name):
        raise KureError(f"A profile cannot be called {name!r}, as its results lie in a folder of that name: write one "
                        "of letters and digits in KURE_PROFILE.")  # fmt: skip
    return name


def results() -> Path:
    """The folder of the ambient profile's results; it need not exist yet."""
    return all_results() / profile()


def cache() -> Path:
    """The folder for data that are unpacked once; it need not exist yet."""
    if named := os.environ.get("KURE_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "kure_lib"
    except RuntimeError:
        raise KureError("There is no home folder to unpack data in: name another folder in KURE_CACHE.") from None


def checking() -> bool:
    """Whether this is check mode; `KureError` if `KURE_CHECK` says neither yes nor no."""
    said = os.environ.get("KURE_CHECK", "")
    check_known("value of KURE_CHECK", said, [*YES, *NO])
    return said in YES
