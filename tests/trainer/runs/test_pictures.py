"""The pictures and charts of the last evaluation, in a run's folder."""

import json

import pytest
import torch

from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.pictures import (
    INDEX,
    PNG,
    Box,
    Curves,
    Matrix,
    Pictures,
    Shown,
    pictures_of,
    read_pictures,
    write_pictures,
)
from syncbn.trainer.tasks import Picture

CONFUSION = Matrix("confusion", ["a", "b"], ["a", "b"], [[1.0, 0.25], [None, None]], "%", "truth", "prediction", "Ah.")
PRECISION = Curves("p", {"a": [[0.0, 1.0], [0.5, 0.25]], "b": [[0.0, 0.0]]}, "recall", "precision", "%", "Oh.")


def test_the_pictures_of_an_evaluation_take_the_place_of_the_last_ones(tmp_path):
    folder = tmp_path / "pictures"
    assert read_pictures(folder) == Pictures()
    first = Pictures(10, [PNG(b"one", "1 & <2>"), PNG(b"two", "", ("left", "right")), PNG(b"three", "3")])
    write_pictures(folder, first)
    assert read_pictures(folder) == first
    second = Pictures(20, [PNG(b"four", "4")], [CONFUSION, PRECISION], {"sky": "#0000ff"})
    write_pictures(folder, second)
    assert read_pictures(folder) == second
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", INDEX]


def test_charts_lie_there_without_pictures_too(tmp_path):
    write_pictures(tmp_path, Pictures(10, [], [CONFUSION]))
    assert read_pictures(tmp_path) == Pictures(10, [], [CONFUSION])


def test_pictures_of_before_there_were_charts_are_read(tmp_path):
    write_pictures(tmp_path, Pictures(10, [PNG(b"one", "1")]))
    (tmp_path / INDEX).write_text(json.dumps({"step": 10, "captions": {"0.png": "1"}}))
    assert read_pictures(tmp_path) == Pictures(10, [PNG(b"one", "1")])


def test_boxes_lie_beside_their_picture_which_is_there_once(tmp_path):
    boxes = {"truth": [Box(0.0, 1.5, 20.25, 30.0, "<cat>")], "prediction": [Box(0.0, 0.0, 9.0, 9.0, "dog", 0.75)]}
    pictures = Pictures(10, [PNG(b"one", "1", (), boxes), PNG(b"two", "2", (), {"truth": [], "prediction": []})])
    write_pictures(tmp_path, pictures)
    assert read_pictures(tmp_path) == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", INDEX]


def test_of_too_many_boxes_the_surest_are_kept_and_of_those_that_are_not_finite_none():
    image, nan = torch.zeros(3, 4, 4, dtype=torch.uint8), float("nan")
    guesses = [Box(i, 0, i + 1 / 3, 1, "cat", torch.tensor(i / 200)) for i in range(200)]
    picture = Picture(image, boxes={"prediction": [Box(nan, 0, 1, 1, "cat", 1.0), *guesses], "truth": [guesses[0]]})
    (png,) = pictures_of(1, Shown([picture])).each
    assert png.boxes["prediction"][0] == Box(199.0, 0.0, 199.33, 1.0, "cat", 0.995)
    assert [box.left for box in png.boxes["prediction"]] == [*range(199, 99, -1)]
    assert len(png.boxes["truth"]) == 1
    assert (png.width, png.height) == (4, 4)


def test_pictures_that_are_not_all_there_are_none(tmp_path):
    write_pictures(tmp_path, Pictures(1, [PNG(b"one", ""), PNG(b"two", "")]))
    (tmp_path / "1.png").unlink()
    assert read_pictures(tmp_path) == Pictures()
    (tmp_path / INDEX).write_text("{")
    assert read_pictures(tmp_path) == Pictures()


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [[1.0, 2.0], [1.0]]], ids=str)
def test_a_matrix_has_a_value_for_each_row_and_column(values):
    with pytest.raises(
        UserError, match=r"the chart 'confusion' has . rows of \[.*\] values and names for 2 rows and 2 "
    ):
        Matrix("confusion", ["a", "b"], ["a", "b"], values)


@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(0, 1), (1, float("nan"))]}, {"a": [(0, 1, 2)]}], ids=str)
def test_curves_have_lines_of_points(lines):
    with pytest.raises(UserError, match=r"the chart 'p' has no .*: give lines of \(x, y\) by name"):
        Curves("p", lines)
