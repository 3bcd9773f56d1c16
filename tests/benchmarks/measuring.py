"""What benchmarks measure with: rounds in processes of their own, and the limits of the machine."""

import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import cpuinfo
import numba
import numpy as np
import psutil
import torch
import torchvision

from kure_lib.networks import device

SMALL = (10_000,)  # arguments of a first round, which does not count
THREADS = psutil.cpu_count(logical=False) or os.cpu_count() or 1  # what torch uses unless told otherwise


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Contender:
    """A process that prepares itself, warms up with one round, and from then on runs a round when asked.

    `prepare(*arguments)` is called in the process, with torch on that many threads, and returns the round.
    Between its rounds the process waits without using the processor, so that rivals can take turns.
    """

    def __init__(self, prepare: Callable[..., Callable[[], object]], *arguments, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, prepare, arguments, threads))
        self.process.start()
        far_end.close()

    def start(self) -> None:
        self.pipe.send("go")

    def finish(self) -> None:
        """Wait for the round; `EOFError` if the process has failed, whose traceback is then on stderr."""
        self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def together(contenders: list[Contender]) -> None:
    """One round of each, all at the same time."""
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.finish()


def _serve(pipe, prepare, arguments, threads) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    work()
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:  # the benchmark is over
            return
        work()
        pipe.send("done")


def alone(prepare: Callable[..., Callable[[], object]], *arguments, rounds: int) -> tuple[float, int]:
    """Median seconds of a round in a fresh process with one thread, and by how many bytes rounds raise its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measured, prepare, arguments, rounds).result()


def _measured(prepare, arguments, rounds) -> tuple[float, int]:
    torch.set_num_threads(1)
    prepare(*SMALL)()  # what is compiled or loaded at the first call
    work = prepare(*arguments)
    before = psutil.Process().memory_info().rss
    took = statistics.median(seconds(work) for _ in range(rounds))
    return took, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


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
