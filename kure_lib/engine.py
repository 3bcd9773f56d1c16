"""Many tasks carried out at once, each in another process: of this machine (`Pool`), or of a Ray cluster (`Cluster`).

The driver decides which tasks; a task is pure. What it needs goes in, what comes out and what it reports comes back,
and the first process alone reads and writes results. So a cluster needs no file system that its machines share.
"""

import ctypes
import hashlib
import multiprocessing
import os
import platform
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache, lru_cache
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from threading import RLock
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from kure_lib import progress
from kure_lib.paths import KureError, in_words

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Task(NamedTuple):
    """A task for another process; it waits until the task named `after` is finished, where that is one of the tasks.

    `inputs` is called in the first process when the task is to begin, and says what it begins with, or None if nothing
    is left to do. `work` is pickled, and called with a function that sends what it is given to the first process, then
    with the inputs. One whose process was lost may begin again, with the inputs of then.
    """

    name: str
    work: Callable[..., Any]
    after: str | None = None
    inputs: Callable[[], tuple | None] = tuple


class Lost(Exception):
    """The process of a task was killed, or its machine is gone."""


class Engine(Protocol):
    """Where tasks are carried out: `at_once` of them, each begun again after `retries` losses at most."""

    retries: int
    reports: Any  # a queue of (name, *what the task of that name sent)

    @property
    def at_once(self) -> int: ...

    def submit(self, task: Task, inputs: tuple) -> Future: ...

    def error(self, future: Future) -> BaseException | None:
        """The error of a finished task as it was raised, `Lost` if the task did not come to its end, or None."""
        ...

    def cancel(self) -> None:
        """End every process, whatever it is doing."""
        ...


def run(
    tasks: Iterable[Task],
    engine: Engine,
    on_report: Callable[..., None],
    on_result: Callable[[str, Any], None] = lambda name, result: None,
) -> None:
    """Carry out every task; one that fails spares those that do not wait for it. The engine is at its end afterwards.

    `on_report` is called in this process with a task's name and whatever the task sends, `on_result` with its name and
    its result. Raises the error of a task as it is, those of several as one `KureError`, and `KureError` for a task
    that was lost too often; where the processes of an engine are lost together, at once.
    """
    waiting = list(tasks)
    failed: dict[str, BaseException] = {}
    at_work: dict[Future, Task] = {}
    losses: Counter[str] = Counter()
    try:
        while waiting or at_work:
            unfinished = {task.name for task in (*waiting, *at_work.values())}
            ready = [task for task in waiting if task.after not in unfinished]
            for task in ready[: max(engine.at_once - len(at_work), 0)]:
                waiting.remove(task)
                if (inputs := task.inputs()) is not None:
                    at_work[engine.submit(task, inputs)] = task
            finished, _ = wait(at_work, timeout=0.5, return_when=FIRST_COMPLETED)
            while not engine.reports.empty():
                on_report(*engine.reports.get())
            for future in finished:
                task, error = at_work[future], engine.error(future)
                if isinstance(error, Lost) and not engine.retries:  # it does not say which process it was
                    raise _killed(at_work.values())
                del at_work[future]
                if not isinstance(error, Lost):
                    if error:
                        failed[task.name] = error
                    else:
                        on_result(task.name, future.result())
                elif losses[task.name] < engine.retries:
                    losses[task.name] += 1
                    waiting.insert(0, task)
                else:
                    failed[task.name] = _killed([task])
            while lost := [task for task in waiting if task.after in failed]:
                failed |= {task.name: failed[task.after] for task in lost}
                waiting = [task for task in waiting if task not in lost]
    finally:
        engine.cancel()
    errors = list(dict.fromkeys(failed.values()))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise KureError("\n".join(dict.fromkeys(map(str, errors))))


def _killed(tasks: Iterable[Task]) -> KureError:
    names = " or ".join(task.name for task in tasks)
    return KureError(f"The process of {names} was killed, perhaps for want of memory: start again with a smaller "
                     "--jobs; what was finished is kept, and a run goes on from its last epoch.")  # fmt: skip


class Pool:
    """Processes of this machine, one for each place: the environment variables it has before it imports anything."""

    retries = 0  # a pool that has lost a process is broken

    def __init__(self, places: Sequence[Mapping[str, str]]):
        context = multiprocessing.get_context("spawn")
        self.at_once = len(places)
        self._manager = SyncManager(ctx=context)
        self._manager.start(die_with_parent)
        self.reports, free = self._manager.Queue(), self._manager.Queue()
        for place in places:
            free.put(place)
        self._processes = ProcessPoolExecutor(len(places), context, _take_place, (free,))

    def submit(self, task: Task, inputs: tuple) -> Future:
        return self._processes.submit(_carry_out, task.name, task.work, self.reports, *inputs)

    def error(self, future: Future) -> BaseException | None:
        error = future.exception()
        return Lost() if isinstance(error, BrokenProcessPool) else error

    def cancel(self) -> None:
        for process in list((self._processes._processes or {}).values()):
            process.kill()
        self._processes.shutdown(cancel_futures=True)
        self._manager.shutdown()


class Cluster:
    """A Ray cluster that is running, in which every task has a core and, where there are any, a GPU.

    Inputs of a task that are bytes travel once to each machine, whatever the number of tasks that have them in common.

    Args:
        address: That of the cluster, "auto" for the one that this machine is part of.
        jobs: How many tasks are carried out at once; None: as many as the cluster has GPUs, else cores.

    Raises:
        KureError: Ray is not installed, or no cluster answers.
    """

    retries = 3

    def __init__(self, address: str, jobs: int | None = None):
        try:
            import ray
            from ray.util.queue import Queue
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError:
            raise KureError("A cluster needs Ray, which is not installed: run, in the folder of the study, "
                            f"{sys.executable} -m pip install '.[cluster]'") from None  # fmt: skip
        stopped = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, log_to_driver=False, logging_level="error")
        except Exception as error:  # of many classes: no cluster, none at the address, another version of Ray or Python
            raise KureError(f"No Ray cluster can be used at {address!r} ({in_words(error)}): start one with `ray start "
                            "--head`, or give the address that it prints.") from error  # fmt: skip
        signal.signal(signal.SIGTERM, stopped)  # Ray ends the process, and leaves nobody to clean up
        self._ray, self._jobs = ray, jobs
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._put = lru_cache(8)(ray.put)

    @property
    def at_once(self) -> int:
        there = self._ray.cluster_resources()
        return self._jobs or max(1, int(there.get("GPU", 0) or there.get("CPU", 1)))

    def submit(self, task: Task, inputs: tuple) -> Future:
        gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_carry_out_there)
        given = [self._put(each) if isinstance(each, bytes) else each for each in inputs]
        return remote.options(name=task.name).remote(_sources(), task.name, task.work, self.reports, *given).future()

    def error(self, future: Future) -> BaseException | None:
        error = future.exception()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return error.cause
        return Lost() if isinstance(error, self._ray.exceptions.RayError) else error

    def cancel(self) -> None:
        self._ray.shutdown()  # ends what this process has submitted; the cluster lives on


def die_with_parent() -> None:
    """Let the kernel of Linux kill this process as soon as the one that started it ends, however it ends."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _take_place(free: Queue[Mapping[str, str]]) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process reports Ctrl-C; a worker just ends
    os.environ.update({progress.FILE: os.devnull, **free.get()})  # the first process says how far all are
    tqdm.set_lock(RLock())  # its own is one between processes, which stays behind where this one is killed


def _carry_out(name: str, work: Callable[..., Any], reports: Any, *inputs: Any) -> Any:
    return work(lambda *values: reports.put((name, *values)), *inputs)


def _carry_out_there(sources: str, *task: Any) -> Any:
    if sources != _sources():
        raise KureError(f"The machine {platform.node()} of the cluster has another version of kure_lib: bring all of "
                        "them to the same commit.")  # fmt: skip
    return _carry_out(*task)


@cache
def _sources() -> str:
    """The SHA-256 of the library's source files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
