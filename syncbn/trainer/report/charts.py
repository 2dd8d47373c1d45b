"""What a task gives to look at, drawn in the house look: the same figures in the report and in W&B."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from syncbn.trainer.report.plots import COLOURS, DASHES, FAINT, INK, MISSING, short_name, span, styled
from syncbn.trainer.runs.metric import in_digits
from syncbn.trainer.runs.pictures import Chart, Curves, Matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERED = 20  # rows or columns whose cells have their numbers in them
LETTER = 0.075  # inches wide, on average
LABEL = 0.14  # inches that a row's name is high
IN_A_COLUMN = 25  # names of a legend
MOST_COLOURED = 12  # lines; of more, the ends are, before the others in grey
WIDE = 4.4  # inches, of a chart of lines
ENDS = 3  # highest and lowest of these


def drawn(chart: Chart) -> "Figure":
    """The figure of a chart of any kind."""
    return DRAW[type(chart)](chart)


@styled
def matrix(chart: Matrix) -> "Figure":
    """A cell for each row and column, the darker the more, with its number in it where there is room.

    Where rows or columns are too many for a name each, every second, third, ... is named.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    percent = chart.unit == "%"
    values = [[math.nan if value is None else value for value in row] for row in chart.values]
    low, high = (0.0, 1.0) if percent else span(values)
    rows, columns = [*map(short_name, chart.rows)], [*map(short_name, chart.columns)]
    most = max(len(rows), len(columns))
    numbers = [[_number(value, percent) for value in row] for row in values]
    numbered = most <= MOST_NUMBERED and max(len(number) for row in numbers for number in row) <= 4
    pitch = max(0.26, min(0.6, 3.0 / most)) if numbered else max(0.045, min(0.3, 6.5 / most))  # inches a cell
    beside, below = (LETTER * max(map(len, names)) + 0.45 for names in (rows, columns))
    wide = max(beside + pitch * len(columns) + (0 if numbered else 0.8), 0.11 * len(chart.title) + 0.3)
    figure = Figure(figsize=(wide, 0.4 + pitch * len(rows) + below), layout="constrained")
    figure.suptitle(
        f"{chart.title}, {chart.unit}".removesuffix(", "),
        x=0.01,
        ha="left",
        fontsize=9.5,
        fontweight="bold",
    )
    axes = figure.add_subplot()
    image = axes.imshow(
        values,
        interpolation="none",
        cmap=colormaps["YlGnBu"].with_extremes(bad=MISSING),
        norm=Normalize(low, high),
    )
    every = math.ceil(LABEL / pitch)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    for label in axes.get_xticklabels():
        label.set_rotation(90 if LETTER * len(label.get_text()) + 0.05 > pitch else 0)
    axes.tick_params(length=0, labelsize=8)
    axes.set_ylabel(chart.down)
    axes.set_xlabel(chart.along)
    if not numbered:
        ticks = PercentFormatter(1, symbol="") if percent else None
        bar = figure.colorbar(image, ax=axes, aspect=40, pad=0.02, format=ticks)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return figure
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        dark = values[i][j] > low + 0.55 * (high - low)
        axes.text(j, i, numbers[i][j], ha="center", va="center", fontsize=8, color="white" if dark else INK)
    return figure


@styled
def curves(chart: Curves) -> "Figure":
    """A line for each name, the names below from the highest line to the lowest.

    Of more than MOST_COLOURED lines the highest and the lowest three are coloured, and the others thin and grey.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ranked = sorted(chart.lines, key=lambda name: -_height(chart.lines[name]))
    ends = ranked if len(ranked) <= MOST_COLOURED else [*ranked[:ENDS], *ranked[-ENDS:]]
    labels = [short_name(name) for name in ends]
    columns = min(len(labels), max(1, int(WIDE / (LETTER * max(map(len, labels)) + 0.5))))
    rows = math.ceil(len(labels) / columns) + (len(ranked) > len(ends))
    figure = Figure(figsize=(WIDE, 3.4 + 0.17 * rows), layout="constrained")
    axes = figure.add_subplot(title=f"{chart.title}, {chart.unit}".removesuffix(", "))
    for name in ranked:
        if name not in ends:
            axes.plot(*zip(*chart.lines[name], strict=True), color=MISSING, linewidth=0.7, zorder=1.5)
    for i, (name, label) in enumerate(zip(ends, labels, strict=True)):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]
        axes.plot(*zip(*chart.lines[name], strict=True), color=colour, linestyle=dash, linewidth=1.5, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.along)
    axes.set_ylabel(chart.up)
    if chart.unit == "%":
        axes.set(xlim=(0, 1.01), ylim=(0, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    others = f"the {ENDS} highest and the {ENDS} lowest of {len(ranked)}" if len(ranked) > len(ends) else None
    figure.legend(  # pyright: ignore[reportCallIssue]
        loc="outside lower left",
        ncols=columns,
        title=others,
        alignment="left",
        frameon=False,
        handlelength=1.4,
        columnspacing=1.2,
        labelspacing=0.3,
    )
    return figure


@styled
def legend(colours: Mapping[str, str]) -> "Figure":
    """A square of each colour beside what it means."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [*map(short_name, colours)]
    columns = math.ceil(len(names) / IN_A_COLUMN)
    rows = math.ceil(len(names) / columns)
    width = LETTER * max(map(len, names)) + 0.45
    figure = Figure(figsize=(width * columns + 0.1, 0.2 * rows + 0.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width * columns + 0.1), ylim=(0.2 * rows + 0.05, -0.05))
    for i, (name, colour) in enumerate(zip(names, colours.values(), strict=True)):
        x, y = 0.05 + width * (i // rows), 0.2 * (i % rows)
        axes.add_patch(Rectangle((x, y + 0.02), 0.24, 0.16, facecolor=colour, edgecolor=FAINT))
        axes.text(x + 0.32, y + 0.1, name, va="center", fontsize=8.5)
    return figure


def _height(points: Sequence[Sequence[float]]) -> float:
    """The mean height of a line, by which lines are ranked."""
    return mean(y for _, y in points)


def _number(value: float, percent: bool) -> str:
    if math.isnan(value):
        return ""
    if percent:
        return f"{100 * value:.0f}" if value >= 0.005 else ""
    return in_digits(value, 2)


DRAW: Mapping[type[Chart], Callable[[Any], "Figure"]] = {Matrix: matrix, Curves: curves}
