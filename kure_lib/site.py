"""The site of a profile: its notebooks, verdicts, figures and tables, and an explorer of accuracies.

Sphinx builds it from the templates in `docs/` and the executed notebooks, a warning being an error. It needs no server
and no network: it can be opened, searched and sent as a folder of files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.stats import t as student_t

from kure_lib import files, notebooks, paths
from kure_lib.findings import answer, show, verdicts
from kure_lib.paths import KureError
from kure_lib.study import evaluations
from kure_lib.tensors.grids import Bits

DOCS = paths.ROOT / "docs"
HERO = "gain_by_pipeline"
BUNDLE = "window.vegaEmbed = vegaEmbed;"  # what the explorer needs of Vega
STEP_RULES = {
    "mse": "plain: least squared error", "lapq": "LAPQ", "mx": "block scale of MX", "nvfp4": "block scale of NVFP4",
    "max_abs": "largest weight", "percentile": "percentile", "dorefa": "as trained", "lsq": "as trained",
}  # fmt: skip
STEPS_OF = {
    "power_of_two": "power-of-two steps",
    "bias_correction": "bias correction",
    "fold_batch_norm": "batch norms folded",
    "equalized": "ranges equalized",
    "refit": "steps refit",
    "reestimate_batch_norm": "batch norms re-estimated",
}
Marked = dict[int, list[tuple[str, str]]]  # by number of a cell: kind and name of what it keeps
GRIDS = {"mid_rise": "mid-rise (2^M levels)", "mid_tread": "mid-tread (2^M + 1)", "signed_int": "signed integers"}


def build(profile: str, failed: Iterable[str] = ()) -> Path:
    """Write the site on whatever lies in `results/<profile>/`; returns its first page.

    `failed` says what went wrong with each notebook that could not be executed, in its first line. Raises `KureError`
    with Sphinx's first warning if a notebook cannot be shown.
    """
    paths.use_profile(profile)
    site = paths.results() / "site"
    files.make_folder(site.parent)
    found = evaluations.write(profile)
    books = _books()
    pages = {stem: _title(stem, book) for stem, book in books.items()}
    marked = {stem: _results(book) for stem, book in books.items()}
    gallery: list[dict[str, Any]] = [
        {"title": pages[stem], **_made(stem, book, marked[stem])} for stem, book in books.items()
    ]
    hero = next((figure for page in gallery for figure in page["figures"] if figure["name"] == HERO), None)
    values = {
        "profile": profile, "intro": _introduction(), "failed": [reason.splitlines()[0] for reason in failed],
        "hero": hero, "findings": _findings(pages), "boards": _boards(pages), "pages": pages,
        "gallery": gallery, "evaluations": len(found), "columns": evaluations.COLUMNS, "kinds": verdicts.KINDS,
        "rule": verdicts.RULE, "chance": verdicts.CHANCE, "changed": verdicts.changed_after_looking(),
        "claims": verdicts.claims().values(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".site.", dir=site.parent) as folder:
        source, html = Path(folder) / "source", Path(folder) / "html"
        (source / "notebooks").mkdir(parents=True)
        templates = Environment(loader=FileSystemLoader(DOCS), undefined=StrictUndefined, trim_blocks=True)
        for name in templates.list_templates(extensions=["md"]):
            (source / name).write_text(templates.get_template(name).render(values), encoding="utf-8")
        for stem, book in books.items():
            page = _page(book, marked[stem], pages, site / "notebooks")
            nbformat.write(page, source / "notebooks" / f"{stem}.ipynb")
        _sphinx(source, html)
        for name in ("figures", "tables"):
            if (paths.results() / name).is_dir():
                shutil.copytree(paths.results() / name, html / name, ignore=shutil.ignore_patterns("*.md"))
        if len(found):
            shutil.copy(paths.results() / "evaluations.csv", html)
        (html / "_static" / "explorer-data.js").write_text(f"const EXPLORER = {_explorer(found)};\n", encoding="utf-8")
        (html / "_static" / "vega.js").write_text(_vega(), encoding="utf-8")
        shutil.rmtree(site, ignore_errors=True)
        html.replace(site)
    return site / "index.html"


def _books() -> dict[str, nbformat.NotebookNode]:
    """Every executed notebook, in reading order; those of the study are committed as executed."""
    folders = [paths.results() / "notebooks", *([paths.NOTEBOOKS] if paths.profile() == "study" else [])]
    found = {}
    for stem in notebooks.available():
        copies = [file for folder in folders if (file := folder / f"{stem}.ipynb").is_file()]
        if copies:
            found[stem] = nbformat.read(max(copies, key=lambda file: file.stat().st_mtime), as_version=4)
    return found


def _title(stem: str, book: nbformat.NotebookNode) -> str:
    first = book.cells[0].source.partition("\n")[0] if book.cells else ""
    return first.lstrip("# ") if first.startswith("# ") else stem


def _made(stem: str, book: nbformat.NotebookNode, marked: Marked) -> dict[str, list[dict[str, str]]]:
    """The figures and tables that a notebook's cells make, each with its section and a link to its cell."""
    made: dict[str, list[dict[str, str]]] = {"figures": [], "tables": []}
    section = _title(stem, book)
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"^#+ (.+)", cell.source, re.MULTILINE)][-1]
            continue
        for kind, name in marked[i]:
            text = paths.results() / kind / f"{name}.md"
            words = name.replace("_", " ").strip().capitalize()
            made[kind].append({
                "name": name, "words": words, "section": section, "link": f"notebooks/{stem}.html#{name}",
                "text": text.read_text(encoding="utf-8") if kind == "tables" else "",
            })  # fmt: skip
    return made


def _results(book: nbformat.NotebookNode) -> Marked:
    """The figures that each code cell names and the tables that it shows, as they are on disk."""
    figures = {file.stem for file in (paths.results() / "figures").glob("*.png")}
    tables = {file.read_text(encoding="utf-8").strip(): file.stem for file in (paths.results() / "tables").glob("*.md")}
    found: Marked = defaultdict(list)
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "code":
            shown = {output.data.get("text/markdown", "").strip() for output in cell.outputs if "data" in output}
            found[i] += [("figures", name) for name in sorted(figures & set(re.findall(r'"(\w+)"', cell.source)))]
            found[i] += [("tables", name) for name in sorted(tables[text] for text in shown & tables.keys())]
    return found


def _page(book: nbformat.NotebookNode, marked: Marked, pages: dict[str, str], folder: Path) -> nbformat.NotebookNode:
    """The notebook as the site in `folder` shows it: one title, code folded, an anchor before whatever is kept."""
    text, code = nbformat.v4.new_markdown_cell, "code"
    cells = [] if book.cells and book.cells[0].source.startswith("# ") else [text(f"# {_title('Notebook', book)}")]

    def link(found: re.Match) -> str:
        if Path(found[2]).stem in pages and found[2].endswith(".ipynb"):
            return found[0]
        target = os.path.relpath(paths.NOTEBOOKS / found[2], folder)
        return f'<a href="{target}">{found[1]}</a>'

    def linked(markdown: str) -> str:
        """With links to what has no page, such as a notebook that failed, leading to the file itself."""
        return re.sub(r"\[([^]]+)\]\((?!\w+:|#)([^)#\s]+)\)", link, markdown)

    for i, cell in enumerate(book.cells):
        if cell.cell_type == code:
            made = marked[i]
            cells += [text("\n".join(f'<span id="{name}"></span>' for _, name in made))] if made else []
            words = " and ".join(name.replace("_", " ") for _, name in made) or "figure"
            cell.metadata.setdefault("tags", []).append("hide-input")
            cell.metadata["mystnb"] = {"image": {"alt": words}}
            for output in (each for each in cell.outputs if "text/markdown" in each.get("data", {})):
                output.data["text/markdown"] = linked(output.data["text/markdown"])
        else:
            demoted = re.sub(r"^# ", "## ", cell.source) if i else cell.source
            cell.source = linked(demoted)
        cells.append(cell)
    language = {"name": "python", "pygments_lexer": "ipython3"}  # what a notebook never executed lacks
    return nbformat.v4.new_notebook(cells=cells, metadata={**book.metadata, "language_info": language})


def _introduction() -> str:
    """The opening of the README, up to its figure."""
    opening = (paths.ROOT / "README.md").read_text(encoding="utf-8").partition("\n[![")[0]
    return opening.partition("\n")[2].strip()


def _findings(pages: dict[str, str]) -> str:
    """What was found, where the verdicts of this profile are those that the sentences suppose."""
    try:
        found = answer.markdown()
    except KureError:
        return ""
    return found if set(re.findall(r"notebooks/(\w+)", found)) <= set(pages) else ""


def _boards(pages: dict[str, str]) -> list[dict[str, Any]]:
    """The paper's claims and the readers' questions, each with how often every outcome occurs."""
    boards = []
    rows = verdicts.scoreboard().to_dict("records")
    for row in rows:
        stems = row["notebook"].split(", ")
        row["notebooks"] = [
            f'<a href="notebooks/{stem}.html" title="{pages[stem]}">{stem[:2]}</a>' if stem in pages else stem[:2]
            for stem in stems
        ]
    for title, asked in (("The paper's claims", False), ("Its readers' questions", True)):
        chosen = [row for row in rows if verdicts.claims()[row["id"]].is_question is asked]
        counts = Counter(row["outcome"] for row in chosen)
        order = [*verdicts.OUTCOMES, *verdicts.ANSWERS.values()]
        found = {outcome: counts[outcome] for outcome in order if outcome in counts}
        boards.append({"title": title, "rows": chosen, "counts": found})
    return boards


def _explorer(found: pd.DataFrame) -> str:
    """What the explorer shows, as JSON: control and KURE of the main arms and of quantization-aware training."""
    asked = found.part.isin(["main", "qat"]) & found.arm.isin(["control", "kure"])
    usual = found[["perturbation", "accumulator_bits", "layers"]].isna().all(axis=1) & (found.activation_ratio == 1)
    kept = found[asked & usual & ~(found.weight_bits.isna() & found.activation_bits.isna())]
    both = kept[["weight_bits", "activation_bits"]].itertuples(index=False)
    shown = pd.DataFrame({
        "model": kept.model.map(show.NAME),
        "trained": kept.trained_with.where(kept.trained_with != "", "in full precision"),
        "bits": [str(Bits(*(None if pd.isna(each) else each for each in widths))) for widths in both],
        "grid": kept.grid.map(lambda name: GRIDS.get(name) or show.NAME[name]), "scope": kept.scope,
        "pipeline": [_pipeline(row) for row in kept.to_dict("records")], "ratio": kept.step_ratio,
        "arm": kept.arm, "seed": kept.seed, "top1": kept.top1,
    })  # fmt: skip
    shown = shown.sort_values(["pipeline", "bits"], key=lambda column: column.map(_order), kind="stable")
    most = int(shown.groupby([*shown.columns[:-2]]).size().max()) if len(shown) else 1
    return json.dumps({
        "columns": list(shown), "rows": shown.values.tolist(),
        "quantiles": {n: student_t.ppf(0.975, n - 1) for n in range(2, most + 1)},
        "looks": {
            arm: {"name": show.NAME[arm], "color": show.COLOR[arm], "dash": [] if arm == "kure" else [5, 3]}
            for arm in ("control", "kure")
        },
        "first": {"bits": "3/FP", "pipeline": STEP_RULES["mse"], "scope": "per tensor", "grid": GRIDS["mid_rise"]},
    }, ensure_ascii=False, allow_nan=False)  # fmt: skip


def _pipeline(row: Mapping[Any, Any]) -> str:
    """Everything that the other menus do not say, in words."""
    rule = STEP_RULES.get(row["step_rule"]) or row["step_rule"].replace("aciq", "ACIQ").replace("lp:", "Lp error, p = ")
    made = [f"from an 8-bit copy ({row['rounding']})"] if pd.notna(row["rounding"]) else []
    made += [f"rounded by {show.NAME[row['reconstruction']]}"] if pd.notna(row["reconstruction"]) else []
    which = {"means": " (means alone)", "variances": " (variances alone)"}
    done = [words + which.get(row[name], "") for name, words in STEPS_OF.items() if row[name]]
    return ", ".join([rule, *done, *made])


def _order(value: Any) -> tuple:
    """Plain before all else, few words before many; weight-only bits before others."""
    text = str(value)
    return (not text.startswith("plain"), text.count(","), not text.endswith("/FP"), text)


def _vega() -> str:
    """The libraries that draw the explorer, as one script; made once and kept."""
    kept = paths.cache() / f"vega-{version('vl-convert-python')}.js"
    if not kept.is_file():
        import vl_convert

        files.write_atomically(kept, f"(() => {{{vl_convert.javascript_bundle(BUNDLE)}}})();\n")  # no names leak
    return kept.read_text(encoding="utf-8")


def _sphinx(source: Path, html: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "sphinx", "-W", "-q", "-N", "-b", "html", "-c", DOCS, source, html]
    command += ["-d", source.with_name("read")]  # what Sphinx remembers is of no use to readers
    built = subprocess.run(command, capture_output=True, text=True, cwd=source)
    if built.returncode:
        wrong = (built.stderr or built.stdout).strip().splitlines() or [f"exit code {built.returncode}"]
        sentence = wrong[0].replace(f"{source}{os.sep}", "")
        raise KureError(f"The site could not be built: {sentence}. Mend the page that it names.")
