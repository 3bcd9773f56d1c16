"""The manifest: every committed result is listed, none is changed or gone, and a reader's own tool agrees."""

import shutil
import subprocess

import pytest

from kure_lib import __main__ as command_line
from kure_lib.paths import ROOT, KureError
from kure_lib.study import manifest

STUDY = ROOT / "results" / "study"


def test_the_committed_results_are_those_of_the_manifest():
    """If this fails and the change is meant, write the manifest anew: ./run_all.sh --manifest."""
    assert manifest.differences(STUDY) == []


def test_the_manifest_lists_every_result_that_git_does_not_ignore():
    ignored = {"local", "notebooks", "site", "checkpoints"}
    files = [file.relative_to(STUDY) for file in STUDY.rglob("*") if file.is_file() and file.suffix != ".lock"]
    names = {file.as_posix() for file in files if not ignored & set(file.parts)}
    listed = [line.split("  ", 1)[1] for line in (STUDY / manifest.NAME).read_text().splitlines()]
    assert listed == sorted(names - {manifest.NAME}) and len(listed) > 500


@pytest.fixture
def study(results_folder):
    """A few results and their manifest, in the folder of the profile `study`."""
    folder = results_folder.parent / "study"
    for name in ("records/a.json", "tables/a.md", "tables/a.csv", "figures/a.png", "weights/a.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "weights" / "local").mkdir()
    (folder / "weights" / "local" / "b.safetensors").write_text("not committed")
    manifest.write(folder)
    return folder


def test_what_is_new_changed_or_gone_is_listed_and_written_down(study, capsys):
    assert manifest.differences(study) == []
    (study / "verdicts").mkdir()
    (study / "verdicts" / "S1.json").write_text("{}")
    (study / "figures" / "a.png").write_text("figures/a.pnh")
    (study / "tables" / "a.csv").unlink()
    wanted = ["changed figures/a.png", "gone    tables/a.csv", "new     verdicts/S1.json"]
    assert manifest.differences(study) == wanted
    assert command_line.main(["--manifest"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == wanted
    assert manifest.differences(study) == []
    assert command_line.main(["--manifest"]) == 0
    assert capsys.readouterr().out.startswith("0 files are new, changed or gone")


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="the tool is not everywhere")
def test_the_readers_own_tool_reads_it(study):
    check = ["sha256sum", "--check", "--strict", "--quiet", manifest.NAME]
    assert subprocess.run(check, cwd=study).returncode == 0
    (study / "records" / "a.json").write_text("other")
    assert subprocess.run(check, cwd=study, capture_output=True).returncode == 1


@pytest.mark.parametrize("content", ["", "half a line\n", "0" * 63 + "  records/a.json\n"])
def test_a_damaged_manifest_is_named(study, content):
    (study / manifest.NAME).write_text(content)
    with pytest.raises(KureError, match=rf"{study / manifest.NAME} is damaged"):
        manifest.differences(study)
