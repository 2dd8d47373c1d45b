"""The pictures of the last evaluation, in a run's folder."""

from syncbn.trainer.runs.pictures import INDEX, PNG, Pictures, read_pictures, write_pictures


def test_the_pictures_of_an_evaluation_take_the_place_of_the_last_ones(tmp_path):
    folder = tmp_path / "pictures"
    assert read_pictures(folder) == Pictures()
    first = Pictures(10, [PNG(b"one", "1 & <2>"), PNG(b"two", ""), PNG(b"three", "3")])
    write_pictures(folder, first)
    assert read_pictures(folder) == first
    second = Pictures(20, [PNG(b"four", "4")])
    write_pictures(folder, second)
    assert read_pictures(folder) == second
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", INDEX]


def test_pictures_that_are_not_all_there_are_none(tmp_path):
    write_pictures(tmp_path, Pictures(1, [PNG(b"one", ""), PNG(b"two", "")]))
    (tmp_path / "1.png").unlink()
    assert read_pictures(tmp_path) == Pictures()
    (tmp_path / INDEX).write_text("[]")
    assert read_pictures(tmp_path) == Pictures()
