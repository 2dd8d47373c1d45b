"""A record is a JSON line: a row of figures, how they were measured, on what, and when.

benchmark, table    the benchmark's name, and which of its tables this is a row of
parameters          the options of the command
case                what this row is of: a shape, a norm, a number of ranks
figures             name to a number, a text, {low, median, high, n} of quartiles or {mean, std, n}; null: none
steal               the share of the cores that other guests of the host took meanwhile
hardware, versions, commit, date
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import machine

Record = dict[str, Any]


class Spread(NamedTuple):
    """The median of n values and their quartiles."""

    low: float
    median: float
    high: float
    n: int


class Mean(NamedTuple):
    """The mean of n values and their standard deviation, None of one value."""

    mean: float
    std: float | None
    n: int


class Result(NamedTuple):
    """A row of a table, of which all rows have the same keys."""

    table: str
    case: dict[str, Any]
    figures: dict[str, Any]


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Spread(low, median, high, len(values))


def mean(values: Iterable[float]) -> Mean | None:
    """None of no value at all."""
    values = list(values)
    if not values:
        return None
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def records(benchmark: str, parameters: argparse.Namespace, results: Iterable[Result]) -> Iterator[Record]:
    """A record of each result, as it comes."""
    options = {name: value for name, value in vars(parameters).items() if name != "json"}
    ticks = machine.stolen()
    for table, case, figures in results:
        yield plain(
            {
                "benchmark": benchmark,
                "table": table,
                "parameters": options,
                "case": case,
                "figures": figures,
                "steal": round(machine.stolen(ticks), 3),
                **machine.fields(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )


def plain(value: Any) -> Any:
    """As JSON will give it back."""
    if isinstance(value, Spread | Mean):
        return value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def kept(rows: Iterable[Record], file: Path | None) -> Iterator[Record]:
    """The same records, each appended to the file."""
    for row in rows:
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        yield row


def read(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]
