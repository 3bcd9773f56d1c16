"""The device on which networks run, the arithmetic they run in, and what a record says of both."""

import platform
import subprocess
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from kure_lib.paths import ROOT

CLEARLY = 1.3  # times as fast: what bfloat16 must be to be worth its rounding


def device() -> torch.device:
    """The first GPU that PyTorch sees, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def precision() -> Literal["float32", "bfloat16"]:
    """`bfloat16` where the machine multiplies it natively and clearly faster than float32, else `float32`."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native and _product_speedup(torch.bfloat16) > CLEARLY else "float32"


def _product_speedup(dtype: torch.dtype, size: int = 512, rounds: int = 5) -> float:
    """The speed of a matrix product relative to float32; some processors have slow bfloat16 units."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=2, repeat=rounds))

    return seconds(torch.float32) / seconds(dtype)


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
    import torchvision  # which a network of the user's own does not need

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    place = device()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "numpy": np.__version__, "machine": platform.machine(), "system": platform.system(),
        "device": torch.cuda.get_device_name() if place.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "precision": precision(), "threads": 1, "commit": git.stdout.strip() or "unknown",
    }  # fmt: skip
