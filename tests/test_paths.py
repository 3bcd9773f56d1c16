"""Folders that follow the environment."""

from kure_lib import paths


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
