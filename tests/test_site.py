"""The site is complete, asks for nothing from a network, has links that lead somewhere, and works in a browser."""

import html.parser
import json
import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import browser
import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from kure_lib import notebooks, paths, site
from kure_lib.findings import show, verdicts
from kure_lib.paths import NOTEBOOKS, ROOT
from kure_lib.study import evaluations

FIRST, SECOND, ABSENT = "06_step_size_robustness", "07_bit_width_robustness_ptq", "08_bit_width_robustness_qat"
STUDY = ROOT / "results" / "study"
COMMITTED = ("records", "figures", "tables", "verdicts")


class Links(html.parser.HTMLParser):
    """What a page refers to, what it would load, and the anchors it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets, self.loaded, self.anchors = set(), set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.anchors |= {about.get("id"), about.get("name")} - {None}
        self.targets |= {about.get("href"), about.get("src")} - {None}
        if tag in ("script", "img", "link", "iframe"):
            self.loaded |= {about.get("href"), about.get("src")} - {None}


def broken(folder: Path) -> list[tuple[str, str]]:
    """Every link within a site, or to files beside it, that leads nowhere, with its page."""
    pages = {page.resolve(): Links(page) for page in folder.rglob("*.html")}
    found = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            lost = not file.exists() or (parts.fragment and unquote(parts.fragment) not in pages[file].anchors)
            if not parts.scheme and target != "#" and lost:
                found.append((page.name, target))
    return found


def notebook(stem: str, other: str) -> nbformat.NotebookNode:
    text = f"# {stem[:2]} · Title\n\n$\\tilde\\Delta < 1$: see [the other]({other}.ipynb), not \\$5 or \\$6."
    more = f"# Second part\n\n[Not executed]({ABSENT}.ipynb), [the data](../LICENSE)"
    code = "secret = 41 + 1\n" + (f'show.figure(fig, "{stem[:2]}_a_figure", data)' if stem == FIRST else "")
    cell = nbformat.v4.new_code_cell(code, execution_count=1)
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"text/markdown": f"| bits |\n|---|\n| [4]({ABSENT}.ipynb) |"})
    ]
    markdown = nbformat.v4.new_markdown_cell
    return nbformat.v4.new_notebook(cells=[markdown(text), markdown(more), cell])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The site of a small study; reads its pages by name."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "NOTEBOOKS", folder / "notebooks")
        patch.setenv("KURE_RESULTS", str(folder / "results"))
        patch.setenv("KURE_PROFILE", "smoke")
        executed = paths.results() / "notebooks"
        for each in (paths.NOTEBOOKS, executed):
            each.mkdir(parents=True)
            for stem, other in ((FIRST, SECOND), (SECOND, FIRST)):
                nbformat.write(notebook(stem, other), each / f"{stem}.ipynb")
        nbformat.write(notebook(ABSENT, FIRST), paths.NOTEBOOKS / f"{ABSENT}.ipynb")
        (folder / "LICENSE").write_text("what a notebook links to")
        (executed / f"{FIRST}.partial.ipynb").write_text("what a failed execution left")
        fig, ax = plt.subplots()
        ax.plot([1, 2])
        show.figure(fig, "06_a_figure", pd.DataFrame({"x": [1, 2]}))
        effects = pd.DataFrame({"setting": ["w3"] * 3, "seed": [0, 1, 2], "effect": [2.0, 2.2, 2.4]})
        verdicts.judge("S3", effects, "costs 0.3 < 1.2 points")
        index = site.build("smoke", [f"Notebook {ABSENT} failed: a < b\nits traceback"])
        assert index == paths.results() / "site" / "index.html"
    return SimpleNamespace(folder=index.parent, page=lambda name: (index.parent / f"{name}.html").read_text("utf-8"))


def test_the_first_page_has_all_there_is(small):
    index = small.page("index")
    assert len(re.findall(r'<article class="card"', index)) == len(verdicts.claims())
    assert '<p class="number">+2.2 ± 0.5 points (w3)</p>' in index and "costs 0.3 &lt; 1.2 points" in index
    assert "What was found" not in index  # these sentences are about other verdicts
    assert f"Notebook {ABSENT} failed: a &lt; b" in index and "traceback" not in index


def test_a_notebook_has_one_title_formulae_tables_and_folded_code(small):
    text = small.page(f"notebooks/{FIRST}")
    assert text.count("<h1>") == 1 and "<h2>Second part" in text
    assert "<math" in text and "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).replace(
        "$5 or $6", ""
    )
    assert re.search(r"<details.*Show the code.*41", text, re.DOTALL)
    assert re.search(r"<th[^>]*><p>bits</p></th>", text)


def test_a_figure_links_to_its_cell_and_its_data(small):
    gallery = Links(small.folder / "figures.html")
    assert {f"notebooks/{FIRST}.html#06_a_figure", "figures/06_a_figure.csv", "figures/06_a_figure.png"} <= set(
        gallery.targets
    )
    assert "06_a_figure" in Links(small.folder / "notebooks" / f"{FIRST}.html").anchors


def test_the_links_of_a_small_study_lead_somewhere(small):
    assert broken(small.folder) == []
    links = Links(small.folder / "notebooks" / f"{FIRST}.html").targets
    assert f"{SECOND}.html" in links
    there = {(small.folder / "notebooks" / link).resolve() for link in links if link.startswith("../../")}
    assert {file.name for file in there} >= {"LICENSE", f"{ABSENT}.ipynb"}


def test_a_study_without_results_has_a_site_too(results_folder):
    assert "not tested" in site.build("smoke").read_text("utf-8")


def test_a_notebook_that_cannot_be_shown_is_named(results_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on many build machines
    book = notebook(FIRST, FIRST)
    book.cells[0].source += "\n\n[nowhere](#no-such-section)"
    for folder in (paths.NOTEBOOKS, results_folder.parent / "smoke" / "notebooks"):
        folder.mkdir(parents=True)
        nbformat.write(book, folder / f"{FIRST}.ipynb")
    with pytest.raises(paths.KureError, match=rf"could not be built: notebooks/{FIRST}\.ipynb.*no-such-section"):
        site.build("smoke")


def test_the_explorer_leaves_out_random_errors_and_single_layers():
    rows = [
        {"model": "resnet20", "part": "main", "arm": "kure", "seed": 0, "trained_with": "", "weight_bits": 4,
         "step_rule": "mse", "grid": "mid_rise", "scope": "per tensor", "step_ratio": 1.0, "activation_ratio": 1.0,
         "top1": top1, "perturbation": perturbation, "layers": layers}
        for top1, perturbation, layers in ((92.5, None, None), (90.0, "flips 0.001", None), (91.0, None, "conv1"))
    ]  # fmt: skip
    usual = dict.fromkeys(site.STEPS_OF, False)
    found = pd.DataFrame([row | usual for row in rows], columns=list(evaluations.COLUMNS))
    assert [row[-1] for row in json.loads(site._explorer(found))["rows"]] == [92.5]


def test_a_formula_beyond_the_converter_is_shown_as_tex():
    mathml = runpy.run_path(str(ROOT / "docs" / "conf.py"))["mathml"]
    assert mathml(r"\frac", "inline") == r"<code class='tex'>\frac</code>"
    assert mathml("x", "block").startswith("<math")


# The committed study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of the site of the committed study."""
    folder = tmp_path_factory.mktemp("results") / "study"
    folder.mkdir()
    for name in COMMITTED:
        (folder / name).symlink_to(STUDY / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KURE_RESULTS", str(folder.parent))
        patch.setenv("KURE_PROFILE", "study")
        return site.build("study").parent


def test_every_link_and_anchor_of_the_study_leads_somewhere(study):
    assert broken(study) == []


def test_every_figure_and_table_of_the_study_is_shown_with_its_cell_and_its_data(study):
    for kind, suffix in (("figures", "png"), ("tables", "md")):
        targets = Links(study / f"{kind}.html").targets
        names = {file.stem for file in (STUDY / kind).glob(f"*.{suffix}")}
        assert names and {f"{kind}/{name}.csv" for name in names} <= targets
        assert names <= {target.partition("#")[2] for target in targets if target.startswith("notebooks/")}


def test_every_notebook_has_one_entry_and_every_formula_is_shown(study):
    index = (study / "index.html").read_text("utf-8")
    for stem in notebooks.available():
        assert len(re.findall(rf'toctree-l1"><a class="reference internal" href="notebooks/{stem}\.html"', index)) == 1
        text = (study / "notebooks" / f"{stem}.html").read_text("utf-8")
        assert text.count("<h1>") == 1 and "<code class='tex'>" not in text
        written = "".join(cell.source for cell in nbformat.read(NOTEBOOKS / f"{stem}.ipynb", 4).cells[:1])
        assert written.partition("\n")[0].lstrip("# ") in text


def test_no_page_loads_anything_from_a_network(study):
    assert {target for page in study.rglob("*.html") for target in Links(page).loaded if urlsplit(target).scheme} <= {
        ""
    }


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if not browser.CHROMIUM:
        pytest.skip("there is no Chromium: on Debian, install the package chromium")
    with browser.page(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


PAGES = ("index", "explorer", "figures", "tables", "decides", "use", "reproducibility", f"notebooks/{SECOND}")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_and_asks_for_nothing(name, dark, study, tab):
    tab.requests.clear(), tab.errors.clear()
    tab.open(study / f"{name}.html", width=390, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    lightness = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert lightness < 60 if dark else lightness > 200
    assert tab.errors == []
    assert {urlsplit(address).scheme for address in tab.requests} <= {"file", "data"}


def test_the_search_finds_a_word(study, tab):
    tab.open(study / "search.html", "?q=kurtosis")
    tab.wait("document.querySelectorAll('#search-results .search li a').length > 3")
    found = tab.run("[...document.querySelectorAll('#search-results .search li a')].map(each => each.href)")
    assert any(f"notebooks/{stem}.html" in link for link in found for stem in notebooks.available())


def test_the_boards_show_one_kind_of_verdict(study, tab):
    tab.open(study / "index.html")
    tab.run("document.querySelector('.board button[data-outcome=fails]').click()")
    shown = "[...document.querySelector('.board').querySelectorAll('.card')].filter(c => c.offsetParent).map(c => c.id)"
    on_disk = [json.loads(file.read_text("utf-8")) for file in (STUDY / "verdicts").glob("*.json")]
    fails = {each["id"] for each in on_disk if each["outcome"] == "fails"}
    assert fails and set(tab.run(shown)) == fails
    tab.run("document.querySelector('.board button[data-outcome=fails]').click()")
    assert len(tab.run(shown)) == sum(not claim.is_question for claim in verdicts.claims().values())


EPOCHS = {"resnet20": 10, "mobilenet_v2_050": 8}  # of pre-training, in the main arms


def accuracies(model: str, arm: str, **spec) -> list[float]:
    """Accuracies in the main records of an arm by seed, under one specification, read without the library."""
    found = {}
    for file in (STUDY / "records").glob(f"{model}-{arm}-seed?-*.json"):
        record = json.loads(file.read_text("utf-8"))
        key = json.dumps(spec, sort_keys=True)
        if key in record["evaluations"] and record["config"]["start"]["epochs"] == EPOCHS[model]:
            found[record["config"]["seed"]] = record["evaluations"][key][0]
    return [found[seed] for seed in sorted(found)]


def test_the_explorer_shows_the_numbers_of_the_records(study, tab):
    tab.open(study / "explorer.html")
    drawn = "document.getElementById('chooser').dataset.drawn"
    tab.wait(drawn)

    def numbers() -> list[list[float]]:
        cells = (
            "[...document.querySelectorAll('#numbers tbody tr')].map(r => [...r.cells].map(c => Number(c.innerText)))"
        )
        return [[row[1], row[2]] for row in tab.run(cells)]

    def wanted(model: str, **spec) -> list[list[float]]:
        arms = [accuracies(model, arm, **spec) for arm in ("control", "kure-1.8-1")]
        return [list(pair) for pair in zip(*arms, strict=True)]

    def choose(name: str, value: str) -> None:
        tab.run(f"(() => {{ const menu = document.getElementById('chooser').{name}; menu.value = {json.dumps(value)};"
                f"menu.dispatchEvent(new Event('input', {{bubbles: true}})); }})()")  # fmt: skip
        tab.wait(f"JSON.parse({drawn}).{name} === {json.dumps(value)}")

    points = "document.querySelectorAll('#by-ratio .mark-symbol.role-mark path').length"
    assert numbers() == wanted("resnet20", weight_bits=3)
    before = tab.run(points)
    choose("bits", "2/FP")
    assert numbers() == wanted("resnet20", weight_bits=2) and tab.run(points) != before
    choose("model", "MobileNet-V2 0.5")
    assert numbers() == wanted("mobilenet_v2_050", weight_bits=2)
    gain = pd.DataFrame(numbers()).diff(axis=1)[1].mean()
    said = tab.run("document.getElementById('gain').innerText")
    assert f"{'gains' if gain >= 0 else 'loses'} {abs(gain):.2f} points" in said
    choose("grid", "FP8 E4M3")
    assert "Not measured" in tab.run("document.getElementById('gain').innerText") and numbers() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ("index", "explorer", "figures", "tables", f"notebooks/{SECOND}"))
def test_axe_finds_nothing_serious(name, dark, study, tab):
    script = os.environ.get("KURE_AXE")
    if not script:
        pytest.skip("KURE_AXE names no axe.min.js, the script of the npm package axe-core")
    tab.open(study / f"{name}.html", dark=dark)
    if name == "explorer":
        tab.wait("document.getElementById('chooser').dataset.drawn")
    tab.run(Path(script).read_text("utf-8"))
    found = tab.run("axe.run().then(result => result.violations.map(v => [v.id, v.impact, v.nodes[0].html]))")
    assert [each for each in found if each[1] in ("serious", "critical")] == []
