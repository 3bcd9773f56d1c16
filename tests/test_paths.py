"""Folders that follow the environment, and files that are written whole or not at all."""

import errno
import os

import pytest

from kure_lib import files, paths
from kure_lib.paths import KureError


def test_results_follow_the_environment_and_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "trial")
    assert tmp_path == paths.RESULTS
    assert paths.results() == tmp_path / "trial"
    paths.use_profile("study")
    assert paths.results() == tmp_path / "study"
    monkeypatch.setenv("KURE_RESULTS", "elsewhere")
    assert paths.RESULTS == paths.ROOT / "elsewhere"
    monkeypatch.delenv("KURE_PROFILE")
    assert paths.results().name == "quick"


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
