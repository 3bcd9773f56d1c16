"""The report of a profile: one page with verdicts, figures and tables, and one for every executed notebook.

The pages hold their styles and show formulae as MathML, so they need no network, only the results beside them.
"""

import os
import re
from collections.abc import Container, Iterable
from functools import partial
from html import escape
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from kure_lib import files, notebooks, paths
from kure_lib.findings import verdicts

STYLE = """
:root { --faint: #66707a; --line: #dde1e5; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 6rem; color: #1d2329; background: #fff;
       font: 16px/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; }
a { color: #0072b2; text-decoration: none; } a:hover { text-decoration: underline; }
nav, .faint, figcaption { color: var(--faint); font-size: .9em; } nav a { margin-right: 1.2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: .92em; }
th, td { padding: .35em .7em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
ul.plain { list-style: none; padding: 0; } .scroll, pre { overflow-x: auto; } pre { font-size: .86em; }
td b { white-space: nowrap; } td b::before { content: "● "; }
.holds, .yes { color: #00785a; } .mixed { color: #a86f00; } .fails, .no { color: #c04a00; }
.undecided, .not { color: var(--faint); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; } math[display=block] { overflow-x: auto; }
.input_area { background: #f6f7f8; border-left: 3px solid var(--line); padding: .1em 1em; }
.prompt, .output_stderr { display: none; }
#code:not(:checked) ~ main .input { display: none; }
"""
EARLIER = "These notebooks could not be executed; what is shown of them, if anything, is of an earlier time."


class _Markdown(IPythonRenderer):
    """Turns Markdown into HTML, with formulae as MathML and links relative to the report's folder."""

    def __init__(self, folder: Path):
        super().__init__(escape=False, exclude_anchor_links=True)
        self.folder = folder

    def inline_math(self, body: str) -> str:
        return _formula(body, "inline")

    def block_math(self, body: str) -> str:
        return _formula(body, "block")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if re.fullmatch(r"\d\d_\w+\.ipynb(#.*)?", url):
            url = url.replace(".ipynb", ".html")
        elif not re.match(r"[a-z]+:|#", url):
            url = os.path.relpath(paths.NOTEBOOKS / url, self.folder)
        return super().link(text, url, title)


def build(profile: str, failed: Iterable[str] = ()) -> Path:
    """Write the report on whatever lies in `results/<profile>/`; returns its first page.

    `failed` says what went wrong with each notebook that could not be executed, in its first line.
    """
    paths.use_profile(profile)
    folder = paths.results() / "report"
    pages = _notebook_pages(folder)
    index = folder / "index.html"
    lost = [f"<li>{escape(reason.splitlines()[0])}" for reason in failed]
    contents = [f"<li>{_link(f'{stem}.html', title)}" for stem, title in pages.items()]
    sections = [
        f"<p>What became of the paper's claims when tried again, under the profile {escape(profile)}.</p>",
        _section("Failed", f"<p>{EARLIER}</p><ul class=plain>", lost, "</ul>"),
        _section("Verdicts", "<div class=scroll><table>", _verdicts(pages), "</table></div>"),
        _section("Notebooks", "<ul class=plain>", contents, "</ul>"),
        _section("Figures", "<div class=gallery>", _figures(), "</div>"),
        _section("Tables", "<div>", _tables(folder), "</div>"),
    ]
    _write(index, "One model to rule them all, reproduced", "\n".join(sections))
    return index


def _notebook_pages(folder: Path) -> dict[str, str]:
    """Write a page for every executed notebook; returns their titles by stem, in reading order."""
    files = {stem: paths.results() / "notebooks" / f"{stem}.ipynb" for stem in notebooks.available()}
    books = {stem: nbformat.read(file, as_version=4) for stem, file in files.items() if file.is_file()}
    titles = {stem: book.cells[0].source.partition("\n")[0].lstrip("# ") for stem, book in books.items()}
    stems = list(books)
    for i, stem in enumerate(stems):
        exporter = HTMLExporter(template_name="basic", filters={"markdown2html": partial(_html, folder=folder)})
        body, _ = exporter.from_notebook_node(books[stem])
        neighbours = stems[max(i - 1, 0) : i] + stems[i + 1 : i + 2]
        links = [_link("index.html", "Report"), *(_link(f"{near}.html", titles[near]) for near in neighbours)]
        switch = "<input type=checkbox id=code> <label for=code>Show the code</label>"
        page = f"<nav>{''.join(links)}</nav>\n{switch}\n<main>{body}</main>"
        _write(folder / f"{stem}.html", titles[stem], page)
    return titles


def _verdicts(pages: Container[str]) -> list[str]:
    rows = ["<tr><th><th>Claim or question<th>Verdict<th>Decided by<th>Notebook"]
    for row in verdicts.scoreboard().to_dict("records"):
        stems = row["notebook"].split(", ")
        links = " ".join(_link(f"{stem}.html", stem[:2]) if stem in pages else stem[:2] for stem in stems)
        claim, outcome, number, evidence = (
            escape(row[name]) for name in ("statement", "outcome", "decided_by", "evidence")
        )
        folded = f"<details><summary>why</summary>{evidence}</details>" if evidence else ""
        cells = [row["id"], claim, f"<b class='{outcome}'>{outcome}</b>", number + folded, links]
        rows.append("<tr><td>" + "<td>".join(cells))
    return rows


def _figures() -> list[str]:
    """Every figure with a link to the numbers it plots."""
    return [
        f"<figure><img src='../figures/{file.name}' alt='{_words(file)}' loading=lazy>"
        f"<figcaption>{_words(file)} · {_link(f'../figures/{file.stem}.csv', 'data')}</figcaption></figure>"
        for file in sorted((paths.results() / "figures").glob("*.png"))
    ]


def _tables(folder: Path) -> list[str]:
    """Every table as its notebook shows it, with a link to its numbers."""
    return [
        f"<h3>{_words(file)}</h3><div class=scroll>{_html(file.read_text(encoding='utf-8'), folder)}</div>"
        f"<p class=faint>{_link(f'../tables/{file.stem}.csv', 'data')}</p>"
        for file in sorted((paths.results() / "tables").glob("*.md"))
    ]


def _section(heading: str, start: str, parts: list[str], end: str) -> str:
    """A section, or nothing if it would be empty."""
    return "\n".join([f"<h2>{heading}</h2>", start, *parts, end]) if parts else ""


def _html(markdown: str, folder: Path) -> str:
    return MarkdownWithMath(renderer=_Markdown(folder)).render(markdown)


def _formula(tex: str, display: str) -> str:
    """MathML, or the TeX itself if it is more than the converter knows."""
    try:
        return mathml(tex, display=display)
    except Exception:  # the converter has no common class of errors
        return f"<code>{escape(tex)}</code>"


def _link(url: str, text: str) -> str:
    return f"<a href='{escape(url)}'>{escape(text)}</a>"


def _words(file: Path) -> str:
    return escape(file.stem.replace("_", " ").capitalize())


def _write(path: Path, title: str, body: str) -> None:
    """Write a page; a body without a heading of its own gets the title as one."""
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    heading = "" if "<h1" in body else f"<h1>{escape(title)}</h1>"
    page = f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content='width=device-width'>
<title>{escape(title)}</title>
<style>{style}</style>
<body>
{heading}
{body}
</html>
"""
    files.write_atomically(path, page)
