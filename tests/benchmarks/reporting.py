"""Targets, the rows that are held against them, and the files in which a run of the benchmarks is kept."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from kure_lib.files import write_atomically
from kure_lib.networks import device

RESNET = 4 if device.precision() == "bfloat16" else 2  # times faster


@dataclass(frozen=True)
class Target:
    """What is measured against what, and the ratio that is wanted.

    Either ours is `faster` by at least that factor, or it takes `within` that multiple of the other's time.
    `unit` is how both are shown: `images/s`, `ms` or `s`.
    """

    path: str
    rival: str
    unit: str
    faster: float | None = None
    within: float | None = None

    def __str__(self) -> str:
        return f"≥ {self.faster:g} × faster" if self.faster else f"≤ {self.within:g} × the time"


KURE = "KURE term of ResNet-18 (19 layers, 11.2 M weights), forward and backward, 1 thread"
STEP = "ResNet-20 training step with KURE, batch 256, 1 thread"
MSE = "MSE-optimal step of 2.4 M weights, 2, 3, 4, 5, 6 and 8 bits, 1 thread"
TWO_RUNS = "training {}, batch 256: two runs at once, 1 thread each, together"
ONE_RUN = "training {}, batch 256: one run, all threads"
VARIANTS = "accuracy of 24 quantized variants of a ResNet-20, 10,000 images, all threads"
SCRIPT = "float32, torchvision transforms in a `DataLoader` with 2 workers, plain net, all threads"
COPIES = "`deepcopy`, quantize in place (steps given), `DataLoader`, float32; 2 timed, × 12"

TARGETS = {
    "kure": Target(KURE, "autograd of `(((w - w.mean()) / w.std()) ** 4).mean()`, 1 thread", "ms", faster=6),
    "kure_memory": Target(KURE, "1.5 copies of the weights: two reads, one write", "ms", within=3),
    "kure_step": Target(STEP, "the step without it", "ms", within=1.03),
    "mse_step": Target(MSE, "200 steps tried by quantizing, 1 thread", "ms", faster=100),
    "resnet20": Target(TWO_RUNS.format("ResNet-20"), SCRIPT, "images/s", faster=RESNET),
    "resnet20_alone": Target(ONE_RUN.format("ResNet-20"), SCRIPT, "images/s", faster=RESNET),
    "mobilenet_v2_050": Target(TWO_RUNS.format("MobileNet-V2 0.5"), SCRIPT, "images/s", faster=3),
    "mobilenet_v2_050_alone": Target(ONE_RUN.format("MobileNet-V2 0.5"), SCRIPT, "images/s", faster=3),
    "variants": Target(VARIANTS, COPIES, "s", faster=5),
}


GROWTH = {
    "kure": "KURE term of one tensor, forward and backward",
    "steps": "steps of least squared error of one tensor at 2, 3, 4, 5, 6 and 8 bits",
}


BILLIONS = 7  # weights of a language model that people run at home


@dataclass(frozen=True)
class Growth:
    """How time, and memory beside the weights, grow with the number of weights, one thread in a fresh process each."""

    name: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]

    @property
    def exponent(self) -> float:
        """That of the time, fitted over the sizes from a million on, where a call's own cost no longer counts."""
        large = [(math.log(n), math.log(t)) for n, t in zip(self.sizes, self.seconds, strict=True) if n >= 10**6]
        return statistics.linear_regression(*zip(*large, strict=True)).slope

    def cells(self) -> list[list[str]]:
        return [
            [GROWTH[self.name], f"{n:,}", f"{1000 * t:,.3g} ms", f"{1e9 * t / n:.2f} ns",
             f"{max(b, 0) / 2**20:,.0f} MiB", f"{b / (4 * n):.1f}" if n >= 10**6 else "–"]
            for n, t, b in zip(self.sizes, self.seconds, self.bytes, strict=True)
        ]  # fmt: skip


def growth_markdown(grown: list[Growth], about: dict) -> str:
    """The table of all sizes and, under it, the exponents and what the largest size says of a large model."""
    head = ["path", "weights", "time", "a weight", "memory beside the weights", "copies of the weights"]
    table = tabulate([line for each in grown for line in each.cells()], head, tablefmt="pipe", disable_numparse=True)
    exponents = "; ".join(f"{GROWTH[each.name]}: n^{each.exponent:.2f}" for each in grown)
    ahead = "; ".join(
        f"{GROWTH[each.name]}: {BILLIONS * 1e9 * each.seconds[-1] / each.sizes[-1]:.0f} s" for each in grown
    )
    return (
        f"{table}\n\n{about['cpu']}, torch {about['torch']}; one thread, a fresh process for every size, median of its "
        f"rounds.\nFrom a million weights on time grows as: {exponents}.\n"
        f"At the rate of the largest size, {BILLIONS} billion weights take one thread: {ahead}.\n"
    )


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of each round of both sides, and how much was done in a round by each.

    The amount is in images for `images/s`, and a multiple of the work named in the target otherwise; `flops` are
    the operations of a network's matrix products in one unit of it.
    """

    name: str
    rival_seconds: tuple[float, ...]
    ours_seconds: tuple[float, ...]
    rival_amount: float
    ours_amount: float
    flops: float | None = None

    @property
    def target(self) -> Target:
        return TARGETS[self.name]

    @property
    def rates(self) -> tuple[float, float]:
        """Amount a second, of the rival and of ours, from the median round."""
        return (self.rival_amount / statistics.median(self.rival_seconds),
                self.ours_amount / statistics.median(self.ours_seconds))  # fmt: skip

    @property
    def ratio(self) -> float:
        rival, ours = self.rates
        return ours / rival if self.target.faster else rival / ours

    @property
    def met(self) -> bool:
        return self.ratio >= self.target.faster if self.target.faster else self.ratio <= self.target.within

    def cells(self) -> list[str]:
        rival, ours = (_quantity(rate, self.target.unit) for rate in self.rates)
        digits = 2 if self.target.within else 1
        outcome = "met" if self.met else "not met"
        ratio = f"{self.ratio:.{digits}f} ×"
        return [self.target.path, self.target.rival, rival, ours, ratio, str(self.target), outcome]

    def as_json(self) -> dict:
        target, (rival, ours) = self.target, self.rates
        return {
            "name": self.name, "path": target.path, "measured_against": target.rival,
            "rival": _quantity(rival, target.unit), "ours": _quantity(ours, target.unit),
            "ratio": round(self.ratio, 3), "target": str(target), "met": self.met,
            "rounds": len(self.ours_seconds),
            "rival_median_seconds": round(statistics.median(self.rival_seconds), 6),
            "rival_work_in_a_round": self.rival_amount,
            "ours_median_seconds": round(statistics.median(self.ours_seconds), 6),
            "ours_work_in_a_round": self.ours_amount,
        }  # fmt: skip

    def shares(self, limits: dict[str, float]) -> str:
        """What of the machine's matrix-product rate the two sides use, and what the target asks for."""
        (rival, ours), (wide, fast) = self.rates, _product_limits(limits)
        used, uses = (rate * self.flops / 1e9 / limit for rate, limit in ((rival, wide), (ours, fast)))
        wanted = uses * self.target.faster / self.ratio
        return f"{self.target.path}: {used:.0%}, {uses:.0%}, {wanted:.0%}"


def _product_limits(limits: dict[str, float]) -> list[float]:
    """GFLOP/s of all threads, in float32 and in the arithmetic of the library."""
    names = [f"matrix product {dtype}, GFLOP/s" for dtype in ("float32", device.precision())]
    return [max(value for key, value in limits.items() if key.startswith(name)) for name in names]


def _quantity(rate: float, unit: str) -> str:
    if unit == "images/s":
        return f"{rate:,.0f} images/s"
    return f"{(1000 if unit == 'ms' else 1) / rate:,.3g} {unit}"


def markdown(rows: list[Row], about: dict, limits: dict[str, float]) -> str:
    """The table of rows and, under it, the machine and its limits."""
    head = ["path", "measured against", "rival", "ours", "ratio", "target", ""]
    table = tabulate([row.cells() for row in rows], head, tablefmt="pipe", disable_numparse=True)
    bounds = "; ".join(f"{name}: {value:.0f}" for name, value in limits.items())
    shares = "; ".join(row.shares(limits) for row in rows if row.flops)
    return (
        f"{table}\n\n{about['cpu']}, {about['cores']} cores, {about['precision']}, torch {about['torch']}. "
        "Both sides of a row take turns in one run; medians of all rounds.\n"
        f"Limits of the machine in the same run: {bounds}.\n"
        + (
            f"Of its matrix-product rate (float32; {about['precision']}), the operations of the networks take, by the "
            f"rival, by ours, and if the target were met: {shares}.\n"
            if shares
            else ""
        )
    )


def content(rows: list[Row], about: dict, limits: dict[str, float]) -> dict:
    rounded = {name: round(value, 1) for name, value in limits.items()}
    return {"machine": about, "limits": rounded, "rows": [row.as_json() for row in rows]}


def growth_content(grown: list[Growth], about: dict) -> dict:
    return {"machine": about, "growth": [asdict(each) | {"exponent": round(each.exponent, 3)} for each in grown]}


def save(stem: Path, content: dict, text: str) -> None:
    """Write `<stem>.json` and `<stem>.md`."""
    write_atomically(stem.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_atomically(stem.with_suffix(".md"), text)


def update_page(path: Path, name: str, text: str) -> bool:
    """Put a text between its two markers in a page; False if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, began, rest = content.partition(begin)
    _, ended, after = rest.partition(end)
    if not (began and ended):
        return False
    write_atomically(path, f"{before}{begin}\n{text.strip()}\n{end}{after}")
    return True
