"""Charts that a task makes of its sums, as they are drawn."""

import pytest

from syncbn.trainer.report import charts
from syncbn.trainer.report.for_wandb import drawings_of
from syncbn.trainer.runs.pictures import KINDS, Matrix, Pictures
from tests.trainer.report.drawn import brightness, texts


def confusion(classes, **options):
    names = [f"class {i}" for i in range(classes)]
    values = [[0.75 if i == j else 0.25 / (classes - 1) for j in range(classes)] for i in range(classes)]
    given = {"title": "confusion", "values": values, "unit": "%", "down": "truth", "along": "taken for"}
    return Matrix(rows=names, columns=names, **{**given, **options})


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


def test_a_legend_has_each_colour_beside_its_meaning():
    colours = {f"class {i}": f"#0000{i:02x}" for i in range(150)}
    figure = charts.legend(colours)
    assert texts(figure) == [*colours]
    squares = figure.axes[0].patches
    assert [square.get_facecolor()[2] for square in squares] == [pytest.approx(i / 255) for i in range(150)]


def test_wandb_is_given_the_same_drawings():
    drawings = drawings_of(Pictures(10, [], [confusion(2, title="a matrix")], {"sky": "#0000ff"}))
    assert [*drawings] == ["eval/a_matrix", "eval/legend"]
    assert all(draw().size > (50, 20) for draw in drawings.values())
    assert drawings_of(Pictures(10)) == {}
