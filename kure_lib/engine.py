"""Many tasks carried out at once, each in a process; the driver decides which tasks, and how many at once."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.managers import SyncManager
from queue import Queue
from typing import NamedTuple

from kure_lib.paths import KureError

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Task(NamedTuple):
    """A task for another process; it waits until the task named `after` is finished, where that is one of the tasks.

    `work` is pickled. It is called with one argument: a function that sends what it is given to the first process.
    """

    name: str
    work: Callable[[Callable[..., None]], object]
    after: str | None = None


def run(tasks: Iterable[Task], places: Sequence[Mapping[str, str]], on_report: Callable[..., None]) -> None:
    """Carry out every task, as many at once as there are places; one that fails spares those that do not wait for it.

    A place is the environment variables of one worker process, set before it imports anything. `on_report` is called
    in this process with a task's name and whatever the task sends. Raises the error of a task as it is, those of
    several as one `KureError`, and `KureError` at once if the operating system killed a worker.
    """
    waiting = list(tasks)
    failed: dict[str, BaseException] = {}
    at_work: dict[Future[None], Task] = {}
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(die_with_parent)
    with manager:
        reports, free = manager.Queue(), manager.Queue()
        for place in places:
            free.put(place)
        pool = ProcessPoolExecutor(len(places), context, _take_place, (free,))
        try:
            while waiting or at_work:
                unfinished = {task.name for task in (*waiting, *at_work.values())}
                ready = [task for task in waiting if task.after not in unfinished]
                for task in ready[: len(places) - len(at_work)]:
                    at_work[pool.submit(_carry_out, task, reports)] = task
                    waiting.remove(task)
                finished, _ = wait(at_work, timeout=0.5, return_when=FIRST_COMPLETED)
                while not reports.empty():
                    on_report(*reports.get())
                for future in finished:
                    task, error = at_work[future], future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    del at_work[future]
                    if error:
                        failed[task.name] = error
                while lost := [task for task in waiting if task.after in failed]:
                    failed |= {task.name: failed[task.after] for task in lost}
                    waiting = [task for task in waiting if task not in lost]
        except BrokenProcessPool:  # does not say which process it was
            names = " or ".join(task.name for task in at_work.values())
            raise KureError(f"The process of {names} was killed, perhaps for want of memory: start again with a "
                            "smaller --jobs; a run goes on from its last epoch.") from None  # fmt: skip
        finally:
            for process in list((pool._processes or {}).values()):
                process.kill()  # files are written whole or not at all, so nothing is lost that was finished
            pool.shutdown(cancel_futures=True)
    errors = list(dict.fromkeys(failed.values()))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise KureError("\n".join(dict.fromkeys(map(str, errors))))


def die_with_parent() -> None:
    """Let the kernel of Linux kill this process as soon as the one that started it ends, however it ends."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _take_place(free: Queue[Mapping[str, str]]) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process reports Ctrl-C; a worker just ends
    os.environ.update(free.get())


def _carry_out(task: Task, reports: Queue[tuple]) -> None:
    task.work(lambda *values: reports.put((task.name, *values)))
