"""What `make gpu` has measured, as the table of RESULTS.md: `python -m benchmarks gpu [gpu-results]`.

FOLDER/results.jsonl has the records of each step, and behind them one of the step itself: its exit code and seconds. Of
a step that was run again the last counts. What no record holds is "not yet measured".
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import machine, records, tables
from benchmarks.measure.records import Record
from benchmarks.operator.op_gpu import LARGE_MB, WANTED_OF_COPY, WANTED_OF_TORCH

UNKNOWN = "not yet measured"
OURS = ("syncbn", "fused", "syncbn graph", "fused graph", "syncbn compile")


class Step(NamedTuple):
    """outcome: exit code, seconds and limit_s; rows: the records that came before it."""

    outcome: dict[str, int]
    rows: list[Record]


class Row(NamedTuple):
    """A figure of one step's, what is wanted of it, and how it is read out of the step's records."""

    step: str
    figure: str
    wanted: str
    read: Callable[[list[Record]], str | None]


def read(file: Path) -> dict[str, Step]:
    """The last run of each step, in the order in which steps first came."""
    steps: dict[str, Step] = {}
    rows: list[Record] = []
    for row in records.read(file):
        if row["benchmark"] == "gpu":
            steps[row["case"]["step"]] = Step(row["figures"], rows)
            rows = []
        else:
            rows.append(row)
    return steps


def extent(values: Iterable[float]) -> str | None:
    """The least and the most."""
    ordered = sorted(values)
    if not ordered:
        return None
    return f"{ordered[0]:.2f}" if len(ordered) == 1 else f"{ordered[0]:.2f} to {ordered[-1]:.2f} (n = {len(ordered)})"


def of_a_pass(name: str) -> Callable[[list[Record]], str | None]:
    def shares(rows: list[Record]) -> str | None:
        wide = figures(rows, "passes", **{"pass": name, "narrow": False})
        return extent(row["of copy"] for case, row in wide if case["MB"] > LARGE_MB)

    return shares


def narrow(rows: list[Record]) -> str | None:
    return extent(row["of copy"] for case, row in figures(rows, "passes", narrow=True) if case["pass"] != "images")


def of_copy(rows: list[Record]) -> str | None:
    ours = figures(rows, "operator", contestant="syncbn")
    return extent(row["of copy"] for case, row in ours if case["MB"] > LARGE_MB and row["of copy"])


def torch_over_ours(rows: list[Record]) -> str | None:
    theirs = figures(rows, "operator", contestant="torch")
    return extent(row["of syncbn"]["median"] for case, row in theirs if case["chain"] in WANTED_OF_TORCH)


def layer(table: str) -> Callable[[list[Record]], str | None]:
    def ratio(rows: list[Record]) -> str | None:
        ours = [row["of torch"] for _, row in figures(rows, table, kind="syncbn")]
        return f"{ours[-1]['median']:.2f}" if ours and ours[-1] else None

    return ratio


def at_32_images(name: str, contestants: Sequence[str], digits: int) -> Callable[[list[Record]], str | None]:
    """A figure of each contestant's step."""

    def listed(rows: list[Record]) -> str | None:
        values = {case["contestant"]: row[name] for case, row in figures(rows, "step", images=32)}
        present = ((one, values[one]) for one in contestants if values.get(one) is not None)
        return ", ".join(f"{one} {median(value):.{digits}f}" for one, value in present) or None

    return listed


def drift(rows: list[Record]) -> str | None:
    ratios = [row["figures"].get("of off") for row in rows if row["case"].get("level") == "image"]
    return f"{ratios[-1]['median']:.3f}" if ratios and ratios[-1] else None


def median(value: Any) -> float:
    return value["median"] if isinstance(value, dict) else value


ROWS = [
    *(Row("smoke", f"{name}, tensors > {LARGE_MB} MB: share of a copy's bandwidth", "-", of_a_pass(name))
      for name in ("moments", "normalize", "grad_sums", "grad_input")),
    Row("smoke", "the same where C or S is not divisible by 8", "-", narrow),
    Row("op", f"forward + backward, tensors > {LARGE_MB} MB: share of a copy's bandwidth on 8, 8, 10 passes",
        f"at least {WANTED_OF_COPY}", of_copy),
    Row("op", "torch.nn.SyncBatchNorm + ReLU, and + add + ReLU, over ours", "at least 1.5", torch_over_ours),
    Row("step", "host time of a layer, tiny tensors, of torch.nn.SyncBatchNorm's", "at most 0.6",
        layer("host, tiny tensors")),
    Row("step", "a layer at 8 images, eager, of torch.nn.SyncBatchNorm's time", "at most 0.6",
        layer("layer, 8 images")),
    Row("step", "host waits in a step", "0", at_32_images("waits", OURS, 0)),
    Row("step", "kernels in a step", "-", at_32_images("kernels", ("local", "torch", *OURS), 0)),
    Row("step", "32 images: step of local batch norm, with fusion or as a graph", "at most 1.03",
        at_32_images("of local", ("fused", "syncbn graph", "fused graph"), 3)),
    Row("step", "32 images: step of torch.nn.SyncBatchNorm over ours", "at least 1.15",
        at_32_images("torch over it", ("syncbn", "fused"), 3)),
    Row("step", "32 images: peak memory, MiB", "below torch's",
        at_32_images("memory_mib", ("torch", "syncbn", "fused"), 0)),
    Row("drift", "a step of ResNet-50 with drift at level image, of one without", "at most 1.02", drift),
]  # fmt: skip


def figures(rows: list[Record], table: str, **case: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Case and figures of a table's rows, of those in which the case has these values."""
    right = [row for row in rows if row["table"] == table and case.items() <= row["case"].items()]
    return [(row["case"], row["figures"]) for row in right]


def results(steps: dict[str, Step]) -> str:
    """RESULTS.md's table."""
    rows = []
    for step, figure, wanted, value_of in ROWS:
        value = value_of(steps[step].rows) if step in steps else None
        case = {"step": step, "figure": figure, "wanted": wanted}
        rows.append({"benchmark": "gpu", "table": "make gpu", "case": case, "figures": {"found": value or UNKNOWN}})
    return "\n".join(tables.lines(rows))


def summary(steps: dict[str, Step], folder: Path) -> str:
    """What became of each step, with the last line of its log where it failed."""
    lines = []
    for name, (outcome, _) in steps.items():
        log = folder / f"{name}.log"
        said = log.read_text().strip().splitlines()[-1:] if log.exists() else []
        became = {0: "ok", 124: "OUT OF TIME", 137: "OUT OF TIME"}.get(outcome["code"], f"FAILED ({outcome['code']})")
        took = f"{outcome['seconds']:4} s of {outcome['limit_s']:3} s"
        lines.append(f"{name:<8}{became:<14}{took}  {''.join(said)[:80]}".rstrip())
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-results"))


def show(options: argparse.Namespace) -> None:
    file = options.folder / "results.jsonl"
    if not file.exists():
        sys.exit(f"{file} is not there: `make gpu` makes it")
    steps = read(file)
    machines = [machine.described(row["hardware"], row["versions"]) for row in records.read(file)[:1]]
    print(*machines, results(steps), summary(steps, options.folder), f"logs: {options.folder}/", sep="\n\n")
