"""COCO's average precision from its definition, slowly: what syncbn.trainer.tasks.coco is compared with."""

from statistics import mean

import numpy as np

IOUS, RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()  # rounded as COCO rounds them
SIZES = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}


def overlap(box, truth):
    """The intersection over the union; with a crowd, over the box alone."""
    shared = [min(box[i + 2], truth[i + 2]) - max(box[i], truth[i]) for i in (0, 1)]
    common = max(0, shared[0]) * max(0, shared[1])
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, truth)]
    return common / (areas[0] if truth[6] else areas[0] + areas[1] - common)


def matched(boxes, truth, iou, smallest, largest):
    """(score, right) of the predictions for one image and class that count, and how many boxes there are to find."""
    inside = [not each[6] and smallest <= each[5] <= largest for each in truth]
    taken, verdicts = set(), []
    for box in sorted(boxes, key=lambda box: -box[4])[:100]:
        best, most = None, iou
        for wanted in (True, False):  # what need not be found is taken only where nothing else is
            for i, each in enumerate(truth):
                free = i not in taken or each[6]
                if inside[i] == wanted and free and overlap(box, each) >= most:
                    best, most = i, overlap(box, each)
            if best is not None:
                break
        if best is not None:
            taken.add(best)
            if inside[best]:
                verdicts.append((box[4], True))
        elif smallest <= (box[2] - box[0]) * (box[3] - box[1]) <= largest:
            verdicts.append((box[4], False))
    return verdicts, sum(inside)


def curve(predictions, truth, label, iou, size):
    """Precision at the 101 recalls, and the recall reached; None: there is nothing to find."""
    verdicts, count = [], 0
    for boxes, objects in zip(predictions, truth, strict=True):
        of_class = [box for box in boxes if box[5] == label], [each for each in objects if each[4] == label]
        some, more = matched(*of_class, iou, *SIZES[size])
        verdicts, count = verdicts + some, count + more
    if not count:
        return None
    points, right = [], 0
    for n, (_, is_right) in enumerate(sorted(verdicts, key=lambda verdict: -verdict[0]), start=1):
        right += is_right
        points.append((right / count, right / n))
    heights = [max((height for reached, height in points if reached >= recall), default=0.0) for recall in RECALLS]
    return heights, right / count


def average_precision(predictions, truth, classes):
    """The figures by name, of lists of lists of boxes as tensors' tolist gives them."""

    labels = range(1, len(classes) + 1)

    def curves(size, labels=labels):
        every = [curve(predictions, truth, label, iou, size) for label in labels for iou in IOUS]
        return [each for each in every if each]

    def averaged(curves):
        return mean(mean(heights) for heights, _ in curves) if curves else None

    whole = curves("")
    figures = {f"ap{size}": averaged(curves(size)) for size in SIZES}
    figures |= {"ap50": averaged(whole[0::10]), "ap75": averaged(whole[5::10])}
    figures |= {"ar": mean(recall for _, recall in whole) if whole else None}
    figures |= {f"class_ap_{name}": averaged(curves("", [label])) for label, name in enumerate(classes, start=1)}
    return {name: value for name, value in figures.items() if value is not None}
