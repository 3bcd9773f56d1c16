"""One run trained by several processes of this machine, each with a GPU of its own: data parallelism.

Every process makes the same network and the same batches, and computes on its part of each, so that the images of a
step do not depend on how many there are. `DistributedDataParallel` takes the mean of their gradients. A penalty on
weights is the same in every process, so the mean of its gradients is its gradient: it is added once.
"""

import signal
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from kure_lib.networks.data import Part
from kure_lib.paths import KureError, say
from kure_lib.training.protocol import Steps

RESTARTS = 3  # after a process was lost
FEW = 16  # images: with fewer, batch norm's statistics cost accuracy (Wu & He, ECCV 2018, Fig. 1)
LOOK = 0.1  # seconds between two looks at what the processes report
PATIENCE = timedelta(hours=2)  # for which the others wait while the first evaluates


def part() -> Part:
    """Which part of every batch is this process's, and of how many: (0, 1) where it trains alone."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def total(sums: Tensor) -> Tensor:
    """The sum over the processes of a tensor."""
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums


def synchronized(model: nn.Module, images: int) -> nn.Module:
    """The network, with batch norms that see the images of all processes where a part is fewer than `FEW` images.

    Raises `KureError` on a processor, where such batch norms do not exist.
    """
    if images >= FEW or not distributed.is_initialized():
        return model
    if next(model.parameters()).device.type == "cpu":
        raise KureError(f"Batch norm would see {images} images in each process, which are too few, and only GPUs can "
                        f"put them together: take larger batches or fewer processes, for {FEW} each.")  # fmt: skip
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def averaging(model: nn.Module, steps: Steps) -> nn.Module:
    """The network as a step computes it: the gradients of its weights and of learned steps are means over processes.

    It is to be made anew for every epoch. The order in which gradients are added depends on what was computed with it
    before, and a run that goes on from a checkpoint has to add in the order of one that was never interrupted.
    """
    if not distributed.is_initialized():
        return model
    return DistributedDataParallel(_WithSteps(model, steps))


class _WithSteps(nn.Module):
    def __init__(self, model: nn.Module, steps: Steps):
        super().__init__()
        self.model, self.steps = model, nn.ParameterList(steps.values())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def together(count: int, work: Callable[..., Any], inputs: tuple, on_report: Callable[..., None]) -> None:
    """Call `work(report, *inputs)` in `count` new processes that form a group; `on_report` gets here what they report.

    If a process is lost, all begin again, `RESTARTS` times at most; so the work has to keep what it has done.

    Raises `KureError`: that of the work; for more processes than GPUs, where there are any; for too many losses.
    """
    if 0 < (gpus := torch.cuda.device_count()) < count:
        raise KureError(f"{count} processes need as many GPUs, and PyTorch sees {gpus}: ask for fewer.")
    for left in reversed(range(RESTARTS + 1)):
        try:
            _attempt(count, work, inputs, on_report)
            break
        except (ProcessExitedException, ProcessRaisedException) as error:
            reason = str(error).strip().splitlines()[-1]
            if not left:
                raise KureError(f"One of the {count} processes of a run was lost {RESTARTS + 1} times ({reason}): "
                                "start again with fewer or with a smaller --jobs; the run goes on from its last epoch."
                                ) from error  # fmt: skip
            say(f"One of the {count} processes of a run was lost ({reason}): they go on from its last epoch.")


def _attempt(count: int, work: Callable[..., Any], inputs: tuple, on_report: Callable[..., None]) -> None:
    reports = multiprocessing.get_context("spawn").SimpleQueue()

    def hand_on() -> None:
        while not reports.empty():
            report = reports.get()
            if isinstance(report, KureError):
                raise report
            on_report(*report)

    with tempfile.TemporaryDirectory(prefix="kure-") as folder:
        store = Path(folder) / "store"
        group = multiprocessing.spawn(_take_part, (count, store, reports, work, inputs), count, join=False)
        try:
            while not group.join(LOOK):
                hand_on()
        finally:
            for process in group.processes:
                process.kill()
            hand_on()  # an error of the work comes before what it did to the other processes


def _take_part(rank: int, count: int, store: Path, reports: Any, work: Callable[..., Any], inputs: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which torch has the kernel send where the first process ends
    warnings.filterwarnings("ignore", "Grad strides do not match")  # 1 × 1 convolutions, channels-last: no error
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(rank)
    group: dict[str, Any] = {"rank": rank, "world_size": count, "store": distributed.FileStore(str(store), count)}
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE, **group)
    try:
        work(lambda *values: reports.put(values), *inputs)
    except KureError as error:
        reports.put(error)
    distributed.destroy_process_group()
