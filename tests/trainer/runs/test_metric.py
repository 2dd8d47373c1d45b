"""How people read figures."""

import pytest

from syncbn.trainer.runs.metric import Metric, in_words


def of_classes(ious, better="more"):
    """Metrics and figures of a segmentation; None: the class has none."""
    metrics = [Metric("miou", "%", headline=True), Metric("loss", better="less")]
    metrics += [Metric(f"iou_{name}", "%", better, detail=name) for name in ious]
    return metrics, {"eval/miou": 0.5} | {f"eval/iou_{n}": v for n, v in ious.items() if v is not None}


MANY = {f"class_{i}": i / 100 for i in range(20)}
ROWS = {
    "few": ({"sky": 0.5, "traffic_light": 0.75}, "more", {"eval/iou": "traffic_light: 75.00%, sky: 50.00%"}),
    "an-error": ({"sky": 0.5, "road": 0.75}, "less", {"eval/iou": "sky: 50.00%, road: 75.00%"}),
    "an-absent-one": (
        {"sky": 0.5, "car": None, "cat": None},
        "more",
        {"eval/iou": "sky: 50.00%", "eval/iou, absent": "car, cat (not in the eval data: left out of the mean)"},
    ),
    "many": (
        MANY,
        "more",
        {
            "eval/iou, best": "class_19: 19.00%, class_18: 18.00%, class_17: 17.00%, class_16: 16.00%, "
            "class_15: 15.00% (of 20)",
            "eval/iou, worst": "class_0: 0.00%, class_1: 1.00%, class_2: 2.00%, class_3: 3.00%, class_4: 4.00%",
        },
    ),
    "none-evaluated": ({"sky": None}, "more", {}),
}


@pytest.mark.parametrize(("ious", "better", "rows"), ROWS.values(), ids=ROWS)
def test_figures_of_classes_share_a_row_from_the_best_to_the_worst(ious, better, rows):
    metrics, figures = of_classes(ious, better)
    assert in_words({**figures, "eval/loss": 0.25, "eval/images": 7.0}, metrics) == {
        "eval/miou": "50.00%",
        "eval/loss": "0.2500",
        "eval/images": "7",
        **rows,
    }


def test_recalibrated_figures_of_classes_have_a_row_of_their_own():
    metrics, _ = of_classes({"sky": 0.5})
    rows = in_words({"eval/iou_sky": 0.5, "eval/recalibrated_iou_sky": 0.75}, metrics)
    assert rows == {"eval/iou": "sky: 50.00%", "eval/recalibrated_iou": "sky: 75.00%"}
