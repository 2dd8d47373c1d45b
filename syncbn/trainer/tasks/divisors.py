"""What torchvision's detectors divide their losses by: so that ranks can divide by that of all of them together."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = "images"
# Of R-CNN, by the name of a loss; those of SSD and FCOS are all divided by the matched anchors, others by the images
OF_RCNN = {
    "loss_objectness": "sampled anchors",
    "loss_rpn_box_reg": "sampled anchors",
    "loss_classifier": "sampled boxes",
    "loss_box_reg": "sampled boxes",
    "loss_mask": "positive boxes",
}


class Divisors:
    """By what the losses of a forward were divided, each on at least 1."""

    def __init__(self, images: int, of_loss: Callable[[str], str]):
        self.of_loss = of_loss
        self.counts: dict[str, Any] = defaultdict(int, {IMAGES: images})

    def undone(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sums that the losses were means of, and what there is of each: [K] both, the same K on every rank."""
        sums: dict[str, Tensor] = {}
        for name, loss in losses.items():
            kind = self.of_loss(name)
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            sums[kind] = sums.get(kind, 0) + loss * self._count(kind, loss).clamp(min=1)
        first = next(iter(sums.values()))
        return torch.stack([*sums.values()]), torch.stack([self._count(kind, first) for kind in sums])

    def _count(self, kind: str, like: Tensor) -> Tensor:
        return torch.as_tensor(self.counts[kind], dtype=like.dtype, device=like.device)


@contextmanager
def divisors(model: nn.Module, images: int) -> Iterator[Divisors]:
    """A block in which a detector is called once, on so many images, and what it divided its losses by.

    SSD: by the anchors that match an object. FCOS: by the points that do. R-CNN: by the anchors and boxes that are
    sampled, and those of the latter that match. RetinaNet divides by the anchors of each image, and then by the images;
    any other model is taken to give means over its images.

    Source: torchvision's models/detection, where each of them counts the batch of a rank alone.
    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.ssd import SSD

    with ExitStack() as stack:

        def watch(owner: Any, name: str, watched: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            stack.enter_context(replaced(owner, name, watched(getattr(owner, name))))

        if isinstance(model, SSD):
            seen = Divisors(images, lambda _: "matched")
            watch(model, "proposal_matcher", lambda match: matches(match, seen))
        elif isinstance(model, FCOS):
            seen = Divisors(images, lambda _: "matched")
            watch(model.head, "compute_loss", lambda loss: losses_of_points(loss, seen))
        elif isinstance(model, GeneralizedRCNN):
            seen = Divisors(images, lambda name: OF_RCNN.get(name, IMAGES))
            watch(model.rpn, "fg_bg_sampler", lambda take: samples(take, seen, "sampled anchors"))
            watch(model.roi_heads, "fg_bg_sampler", lambda take: samples(take, seen, "sampled boxes", "positive boxes"))
        else:
            seen = Divisors(images, lambda _: IMAGES)
        yield seen


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A block in which an object has another value of a name."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def matches(match: Callable[[Tensor], Tensor], seen: Divisors) -> Callable[[Tensor], Tensor]:
    """SSD's matcher, called for each image with an object."""

    def counted(quality: Tensor) -> Tensor:
        places = match(quality)
        seen.counts["matched"] = seen.counts["matched"] + (places >= 0).sum()
        return places

    return counted


def losses_of_points(compute: Callable[..., Any], seen: Divisors) -> Callable[..., Any]:
    """FCOS's losses, of what each point of each image matches."""

    def counted(targets: Any, outputs: Any, anchors: Any, places: list[Tensor]) -> Any:
        seen.counts["matched"] = sum((each >= 0).sum() for each in places)
        return compute(targets, outputs, anchors, places)

    return counted


def samples(
    sample: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]], seen: Divisors, both: str, positive: str = ""
) -> Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """R-CNN's sampler, which takes positives and negatives of each image. both, positive: names of what to count."""

    def counted(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positives, negatives = sample(labels)
        seen.counts[both] = sum(each.sum() for each in [*positives, *negatives])
        if positive:
            seen.counts[positive] = sum(each.sum() for each in positives)
        return positives, negatives

    return counted
