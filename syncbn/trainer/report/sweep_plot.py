"""A figure of one metric along a setting, in the house look: numbers on their axis, words side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from syncbn.trainer.report.plots import COLOURS, DASHES, short_name, styled

if TYPE_CHECKING:  # as in plots
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def drawn_along(
    lines: Sequence[Mapping[str, Any]],
    *,
    title: str,
    key: str,
    numbers: Sequence[float] | None = None,
    log: bool = False,
    percent: bool = False,
    width: float = 4.0,
    height: float = 2.6,
) -> "Figure":
    """A figure of one metric along a setting, a line for each mapping, error bars where a spread is known.

    Args:
        lines: of each the values of the setting ("along"), and "means" and "stds" (nan: not known) to go with them.
        key: the setting's name, under its axis.
        numbers: what the values are as numbers, of all lines one after the other; none: they are words.
        log: a logarithmic axis of numbers.
        percent: means are shares of 1, shown in per cent.
        width, height: inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(title=title)
    names = list(dict.fromkeys(value for line in lines for value in line["along"]))
    places = iter(numbers) if numbers else None
    for i, line in enumerate(lines):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        beside = 0.05 * (i - (len(lines) - 1) / 2)  # so that no error bar hides another
        at = [next(places) if places else names.index(value) + beside for value in line["along"]]
        order = sorted(range(len(at)), key=at.__getitem__)
        x, y, spread = ([values[j] for j in order] for values in (at, line["means"], line["stds"]))
        loose = "none" if len(lines) == 1 and not line["name"] and len(set(at)) < len(at) else dash
        style: Any = {"color": colour, "linestyle": loose, "linewidth": 1.4, "marker": "o", "markersize": 3.5}
        axes.errorbar(x, y, yerr=spread, capsize=2.5, elinewidth=1, **style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if numbers is None:
        axes.set_xticks(range(len(names)), [short_name(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        _name_numbers(axes, dict(zip(numbers, (v for line in lines for v in line["along"]), strict=True)), log)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.set_xlabel(key)
    return figure


def _name_numbers(axes: "Axes", names: Mapping[float, str], log: bool) -> None:
    """Tell the axis below its numbers: each that was tried if they are few, else round ones."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    if log:
        axes.set_xscale("log")
    if len(names) <= 8:
        axes.set_xticks(list(names), list(names.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    elif log:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
