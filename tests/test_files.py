"""Files that are written whole or not at all, and in check mode compared with the committed ones."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from kure_lib import files
from kure_lib.paths import KureError


def test_a_written_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "new" / "record.json"
    files.write_atomically(file, "Δ")
    files.write_atomically(file, b"\x00\x01")
    assert file.read_bytes() == b"\x00\x01"
    assert os.listdir(file.parent) == ["record.json"]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    files.write_atomically(file, "old")

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KureError, match=r"record\.json \(No space left on device\)"):
        files.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    files.write_atomically(file, "old")

    def replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    left = tmp_path / "records" / f".a.json.{gone.pid}"
    others = [tmp_path / "records" / name for name in (f".b.json.{os.getpid()}", ".hidden", "a.1", "c.json")]
    left.parent.mkdir()
    for file in (left, *others):
        file.touch()
    files.sweep(tmp_path)
    assert sorted(left.parent.iterdir()) == sorted(others)


@pytest.mark.parametrize("path", ["/proc/results", "/dev/full/results", "/dev/null/x"])
def test_an_impossible_folder_is_one_sentence(path):
    for ask in (lambda: files.make_folder(Path(path)), lambda: files.write_atomically(Path(path) / "a.json", "1")):
        with pytest.raises(KureError, match=r"Cannot write .*KURE_RESULTS, for data KURE_CACHE, to another folder"):
            ask()


# Check mode

COMMITTED = "arm,bits,top1\nkure,2,82.31\ncontrol,4,\n"


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A committed table, while check mode is on."""
    file = tmp_path / "table.csv"
    file.write_text(COMMITTED)
    monkeypatch.setenv("KURE_CHECK", "1")
    return file


@pytest.mark.parametrize("made", [COMMITTED, COMMITTED.replace("82.31", "82.312"), COMMITTED.replace(",2,", ",2.0,")])
def test_check_mode_takes_equal_tables_and_rounding_and_writes_nothing(committed, made):
    files.keep(committed, made)
    assert committed.read_text() == COMMITTED


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (COMMITTED.replace("82.31", "82.39"), r"row 1 of column top1 is 82\.39 and was 82\.31"),
        (COMMITTED.replace("82.31", "many"), "row 1 of column top1 is many and was 82.31"),
        (
            COMMITTED.replace("control,4,", "control,4,91.2"),
            "row 2 of column top1 is 91.2 and was",
        ),  # where nothing was measured
        (COMMITTED.replace("kure", "l2"), "row 1 of column arm is l2 and was kure"),
        (COMMITTED.removesuffix("control,4,\n"), "row 2 of column arm is nothing and was control"),
        (COMMITTED.replace("arm,bits", "bits,arm"), "row 0 of column"),
    ],
)
def test_check_mode_names_the_file_and_what_differs(committed, made, said):
    with pytest.raises(KureError, match=rf"table\.csv differs from its notebook, {said}.*find the cause"):
        files.keep(committed, made)


@pytest.mark.parametrize(("was", "said"), [(None, "is missing"), (b"\xff\xfe", "is damaged"), (b"", "is damaged")])
def test_check_mode_says_what_is_missing_or_damaged(committed, was, said):
    committed.unlink()
    if was is not None:
        committed.write_bytes(was)
    with pytest.raises(KureError, match=rf"table\.csv {said}"):
        files.keep(committed, COMMITTED)


def test_the_padding_of_a_markdown_table_does_not_count(committed):
    table = committed.with_suffix(".md")
    table.write_text("| arm  | top1 |\n|:-----|-----:|\n| kure | 82.3 |\n")
    files.keep(table, "| arm |  top1 |\n|:---|---:|\n| kure |  82.3 |\n")
    with pytest.raises(KureError, match=r"row 1 of column top1 is 82\.4 and was 82\.3"):
        files.keep(table, "| arm |  top1 |\n|:---|---:|\n| kure |  82.4 |\n")
