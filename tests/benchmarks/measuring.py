"""What benchmarks measure with: rounds in fresh processes that take turns, and the limits of the machine."""

import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cpuinfo
import numba
import numpy as np
import psutil
import torch
import torchvision

from kure_lib.networks import device

SMALL = (10_000,)  # arguments of a first round, which does not count
THREADS = psutil.cpu_count(logical=False) or os.cpu_count() or 1  # what torch uses unless told otherwise
Prepare = Callable[..., Callable[[], object]]  # makes a round
FRESH = multiprocessing.get_context("forkserver")  # a process starts as one that has imported this, and done nothing
FRESH.set_forkserver_preload(["scipy.optimize", "torchvision", "kure_lib.quantization.lapq", "kure_lib.training.loop"])


@dataclass(frozen=True)
class Side:
    """One side of a comparison: fresh processes at once, in each of which `prepare(*arguments)` makes a round.

    `amount` says how much of the work that the comparison names is done in a round, by all of the processes together.
    """

    prepare: Prepare
    arguments: tuple = ()
    threads: int = 1
    processes: int = 1
    amount: float = 1


class Taken(NamedTuple):
    """Median seconds of a side's rounds, and the bytes of memory that its processes needed at most, imports apart."""

    seconds: float
    bytes: int


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(sides: Sequence[Side], rounds: int) -> list[Taken]:
    """Rounds of all sides in turn, in processes of their own that have warmed up with one round and then end.

    While one side has its turn the processes of the others wait and use no processor.
    """
    with ExitStack() as stack:
        contenders = [[stack.enter_context(_Contender(side)) for _ in range(side.processes)] for side in sides]
        for contender in chain(*contenders):
            contender.wait()
        took = [[seconds(lambda each=each: _together(each)) for each in contenders] for _ in range(rounds)]
        memory = [sum(contender.end() for contender in each) for each in contenders]
    return [Taken(statistics.median(each), peak) for each, peak in zip(zip(*took, strict=True), memory, strict=True)]


class _Contender:
    """A process of a side, which makes a round whenever it is told to."""

    def __init__(self, side: Side):
        self.pipe, far_end = FRESH.Pipe()
        self.process = FRESH.Process(target=_serve, args=(far_end, side))
        self.process.start()
        far_end.close()

    def __enter__(self) -> "_Contender":
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()
        self.process.join()

    def start(self) -> None:
        self.pipe.send(True)

    def wait(self) -> int:
        """Wait for the round; `EOFError` if the process has failed, whose traceback is then on stderr."""
        return self.pipe.recv()

    def end(self) -> int:
        """Bytes of memory that it needed."""
        self.pipe.send(False)
        return self.wait()


def _together(contenders: list[_Contender]) -> None:
    """A round of each, all at the same time."""
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.wait()


def _serve(pipe, side: Side) -> None:
    torch.set_num_threads(side.threads)
    before = psutil.Process().memory_info().rss
    work = side.prepare(*side.arguments)
    work()
    _forget_peak()
    while True:
        pipe.send(0)
        try:
            if not pipe.recv():
                break
        except EOFError:  # another side has failed
            return
        work()
    pipe.send(max(_peak() - before, 0))


def _forget_peak() -> None:
    """Count the peak of memory from now on, where Linux lets a process say so: not what loading and compiling took."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes that this process has needed at most; `getrusage` tells at least those of the one it was started by."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(prepare: Prepare, *arguments, rounds: int) -> Taken:
    """Rounds in a fresh process with one thread, after one of another size, by which all is compiled and loaded.

    Of the memory what `prepare` needs does not count.
    """
    with ProcessPoolExecutor(1, FRESH) as fresh:
        return fresh.submit(_measured, prepare, arguments, rounds).result()


def _measured(prepare, arguments, rounds) -> Taken:
    torch.set_num_threads(1)
    prepare(*SMALL)()
    work = prepare(*arguments)
    before = psutil.Process().memory_info().rss
    _forget_peak()
    took = statistics.median(seconds(work) for _ in range(rounds))
    return Taken(took, _peak() - before)


def machine() -> dict:
    """The processor and the software; no name of the host."""
    return {
        "cpu": cpuinfo.get_cpu_info()["brand_raw"], "cores": THREADS, "logical_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30), "system": platform.system(),
        "capability": torch.backends.cpu.get_cpu_capability(), "precision": device.precision(),
        "threads": THREADS, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "numpy": np.__version__, "numba": numba.__version__,
    }  # fmt: skip


def slug(about: dict) -> str:
    """Processor and cores as a file name.

    >>> slug({"cpu": "AMD EPYC (TM)", "cores": 2})
    'amd-epyc-tm-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['cores']} cores".lower()).strip("-")


def limits() -> dict[str, float]:
    """How fast the machine copies memory and multiplies matrices, with one thread and with all."""
    return {
        f"{name} ({count} thread{'s' * (count > 1)})": value
        for count in sorted({1, THREADS})
        for name, value in _limits(count).items()
    }


def _limits(threads: int, size: int = 2048, rounds: int = 7) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(2**26)  # 256 MiB: larger than any cache
        target = torch.empty_like(source).zero_()
        copy = _median(lambda: target.copy_(source), rounds)
        result = {"copy, read and written, GB/s": 2 * source.nbytes / copy / 1e9}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.ones(2, size, size, dtype=dtype)
            name = f"matrix product {str(dtype).removeprefix('torch.')}, GFLOP/s"
            result[name] = 2 * size**3 / _median(lambda a=a, b=b: a @ b, rounds) / 1e9
        return result
    finally:
        torch.set_num_threads(before)


def _median(work: Callable[[], object], rounds: int) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(rounds))
