"""The pictures and charts of the last evaluation, in a run's folder."""

import json

import pytest

from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.pictures import INDEX, PNG, Matrix, Pictures, read_pictures, write_pictures

CONFUSION = Matrix("confusion", ["a", "b"], ["a", "b"], [[1.0, 0.25], [None, None]], "%", "truth", "prediction", "Ah.")


def test_the_pictures_of_an_evaluation_take_the_place_of_the_last_ones(tmp_path):
    folder = tmp_path / "pictures"
    assert read_pictures(folder) == Pictures()
    first = Pictures(10, [PNG(b"one", "1 & <2>"), PNG(b"two", "", ("left", "right")), PNG(b"three", "3")])
    write_pictures(folder, first)
    assert read_pictures(folder) == first
    second = Pictures(20, [PNG(b"four", "4")], [CONFUSION], {"sky": "#0000ff"})
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
