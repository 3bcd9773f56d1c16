"""The report is complete, needs no network, and has links that lead somewhere."""

import re

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from kure_lib import paths
from kure_lib import site as report
from kure_lib.findings import show, verdicts

FIRST, SECOND = "06_step_size_robustness", "07_bit_width_robustness_ptq"


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Builds the report on a small study and returns a function that reads its pages."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("KURE_PROFILE", "smoke")
    executed = paths.results() / "notebooks"
    for folder in (paths.NOTEBOOKS, executed):
        folder.mkdir(parents=True)
        for stem, other in ((FIRST, SECOND), (SECOND, FIRST)):
            nbformat.write(notebook(stem, other), folder / f"{stem}.ipynb")
    (executed / f"{FIRST}.partial.ipynb").write_text("what a failed execution left")
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    show.figure(fig, "06_a_figure", pd.DataFrame({"x": [1, 2]}))
    show.table(pd.DataFrame({"bits": [3, 4]}), "06_a_table", caption="Bits & more")
    effects = pd.DataFrame({"setting": ["w3"] * 3, "seed": [0, 1, 2], "effect": [2.0, 2.2, 2.4]})
    verdicts.judge("S3", effects, "costs 0.3 < 1.2 points")
    index = report.build("smoke")
    assert index == paths.results() / "report" / "index.html"
    return lambda name: (index.parent / f"{name}.html").read_text()


def notebook(stem: str, other: str) -> nbformat.NotebookNode:
    text = f"# {stem[:2]} · Title\n\n$\\tilde\\Delta < 1$: see [the other]({other}.ipynb), not \\$5 or \\$6."
    cell = nbformat.v4.new_code_cell("secret = 41 + 1", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": "| bits |\n|---|\n| 4 |"})]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), cell])


def test_the_first_page_has_all_there_is(page):
    index = page("index")
    assert len(re.findall(r"<td><b class='(?:holds|not tested)'>", index)) == len(verdicts.claims())
    assert "<td><b class='holds'>holds</b><td>+2.2 ± 0.5 points (w3)" in index and "costs 0.3 &lt; 1.2 points" in index
    assert "<img src='../figures/06_a_figure.png'" in index
    assert "Bits &amp; more" in index
    assert "06 · Title" in index


def test_a_notebook_page_shows_formulae_tables_and_on_demand_code(page):
    text = page(FIRST)
    assert "<math" in text and "$" not in text.replace("$5 or $6", "")
    assert "<th>bits</th>" in text
    assert "secret" in text and "#code:not(:checked) ~ main .input { display: none; }" in text
    assert f'<a href="{SECOND}.html">the other</a>' in text


def test_links_are_relative_and_lead_somewhere(page):
    folder = paths.results() / "report"
    for name in ("index", FIRST, SECOND):
        targets = re.findall(r"(?:href|src)=[\"']([^\"'#]+)", page(name))
        assert targets
        assert [target for target in targets if not (folder / target).is_file()] == []


def test_a_study_without_results_has_a_report_too(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "smoke")
    assert "not tested" in report.build("smoke").read_text()


def test_a_notebook_that_failed_is_named_with_the_first_line_of_its_error(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "smoke")
    assert "could not be executed" not in report.build("smoke").read_text()
    index = report.build("smoke", [f"Notebook {FIRST} failed: a < b\nits traceback"]).read_text()
    assert f"<li>Notebook {FIRST} failed: a &lt; b" in index and "traceback" not in index


def test_a_formula_beyond_the_converter_is_shown_as_tex():
    assert report._formula(r"\frac", "inline") == r"<code>\frac</code>"
