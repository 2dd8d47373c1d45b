"""The Markdown tables of records: `python -m benchmarks table FILE ...` prints those of files that --json has made.

A median has its quartiles in brackets, and its number of values in column n; a mean its standard deviation behind ±.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, records
from benchmarks.measure.records import Record


def lines(rows: Iterable[Record]) -> Iterator[str]:
    """Markdown, a line at a time as rows come; a table ends where rows have another title or other columns."""
    current, widths = None, []
    for row in rows:
        cells = {**row["case"], **row["figures"]}
        texts = [text_of(value) for value in cells.values()]
        columns = list(cells)
        if counts := sorted({value["n"] for value in cells.values() if isinstance(value, dict) and "median" in value}):
            columns.append("n")
            texts.append(", ".join(map(str, counts)))
        key = row["benchmark"], row["table"], columns
        if key != current:
            current, widths = key, [max(map(len, pair)) for pair in zip(columns, texts, strict=True)]
            yield f"\n{row['table']}\n"
            yield line(columns, widths)
            yield line(["-" * width for width in widths], widths)
        yield line(texts, widths)


def line(texts: list[str], widths: list[int]) -> str:
    return "| " + " | ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)) + " |"


def text_of(value: Any) -> str:
    """A cell."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}".replace(",", " ")
        case float():
            return number(value)
        case {"median": median, "low": low, "high": high}:
            return f"{number(median, '#')} ({number(low, '#')} {number(high, '#')})"
        case {"mean": mean, "std": std}:
            return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f} (n = {value['n']})"
        case list():
            return " × ".join(map(str, value)) if is_shape(value) else " ".join(map(text_of, value))
    return str(value).replace("|", "\\|")


def is_shape(value: list[Any]) -> bool:
    return all(isinstance(each, int) for each in value)


def number(value: float, kind: str = "") -> str:
    """Four digits, and all of those before the point; of kind "#" zeros at the end too."""
    if math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:{kind}.4g}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON lines")


def show(options: argparse.Namespace) -> None:
    """Print each machine with its tables."""
    rows = [row for file in options.files for row in records.read(file)]
    for measured_on, alike in itertools.groupby(rows, lambda row: machine.described(row["hardware"], row["versions"])):
        print(f"{measured_on}\n", *lines(alike), "", sep="\n")
