"""The project as a whole: pinned, layered, small, complete, and about nothing but the study."""

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kure_lib.findings import verdicts
from kure_lib.paths import DATA, NOTEBOOKS, ROOT

MODULES = sorted((ROOT / "kure_lib").rglob("*.py"))


def pins() -> dict[str, Requirement]:
    """The lines of requirements.txt by package."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def source(file: Path) -> str:
    """The code of a Python file or of a notebook."""
    if file.suffix == ".py":
        return file.read_text(encoding="utf-8")
    cells = nbformat.read(file, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def imported(file: Path) -> set[str]:
    """The full names of the modules and of the names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# The environment


def test_every_package_is_pinned_exactly_and_once():
    lines = re.findall(r"^[^#\n].*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    exact = r"[a-z0-9-]+==[\w.]+(; sys_platform != 'win32')?"
    assert [line for line in lines if not re.fullmatch(exact, line)] == []
    assert len(lines) == len(pins())


def test_pip_conda_and_the_package_share_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert packages == {"pip": ["-r requirements.txt"]} and pip == "pip"
    assert python.startswith(f"python {project['project']['requires-python']}")


def test_these_tests_run_with_the_pinned_versions():
    wrong = {name: version(name) for name, pin in pins().items() if not pin.specifier.contains(version(name))}
    assert not wrong


def test_everything_imported_is_pinned():
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *NOTEBOOKS.glob("*.ipynb"), ROOT / "conftest.py"]
    own = {"kure_lib", *(file.stem for file in files)}
    foreign = {name.split(".")[0] for file in files for name in imported(file)} - own - set(sys.stdlib_module_names)
    packages = packages_distributions()
    assert {name for name in foreign if canonicalize_name(packages[name][0]) not in pins()} == set()


# The library


def test_imports_between_packages_go_down():
    linted = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert linted.returncode == 0, linted.stdout


def test_the_linter_has_nothing_to_say():
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    checked = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# The files


def test_the_data_are_complete():
    lines = (DATA / "SHA256SUMS").read_text().splitlines()
    found = {line: hashlib.sha256((DATA / line.split()[1]).read_bytes()).hexdigest() for line in lines}
    assert len(found) == 4
    assert [line for line, digest in found.items() if line.split()[0] != digest] == []


@cache
def texts() -> dict[Path, str]:
    """What a reader of the repository can read, this file apart, which must name what is forbidden."""
    folders = ["*", ".ci/*", "kure_lib/**/*", "notebooks/*", "tests/**/*", "results/study/*/*"]
    files = {file for folder in folders for file in ROOT.glob(folder) if file.is_file()}
    readable = {".py", ".sh", ".md", ".txt", ".toml", ".yml", ".ipynb", ".json", ".csv", ""}
    chosen = (file for file in sorted(files) if file.suffix in readable and file.name != Path(__file__).name)
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in chosen}


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a folder of somebody's machine", r"/(?:root|home|Users|work)/\w+"),
        ("a package registry", r"pypi\.org|pythonhosted|download\.pytorch|conda\.anaconda|anaconda\.org"),
    ],
)
def test_no_file_names(what, pattern):
    found = [(str(path), match) for path, text in texts().items() for match in re.findall(pattern, text)]
    assert not found, f"{what}: {found}"


README = ROOT / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not written yet")
def test_the_readme_points_at_what_is_there_and_lists_every_notebook():
    targets = {target for target in re.findall(r"\]\(([^)\s#]+)", README.read_text()) if "://" not in target}
    assert {target for target in targets if not (ROOT / target).exists()} == set()
    assert {f"notebooks/{file.name}" for file in NOTEBOOKS.glob("*.ipynb")} <= targets


@pytest.mark.skipif(not README.exists(), reason="the README is not written yet")
def test_the_scoreboard_of_the_readme_is_the_committed_one(monkeypatch):
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.setenv("KURE_CHECK", "1")
    verdicts.update_readme(README)


def test_scripts_are_executable():
    assert all((ROOT / name).stat().st_mode & 0o111 for name in ("run_all.sh", ".ci/run"))
