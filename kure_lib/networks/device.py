"""The device on which networks run, the arithmetic they run in, and what a record says of both."""

import math
import os
import platform
import re
import subprocess
import timeit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kure_lib.paths import ROOT, KureError, gpus_per_run

_everywhere = False  # whether networks compute in float32 on every machine
CLEARLY = 1.3  # times as fast: what bfloat16 must be to be worth its rounding


def device() -> torch.device:
    """The first GPU that PyTorch sees, else the processor.

    Raises `KureError` if `CUDA_VISIBLE_DEVICES` names a GPU and PyTorch sees none: nothing falls silently to the
    processor, where a run takes a hundred times as long.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if named := _named_gpus():
        raise KureError(f"CUDA_VISIBLE_DEVICES names {','.join(named)}, and PyTorch sees no GPU: correct it, install a "
                        "PyTorch for CUDA, or set it to nothing to compute on the processor.")  # fmt: skip
    return torch.device("cpu")


def gpus() -> list[str]:
    """The GPUs that processes can take turns with, by the names that `CUDA_VISIBLE_DEVICES` gives them.

    The user's own names stay as they are, be they numbers, UUIDs or parts of a GPU (MIG), of which one process sees
    the first alone. Raises `KureError` if PyTorch does not see all that are named.
    """
    if device().type == "cpu":
        return []
    named, count = _named_gpus(), torch.cuda.device_count()
    if named and len(named) != count and not named[0].startswith("MIG-"):
        raise KureError(f"CUDA_VISIBLE_DEVICES names {','.join(named)}, and PyTorch sees {count} of these "
                        f"{len(named)}: name only GPUs that are there, each once.")  # fmt: skip
    return named or [str(i) for i in range(count)]


def workers() -> int:
    """How many runs are trained at once: one for each GPU, or for so many as share a run, else one for each core."""
    return len(gpu_groups()) or cores()


def gpu_groups() -> list[str]:
    """The GPUs in groups that share a run, each as `CUDA_VISIBLE_DEVICES` names it; none if there are too few."""
    seen, each = gpus(), gpus_per_run()
    return [",".join(seen[i : i + each]) for i in range(0, len(seen) - each + 1, each)]


def places(jobs: int) -> list[dict[str, str]]:
    """The environment of every worker: they take turns with the GPUs, where there are any."""
    groups = gpu_groups()
    return [{"CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} if groups else {} for i in range(jobs)]


def _named_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` names, up to the first that is no name, such as -1: there CUDA stops reading."""
    names = map(str.strip, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    return list(takewhile(re.compile(r"\d+$|GPU-|MIG-").match, names))


def cores() -> int:
    """How many processor cores this process may use: those that the machine, its affinity and its cgroup leave it."""
    import psutil  # like torchvision, not needed for a network of the user's own

    if count := getattr(os, "process_cpu_count", None):  # Python 3.13 and later
        allowed = count()
    else:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(max(1, min(allowed or 1, psutil.cpu_count(logical=False) or math.inf, _quota())))


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores' time the cgroup of this process and those around it leave it, rounded up; infinite if any."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    group = next((root / line[3:].lstrip("/") for line in lines if line.startswith("0::")), root)
    shares = [math.inf]
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            shares.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # no limit there, or "max"
            continue
    return min(shares)


def precision() -> Literal["float32", "bfloat16"]:
    """`bfloat16` where the machine multiplies it natively and clearly faster than float32, else `float32`."""
    return "float32" if _everywhere else _of_machine()


@contextmanager
def in_float32() -> Iterator[None]:
    """A block in which networks compute in float32 on every machine, so that what is printed agrees between them."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


@cache
def _of_machine() -> Literal["float32", "bfloat16"]:
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # not that of a V100 or T4
        return "bfloat16" if native else "float32"
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native and _product_speedup() > CLEARLY else "float32"


def _product_speedup() -> float:
    """The speed of a matrix product in bfloat16 relative to float32; some processors have slow bfloat16 units."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=2, repeat=5))

    return seconds(torch.float32) / seconds(torch.bfloat16)


def autocast() -> torch.autocast:
    """A block that computes matrix products in `precision()` and everything else in float32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision() == "bfloat16")


@contextmanager
def single_thread() -> Iterator[None]:
    """A block in which PyTorch computes on one thread, so that sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def provenance() -> dict[str, Any]:
    """Versions, machine, arithmetic and commit, as a record keeps them."""
    place, commit = device(), ""
    with suppress(OSError):  # there is no git
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__, "machine": platform.machine(), "system": platform.system(),
        "device": torch.cuda.get_device_name() if place.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "precision": precision(), "threads": 1, "commit": commit or "unknown",
    }  # fmt: skip
