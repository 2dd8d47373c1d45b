"""Figures in one house look: a heat map, and curves over steps. Drawn without pyplot, so that nothing is global."""

import functools
import io
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:  # matplotlib takes half a second: it is imported where the first figure is made
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from PIL.Image import Image

P = ParamSpec("P")
R = TypeVar("R")

ONE_AT_A_TIME = threading.RLock()  # matplotlib's style is one for all threads, and W&B's thread draws too

COLOURS = ("#1f6f9f", "#d1693c", "#3a8f5c", "#8a5fa8", "#b8902a", "#c2557f", "#4f6d7a", "#7a4b2e")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # once the colours are used up
INK, FAINT, MISSING = "#33383d", "#d9dcdf", "#c9ccd0"
PX_PER_PT = 96 / 72

MOST_COLUMNS = 100  # of a heat map; more are put together
MOST_POINTS = 120  # of a curve; more are averaged
NAME_LENGTH = 26  # letters of a row's name

STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.parse_math": False,  # a run's name may hold a $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "syncbn",  # the same ids in every run
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """draw, in the house style, and matplotlib's own again after it."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with ONE_AT_A_TIME, matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[int],
    *,
    title: str,
    unit: str,
    along: str = "step",
    worst: str = "high",
    limits: tuple[float, float] | None = None,
    log: bool = False,
    width: float = 4.0,
) -> "Figure":
    """A figure with one cell for each row and column, the darker the worse, grey where nothing is known.

    More than 100 columns are put together, and each then shows the worst of its own, which its axis says.
    Rows too many for a name each are named at every second, third, ... row.

    Args:
        values: [rows][columns]; nan: not known.
        rows: names from top to bottom, such as layers.
        columns: numbers that rise from left to right, such as steps or ranks.
        unit: what a cell's number is, beside the colour bar.
        along: what a column is.
        worst: "high" or "low": which end of the numbers is drawn dark.
        limits: lowest and highest number told apart by colour; none: those of values.
        log: a logarithmic scale of colours; numbers of 0 and less are grey then.
        width: inches; the height follows from the rows.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    values, columns, together = _put_together(values, columns, max if worst == "high" else min)
    low, high = limits or span(values, positive=log)
    pitch = min(0.24, max(0.05, 7.5 / max(len(rows), 1)))  # inches a row
    figure = Figure(figsize=(width, 0.85 + max(pitch * len(rows), 0.6)), layout="constrained")
    axes = figure.add_subplot(title=title)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="none",
        cmap=_colours(worst),
        norm=LogNorm(low, high, clip=True) if log else Normalize(low, high),
    )
    every = math.ceil(0.13 / pitch)
    axes.set_yticks(range(0, len(rows), every), [short_name(name) for name in rows[::every]])
    axes.tick_params("y", length=0, labelsize=8)
    ticks = _spread(columns, most=int(1.4 * width))
    axes.set_xticks(ticks, [f"{columns[i]}" for i in ticks])
    note = f" (each column: the {'highest' if worst == 'high' else 'lowest'} of {together})" if together > 1 else ""
    axes.set_xlabel(along + note)
    lowest, highest = span(values, positive=log)
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = beyond.get((lowest < low, highest > high), "neither")
    bar = figure.colorbar(
        image, ax=axes, aspect=6 * figure.get_figheight(), pad=0.02, extend=extend or "neither", label=unit
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if log:
        _few_log_ticks(bar, low, high)
    return figure


@styled
def curves(
    lines: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    unit: str = "",
    percent: bool = False,
    from_zero: bool = False,
    legend: bool = True,
    width: float = 4.0,
    height: float = 2.5,
) -> "Figure":
    """A figure of one metric against the step, a line for each name.

    A line of more than 120 points is drawn as means over neighbours, with the points themselves faint behind up to
    three lines. Numbers that are not finite leave a gap.

    Args:
        lines: {name: {step: value}}; an empty one keeps its colour for the next figure.
        percent: values are shares of 1, shown in per cent.
        from_zero: the axis of values begins at 0.
        legend: names in the figure; where figures stand together, one legend beside them is enough.
        width, height: inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(title=title)
    for i, (name, points) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        steps, values = list(points), [v if math.isfinite(v) else math.nan for v in points.values()]
        if len(steps) > MOST_POINTS and len(lines) <= 3:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.6)
        steps, values = _averaged(steps, values)
        dots = "o" if len(steps) <= 30 else None
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.4, marker=dots, markersize=2.5, label=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    if legend and len(lines) > 1:
        if len(title + "".join(lines)) < 9 * width:  # room beside the title
            beside: Any = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": len(lines)}
            axes.legend(**beside, frameon=False, handlelength=1.4)
        else:
            figure.legend(loc="outside lower left", frameon=False, handlelength=1.4)  # pyright: ignore
    return figure


@styled
def picture(figure: "Figure") -> "Image":
    """The figure in pixels, as those take it who know no figures."""
    import PIL.Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return PIL.Image.open(file)


@styled
def svg(figure: "Figure", prefix: str) -> str:
    """The figure as an <svg> element to stand in an HTML page, the same bytes each time.

    Text stays text, and every id begins with the prefix, so that several may stand on one page.
    """
    file = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=none, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r'(<\w+) id="([^"]+)"', lambda m: m[0] if m[2] in used else m[1], text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    wide, high = (round(inches * 72 * PX_PER_PT) for inches in figure.get_size_inches())
    sized = f'<svg width="{wide}" height="{high}"'
    return re.sub(r"^<svg|(?<= )(?:width|height)=\"[\d.]+pt\" ?", lambda m: sized if m[0] == "<svg" else "", text)


def span(values: Iterable[Iterable[float]], *, positive: bool = False) -> tuple[float, float]:
    """The lowest and the highest finite number, a little apart if they are one; up to 1 if there is none.

    positive: of the numbers above 0 alone, and of the six highest decades.
    """
    finite = [v for row in values for v in row if math.isfinite(v) and (v > 0 or not positive)]
    if not finite:
        return (0.1, 1.0) if positive else (0.0, 1.0)
    low, high = min(finite), max(finite)
    if positive:
        low = max(low, high / 1e6)  # on a scale of more decades nothing else can be told apart
    return (low, high) if low < high else (low, low + (abs(low) * 0.1 or 1.0))


def _colours(worst: str) -> "Colormap":
    from matplotlib import colormaps

    return colormaps["YlGnBu" if worst == "high" else "YlGnBu_r"].with_extremes(bad=MISSING)


def _few_log_ticks(bar: "Colorbar", low: float, high: float) -> None:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1, 2, 5) if len(exponents) <= 4 else (1,)
    ticks = [m * 10.0**e for e in exponents for m in marks if low <= m * 10.0**e <= high] or [low, high]
    bar.set_ticks(ticks, labels=[f"{tick:,.0f}" if 1 <= tick < 1e6 else f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()


def _put_together(
    values: Sequence[Sequence[float]], columns: Sequence[int], keep: Callable[[Iterable[float]], float]
) -> tuple[list[list[float]], list[int], int]:
    """At most MOST_COLUMNS columns, each the worst of so many neighbours and named by the last of them."""
    together = _round(len(columns) / MOST_COLUMNS)
    starts = range(0, len(columns), together)

    def worst(part: Sequence[float]) -> float:
        finite = [v for v in part if math.isfinite(v)]
        return keep(finite) if finite else math.nan

    kept = [[worst(row[i : i + together]) for i in starts] for row in values]
    return kept, [columns[min(i + together, len(columns)) - 1] for i in starts], together


def _averaged(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS points, each the mean of so many neighbours."""
    together = max(1, math.ceil(len(steps) / MOST_POINTS))
    starts = range(0, len(steps), together)
    parts = [values[i : i + together] for i in starts]
    return [steps[min(i + together, len(steps)) - 1] for i in starts], [sum(part) / len(part) for part in parts]


def _spread(columns: Sequence[int], most: int) -> list[int]:
    """Indices of the columns to name: evenly apart, so that round numbers meet where there are some."""
    every = _round(len(columns) / most)
    first = 0 if columns and columns[0] == 0 else every - 1
    return list(range(first, len(columns), every))


def _round(number: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, ... that is not less."""
    return next(n for e in range(20) for n in (10**e, 2 * 10**e, 5 * 10**e) if number <= n)


def short_name(name: str) -> str:
    """A long name without its middle: both ends tell a layer."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
