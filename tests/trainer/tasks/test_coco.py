"""COCO's average precision, by hand and from its definition."""

import subprocess
import sys

import pytest
import torch

from syncbn.trainer.tasks.coco import average_precision, metrics_of, precision_recall
from tests.trainer.tasks.average_precision import average_precision as by_definition

BOX, APART = [10, 10, 50, 50], [60, 60, 90, 90]


def predictions(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)


def truth(*rows, crowd=0):
    """Boxes and their classes; the area follows."""
    with_areas = [[*box, label, (box[2] - box[0]) * (box[3] - box[1]), crowd] for box, label in rows]
    return torch.tensor(with_areas, dtype=torch.float64).reshape(-1, 7)


def test_the_very_boxes_are_a_precision_of_one():
    result = average_precision(
        [predictions([*BOX, 0.9, 1], [*APART, 0.8, 2]), predictions()], [truth((BOX, 1), (APART, 2)), truth()], "ab"
    )
    # 40 × 40 is COCO's medium, 30 × 30 its small
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ar", "class_ap_a", "class_ap_b"]
    assert result.figures == pytest.approx(dict.fromkeys(names, 1.0))
    assert result.curves == {name: [(i / 100, 1.0) for i in range(101)] for name in "ab"}


def test_what_is_found_late_and_half_found_counts_as_the_definition_has_it():
    # A box of IoU 0.8 behind a wrong one of a higher score, and a second object that is never found
    shifted = [10, 10, 50, 42]
    result = average_precision([predictions([*shifted, 0.5, 1], [*APART, 0.9, 1])], [truth((BOX, 1), (BOX, 1))], "a")
    # Precision 1/2 up to a recall of 1/2, which are 51 of 101 points, at the IoUs 0.5 to 0.8
    at_half = 51 / 101 / 2
    assert result.figures == pytest.approx(
        {"ap": 0.7 * at_half, "ap50": at_half, "ap75": at_half, "ap_medium": 0.7 * 51 / 101, "ar": 0.35}
        | {"class_ap_a": 0.7 * at_half}
    )
    assert [height for _, height in result.curves["a"]] == 51 * [0.5] + 50 * [0.0]
    (chart,) = precision_recall(result)
    assert chart.lines == result.curves


def test_a_second_box_for_an_object_is_wrong_and_one_in_a_crowd_is_neither():
    twice = predictions([*BOX, 0.9, 1], [*BOX, 0.8, 1], [*APART, 0.7, 1])
    assert average_precision([twice], [truth((BOX, 1), (APART, 1))], "a").figures["ap"] == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )
    inside = predictions([20, 20, 30, 30, 0.9, 1], [*APART, 0.7, 1])
    objects = torch.cat([truth((APART, 1)), truth((BOX, 1), crowd=1)])
    assert average_precision([inside], [objects], "a").figures["ap"] == pytest.approx(1.0)


def test_areas_are_those_of_the_truth():
    objects = truth((BOX, 1))
    objects[0, 5] = 900.0  # of a mask, say: less than its box
    figures = average_precision([predictions([*BOX, 0.9, 1])], [objects], "a").figures
    assert figures["ap_small"] == pytest.approx(1.0)
    assert "ap_medium" not in figures


def test_without_predictions_all_is_0_and_without_truth_there_is_no_more_than_that():
    figures = average_precision([predictions()], [truth((BOX, 1))], ["a", "absent"]).figures
    assert figures == dict.fromkeys(["ap", "ap50", "ap75", "ap_medium", "ar", "class_ap_a"], 0.0)
    for objects in truth(), truth((BOX, 1), crowd=1):
        assert average_precision([predictions([*BOX, 0.9, 1])], [objects], "a") == ({"ap": 0.0}, {})
    assert average_precision([], [], "a") == ({"ap": 0.0}, {})
    assert precision_recall(average_precision([], [], "a")) == []


def test_what_is_not_finite_is_no_prediction():
    boxes = predictions([*BOX, float("nan"), 1], [float("inf"), *BOX[1:], 1.0, 1], [*BOX, 0.5, 1])
    assert average_precision([boxes], [truth((BOX, 1))], "a").figures["ap"] == pytest.approx(1.0)


def test_a_class_called_small_has_a_figure_of_its_own():
    figures = average_precision([predictions()], [truth((BOX, 1))], ["small"]).figures
    assert "ap_small" not in figures
    assert figures["class_ap_small"] == 0.0
    names = [metric.name for metric in metrics_of(["small", "car"])]
    assert names == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "class_ap_small", "class_ap_car"]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_definitions_on_random_boxes(seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(high, *shape):
        return torch.randint(0, high, shape, generator=generator).double()

    classes, objects, guesses = ["a", "b", "absent"], [], []
    for _ in range(12):
        n = int(drawn(8))
        corner, side = drawn(120, n, 2), 4 + drawn(9, n, 2) ** 2 * 3
        label, crowd = 1 + drawn(2, n, 1), (drawn(5, n, 1) == 0).double()
        area = side.prod(1, keepdim=True) * (1 - drawn(2, n, 1) / 4)
        objects.append(torch.cat([corner, corner + side, label, area, crowd], 1))
        # Most near an object, some of another class, with few different scores, and whole pixels: many ties
        near = (corner + drawn(5, 3, n, 2) - 2, (corner + side + drawn(5, 3, n, 2) - 2))
        near = torch.cat(near, 2).flatten(0, 1)
        near = near[(near[:, 2] > near[:, 0]) & (near[:, 3] > near[:, 1])]
        far = drawn(150, 20, 2)
        boxes = torch.cat([near, torch.cat([far, far + 1 + drawn(100, 20, 2)], 1)])
        guesses.append(torch.cat([boxes, drawn(6, len(boxes), 1) / 6, 1 + drawn(3, len(boxes), 1)], 1))
    figures = average_precision(guesses, objects, classes).figures
    want = by_definition([each.tolist() for each in guesses], [each.tolist() for each in objects], classes)
    assert figures == pytest.approx(want, rel=0, abs=1e-12)
    assert figures.keys() == {metric.name for metric in metrics_of(classes)} - {"class_ap_absent"}
    assert 0.01 < figures["ap"] < figures["ap50"] < 0.99


def test_only_the_best_hundred_of_an_image_count():
    wrong = [[*APART, 1 - i / 1000, 1] for i in range(100)]
    objects = truth((BOX, 1))
    assert average_precision([predictions(*wrong, [*BOX, 0.1, 1])], [objects], "a").figures["ap"] == 0
    assert average_precision([predictions(*wrong[1:], [*BOX, 0.1, 1])], [objects], "a").figures["ap"] > 0


def test_nothing_is_printed_and_nothing_loaded_before_boxes_are_judged():
    script = """if 1:
        import sys, torch
        from syncbn.trainer.tasks.coco import average_precision
        assert "faster_coco_eval" not in sys.modules
        box = torch.tensor([[0.0, 0, 9, 9, 1, 1]], dtype=torch.float64)
        average_precision([box], [torch.tensor([[0.0, 0, 9, 9, 1, 81, 0]], dtype=torch.float64)], "a")
        assert "faster_coco_eval" in sys.modules
        assert "matplotlib" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
