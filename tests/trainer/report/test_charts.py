"""Charts that a task makes of its sums, as they are drawn."""

import pytest

from syncbn.trainer.report import charts, plots
from syncbn.trainer.report.for_wandb import drawings_of
from syncbn.trainer.runs.pictures import KINDS, Curves, Matrix, Pictures
from tests.trainer.report.drawn import brightness, texts


def confusion(classes, **options):
    names = [f"class {i}" for i in range(classes)]
    values = [[0.75 if i == j else 0.25 / (classes - 1) for j in range(classes)] for i in range(classes)]
    given = {"title": "confusion", "values": values, "unit": "%", "down": "truth", "along": "taken for"}
    return Matrix(rows=names, columns=names, **{**given, **options})


def precision(classes, **options):
    """Of class i, the higher the greater i."""
    lines = {f"class {i}": [(0, 1), (1, (i + 1) / classes)] for i in range(classes)}
    return Curves("p r", lines, "recall", "precision", **options)


def coloured(figure):
    """The names of the lines that have a colour, with it and the dash, and the number of grey ones."""
    by_name = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    named = {name: look for name, look in by_name.items() if not name.startswith("_")}
    return named, sum(line.get_color() == plots.MISSING for line in figure.axes[0].lines)


def test_each_kind_of_chart_is_drawn():
    assert charts.DRAW.keys() == set(KINDS.values())


def test_a_matrix_is_the_darker_the_more_and_grey_where_nothing_is_known():
    figure = charts.drawn(Matrix("m", ["a", "b"], ["c", "d"], [[0.0, 0.5], [1.0, None]], "%"))
    bright = brightness(figure)
    assert bright[0][0] > bright[0][1] > bright[1][0]
    image = figure.axes[0].images[0]
    red, green, blue, _ = image.to_rgba(image.get_array())[1][1]
    assert max(red, green, blue) - min(red, green, blue) < 0.05
    assert sorted(texts(figure)) == ["100", "50", "a", "b", "c", "d", "m, %"]


@pytest.mark.parametrize(
    ("classes", "named", "numbered"), [(2, 2, 2), (11, 11, 11), (19, 19, 19), (21, 21, 0), (150, 38, 0)]
)
def test_names_and_numbers_stand_as_far_as_there_is_room(classes, named, numbered):
    shown = texts(charts.drawn(confusion(classes)))
    assert len([text for text in shown if text.startswith("class")]) == 2 * named
    assert {"confusion, %", "truth", "taken for"} <= {*shown}
    assert shown.count("75") == numbered


def test_numbers_too_long_for_a_cell_are_told_by_a_scale_of_colours():
    figure = charts.drawn(confusion(3, values=3 * [[1e5, 2e5, 12345.0]], unit="px"))
    assert figure.axes[0].images[0].get_clim() == (12345.0, 2e5)
    assert "12,345" not in texts(figure)
    assert len(figure.axes) == 2


@pytest.mark.parametrize("classes", [1, 2, 8, 12])
def test_a_line_of_each_name_has_a_look_of_its_own(classes):
    figure = charts.drawn(precision(classes, unit="%"))
    named, grey = coloured(figure)
    assert [*named] == [f"class {i}" for i in reversed(range(classes))]  # from the highest
    assert len(set(map(str, named.values()))) == classes
    assert grey == 0
    shown = texts(figure)
    assert {"p r, %", "recall", "precision", *named} <= {*shown}
    assert shown.count("100") == 2  # per cent on both axes


def test_of_many_lines_the_highest_and_the_lowest_are_named():
    figure = charts.drawn(precision(80))
    named, grey = coloured(figure)
    assert [*named] == [f"class {i}" for i in (79, 78, 77, 2, 1, 0)]
    assert grey == 74
    assert "the 3 highest and the 3 lowest of 80" in texts(figure)
    assert plots.svg(figure, "a") == plots.svg(charts.drawn(precision(80)), "a")


def test_lines_are_where_their_points_are():
    (line,) = charts.drawn(Curves("c", {"a": [[0.0, 5.0], [2.0, -1.0]]})).axes[0].lines
    assert line.get_xydata().tolist() == [[0.0, 5.0], [2.0, -1.0]]


def test_a_legend_has_each_colour_beside_its_meaning():
    colours = {f"class {i}": f"#0000{i:02x}" for i in range(150)}
    figure = charts.legend(colours)
    assert texts(figure) == [*colours]
    squares = figure.axes[0].patches
    assert [square.get_facecolor()[2] for square in squares] == [pytest.approx(i / 255) for i in range(150)]


def test_wandb_is_given_the_same_drawings():
    drawings = drawings_of(Pictures(10, [], [confusion(2, title="a matrix"), precision(2)], {"sky": "#0000ff"}))
    assert [*drawings] == ["eval/a_matrix", "eval/p_r", "eval/legend"]
    assert all(draw().size > (50, 20) for draw in drawings.values())
    assert drawings_of(Pictures(10)) == {}
