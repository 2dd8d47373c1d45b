"""COCO's average precision: what detectors are judged by."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Curves

if TYPE_CHECKING:
    import numpy as np

METRICS = (
    Metric("ap", "%", headline=True),
    Metric("ap50", "%"),
    Metric("ap75", "%"),
    Metric("ap_small", "%"),
    Metric("ap_medium", "%"),
    Metric("ap_large", "%"),
    Metric("ar", "%"),
)
MOST_PREDICTIONS = 100  # of an image that count
AREAS = ("all", "small", "medium", "large")  # in COCOeval's order


class Precision(NamedTuple):
    """How well boxes are predicted.

    figures: those of METRICS and of each class, by name. Left out: what there is no truth of, such as a size that no
        box has. `ap` is always there, as checkpoints are chosen by it: 0 without any truth.
    curves: of each class that has truth, (recall, precision) at an IoU of 0.5 and the 101 recalls 0, 0.01, ..., 1.
    """

    figures: dict[str, float]
    curves: dict[str, list[tuple[float, float]]]


def metrics_of(classes: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of a detector, with one for each class."""
    return (*METRICS, *(Metric(f"class_ap_{name}", "%", detail=name) for name in classes))


def average_precision(predictions: Sequence[Tensor], truth: Sequence[Tensor], classes: Sequence[str]) -> Precision:
    """COCO's figures of the predictions for all images.

    Args:
        predictions: of each image, float64 [n, 6]: left, top, right, bottom, score, label. The best 100 of an image and
            class count; of equal scores, those of earlier images and rows come first.
        truth: of each image, float64 [n, 7]: left, top, right, bottom, label, area, crowd (0 or 1). Small, medium and
            large go by the area. A crowd takes any number of predictions, which then count neither for nor against.
        classes: label k is classes[k - 1].

    Source: Lin et al. 2014 (arXiv:1405.0312), and cocodataset.org/#detection-eval: the precision at 101 recalls,
    averaged over them, over the IoUs 0.5, 0.55, ..., 0.95, and over the classes.
    """
    from faster_coco_eval import COCO, COCOeval_faster  # only where boxes are judged

    with uncollected():
        evaluation = COCOeval_faster(
            COCO(_as_coco(truth, classes, _truth_of)), COCO(_as_coco(predictions, classes, _prediction_of)), "bbox"
        )
        evaluation.params.maxDets = [MOST_PREDICTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    # [IoUs, recalls, classes, sizes] and [IoUs, classes, sizes]; -1: no truth
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    whole = precision[..., 0]
    figures = {
        "ap": _mean(whole) or 0.0,
        "ap50": _mean(whole[0]),
        "ap75": _mean(whole[5]),
        **{f"ap_{AREAS[i]}": _mean(precision[..., i]) for i in (1, 2, 3)},
        "ar": _mean(recall[..., 0]),
        **{f"class_ap_{name}": _mean(whole[..., i]) for i, name in enumerate(classes)},
    }
    recalls = [i / 100 for i in range(101)]
    at_half = zip(classes, whole[0].T.tolist(), strict=True)
    return Precision(
        {name: value for name, value in figures.items() if value is not None},
        {name: list(zip(recalls, heights, strict=True)) for name, heights in at_half if heights[0] >= 0},
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """A block without the garbage collector, which would look through a dict for each box, again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def precision_recall(precision: Precision) -> list[Curves]:
    """The chart of its curves; none, where there is no truth."""
    if not precision.curves:
        return []
    lines = {name: [(x, round(y, 4)) for x, y in points] for name, points in precision.curves.items()}
    caption = "The precision of each class along its recall, at an IoU of 0.5."
    return [Curves("precision and recall", lines, "recall", "precision", "%", caption)]


def _mean(values: "np.ndarray") -> float | None:
    """The mean of what there is truth of."""
    judged = values[values > -1]
    return float(judged.mean()) if judged.size else None


def _as_coco(rows: Sequence[Tensor], classes: Sequence[str], annotation: Any) -> dict[str, Any]:
    """The boxes of all images as COCO's files have them; those that are not finite are none."""
    numbers = torch.tensor([i for i, boxes in enumerate(rows, start=1) for _ in range(len(boxes))])
    boxes = torch.cat([*rows]) if len(rows) else torch.empty(0, 7)
    finite = boxes.isfinite().all(1)
    by_image = zip(numbers[finite].tolist(), boxes[finite].tolist(), strict=True)
    return {
        "images": [{"id": i} for i in range(1, len(rows) + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        # From 1: an id of 0 would mean that nothing was matched
        "annotations": [{"id": i, "image_id": image, **annotation(*box)} for i, (image, box) in enumerate(by_image, 1)],
    }


def _prediction_of(left: float, top: float, right: float, bottom: float, score: float, label: float) -> dict[str, Any]:
    wide, high = right - left, bottom - top
    return {"bbox": [left, top, wide, high], "area": wide * high, "score": score, "category_id": int(label)}


def _truth_of(
    left: float, top: float, right: float, bottom: float, label: float, area: float, crowd: float
) -> dict[str, Any]:
    box = [left, top, right - left, bottom - top]
    return {"bbox": box, "area": area, "category_id": int(label), "iscrowd": int(crowd)}
