"""Folders that follow the environment."""

from pathlib import Path

import pytest

from kure_lib import paths, site
from kure_lib.paths import KureError


def test_results_follow_the_environment_and_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_RESULTS", str(tmp_path))
    monkeypatch.setenv("KURE_PROFILE", "trial")
    assert paths.all_results() == tmp_path
    assert paths.results() == tmp_path / "trial"
    paths.use_profile("study")
    assert paths.results() == tmp_path / "study"
    monkeypatch.setenv("KURE_RESULTS", "elsewhere")
    assert paths.all_results() == paths.ROOT / "elsewhere"
    monkeypatch.delenv("KURE_PROFILE")
    assert paths.results().name == "quick"


@pytest.mark.parametrize(("said", "meant"), [("1", True), ("true", True), ("yes", True), ("0", False), ("no", False),
                                             ("false", False), ("", False), (None, False)])  # fmt: skip
def test_check_mode_is_on_or_off(said, meant, monkeypatch):
    monkeypatch.delenv("KURE_CHECK", raising=False)
    if said is not None:
        monkeypatch.setenv("KURE_CHECK", said)
    assert paths.checking() is meant


@pytest.mark.parametrize("said", ["True ", "on", "2"])
def test_check_mode_that_is_neither_is_refused(said, monkeypatch):
    monkeypatch.setenv("KURE_CHECK", said)
    with pytest.raises(KureError, match=f"Unknown value of KURE_CHECK '{said}': choose one of 1, true, yes, 0"):
        paths.checking()


@pytest.mark.parametrize("name", ["../../evil", "/tmp", "a/b", ".", "a b", "-"])
def test_a_profile_cannot_lead_out_of_the_results(name, monkeypatch):
    for ask in (lambda: paths.use_profile(name), lambda: site.build(name)):
        with pytest.raises(KureError, match="A profile cannot be called"):
            ask()
    monkeypatch.setenv("KURE_PROFILE", name)
    with pytest.raises(KureError, match="A profile cannot be called"):
        paths.results()


def test_the_cache_is_named_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KURE_CACHE", str(tmp_path))
    assert paths.cache() == tmp_path
    monkeypatch.setenv("KURE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert paths.cache() == tmp_path / "me" / ".cache" / "kure_lib"

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(KureError, match="There is no home folder to unpack data in: name another folder in KURE_CACHE"):
        paths.cache()
