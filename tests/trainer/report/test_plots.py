"""The house's figures: what they show, and that they may stand together on one page."""

import xml.etree.ElementTree as ET
from math import inf, nan

import pytest

from syncbn.trainer.report import plots
from tests.trainer.report.drawn import brightness, texts


def map_of(values, rows=None, columns=None, **options):
    rows = rows or [f"layer{i}" for i in range(len(values))]
    columns = columns or [10 * (i + 1) for i in range(len(values[0]))]
    return plots.heat_map(values, rows, columns, **{"title": "ICC", "unit": "ICC", **options})


@pytest.mark.parametrize(("worst", "log"), [("high", False), ("high", True), ("low", False), ("low", True)])
def test_the_worst_cell_is_the_darkest(worst, log):
    bright = brightness(map_of([[1.0, 2.0, 4.0]], worst=worst, log=log))[0]
    assert list(bright) == sorted(bright, reverse=worst == "high")


def test_what_is_not_known_is_grey():
    for log in False, True:
        image = map_of([[1.0, nan, 4.0]], log=log).axes[0].images[0]
        red, green, blue, _ = image.to_rgba(image.get_array())[0][1]
        assert max(red, green, blue) - min(red, green, blue) < 0.05
        assert red > 0.7


@pytest.mark.parametrize(("worst", "kept"), [("high", 9.0), ("low", -9.0)])
def test_columns_put_together_show_the_worst_and_say_so(worst, kept):
    values = [[0.0] * 4321]
    values[0][1234], values[0][1235], values[0][0] = 9.0, -9.0, nan
    figure = map_of(values, worst=worst)
    cells = figure.axes[0].images[0].get_array()
    assert cells.shape == (1, 87)
    assert cells[0].compressed().tolist() == [kept if i == 1234 // 50 else 0.0 for i in range(87)]
    end = {"high": "highest", "low": "lowest"}[worst]
    assert f"step (each column: the {end} of 50)" in texts(figure)


def test_few_columns_stay_as_they_are():
    assert "step" in texts(map_of([[0.0] * 100]))


def test_columns_are_named_by_their_steps():
    assert [text for text in texts(map_of([[0.0] * 60])) if text.isdigit()] == ["200", "400", "600"]
    ranks = map_of([[1.0] * 8], columns=range(8), along="rank")
    assert [text for text in texts(ranks) if text.isdigit()] == ["0", "2", "4", "6"]


@pytest.mark.parametrize(("layers", "named"), [(1, 1), (20, 20), (53, 53), (160, 54), (1000, 334)])
def test_rows_are_named_as_far_as_there_is_room(layers, named):
    names = [text for text in texts(map_of([[1.0]] * layers)) if text.startswith("layer")]
    assert len(names) == named
    assert names[0] == "layer0"


def test_a_long_name_keeps_both_ends():
    (name,) = (t for t in texts(map_of([[1.0]], rows=["backbone.features.denseblock4.denselayer16.norm2"])) if "…" in t)
    assert name == "backbone.fea…layer16.norm2"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[[nan]], [[inf, 1.0]], [[0.0, 0.0]], [[-1.0, -2.0]], [[1e-12, 1e12]], [[5.0]], [[0.0, 1e-30]], [[1e300, -1e300]]],
    ids=str,
)
def test_any_numbers_give_a_figure(values, log):
    ET.fromstring(plots.svg(map_of(values, log=log), "a"))


def test_numbers_beyond_the_limits_are_told_by_the_colour_bar():
    for values, extend in (([0.5], "neither"), ([0.5, 2.0], "max"), ([-1.0, 0.5], "min"), ([-1.0, 2.0], "both")):
        assert map_of([values], limits=(0.0, 1.0)).axes[0].images[0].colorbar.extend == extend


def test_a_long_curve_is_averaged_and_its_points_stay_behind():
    figure = plots.curves({"a": {i: float(i % 2) for i in range(1, 961)}}, title="loss")
    behind, line = figure.axes[0].lines
    assert len(behind.get_xdata()) == 960
    assert set(line.get_ydata()) == {0.5}
    assert line.get_xdata()[-1] == 960


@pytest.mark.parametrize("points", [{}, {1: 1.0}, {1: nan}, {1: 1.0, 2: inf, 3: 2.0}], ids=str)
def test_any_points_give_a_figure(points):
    ET.fromstring(plots.svg(plots.curves({"a": points, "b": {}}, title="loss", percent=True, from_zero=True), "a"))


def test_a_run_has_its_colour_in_every_figure():
    def colours(*lines):
        figure = plots.curves(dict(zip("abcdefghijk", lines, strict=False)), title="loss")
        return {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}

    point = {1: 1.0}
    assert colours({}, point)["b"] == colours(point, point)["b"] != colours(point)["a"]
    assert len(set(colours(*[point] * 11).values())) == 11


def test_names_are_text_and_never_formulae():
    names = ["<b> & $x_{", "a\"b'c", "$$", "ümlaut ✓"]
    shown = texts(plots.curves({name: {1: 1.0} for name in names}, title="$\\frac{"))
    assert set(names) | {"$\\frac{"} <= set(shown)


def test_ids_are_told_apart_by_their_prefix():
    one, other = (plots.svg(map_of([[1.0, 2.0]]), prefix) for prefix in ("a", "b"))
    ids = [[e.get("id") for e in ET.fromstring(svg).iter() if e.get("id")] for svg in (one, other)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert one.replace("a-", "b-") == other


def test_the_style_of_others_is_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.svg(map_of([[1.0]]), "a")
    plots.curves({"a": {1: 1.0}}, title="loss")
    assert dict(matplotlib.rcParams) == before


def test_wandb_takes_a_figure():
    import wandb

    image = wandb.Image(plots.picture(map_of([[1.0, 2.0]])))
    assert image.image.size[0] > 100
