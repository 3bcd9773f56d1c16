"""Where the progress of a computation is said, and where it must not be."""

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from kure_lib import progress


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The file that the driver reads."""
    file = tmp_path / "line"
    monkeypatch.setenv(progress.FILE, str(file))
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    return file


def test_bars_within_one_another_are_one_line_for_the_driver(told, capsys):
    with progress.bar(126, "evaluations", "evaluation") as outer:
        for _ in range(2):
            outer.update()
            assert told.read_text() == f"evaluations {outer.n} of 126"
            with progress.bar(406, "LAPQ", "loss") as inner:
                assert told.read_text() == f"evaluations {outer.n} of 126, LAPQ 0 of 406"
                inner.update(120)
                assert told.read_text() == f"evaluations {outer.n} of 126, LAPQ 120 of 406"
        assert told.read_text() == "evaluations 2 of 126"
    assert told.read_text() == ""
    with pytest.raises(ZeroDivisionError), progress.bar(3, "LAPQ", "loss"):
        assert told.read_text() == "LAPQ 0 of 3"
        _ = 1 / 0
    assert told.read_text() == "" and not progress._Line.shown
    assert capsys.readouterr() == ("", "")


def test_a_few_steps_are_made_without_a_word(told):
    with progress.bar(3, "evaluations", "evaluation", few=3) as bar:
        bar.update()
    assert not told.exists()
    with progress.bar(4, "evaluations", "evaluation", few=3):
        assert told.read_text() == "evaluations 0 of 4"


def test_a_line_that_cannot_be_written_stops_nothing(told, monkeypatch):
    monkeypatch.setenv(progress.FILE, str(told / "not" / "there"))
    with progress.bar(2, "LAPQ", "loss") as bar:
        bar.update(2)
    assert bar.n == 2


def test_lines_are_written_once_a_second_however_fast_the_steps_are(told, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 1000.0)
    with progress.bar(9, "LAPQ", "loss") as bar:
        for _ in range(9):
            bar.update()
        assert told.read_text() == "LAPQ 0 of 9"


def test_a_wait_is_told_to_the_driver_or_else_to_the_user(told, monkeypatch, capsys):
    with progress.bar(9, "evaluations", "evaluation"), progress.waiting("resnet20", "It waits."):
        assert told.read_text() == "evaluations 0 of 9, waiting for resnet20"
    assert told.read_text() == "" and capsys.readouterr() == ("", "")
    monkeypatch.delenv(progress.FILE)
    with progress.waiting("resnet20", "It waits."):
        assert capsys.readouterr() == ("", "It waits.\n")


def test_where_nobody_looks_nothing_is_said(monkeypatch, capsys):
    monkeypatch.delenv(progress.FILE, raising=False)
    with progress.bar(9, "LAPQ", "loss") as bar:
        bar.update(9)
    assert capsys.readouterr() == ("", "")


CELL = """
from kure_lib import progress
progress.SECONDS = 0.0
with progress.bar(5, "evaluations", "evaluation") as outer, progress.bar(7, "LAPQ", "loss") as inner:
    inner.update(3)
"""


@pytest.mark.parametrize("person", [True, False])
def test_a_line_below_a_cell_is_for_a_person_alone(person, monkeypatch):
    """nbclient, papermill and nbval execute a cell as one that cannot ask anybody for input; JupyterLab can."""
    monkeypatch.delenv(progress.FILE, raising=False)
    manager, client = start_new_kernel(kernel_name="python3")
    outputs = []

    def keep(message):
        if message["msg_type"] in ("stream", "error", "display_data", "execute_result"):
            outputs.append(nbformat.v4.output_from_msg(message))

    try:
        client.execute_interactive(CELL, allow_stdin=person, output_hook=keep, timeout=120)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    text = "".join(output.text for output in outputs)
    assert all(output.name == "stderr" for output in outputs)
    lines = [line.strip() for line in text.split("\r") if line.strip()]
    wanted = ["evaluations 0 of 5", "evaluations 0 of 5, LAPQ 0 of 7", "evaluations 0 of 5, LAPQ 3 of 7"]
    assert lines == ([*wanted, "evaluations 0 of 5"] if person else [])
    assert not person or text.endswith("\r" + " " * progress.WIDTH + "\r"), "it is gone in the end"
