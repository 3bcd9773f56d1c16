"""The tables of the benchmarks, and the files in which they are kept."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from comparisons import LABELS, Comparison, Rival, comparisons
from measuring import Taken
from tabulate import tabulate

from kure_lib.files import write_atomically
from kure_lib.networks import device


@dataclass(frozen=True)
class Row:
    """A comparison with one rival: for each time that fresh processes measured, what both sides took."""

    comparison: Comparison
    rival: Rival
    taken: tuple[tuple[Taken, Taken], ...]  # ours, the rival's

    @property
    def rates(self) -> tuple[float, float]:
        """Amount a second, of ours and of the rival, by the median."""
        sides = self.comparison.ours, self.rival.side
        return tuple(side.amount / statistics.median(both[i].seconds for both in self.taken)
                     for i, side in enumerate(sides))  # fmt: skip

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours was, or the multiple of the rival's time that it took, each time."""
        faster = [(self.comparison.ours.amount / ours.seconds) / (self.rival.side.amount / rival.seconds)
                  for ours, rival in self.taken]  # fmt: skip
        return sorted(1 / ratio if self.rival.within else ratio for ratio in faster)

    @property
    def outcome(self) -> str:
        ratio, rival = statistics.median(self.ratios), self.rival
        if rival.faster is None and rival.within is None:
            return ""
        met = ratio >= rival.faster if rival.faster else ratio <= rival.within
        return "met" if met else "not met"

    @property
    def memory(self) -> list[int]:
        """Bytes of ours and of the rival, by the median."""
        return [int(statistics.median(both[i].bytes for both in self.taken)) for i in (0, 1)]

    def cells(self) -> list[str]:
        (ours, rival), unit = self.rates, self.comparison.unit
        return [self.comparison.path, self.rival.words, _quantity(rival, unit), _quantity(ours, unit),
                f"{statistics.median(self.ratios):.3g} ×", _range(self.ratios), self.rival.target, self.outcome,
                " / ".join(f"{each / 2**20:,.0f}" for each in reversed(self.memory))]  # fmt: skip

    def as_json(self) -> dict:
        (ours, rival), unit = self.rates, self.comparison.unit
        return {
            "path": self.comparison.path, "measured_against": self.rival.words, "rival": _quantity(rival, unit),
            "ours": _quantity(ours, unit), "ratios": [round(ratio, 3) for ratio in self.ratios],
            "target": self.rival.target, "outcome": self.outcome,
            "rounds": self.comparison.rounds, "seconds": [[both[1].seconds, both[0].seconds] for both in self.taken],
            "amounts": [self.rival.side.amount, self.comparison.ours.amount], "bytes": self.memory[::-1],
        }  # fmt: skip

    def share(self, limits: dict[str, float]) -> list[float]:
        """What the rival's products and ours take of the machine's product rate, each in its arithmetic."""
        ours, rival = (rate * self.comparison.flops / 1e9 for rate in self.rates)
        usual = "float32" if self.rival.words.startswith("usual") else device.precision()
        return [rival / _product_limit(limits, usual), ours / _product_limit(limits, device.precision())]


def _product_limit(limits: dict[str, float], precision: str) -> float:
    """GFLOP/s of all threads."""
    return max(value for name, value in limits.items() if name.startswith(f"matrix product {precision}"))


def _quantity(rate: float, unit: str) -> str:
    if unit == "images/s":
        return f"{rate:,.0f} images/s"
    return f"{(1000 if unit == 'ms' else 1) / rate:,.3g} {unit}"


def _range(ratios: list[float]) -> str:
    return f"{min(ratios):.3g} – {max(ratios):.3g}"


class Table:
    """What was found under one name, as a page shows it and as a file keeps it."""

    whole: ClassVar[set[str]] = set()
    head: ClassVar[list[str]] = []

    def __init__(self, found: dict, about: dict, limits: dict[str, float]):
        self.found, self.about, self.limits = found, about, limits

    def is_whole(self) -> bool:
        return self.found.keys() == self.whole

    def cells(self) -> list[list[str]]:
        raise NotImplementedError

    def below(self) -> str:
        return ""

    def markdown(self) -> str:
        about = self.about
        machine = (f"{about['cpu']} ({about['capability']}), {about['cores']} cores, {about['precision']}, torch "
                   f"{about['torch']}.")  # fmt: skip
        table = tabulate(self.cells(), self.head, tablefmt="pipe", disable_numparse=True)
        return f"{table}\n\n{machine} {self.below()}\n"

    def content(self) -> dict:
        return {"machine": self.about, "rows": [dict(zip(self.head, line, strict=True)) for line in self.cells()]}


class Speed(Table):
    whole = set(comparisons())
    head = ["path", "measured against", "rival", "ours", "ratio", "range", "target", "", "MiB, rival / ours"]

    def rows(self) -> list[Row]:
        return [row for name in comparisons() for row in self.found.get(name, ())]

    def cells(self) -> list[list[str]]:
        return [row.cells() for row in self.rows()]

    def below(self) -> str:
        bounds = "; ".join(f"{name}: {value:.0f}" for name, value in self.limits.items())
        text = ("Medians, and the range of the ratios, over fresh processes; both sides of a row take turns. Memory is "
                "that of the processes at their peak beside what imports take; a loader's workers do not count.\n"
                f"Limits of the machine in the same run: {bounds}.")  # fmt: skip
        shares = "; ".join(
            f"{row.comparison.path.partition(',')[0]}, {row.rival.words.partition(':')[0].partition(',')[0]} and ours: "
            + " and ".join(f"{share:.0%}" for share in row.share(self.limits))
            for row in self.rows() if row.comparison.flops
        )  # fmt: skip
        return f"{text}\nOf its matrix-product rate the operations of the networks take: {shares}." if shares else text

    def content(self) -> dict:
        rounded = {name: round(value, 1) for name, value in self.limits.items()}
        return {"machine": self.about, "limits": rounded, "rows": [row.as_json() for row in self.rows()]}


METHODS = {
    "kure": "KURE", "gradient_l1": "L1 of the gradient", "range": "range",
    "outliers": "outliers", "entropy": "entropy", "variation": "variation of |w|", "noise": "weight noise",
    "sam": "SAM", "ema": "EMA", "kure_of_activations": "KURE of activations", "dorefa 4/4": "DoReFa 4/4",
    "lsq 4/4": "LSQ 4/4",
}  # fmt: skip


class Methods(Table):
    """By method the times that a step took in multiples of a plain one."""

    whole = set(METHODS)
    head = ["training by", "time of a plain step", "range"]

    def cells(self) -> list[list[str]]:
        return [
            [words, f"{statistics.median(self.found[name]):.2f} ×", _range(self.found[name])]
            for name, words in METHODS.items() if name in self.found
        ]  # fmt: skip

    def below(self) -> str:
        return (
            "ResNet-20, batches of 256, 1 thread; all methods take turns in fresh processes, medians and ranges over "
            "them. A step of SAM takes two gradients, one of the gradient's L1 goes backward twice."
        )


LIMITS = {name: f"a training step of {label}" for name, label in LABELS.items()}
LIMITS |= {"evaluation": "an accuracy of a quantized ResNet-20"}


class Limits(Table):
    """By work the seconds that ours takes, the expert's, and its convolutions and products alone, each time."""

    whole = set(LIMITS)
    head = ["work", "ours", "the expert's", "convolutions and products alone", "of ours", "range",
            "the most that could be gained on the expert's"]  # fmt: skip

    def cells(self) -> list[list[str]]:
        lines = []
        for name, words in LIMITS.items():
            if name in self.found:
                ours, expert, alone = zip(*self.found[name], strict=True)
                shares = [part / whole for part, whole in zip(alone, ours, strict=True)]
                most = statistics.median(theirs / part for theirs, part in zip(expert, alone, strict=True))
                took = [f"{1000 * statistics.median(each):,.0f} ms" for each in (ours, expert, alone)]
                lines.append([words, *took, f"{statistics.median(shares):.0%}",
                              f"{min(shares):.0%} – {max(shares):.0%}", f"{most:.2f} ×"])  # fmt: skip
        return lines

    def below(self) -> str:
        return (
            "One run on one thread, batches of 256 for training and of 1,000 for an accuracy on 10,000 images; the "
            "three take turns in fresh processes. The rest is batch norms, ReLUs, additions, the loss, the optimizer, "
            "the images, and for an accuracy the steps, which the expert's script is given."
        )


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


class Growths(Table):
    whole = set(GROWTH)
    head = ["path", "weights", "time", "a weight", "memory beside the weights", "copies of the weights"]

    def cells(self) -> list[list[str]]:
        return [line for each in self.found.values() for line in each.cells()]

    def below(self) -> str:
        """The exponents, and what the largest size says of a large model."""
        exponents = "; ".join(f"{GROWTH[each.name]}: n^{each.exponent:.2f}" for each in self.found.values())
        ahead = "; ".join(
            f"{GROWTH[each.name]}: {BILLIONS * 1e9 * each.seconds[-1] / each.sizes[-1]:.0f} s"
            for each in self.found.values()
        )
        return (
            "One thread, a fresh process for every size, median of its rounds.\n"
            f"From a million weights on time grows as: {exponents}.\n"
            f"At the rate of the largest size, {BILLIONS} billion weights take one thread: {ahead}."
        )

    def content(self) -> dict:
        grown = [asdict(each) | {"exponent": round(each.exponent, 3)} for each in self.found.values()]
        return {"machine": self.about, "growth": grown}


@dataclass(frozen=True)
class Command:
    """A command of the README in a clone whose environment is installed, and the minutes that it may take."""

    words: str
    options: tuple[str, ...]
    minutes: float | None = None


COMMANDS = {
    "first": Command(
        "the first figures: notebook 01, executed, and its site", ("--only", "01", "--profile", "smoke"), 0.5
    ),
    "study": Command("the study from its records: every notebook, and the site", ("--profile", "study")),
    "smoke": Command("the smoke study, trained and executed from nothing", ("--profile", "smoke")),
    "quick": Command("the quick study, trained and executed from nothing", ("--profile", "quick"), 9),
}


class Commands(Table):
    whole = set(COMMANDS)
    head = ["command", "what it does", "minutes", "target", ""]

    def cells(self) -> list[list[str]]:
        lines = []
        for name, command in COMMANDS.items():
            if name in self.found:
                minutes, most = self.found[name] / 60, command.minutes
                outcome = "" if most is None else "met" if minutes <= most else "not met"
                lines.append([f"`./run_all.sh {' '.join(command.options)}`", command.words, f"{minutes:.1f}",
                              "–" if most is None else f"≤ {most:g}", outcome])  # fmt: skip
        return lines

    def below(self) -> str:
        return "Each once, in a fresh clone whose environment is installed."


TABLES: dict[str, type[Table]] = {
    "benchmarks": Speed, "methods": Methods, "limits": Limits, "growth": Growths, "commands": Commands,
}  # fmt: skip


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
