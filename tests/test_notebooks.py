"""What a committed notebook must be: executed, readable, free of traces of a machine, and binding."""

import ast
import json
import re
import shutil
from contextlib import suppress
from functools import cache
from itertools import pairwise
from statistics import median

import nbformat
import pytest

from kure_lib import notebooks, paths
from kure_lib.findings import verdicts
from kure_lib.paths import KureError
from kure_lib.quantization.spec import QuantizationSpec
from kure_lib.study import runs
from kure_lib.study.plans import needed, plan

STUDY = paths.ROOT / "results" / "study"


@pytest.fixture(params=notebooks.available())
def stem(request) -> str:
    return request.param


@cache
def read(stem: str) -> nbformat.NotebookNode:
    return nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", as_version=4)


def code(stem: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(stem).cells if cell.cell_type == "code"]


def tagged(stem: str, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in code(stem) if tag in cell.metadata.get("tags", [])]


def outputs(stem: str) -> list[nbformat.NotebookNode]:
    return [output for cell in code(stem) for output in cell.outputs]


def test_every_cell_was_executed_in_order(stem):
    assert [cell.execution_count for cell in code(stem)] == list(range(1, len(code(stem)) + 1))


def test_no_cell_failed_or_warned(stem):
    assert not [output for output in outputs(stem) if output.output_type == "error"]
    assert not [output.text for output in outputs(stem) if output.get("name") == "stderr"]


def test_it_begins_with_its_claim(stem):
    first = read(stem).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {stem[:2]} · ")
    if stem[:2] != "00":
        assert {"**Claim", "**Cost"} <= set(re.findall(r"\*\*[\w ]+", first.source))


def test_parameters_are_literals_explained(stem):
    (cell,) = tagged(stem, "parameters")
    lines = cell.source.splitlines()
    own = notebooks.defaults(paths.NOTEBOOKS / f"{stem}.ipynb")
    for line in lines:  # papermill reads nothing from a line with a second `=`
        assert re.fullmatch(r"\w+(: \w+)? = [^=#]+  # [^=]+", line), line
        ast.literal_eval(ast.parse(line).body[0].value)
    assert len(own) == len(lines)
    assert own["profile"] == "study"


def test_it_gives_a_verdict_on_its_claims(stem):
    judged = {id for id, claim in verdicts.claims().items() if stem in claim.notebooks}
    source = "\n".join(cell.source for cell in tagged(stem, "verdict"))
    assert judged == set(re.findall(r'verdicts\.judge\(\s*"(\w+)"', source))


def test_the_rule_stands_before_any_number(stem):
    """Only the imports come before it; no notebook decides by a rule of its own."""
    judged = any(stem in claim.notebooks for claim in verdicts.claims().values())
    cells = code(stem)
    announced = [i for i, cell in enumerate(cells) if "verdicts.announce" in cell.source]
    assert len(announced) == judged
    assert not judged or f'verdicts.announce("{stem}")' in cells[announced[0]].source
    assert not any(cell.outputs for cell in cells[: announced[0]]) if judged else True
    assert not any(re.search(r'"(holds|fails|mixed|undecided)"', cell.source) for cell in cells)


def test_it_says_more_than_it_computes(stem):
    lengths = [len(cell.source.splitlines()) for cell in code(stem)]
    assert len(read(stem).cells) - len(lengths) >= len(lengths)
    assert max(lengths) <= 20
    assert median(lengths) <= 6


def test_it_bears_no_trace_of_a_machine(stem):
    book = read(stem)
    assert book.metadata.kernelspec.name == "python3"
    assert "version" not in book.metadata.get("language_info", {})
    metadata = [book.metadata, *(cell.metadata for cell in book.cells)]
    assert not [each for each in metadata if {"papermill", "execution"} & set(each)]
    text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(book))
    assert not re.findall(r"/(?:root|home|Users|tmp|work)/[\w./-]*", text)
    streams = [[output.get("name") for output in cell.outputs] for cell in code(stem)]
    assert not [pair for names in streams for pair in pairwise(names) if pair == ("stdout", "stdout")]


def test_its_links_lead_somewhere(stem):
    text = "\n".join(cell.source for cell in read(stem).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in target]
    assert [target for target in targets if not (paths.NOTEBOOKS / target).exists()] == []


def test_the_first_one_leads_to_all_others():
    linked = "\n".join(cell.source for cell in read(notebooks.available()[0]).cells if "| question |" in cell.source)
    assert [stem for stem in notebooks.available()[1:] if f"]({stem}.ipynb)" not in linked] == []


def test_every_cell_that_evaluates_declares_it(stem):
    evaluating = [cell for cell in code(stem) if re.search(r"\.measure\(|study\.evaluate\(", cell.source)]
    declared = tagged(stem, notebooks.NEEDS)
    assert [cell.id for cell in evaluating if cell not in declared] == []
    assert bool(declared) == bool(evaluating)


#: Names from cells without the tag that statements of tagged ones ask for, which evaluate nothing.
OTHERS = {"04": ["different"], "10": ["shape", "medians", "long"], "13": ["KEYS"]}


def test_what_it_declares_is_on_record_and_complete(stem, monkeypatch):
    """No statement of these cells lacks anything from a cell without the tag, but for those that evaluate nothing."""
    failed = []

    class Noting(suppress):
        def __exit__(self, kind, error, traceback):
            failed.extend([str(error)] if error else [])
            return super().__exit__(kind, error, traceback)

    monkeypatch.setattr(notebooks, "suppress", Noting)
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.delenv("KURE_RESULTS", raising=False)
    with runs.asking() as missing:
        notebooks.ask(stem, {"profile": "study"})
    assert missing == {}
    assert set(failed) == {f"name {name!r} is not defined" for name in OTHERS.get(stem[:2], [])}


def test_it_asks_for_runs_of_the_parts_that_it_reads_and_writes_nothing(stem, results_folder):
    planned = plan("study")
    with runs.asking() as missing:
        notebooks.ask(stem, {"profile": "study"})
    assert missing.keys() <= {run.config for run in needed(planned, [stem]).runs}
    assert bool(missing) == bool(tagged(stem, notebooks.NEEDS))
    assert not list(results_folder.parent.iterdir())


def test_exactly_the_claims_of_these_notebooks_have_a_verdict():
    there = set(notebooks.available())
    owed = {id for id, claim in verdicts.claims().items() if there & set(claim.notebooks)}
    assert {path.stem for path in (STUDY / "verdicts").glob("*.json")} == owed


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the committed study in which check mode is on."""
    ignored = shutil.ignore_patterns("checkpoints", "notebooks", "site")
    shutil.copytree(STUDY, tmp_path / "study", ignore=ignored, symlinks=True)
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_CHECK", "1")
    return tmp_path / "study"


ACCURACY = "07_bit_width_robustness_ptq"


def test_one_altered_accuracy_is_noticed(copied):
    (planned,) = plan("study").select(model="resnet20", arm="kure", part="main", seed=0)
    (file,) = (copied / "records").glob(f"*-{planned.config.key}.json")
    record = json.loads(file.read_text())
    record["evaluations"][QuantizationSpec(weight_bits=4).key][0] -= 5  # percent
    record.pop("digest")  # it would be noticed at once
    file.write_text(json.dumps(record))
    with pytest.raises(KureError, match="differs from its notebook"):
        notebooks.execute(ACCURACY, "study")


FIGURES = sorted(file.stem for file in (STUDY / "figures").glob("*.csv"))


def test_one_altered_number_of_a_figure_is_noticed(copied):
    stem = next(stem for stem in notebooks.available() if stem[:2] == FIGURES[0][:2])
    file = copied / "figures" / f"{FIGURES[0]}.csv"
    head, number, tail = re.fullmatch(r"(.*\n.*?)(-?\d+\.\d+)(.*)", file.read_text(), re.DOTALL).groups()
    file.write_text(f"{head}{float(number) * 1.01:.6g}{tail}")
    with pytest.raises(KureError, match=f"{file.name} differs from its notebook"):
        notebooks.execute(stem, "study")
