"""The command line of the study, `python -m kure_lib`; `run_all.sh` starts it in the right environment.

`--help` must work before anything is installed, so this file imports the standard library alone, the rest when needed.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

PROFILES = {
    "smoke": "a tiny subset that proves the machinery: minutes",
    "quick": "the default: real training on the embedded data, one seed, ten minutes on two cores",
    "study": "the committed study, all seeds: minutes from its records, hours from scratch",
    "imagenet": "the paper's scale: ImageNet, torchvision's weights, GPUs",
    "large": "torchvision's networks on Tiny ImageNet, more of them than in the study, for a GPU: trained only",
}


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own says nothing of a full disk

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; --help lists the options.\n")


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; a mistake ends the process with one sentence and exit code 2."""
    parser = _Parser(
        prog="./run_all.sh",
        description="Train what is missing, execute the notebooks, print the scoreboard, build the site.",
        epilog="profiles:\n" + "\n".join(f"  {name:10}{meaning}" for name, meaning in PROFILES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="scale of the study, see below")
    parser.add_argument("--only", nargs="+", metavar="NN", help="these notebooks only, as in --only 05 07")
    parser.add_argument("--fresh", action="store_true", help="ignore what is on record, train it anew")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="train and evaluate N networks at a time")
    parser.add_argument("--gpus-per-run", type=_positive, metavar="N", help="let N GPUs of this machine share every "
                        "run and each of its batches")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="show the site in a browser when it is built")
    parser.add_argument("--cluster", metavar="ADDRESS", help="train and evaluate on a Ray cluster: its address, or "
                        "auto for the one that this machine is part of")  # fmt: skip
    parser.add_argument("--conda", action="store_true", help="take Python from conda, mamba or micromamba")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="show what would run and for how long")
    instead.add_argument("--bench", action="store_true", help="measure speed (tests/benchmarks)")
    instead.add_argument("--faults", nargs="?", const=20, type=_positive, metavar="N", help="do every fault of "
                         "tests/faults, N times those that chance decides (20), and count what is handled")  # fmt: skip
    instead.add_argument("--test", action="store_true", help="run every test and a smoke study")
    instead.add_argument("--manifest", action="store_true", help="write down anew every accuracy on record and which "
                         "results are committed: results/study/evaluations.csv and MANIFEST.sha256")  # fmt: skip
    instead.add_argument("--lab", nargs="?", const="", metavar="NN", help="open JupyterLab on the notebooks, or on one "
                         "of them; options after -- are for JupyterLab, as in --lab 05 -- --no-browser")  # fmt: skip
    end = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:end], argparse.Namespace(options=words[end + 1 :]))
    if asked.options and asked.lab is None:
        parser.error(f"the options {shlex.join(asked.options)} after -- are for JupyterLab and need --lab")
    return asked


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks. Returns the exit code: 0, 1 after an error, 130 if stopped."""
    words = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        try:
            return check(words[1:]) if words[:1] == ["check"] else _run(arguments(words))
        finally:
            sys.stdout.flush()  # else a full disk shows only when Python ends
    except KeyboardInterrupt:
        again = [word for word in words if word != "--fresh"]
        command = shlex.join(["./run_all.sh", *again])
        print(f"\nStopped. What was finished is kept; go on with {command}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no place
        print(f"Error: the output cannot be written ({error.strerror}): make room, or print elsewhere; what was "
              "finished is kept.", file=sys.stderr)  # fmt: skip
        return 1


def check(argv: Sequence[str]) -> int:
    """Print what `quantization.check` finds in a file of weights, and draw it if asked. Returns the exit code."""
    what = "Kurtosis, distance to uniform and distortion at 8, 4, 3 and 2 bits of every weight tensor in a file."
    parser = _Parser(prog="python -m kure_lib check", description=what)
    parser.add_argument("weights", type=Path, help="a safetensors file")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw it into this file")
    asked = parser.parse_args(argv)
    from kure_lib.paths import KureError
    from kure_lib.quantization.check import check_file

    try:
        found = check_file(asked.weights)
        print(found)
        if asked.figure:
            found.figure().savefig(asked.figure, dpi=150)
    except (KureError, OSError, ValueError) as error:  # of a figure that cannot be written there, or not in this format
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(asked: argparse.Namespace) -> int:
    from kure_lib import paths

    paths.use_profile(asked.profile)
    if asked.gpus_per_run:
        paths.use_gpus_per_run(asked.gpus_per_run)
    try:
        if asked.lab is not None:
            lab(asked.lab, asked.options)
        if asked.test:
            return 0 if test() else 1
        if asked.bench:
            return _python("-m", "pytest", "-m", "benchmark and not slow", "tests/benchmarks")
        if asked.faults:
            every = ("-m", "not benchmark", "--faults", str(asked.faults))
            return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/faults", *every)
        if asked.manifest:
            from kure_lib.study import evaluations, manifest

            evaluations.write("study")
            changed = manifest.write(paths.all_results() / "study")
            print(
                "\n".join([*changed, f"{len(changed)} files are new, changed or gone: commit the manifest with them."])
            )
            return 0
        from kure_lib import driver, overview
        from kure_lib.study import profiles

        if asked.list:
            print(overview.describe(asked.profile, asked.only))
            return 0
        if asked.profile in profiles.ONLY_TRAINED:
            return _train(asked)
        before = outcomes()
        site = driver.run(asked.profile, only=asked.only, fresh=asked.fresh, jobs=asked.jobs, cluster=asked.cluster)
        print(f"\n{scoreboard(before)}\n\nSite: {site}")
        if asked.open:
            webbrowser.open(site.as_uri())
        return 0
    except paths.KureError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _train(asked: argparse.Namespace) -> int:
    """Train what a profile without notebooks lacks, then say what is on record."""
    from kure_lib import driver, overview, paths
    from kure_lib.study import plans, records

    if asked.only:
        raise paths.KureError(f"No notebook reads the profile {asked.profile}: leave --only out.")
    planned = plans.open(asked.profile)
    if asked.fresh:
        for each in planned.runs:
            records.forget(each.config)
    driver.train(planned, asked.jobs, asked.cluster)
    print(overview.describe(asked.profile))
    return 0


def outcomes() -> dict[str, str]:
    """The outcome of every claim under the ambient profile, none if one cannot be read: a run replaces it."""
    from kure_lib.findings import verdicts
    from kure_lib.paths import KureError

    with suppress(KureError):
        board = verdicts.scoreboard()
        return dict(zip(board.id, board.outcome, strict=True))
    return {}


def scoreboard(before: Mapping[str, str]) -> str:
    """The verdicts under the ambient profile, a line for each claim tested, totals, and what changed since `before`."""
    from kure_lib.findings import verdicts

    board = verdicts.scoreboard()
    tested = board[board.outcome != "not tested"]
    rows = zip(tested.id, tested.outcome, tested.statement, strict=True)
    lines = [f"{id:5}{outcome:12}{shorten(what, 92, placeholder=' …')}" for id, outcome, what in rows]
    totals = ", ".join(f"{count} {outcome}" for outcome, count in board.outcome.value_counts().items())
    lines.append(f"{len(board)} claims and questions: {totals}.")
    changed = [
        f"{id} {outcome} (was {before[id]})"
        for id, outcome in zip(board.id, board.outcome, strict=True)
        if before.get(id, outcome) != outcome
    ]
    if set(before.values()) - {"not tested"}:  # there was an earlier run
        lines.append(f"New since the last run: {', '.join(changed) or 'nothing'}.")
    return "\n".join(lines)


def lab(notebook: str, options: Sequence[str]) -> NoReturn:
    """Become JupyterLab on the notebooks, or on one named by number or name; Ctrl-C ends it.

    Raises `KureError` for a notebook that does not exist.
    """
    from kure_lib import notebooks, paths

    chosen = notebooks.select([notebook]) if notebook else []
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={paths.NOTEBOOKS}"]
    command += [f"--LabApp.default_url=/lab/tree/{stem}.ipynb" for stem in chosen]
    command += ["--ServerApp.answer_yes=True", *options]  # yes to the question that follows Ctrl-C
    ambient = {"KURE_PROFILE", "KURE_CHECK"}  # a notebook opened by hand follows its own parameters
    environment = {name: value for name, value in os.environ.items() if name not in ambient}
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"  # kernels of this environment come before those of the user
    os.execve(sys.executable, command, environment)


def test() -> bool:
    """Run every kind of test, later ones also after a failure; the last line printed sums up."""
    at_once = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile")  # a file's tests stay together
    in_order = "--no-loadscope-reorder"  # notebooks come last: each takes seconds, so that no process waits for long
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *at_once, in_order, "--nbval", "--nbval-current-env")
    with tempfile.TemporaryDirectory() as results:
        outcomes = [
            _part("tests and notebooks", *pytest, "tests", "kure_lib", "notebooks"),
            _part("smoke study", "-m", "kure_lib", "--profile", "smoke", KURE_RESULTS=results),
        ]
    print("\n" + ", ".join(summary for _, summary in outcomes))
    return all(passed for passed, _ in outcomes)


def _part(name: str, *command: str, **variables: str) -> tuple[bool, str]:
    """Run one part of the tests; returns whether it passed, and a phrase for the summary."""
    print(f"\n{name}: python {shlex.join(command)}", flush=True)
    start = time.monotonic()
    passed = _python(*command, **variables) == 0
    return passed, f"{name} {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s"


def _python(*command: str, **variables: str) -> int:
    """Run Python in the study's folder, without the caller's results, profile and check mode."""
    from kure_lib import notebooks, paths

    ambient = {"KURE_RESULTS", "KURE_PROFILE", "KURE_CHECK", "KURE_GPUS_PER_RUN"}
    inherited = {name: value for name, value in os.environ.items() if name not in ambient}
    flags = dict.fromkeys(("OMP_NUM_THREADS", "PYDEVD_DISABLE_FILE_VALIDATION"), "1")
    environment = {**inherited, **flags, "MPLBACKEND": "agg", **variables}
    with notebooks.running([sys.executable, *command], cwd=paths.ROOT, env=environment) as process:
        return process.wait()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
