"""Claims of the paper and questions of its readers, and the verdict each one ends in."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
from filelock import FileLock

from kure_lib import files, paths
from kure_lib.paths import KureError, check_known

OUTCOMES = ("holds", "partly", "fails", "not tested")
BEGIN, END = "<!-- scoreboard -->", "<!-- /scoreboard -->"


@dataclass(frozen=True)
class Claim:
    """A statement to be judged: its source, what would refute (or answer) it, the notebooks that judge it."""

    id: str
    source: str
    statement: str
    refuted_by: str
    notebooks: tuple[str, ...]


@cache
def claims() -> dict[str, Claim]:
    """Every claim and question by its id, in the order of `claims.toml`.

    >>> claims()["S3"].notebooks
    ('06_step_size_robustness',)
    """
    text = Path(__file__).with_name("claims.toml").read_text(encoding="utf-8")
    return {
        id: Claim(id=id, **{**fields, "notebooks": tuple(fields["notebooks"])})
        for id, fields in tomllib.loads(text).items()
    }


def record(id: str, outcome: str, evidence: str, notebook: str | None = None) -> None:
    """Write the verdict on a claim and print it; in check mode compare it with the committed verdict.

    `outcome` is one of `OUTCOMES`, `evidence` one sentence with computed numbers. `notebook` (its stem) is
    needed only where several notebooks judge a claim: each adds its part, and if parts differ the claim holds
    `partly`. Raises `KureError` on an unknown id, outcome or notebook, or without evidence.
    """
    check_known("claim", id, claims())
    check_known("outcome", outcome, OUTCOMES)
    claim = claims()[id]
    evidence = " ".join(evidence.split())  # one line, also from a wrapped string
    if not evidence:
        raise KureError(f"The verdict on {id} has no evidence: give one sentence with the computed numbers.")
    if notebook is None and len(claim.notebooks) > 1:
        raise KureError(f"{id} is judged in {', '.join(claim.notebooks)}: say which with notebook=.")
    notebook = notebook or claim.notebooks[0]
    check_known(f"notebook of {id}", notebook, claim.notebooks)

    verdict = {"id": id, "outcome": outcome, "evidence": evidence, "notebook": notebook}
    with _alone(id):
        if len(claim.notebooks) > 1:
            parts = _read(id).get("parts", {}) | {notebook: {"outcome": outcome, "evidence": evidence}}
            verdict = _merged(claim, parts)
        files.keep(_file(id), json.dumps(verdict, indent=2, ensure_ascii=False) + "\n")
    print(f"{id} · {outcome} · {evidence}")


def scoreboard() -> pd.DataFrame:
    """One row a claim under the ambient profile; in `notebook`, the stems of several are joined by ", "."""
    rows = []
    for claim in claims().values():
        verdict = {"outcome": "not tested", "evidence": ""} | _read(claim.id)
        rows.append(verdict | {"id": claim.id, "statement": claim.statement, "notebook": ", ".join(claim.notebooks)})
    return pd.DataFrame(rows, columns=["id", "statement", "outcome", "evidence", "notebook"])


def scoreboard_markdown(folder: str = "notebooks/", evidence: bool = True) -> str:
    """The scoreboard as Markdown: a line of totals, then a table, with the evidence or without, that links to the
    notebooks in `folder`.
    """
    board = scoreboard()
    counts = board.outcome.value_counts()
    totals = ", ".join(f"{outcome} {counts.get(outcome, 0)}" for outcome in OUTCOMES)
    names = ["id", "claim or question", "verdict", *["evidence"] * evidence, "notebook"]
    rows = [names, ["---"] * len(names)]
    for id, statement, outcome, reason, stems in board.itertuples(index=False, name=None):
        links = " ".join(_link(stem, folder) for stem in stems.split(", "))
        rows.append([id, statement, f"**{outcome}**", *[reason] * evidence, links])
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"{len(board)} claims and questions (profile `{paths.profile()}`): {totals}.", "", *table])


def update_readme(path: Path) -> None:
    """Replace what stands between the scoreboard markers of a Markdown file, and nothing else in it."""
    path = Path(path)
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise KureError(f"{path} lacks the lines {BEGIN} and {END}: put them where the scoreboard belongs.")
    files.keep(path, f"{before}{BEGIN}\n{scoreboard_markdown(evidence=False)}\n{END}{after}")


def _merged(claim: Claim, parts: dict[str, dict[str, str]]) -> dict:
    """One verdict from the parts of several notebooks, in the claim's order."""
    parts = {stem: parts[stem] for stem in claim.notebooks if stem in parts}
    outcomes = {part["outcome"] for part in parts.values()}
    return {
        "id": claim.id,
        "outcome": outcomes.pop() if len(outcomes) == 1 else "partly",
        "evidence": " ".join(part["evidence"] for part in parts.values()),
        "notebook": ", ".join(parts),
        "parts": parts,
    }


@contextmanager
def _alone(id: str) -> Iterator[None]:
    """Two notebooks that judge one claim may be executed at the same time; in check mode nothing is written."""
    if paths.checking():
        yield
        return
    lock = paths.results() / "checkpoints" / f"verdict-{id}.lock"
    files.make_folder(lock.parent)
    with FileLock(lock):
        yield


def _file(id: str) -> Path:
    return paths.results() / "verdicts" / f"{id}.json"


def _read(id: str) -> dict:
    """The verdict on disk, or {} if there is none yet; `KureError` names the file if it holds no verdict."""
    try:
        verdict = json.loads(_file(id).read_text(encoding="utf-8"))
        for part in (verdict, *verdict.get("parts", {}).values()):
            check_known("outcome", part["outcome"], OUTCOMES)
            if not isinstance(part["evidence"], str):
                raise TypeError("its evidence is no text")
        return verdict
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, KureError) as error:
        raise KureError(f"{_file(id)} is damaged ({paths.in_words(error)}): delete it and run its notebook "
                        "again.") from error  # fmt: skip


def _link(stem: str, folder: str) -> str:
    """The notebook's number, linked if the notebook exists."""
    exists = (paths.NOTEBOOKS / f"{stem}.ipynb").is_file()
    return f"[{stem[:2]}]({folder}{stem}.ipynb)" if exists else stem[:2]
