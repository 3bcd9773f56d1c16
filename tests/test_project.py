"""The project as a whole: pinned, layered, small, complete, and about nothing but the study."""

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from functools import cache
from importlib import import_module
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kure_lib.findings import answer
from kure_lib.paths import DATA, NOTEBOOKS, ROOT

MODULES = sorted((ROOT / "kure_lib").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADMITTED = SpecifierSet(PROJECT["project"]["requires-python"])
MINORS = [minor for minor in (f"3.{number}" for number in range(100)) if f"{minor}.0" in ADMITTED]
INSTALLED = {canonicalize_name(package.name): package for package in distributions()}


@cache
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


def run(*command: str) -> subprocess.CompletedProcess:
    """What a Python module says when it is run in the root with these arguments."""
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


# The environment


def test_every_package_is_pinned_exactly_and_once():
    lines = re.findall(r"^[^#\n].*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    exact = r"[a-z0-9-]+==[\w.]+(; (sys_platform|python_version) [!=]= '[\w.]+')?"
    assert [line for line in lines if not re.fullmatch(exact, line)] == []
    assert len(lines) == len(pins())


def test_pip_conda_and_the_package_name_the_same_packages():
    """The extras are what requirements.txt pins by hand: its last section follows from the others."""
    by_hand, _ = (ROOT / "requirements.txt").read_text().split("# what the packages above need")
    study, tools = by_hand.split("# tests and hooks")
    project = PROJECT["project"]
    extras = {name: {*map(Requirement, each)} for name, each in project["optional-dependencies"].items()}
    named = {name: {each.name for each in extra if each.name != "kure_lib"} for name, extra in extras.items()}
    core = {Requirement(each).name for each in project["dependencies"]}
    assert core | named["fast"] | named["study"] == set(re.findall(r"^[\w-]+(?===)", study, re.MULTILINE))
    assert named["dev"] == set(re.findall(r"^[\w-]+(?===)", tools, re.MULTILINE))
    for requirement in map(Requirement, project["dependencies"]):
        assert INSTALLED[requirement.name].version in requirement.specifier
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert packages == {"pip": ["-r requirements.txt"]} and pip == "pip"
    assert python in [f"python={minor}" for minor in MINORS]  # one version, because repo2docker reads no ranges


def test_these_tests_run_with_the_pinned_versions():
    here = {name: pin for name, pin in pins().items() if not pin.marker or pin.marker.evaluate()}
    assert {
        name: INSTALLED[name].version for name, pin in here.items() if INSTALLED[name].version not in pin.specifier
    } == {}


def test_every_pin_suits_every_python_that_is_admitted():
    assert MINORS, "no Python is admitted"
    refused = {}
    for name in pins().keys() & INSTALLED.keys():
        suited = SpecifierSet(INSTALLED[name].metadata["Requires-Python"] or "")
        for python in (f"{minor}.{patch}" for minor in MINORS for patch in (0, 99)):
            if python in ADMITTED and python not in suited:
                refused[name] = python
    assert refused == {}


def test_the_script_looks_for_the_pythons_that_are_admitted():
    names = " ".join(f"python{minor}" for minor in reversed(MINORS))
    assert f"candidates=(python3 {names})" in (ROOT / "run_all.sh").read_text()


def needed(python: str, system: str) -> dict[str, set[str]]:
    """What the pins need under a version of Python on a system, with what that needs in turn, and what needs it.

    Of packages that are not installed here, because only other machines need them, nothing is known.
    """
    names = {"linux": ("posix", "Linux"), "darwin": ("posix", "Darwin"), "win32": ("nt", "Windows")}[system]
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system}
    machine |= dict(zip(("os_name", "platform_system"), names, strict=True))

    def holds(requirement: Requirement, extra: str = "") -> bool:
        return not requirement.marker or requirement.marker.evaluate({**machine, "extra": extra})

    waiting = [(name, "") for name, pin in pins().items() if holds(pin)]
    seen, found = set(waiting), {}
    while waiting:
        name, extra = waiting.pop()
        requirements = map(Requirement, INSTALLED[name].requires or []) if name in INSTALLED else ()
        for requirement in (each for each in requirements if holds(each, extra)):
            package = canonicalize_name(requirement.name)
            found.setdefault(package, set()).add(name)
            new = {(package, each) for each in ("", *requirement.extras)} - seen
            seen |= new
            waiting += new
    return {package: by for package, by in found.items() if package not in pins() or not holds(pins()[package])}


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", MINORS)
def test_what_a_pin_needs_is_pinned_too(python, system):
    of_the_gpu = r"(nvidia|cuda)-.*|triton"  # torch pins them itself
    assert {name: by for name, by in needed(python, system).items() if not re.fullmatch(of_the_gpu, name)} == {}


def test_everything_imported_is_pinned():
    files = [
        *MODULES,
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "docs").rglob("*.py"),
        *NOTEBOOKS.glob("*.ipynb"),
        ROOT / "conftest.py",
    ]
    own = {"kure_lib", *(file.stem for file in files)}
    foreign = {name.split(".")[0] for file in files for name in imported(file)} - own - set(sys.stdlib_module_names)
    foreign -= {"ray"}  # the extra `cluster`, pinned in pyproject.toml
    packages = packages_distributions()
    assert {name for name in foreign if canonicalize_name(packages[name][0]) not in pins()} == set()


# The package


OUT_OF_REACH = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def needed(name, found):
    for each in map(Requirement, importlib.metadata.requires(name) or []):
        if each.name not in found and (not each.marker or each.marker.evaluate({"extra": ""})):
            found.add(each.name)
            needed(each.name, found)
    return found

own = {name.replace("-", "_").lower() for name in needed("kure_lib", {"kure_lib"})}
known = importlib.metadata.packages_distributions()

class Finder:
    def find_spec(self, name, path=None, target=None):
        owners = {owner.replace("-", "_").lower() for owner in known.get(name.split(".")[0], [])}
        return None if owners and not owners & own else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Finder() if each is PathFinder else each for each in sys.meta_path]
"""

TRAINS = """
import sys
import kure_lib, torch
from torch import nn

assert kure_lib.__file__.startswith(sys.argv[1]), kure_lib.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10))
nn.init.normal_(model[1].weight, std=0.1)
penalty, x = kure_lib.KurtosisRegularizer(model), torch.randn(4, 1, 10, 10)
optimizer, terms = torch.optim.SGD(model.parameters(), 0.01), [penalty().item()]
for _ in range(3):
    optimizer.zero_grad()
    (0.01 * model(x).square().mean() + penalty()).backward()
    optimizer.step()
    terms.append(penalty().item())
assert terms == sorted(terms, reverse=True), terms
with kure_lib.quantized(model, weight_bits=3) as few:
    assert few[1].weight.unique().numel() <= 8
print(kure_lib.check(model).layers[1].name, "numba" in sys.modules)
from kure_lib.findings import __path__ as findings
print((__import__("pathlib").Path(findings[0]) / "claims.toml").is_file())
"""


@pytest.fixture
def wheel(tmp_path) -> Path:
    """The package as it would be handed out."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    copied = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "results", "data", "tests"))
    subprocess.run([*build, tmp_path, copied], check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    return built


def trains(python: Path | str, script: str, installed: Path, **environment: str) -> None:
    """The package in the folder `installed` trains with this Python, begun far from the repository."""
    command = [python, "-c", script, installed]
    environment = {**os.environ, "HOME": str(installed), **environment}
    ended = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split()) == (0, ["1", "False", "True"]), ended.stderr


def test_the_wheel_alone_trains_with_what_it_says_it_needs(wheel, tmp_path):
    """Installed into an empty folder, with every package out of reach that its metadata do not name."""
    installed = tmp_path / "installed"
    assert {str(module.relative_to(ROOT)) for module in MODULES} <= {*zipfile.ZipFile(wheel).namelist()}
    zipfile.ZipFile(wheel).extractall(installed)
    trains(sys.executable, OUT_OF_REACH + TRAINS, installed, PYTHONPATH=str(installed))


@pytest.mark.oldest
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the oldest torch and numpy were made for Python 3.12 at most")
def test_the_wheel_trains_with_the_oldest_versions_that_it_admits(wheel):
    """In an environment of its own, which is removed afterwards, as it has the GPU libraries of the old torch."""
    oldest = [each.replace(">=", "==") for each in PROJECT["project"]["dependencies"]]
    assert [each for each in oldest if not re.fullmatch(r"\w+==[\d.]+", each)] == []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        install = [python, "-m", "pip", "install", "-q", "--no-compile", "--only-binary", ":all:", wheel, *oldest]
        subprocess.run(install, check=True, env=environment)
        trains(python, TRAINS, Path(folder), PYTHONPATH="")


# The library


def test_imports_between_packages_go_down():
    linted = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert linted.returncode == 0, linted.stdout


def test_types_agree_and_are_complete():
    checked = run("mypy")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("hook", "without_writing", "files"),
    [
        ("ruff-check", ["--no-cache", "--output-format", "concise"], ["."]),
        ("ruff-format", ["--no-cache", "--check"], ["."]),
        ("nbstripout", ["--verify"], [str(file) for file in sorted(NOTEBOOKS.glob("*.ipynb"))]),
    ],
)
def test_the_files_are_as_the_hooks_leave_them(hook, without_writing, files):
    (own,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (entry,) = [each["entry"] for each in own["hooks"] if each["id"] == hook]
    checked = run(*shlex.split(entry), *without_writing, *files)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_hooks_can_be_read():
    checked = run("pre_commit", "validate-config")
    assert checked.returncode == 0, checked.stdout


def test_pytest_without_arguments_finds_all_tests_and_doctests_but_those_on_demand(request):
    collected = {str(Path(item.path).relative_to(ROOT)) for item in request.session.items}
    tests = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")}
    on_demand = {
        file
        for file in tests
        if file.startswith(("tests/benchmarks/", "tests/test_cluster.py", "tests/test_imagenet.py"))
    }
    doctests = {str(file.relative_to(ROOT)) for file in MODULES if "\n    >>> " in file.read_text(encoding="utf-8")}
    assert doctests and len(on_demand) > 1
    assert request.config.getini("testpaths") == ["tests", "kure_lib"]  # ./run_all.sh --test names these folders
    if not collected >= tests - on_demand | doctests or collected & on_demand:  # this is not pytest without arguments
        said = run("pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
        assert said.returncode == 0, said.stdout
        collected = {line.partition("::")[0] for line in said.stdout.splitlines() if "::" in line}
    assert collected & on_demand == set()
    assert (tests - on_demand) | doctests <= collected


# The files


def test_the_data_are_complete():
    lines = (DATA / "SHA256SUMS").read_text().splitlines()
    found = {line: hashlib.sha256((DATA / line.split()[1]).read_bytes()).hexdigest() for line in lines}
    assert len(found) == 4
    assert [line for line, digest in found.items() if line.split()[0] != digest] == []


@cache
def texts() -> dict[Path, str]:
    """What a reader of the repository can read, this file apart, which must name what is forbidden."""
    folders = ["*", ".ci/*", "docs/**/*", "kure_lib/**/*", "notebooks/*", "tests/**/*", "results/study/*/*"]
    files = {file for folder in folders for file in ROOT.glob(folder) if file.is_file()}
    readable = {
        ".py",
        ".sh",
        ".md",
        ".txt",
        ".toml",
        ".cff",
        ".css",
        ".js",
        ".yml",
        ".yaml",
        ".ipynb",
        ".json",
        ".csv",
        "",
    }
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


def targets(document: Path) -> set[str]:
    """The files and folders a document links to."""
    found = re.findall(r"\]\(([^)\s#]+)", document.read_text(encoding="utf-8"))
    return {target for target in found if "://" not in target}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/use.md", "docs/reproducibility.md"]
)
def test_a_document_points_at_what_is_there(name):
    assert {target for target in targets(ROOT / name) if not (ROOT / name).parent.joinpath(target).exists()} == set()


def test_the_readme_lists_every_notebook():
    notebooks = {f"notebooks/{file.name}" for file in NOTEBOOKS.glob("*.ipynb")}
    assert notebooks and notebooks <= targets(README)


def test_names_in_the_advice_to_contributors_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+/\w+)\.(\w+)`", text)
    modules = {path: import_module(f"kure_lib.{path.replace('/', '.')}") for path, _ in names}
    assert names and [f"{path}.{name}" for path, name in names if not hasattr(modules[path], name)] == []


def test_the_findings_and_the_boards_of_the_readme_are_the_committed_ones(monkeypatch):
    monkeypatch.setenv("KURE_PROFILE", "study")
    monkeypatch.setenv("KURE_CHECK", "1")
    answer.update_readme(README)


def test_scripts_are_executable():
    assert all((ROOT / name).stat().st_mode & 0o111 for name in ("run_all.sh", ".ci/run"))
