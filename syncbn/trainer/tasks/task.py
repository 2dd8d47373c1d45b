"""What a task tells the rest of the trainer: loop, screen, W&B, report, status, sweeps, probe and export."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from syncbn.trainer.data import Batch, Data
from syncbn.trainer.data.structure import repeated
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Boxes, Chart

BOXES = ("boxes", "instances")
"""The targets of tasks that find boxes in images, each of its own size, which their models normalise."""

Sums = dict[str, Tensor]
"""Totals over samples, of any shape: they add up over batches and ranks, in float64."""


class Loss(NamedTuple):
    """The loss of a batch: a sum over all that counts in it, [], and how much that is, [].

    What is optimised is the sum over all ranks and batches of a step, over the weight of all of them: the same for any
    split of the samples over ranks, also where a rank has nothing that counts.

    A loss of K terms that are divided by different things has a total and a weight [K] instead, the same K on every
    rank: each term is divided by its weight over all ranks, in each forward of a step by itself.
    """

    total: Tensor
    weight: Tensor
    sums: Sums  # for the metrics


@dataclass(frozen=True)
class Picture:
    """What a model makes of a sample, to be looked at.

    Args:
        image: uint8 [3, H, W], RGB.
        panels: names of its parts, if it has some side by side, equally wide.
        boxes: to be drawn over it, by what they are: {"truth": [Box(...), ...], "prediction": [...]}. Each name has a
            panel of its own, so that the image itself has no parts then. The legend has the colours of what they hold.
    """

    image: Tensor
    caption: str = ""
    panels: Sequence[str] = ()
    boxes: Boxes = field(default_factory=dict)

    def png(self) -> bytes:
        from PIL import Image  # only on rank 0

        file = BytesIO()
        Image.fromarray(self.image.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG")
        return file.getvalue()


LossOf = Callable[[nn.Module, Any], Loss]


class Task(ABC):
    """What is learnt from batches. One object on each rank, the same on all."""

    weighs: Literal["images", "values"] = "images"
    """What a loss's weight counts. images: those of the batch, so that the loop knows the sum and sends no message."""

    targets: str = "classes"
    """What each image of the data must come with: one of data.TARGETS."""

    stacked: bool = True
    """Whether the images of a batch are one tensor [B, 3, H, W], or a list, each of its own size."""

    fixed_shapes: bool = True
    """Whether a step does the same for any batch of its shapes, so that it can be one graph."""

    any_size: bool = False
    """Whether an exported program takes images of any size, where its model does, or of that of training alone."""

    outputs: int | None = None
    """How many numbers the model is to give for an image, its builder's num_classes; None: the classes of the data."""

    metrics: Sequence[Metric]
    """Its figures; one of them is the headline, by which the best checkpoint and the points of a sweep are chosen."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the sums, by name: a rank without a sample has none to tell by."""

    rows: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Of each row of the rows that evaluate gives besides, by name: {"boxes": (6,)} for [n, 6] of each sample."""

    @property
    def parts(self) -> Mapping[str, LossOf]:
        """What is optimised: in each step, in turn, a submodule of the model by its name, by a loss of its own.

        "" is the whole model. A generative adversarial network names two. Each loss calls the model once.
        """
        return {"": self.loss}

    def prepare(self, data: Data) -> None:  # noqa: B027  (most tasks have nothing to look at)
        """Look at the data before the first step of a training, on every rank alike; none speaks to another here.

        Raises UserError.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch in training; the model is called once, also for a batch without a sample."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """The sums of a batch in eval, and the rows: for each sample a tensor [n, ...] of its own length."""

    @abstractmethod
    def figures(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The metrics, by name, of the sums over all batches and ranks (float64, on the CPU); all of them, or fewer.

        After an evaluation, sums also has the rows: a list of a tensor for each sample, in the order of the data set,
        each sample once. Of training steps there are only sums.
        """

    def pictures(self, model: nn.Module, batch: Any, pixels: Any) -> Sequence[Picture]:
        """What the model makes of a few samples of the eval data, the same at each evaluation; none unless overridden.

        pixels: the batch's images before they were normalised, uint8.
        """
        return ()

    def exported(self, model: nn.Module) -> nn.Module | None:
        """What an exported program computes of images [N, 3, H, W]: one tensor; the model unless overridden.

        None: there is no program, as the model returns more than a tensor, or what depends on the images' contents.
        """
        return model

    @property
    def legend(self) -> Mapping[str, str]:
        """What the colours in its pictures mean: {"sky": "#4dbbd5"}."""
        return {}

    def charts(self, sums: Mapping[str, Any]) -> Sequence[Chart]:
        """What there is to draw of an evaluation, of the same sums and rows as the figures; nothing unless overridden.

        Drawn in the report and in W&B, as the pictures are.
        """
        return ()

    def example(self, batch: Batch, samples: int) -> Any:
        """A batch of so many samples that is as dear as any, made of one of the data's: what probes of memory take."""
        return repeated(batch, samples)
