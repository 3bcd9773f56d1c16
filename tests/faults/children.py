"""Processes to be killed, held back or raced: each a fork of one that has only imported the library."""

import multiprocessing
import os
import resource
import signal
import time
import traceback
from pathlib import Path

from kure_lib.paths import KureError
from kure_lib.training.configs import KureConfig, QatConfig, RivalConfig, RunConfig

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kure_lib.study.runs"])
PATIENCE = 600  # seconds; a busy machine is slow

BASE = {"model": "resnet20", "train_size": 128, "epochs": 2, "learning_rate": 0.05, "weight_decay": 5e-4,
        "batch_size": 32}  # fmt: skip
RUNS = [
    RunConfig(**BASE, regularizer=KureConfig()),
    RunConfig(**BASE, quantization=QatConfig.named("lsq 4/4")),  # has learned steps
    RunConfig(**BASE, rival=RivalConfig(name="ema", strength=0.9)),  # has an average
]


class Child:
    """Does one of the functions below, named `work`, in a process with these environment variables beside ours.

    No file that it writes can grow beyond `limit` bytes, as if the disk were full.
    """

    def __init__(self, work: str, *arguments: object, limit: int | None = None, **environment: str):
        self._answer, there = CONTEXT.Pipe(duplex=False)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._begun = time.monotonic()
        self._process = CONTEXT.Process(target=_do, args=(there, variables, limit, work, arguments), daemon=True)
        self._process.start()
        there.close()

    def kill(self, after: float = 0) -> None:
        """End it as the kernel would, after so many seconds if it still lives."""
        self._process.join(after)
        self._process.kill()
        self._process.join()

    def outcome(self) -> tuple[object, str | None]:
        """What it returned, or None and the sentence of its `KureError`; an error for anything else."""
        assert self._answer.poll(PATIENCE), "it does not end"
        value, sentence, trouble = self._answer.recv()
        self._process.join()
        self.seconds = time.monotonic() - self._begun
        assert not trouble, trouble
        if sentence is not None:
            assert_sentence(sentence)
        return value, sentence

    def result(self) -> object:
        """What it returned; an error if that is nothing but a sentence."""
        value, sentence = self.outcome()
        assert sentence is None, sentence
        return value

    def ended(self) -> int:
        """The exit code, once it has ended."""
        self._process.join(PATIENCE)
        return self._process.exitcode


def assert_sentence(text: str) -> None:
    """One line that is no traceback."""
    assert text.strip() and "\n" not in text.strip() and "Traceback" not in text, text


def answered(ask) -> object:
    """What a call returns, or None if it ends in one sentence; any other error is the caller's."""
    try:
        return ask()
    except KureError as error:
        assert_sentence(str(error))
        return None


def _do(answer, variables: dict[str, str], limit: int | None, work: str, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(variables)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        answer.send((globals()[work](*arguments), None, None))
    except KureError as error:
        answer.send((None, str(error), None))
    except BaseException:
        answer.send((None, None, traceback.format_exc()))


# What they do


def train(config) -> tuple[str, int]:
    """The SHA-256 of the run's weights, and how many of its epochs were trained here."""
    from kure_lib.study import runs

    epochs: list[int] = []
    return runs.get(config, lambda epoch, values: epochs.append(epoch)).weights_sha256, len(epochs)


def train_and_die(config, call: str, nth: int, after: bool) -> None:
    """Train until the n-th `os.replace` or `os.fsync`, and be killed right before or after it."""
    original, seen = getattr(os, call), []

    def deadly(*arguments):
        seen.append(call)
        if len(seen) == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)
        if len(seen) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, deadly)
    train(config)


def evaluate(config, widths: list[int]) -> list[tuple]:
    """The accuracies of a finished run at these weight bits."""
    from kure_lib.quantization.spec import QuantizationSpec
    from kure_lib.study import runs

    record = runs.find(config)
    return [runs.evaluate(record, QuantizationSpec(weight_bits=bits)) for bits in widths]


def unpack(source: Path) -> dict[str, bytes]:
    """What is in the cache once a data set is unpacked there."""
    from kure_lib.networks import data

    folder = data.unpack_fashion_mnist(source)
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*ubyte"))}


def decode(paths: list[Path]) -> list:
    """Pictures of 8 × 8 pixels, through the cache."""
    from kure_lib.networks import pictures

    return pictures.decoded("fault", paths, [0] * len(paths), 8).tolist()


def judge(id: str, effects: list[dict], notebook: str) -> None:
    import pandas as pd

    from kure_lib.findings import verdicts

    verdicts.judge(id, pd.DataFrame(effects), notebook=notebook)


def study(seconds: float) -> None:
    """Carry out a study whose training takes so long and then fails."""
    from kure_lib import driver, notebooks

    def fail(*arguments):
        time.sleep(seconds)
        raise KureError("enough of it.")

    notebooks.available = lambda: ["00_start_here"]
    driver.train = fail
    driver.run("smoke")
