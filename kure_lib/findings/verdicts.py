"""Claims of the paper and questions of its readers, the rule that decides them, and the verdict each one ends in.

`claims.toml` says of each claim which effect is measured, in which unit, and how large an effect is worth having; one
rule, here, decides every setting from its interval and the claim from its settings. No notebook has a rule of its own.
"""

import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import pandas as pd
from filelock import FileLock
from IPython.display import Markdown, display
from pandas.api.types import is_scalar
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from kure_lib import files, paths
from kure_lib.findings.statistics import mean_interval
from kure_lib.paths import KureError, check_known

CLAIMS = Path(__file__).with_name("claims.toml")
OUTCOMES = ("holds", "mixed", "undecided", "fails", "not tested")
ANSWERS = {"holds": "yes", "fails": "no"}  # what a question ends in; the other outcomes keep their names
KINDS = {
    "more": "A setting is supported if its interval lies above zero and reaches the margin, refuted if it lies wholly "
    "below the margin, and undecided otherwise.",
    "same": "A setting is supported if its interval lies within ± the margin, refuted if it lies wholly outside, and "
    "undecided otherwise.",
    "exact": "The effect is how far the statement is missed: a setting is supported up to the margin and refuted "
    "beyond it, without chance.",
}
DECISIONS = ("supported", "refuted", "undecided")
RULE = (
    "A claim holds if some setting is supported, none refuted and at most half are undecided; it fails if some are "
    "refuted and none supported; it is mixed if both occur; else it is undecided."
)
CHANCE = (
    "Intervals are Student intervals over seeds, of differences paired by seed, that hold at 95 % for all settings of "
    "a claim at once (Šidák), and so are wider than those in tables and figures, each of which holds for one setting. "
    "A single seed has none and decides nothing."
)
LEVEL = 0.95  # that all intervals of a claim cover at once: each of k settings has level 0.95^(1/k) (Šidák 1967)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """A statement to be judged.

    `effect` says what is measured, between which arms, how paired and over which settings; it is in `unit`. `margin`
    is the smallest effect worth having, in that unit, for `reason` where it is not the usual one; `kind` is one of
    `KINDS`. `notebooks` are those that judge it, each by its stem.
    """

    id: str
    source: str
    statement: str
    effect: str
    kind: Literal["more", "same", "exact"]
    unit: str
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    notebooks: tuple[str, ...]
    reason: str = ""

    @property
    def is_question(self) -> bool:
        return self.id[0] in "PMNGFDEAQ"


@cache
def claims() -> dict[str, Claim]:
    """Every claim and question by its id, in the order of `claims.toml`; `KureError` if one of them is damaged.

    >>> claims()["S3"].notebooks
    ('06_step_size_robustness',)
    """
    found = {}
    for id, fields in _toml()["claims"].items():
        try:
            found[id] = Claim(id=id, **fields)
        except (ValidationError, TypeError) as error:
            raise KureError(f"The claim {id} in {CLAIMS} is damaged ({paths.in_words(error)}): restore it.") from None
    return found


def changed_after_looking() -> list[str]:
    """Every change of a rule, a margin or an effect that was made after a look at the data it decides."""
    return _toml()["changed_after_looking"]


def _toml() -> dict[str, Any]:
    try:
        content = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
        if not (content["claims"] and isinstance(content["claims"], dict)):
            raise ValueError("it holds no claims")
    except (OSError, ValueError, KeyError) as error:
        raise KureError(f"{CLAIMS} is damaged ({paths.in_words(error)}): restore it.") from None
    return content


def rules(stem: str) -> str:
    """What a notebook judges and by which rule, as Markdown, to be shown before any number.

    Raises `KureError` for a notebook that judges nothing.
    """
    judged = [claim for claim in claims().values() if stem in claim.notebooks]
    check_known("notebook with claims", stem, sorted({stem for claim in claims().values() for stem in claim.notebooks}))
    lines = ["**What is judged here, and by which rule**", ""]
    for claim in judged:
        margin = f"margin {claim.margin:g}, in {claim.unit}" + (f" ({claim.reason})" if claim.reason else "")
        lines.append(f"- **{claim.id}** {claim.statement} ({claim.source}) *{claim.effect}*; {margin}; `{claim.kind}`.")
    lines += ["", *(f"`{kind}`: {KINDS[kind]}" for kind in KINDS if kind in {claim.kind for claim in judged})]
    if {claim.kind for claim in judged} != {"exact"}:
        lines += ["", CHANCE]
    lines += ["", RULE]
    return "\n".join(lines)


def announce(stem: str) -> None:
    """Show the rules of a notebook, before any number."""
    display(Markdown(rules(stem)))


def decide(effects: pd.DataFrame, kind: str, margin: float) -> pd.DataFrame:
    """One row a setting, in order of appearance: `setting`, `n`, `mean`, `half`, the half-width of its interval, and
    `decision`.

    Args:
        effects: Columns `setting`, `effect` and, unless `kind` is exact, `seed`; one row a setting and seed.
        kind: One of `KINDS`.
        margin: The smallest effect worth having, in the unit of the effects.

    Raises:
        KureError: The kind is unknown, a column is missing, an effect is not a finite number, or a pair of setting
            and seed occurs twice.

    Example:
        >>> effects = pd.DataFrame({"setting": ["w3"] * 3, "seed": [0, 1, 2], "effect": [2.0, 2.2, 2.4]})
        >>> decide(effects, "more", margin=1.0).round(2).values.tolist()
        [['w3', 3, 2.2, 0.5, 'supported']]
    """
    check_known("kind", kind, KINDS)
    columns = ["setting", "effect"] if kind == "exact" else ["setting", "seed", "effect"]
    if lacking := set(columns) - set(effects.columns):
        raise KureError(f"Effects to be judged lack the column {min(lacking)!r}: give {', '.join(columns)}.")
    if not effects[columns].map(is_scalar).all(axis=None):
        raise KureError(f"Effects to be judged hold what is no single value: give one in each of {', '.join(columns)}.")
    if twice := effects[columns[:-1]].duplicated().sum():
        raise KureError(f"{twice} effects occur twice: give one for each {' and '.join(columns[:-1])}.")
    finite = pd.to_numeric(effects.effect, errors="coerce").map(math.isfinite)
    if not finite.all():
        where = effects.setting[~finite].iloc[0]
        raise KureError(f"The effect in setting {where!r} is not a finite number: leave out what was not measured.")
    groups = effects.groupby("setting", sort=False).effect
    level = LEVEL ** (1 / max(groups.ngroups, 1))
    rows: list[tuple[Any, ...]] = []
    for setting, values in groups:
        mean, half = mean_interval(values, level)
        half = 0.0 if kind == "exact" else math.inf if math.isnan(half) else half
        rows.append((setting, len(values), mean, half, _decision(kind, margin, mean - half, mean + half)))
    return pd.DataFrame(rows, columns=["setting", "n", "mean", "half", "decision"])


def _decision(kind: str, margin: float, low: float, high: float) -> str:
    if kind == "more":
        supported, refuted = low > 0 and high >= margin, high < margin
    elif kind == "same":
        supported, refuted = -margin <= low and high <= margin, low > margin or high < -margin
    else:
        supported, refuted = high <= margin, high > margin
    return "supported" if supported else "refuted" if refuted else "undecided"


def outcome(decisions: Iterable[str]) -> str:
    """What a claim ends in, given the decision on each of its settings: one of `OUTCOMES`.

    >>> outcome(["supported", "undecided"]), outcome(["refuted", "undecided"])
    ('holds', 'fails')
    """
    counts = Counter(decisions)
    supported, refuted, undecided = (counts[name] for name in DECISIONS)
    if supported and refuted:
        return "mixed"
    if supported and 2 * undecided <= supported + undecided:
        return "holds"
    return "fails" if refuted else "undecided" if counts else "not tested"


def judge(id: str, effects: pd.DataFrame, remark: str = "", notebook: str | None = None) -> None:
    """Decide a claim from its effects, keep the verdict and print it; in check mode compare it with the committed one.

    Args:
        id: The claim.
        effects: As in `decide`; none at all means that this profile does not test the claim.
        remark: A sentence with computed numbers that the board folds away.
        notebook: The stem of the judging notebook, needed only where several judge a claim: the effects of all are
            then decided together.

    Raises:
        KureError: The claim or notebook is unknown, or the effects are not as `decide` wants them.
    """
    check_known("claim", id, claims())
    claim = claims()[id]
    if notebook is None and len(claim.notebooks) > 1:
        raise KureError(f"{id} is judged in {', '.join(claim.notebooks)}: say which with notebook=.")
    notebook = notebook or claim.notebooks[0]
    check_known(f"notebook of {id}", notebook, claim.notebooks)
    if len(effects):
        decide(effects, claim.kind, claim.margin)  # refuses what is wrong before anything is kept
    quantum = claim.margin / 1000 or 1e-6  # the rounding of other machines stays out of the file
    rows = [
        {name: row[name] for name in ("setting", "seed") if name in row}
        | {"effect": float(f"{round(row['effect'] / quantum) * quantum:.12g}")}
        for row in _records(effects)
    ]
    part = {"remark": " ".join(remark.split()), "effects": rows}
    with _alone(id):
        parts = _read(id).get("parts", {}) | {notebook: part}
        verdict, settings = _verdict(claim, {stem: parts[stem] for stem in claim.notebooks if stem in parts})
        files.keep(_file(id), json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    print(f"{id} · {verdict['outcome']} · {verdict['evidence']}")
    if settings:
        table = pd.DataFrame(settings).assign(effect=[_shown(claim, row) for row in settings])
        print(table[["setting", "n", "effect", "decision"]].to_string(index=False))


def _verdict(claim: Claim, parts: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The verdict on the effects of all notebooks together, as it is kept, and the decided settings."""
    effects = pd.DataFrame([row for part in parts.values() for row in part["effects"]])
    settings = _records(decide(effects, claim.kind, claim.margin)) if len(effects) else []
    found = outcome([row["decision"] for row in settings])
    summary = "This profile does not test it."
    if settings:
        counts = Counter(row["decision"] for row in settings)
        summary = f"Of {len(settings)} settings " + ", ".join(f"{name} {counts[name]}" for name in DECISIONS) + "."
    if settings and claim.kind != "exact":
        means = [row["mean"] for row in settings]
        summary += f" Over settings the mean is {fmean(means):+.{_digits(claim)}f} {claim.unit}"
        summary += f", positive in {sum(mean > 0 for mean in means)}."
    verdict = {
        "id": claim.id,
        "outcome": ANSWERS.get(found, found) if claim.is_question else found,
        "decided_by": _decisive(claim, settings, found),
        "evidence": " ".join([summary, *(part["remark"] for part in parts.values() if part["remark"])]),
        "notebook": ", ".join(parts),
        "parts": parts,
    }
    return verdict, settings


def _decisive(claim: Claim, settings: list[dict[str, Any]], found: str) -> str:
    """The numbers that decided: for `more` the surest setting on either side of the margin, for the other kinds the
    one furthest from the statement; where nothing is decided, the one with the narrowest interval.
    """
    distance = (lambda row: abs(row["mean"])) if claim.kind == "same" else (lambda row: row["mean"])
    pick = {"supported": distance, "refuted": distance, "undecided": lambda row: -row["half"]}
    if claim.kind == "more":
        pick |= {"supported": lambda row: row["mean"] - row["half"], "refuted": lambda row: -row["mean"] - row["half"]}
    of = {"holds": ["supported"], "fails": ["refuted"], "mixed": ["supported", "refuted"], "undecided": ["undecided"]}
    rows = [max((row for row in settings if row["decision"] == name), key=pick[name]) for name in of.get(found, [])]
    return "; ".join(f"{_shown(claim, row)} {claim.unit} ({row['setting']})" for row in rows)


def _digits(claim: Claim) -> int:
    """Decimals that show a tenth of the margin."""
    return max(1, 1 - math.floor(math.log10(claim.margin))) if claim.margin else 2


def _shown(claim: Claim, row: dict[str, Any]) -> str:
    if claim.kind == "exact":
        return f"{row['mean']:.3g}"
    half = "(one seed)" if math.isinf(row["half"]) else f"± {row['half']:.{_digits(claim)}f}"
    return f"{row['mean']:+.{_digits(claim)}f} {half}"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")  # type: ignore[return-value]  # column names are strings


def scoreboard() -> pd.DataFrame:
    """One row a claim under the ambient profile; in `notebook`, the stems of several are joined by ", "."""
    columns = ["id", "statement", "outcome", "decided_by", "evidence", "notebook"]
    rows = []
    for claim in claims().values():
        verdict = {"outcome": "not tested", "decided_by": "", "evidence": ""} | _read(claim.id)
        rows.append(verdict | {"id": claim.id, "statement": claim.statement, "notebook": ", ".join(claim.notebooks)})
    return pd.DataFrame(rows, columns=columns)


def scoreboard_markdown(folder: str = "notebooks/", folded: bool = False) -> str:
    """Two boards as Markdown, the paper's claims and the readers' questions: each a line of totals, then a table that
    links to the notebooks in `folder` and holds the number that decided, under which the evidence folds away. `folded`,
    for a page that says more, leaves numbers and evidence out, and the tables fold away under their totals.
    """
    board, boards = _records(scoreboard()), []
    for title, word in (("claims of the paper", "claim"), ("questions of its readers", "question")):
        asked = word == "question"
        rows = [row for row in board if claims()[row["id"]].is_question is asked]
        counts = Counter(row["outcome"] for row in rows)
        words = [ANSWERS.get(name, name) if asked else name for name in OUTCOMES]
        totals = ", ".join(f"{name} {counts[name]}" for name in words)
        lines = [f"{len(rows)} {title} (profile `{paths.profile()}`): {totals}.", ""]
        if folded:
            lines = ["<details>", f"<summary>{lines[0].replace('`', '')}</summary>", ""]
        columns = ["id", word, "verdict", *([] if folded else ["decided by"]), "notebook"]
        lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        for row in rows:
            links = " ".join(_link(stem, folder) for stem in row["notebook"].split(", "))
            number = row["decided_by"]
            if row["evidence"]:
                number = f"<details><summary>{number or 'why'}</summary>{row['evidence']}</details>"
            decided = [] if folded else [number]
            cells = (row["id"], row["statement"], f"**{row['outcome']}**", *decided, links)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        boards.append("\n".join([*lines, "", "</details>"] if folded else lines))
    return "\n\n".join(boards)


def means(id: str) -> pd.Series:
    """The mean effect of a claim in each of its settings, in its unit, from the verdict on disk."""
    check_known("claim", id, claims())
    effects = pd.DataFrame([row for part in _read(id).get("parts", {}).values() for row in part["effects"]])
    return effects.groupby("setting", sort=False).effect.mean()


def _alone(id: str) -> AbstractContextManager:
    """Two notebooks that judge one claim may be executed at the same time; in check mode nothing is written."""
    if paths.checking():
        return nullcontext()
    lock = paths.results() / "checkpoints" / f"verdict-{id}.lock"
    files.make_folder(lock.parent)
    return FileLock(lock)


def _file(id: str) -> Path:
    return paths.results() / "verdicts" / f"{id}.json"


def _read(id: str) -> dict:
    """The verdict on disk, or {} if there is none yet; `KureError` names the file if it holds no verdict."""
    try:
        verdict = json.loads(_file(id).read_text(encoding="utf-8"))
        check_known("outcome", verdict["outcome"], [*OUTCOMES, *ANSWERS.values()])
        texts = [verdict["decided_by"], verdict["evidence"], *(part["remark"] for part in verdict["parts"].values())]
        if not all(isinstance(text, str) for text in texts):
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
