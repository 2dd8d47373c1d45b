"""What a segmentation optimises: which pixels count, how much, and what they cost."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn.trainer.data import IGNORED


@dataclass(frozen=True)
class Objective:
    """Cross-entropy of pixels, with options; the config's section task has the same names and says what they are.

    Scores are [B, K, H, W], masks uint8 [B, H, W]. Each is a sum over pixels, so that ranks add up to the whole batch.

    Source of ohem: Shrivastava et al. 2016 (arXiv:1604.03540), by a threshold alone, as a fixed share of the hardest
    pixels would depend on how images are split over ranks.
    """

    class_weights: str = "none"
    dice: float = 0.0
    ohem: float = 0.0
    aux_weight: float = 0.4
    label_smoothing: float = 0.0

    def pixel_weights(self, scores: Tensor, masks: Tensor, class_weights: Tensor | None) -> Tensor:
        """What each pixel counts, [B, H, W]: the weight of its class; 0 where it is ignored, or easy."""
        truth = masks.long()
        counts = truth != IGNORED
        truth = truth.where(counts, 0)
        weights = counts.to(scores.dtype)
        if class_weights is not None:
            weights = weights * class_weights.to(scores.dtype)[truth]
        if self.ohem:
            with torch.no_grad():
                sure = scores.softmax(1).gather(1, truth[:, None])[:, 0]
            weights = weights * (sure < self.ohem)
        return weights

    def total(self, scores: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
        """The sum over pixels of weight × (cross-entropy + dice × the Dice loss of the pixel's image)."""
        losses = F.cross_entropy(
            scores, masks.long(), ignore_index=IGNORED, reduction="none", label_smoothing=self.label_smoothing
        )
        total = (losses * weights).sum()
        if not self.dice:
            return total
        return total + self.dice * (dice_losses(scores, masks) * weights.sum((1, 2))).sum()


def rarity(pixels: Tensor) -> Tensor:
    """Weights [K] of classes by their pixels: 1 / ln(1.02 + share), of which the mean over all pixels is 1.

    Source: ENet, Paszke et al. 2016 (arXiv:1606.02147), section 5.2.
    """
    shares = pixels.double() / pixels.sum().clamp(min=1)
    weights = 1 / (1.02 + shares).log()
    return weights / (weights * shares).sum()


def dice_losses(scores: Tensor, masks: Tensor) -> Tensor:
    """Of each image, [B]: 1 - the mean of 2 |P ∩ T| / (|P| + |T|) over the classes that its mask has.

    P counts probabilities, T pixels, both where the mask counts; an image without such pixels has 0.

    Source: V-Net, Milletari et al. 2016 (arXiv:1606.04797), for several classes.
    """
    counts = (masks != IGNORED)[:, None]
    classes = masks.long()[:, None].where(counts, 0)
    truth = torch.zeros_like(scores).scatter_(1, classes, 1.0) * counts  # F.one_hot would look for the largest class
    guess = scores.softmax(1) * counts
    pixels = truth.sum((2, 3))
    dice = 2 * (guess * truth).sum((2, 3)) / (guess.sum((2, 3)) + pixels).clamp(min=1)
    there = pixels > 0
    return torch.where(there, 1 - dice, 0.0).sum(1) / there.sum(1).clamp(min=1)
