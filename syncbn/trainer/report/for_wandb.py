"""What W&B is given of a report: its heat maps, as pictures and as tables, and the charts of each evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from syncbn.trainer.report import charts, plots
from syncbn.trainer.report.page import heat_maps
from syncbn.trainer.runs.pictures import Pictures
from syncbn.trainer.runs.reader import read_run

Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""By name: the names of columns, and rows."""


def maps_of(folder: Path) -> tuple[dict[str, Any], Tables]:
    """Pictures and tables of the heat maps of the run in a folder, by the names that W&B is to have for them."""
    pictures, tables = {}, {}
    for name, (grid, figure) in heat_maps(read_run(folder)).items():
        pictures[f"drift/map_{name}"] = plots.picture(figure)
        tables[f"drift/by_{name}"] = (["layer", grid.along, name], grid.cells())
    return pictures, tables


def drawings_of(pictures: Pictures) -> dict[str, Callable[[], Any]]:
    """What draws the charts of an evaluation and the legend of its pictures, by the names that W&B is to have."""
    drawings: dict[str, Callable[[], Any]] = {
        f"eval/{chart.title.replace(' ', '_')}": lambda chart=chart: plots.picture(charts.drawn(chart))
        for chart in pictures.charts
    }
    if pictures.legend:
        drawings["eval/legend"] = lambda: plots.picture(charts.legend(pictures.legend))
    return drawings
