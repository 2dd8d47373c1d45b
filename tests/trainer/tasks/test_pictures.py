"""Pictures of the same few eval samples at each evaluation: what the model makes of them."""

from dataclasses import replace
from io import BytesIO

import torch
from PIL import Image
from torch import nn

from syncbn.trainer.config import typed
from syncbn.trainer.data import SHOWN, Batch
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.runs.pictures import Matrix
from syncbn.trainer.tasks.classify import Classify
from syncbn.trainer.training import loop
from tests.ranks import run_ranks
from tests.trainer.trained import ranks_world


class Certain(nn.Module):
    """Takes every image for the second class."""

    def forward(self, images):
        return torch.tensor([[0.0, 30.0, 0.0]]).expand(len(images), 3)


def test_a_picture_of_classification_tells_what_it_is_and_what_it_was_taken_for():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]))
    pixels = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    pictures = Classify(classes=["cat", "dog", "cow"]).pictures(Certain(), batch, pixels)
    assert [picture.caption for picture in pictures] == ["dog", "cow, taken for dog (100%)"]
    png = Image.open(BytesIO(pictures[1].png()))
    assert (png.size, png.getpixel((3, 2))) == ((4, 4), tuple(pixels[1, :, 2, 3].tolist()))


class Counting(Classify):
    """Classification with a chart of one number: how many images are right."""

    def charts(self, sums):
        return [Matrix("right", ["all"], ["all"], [[float(sums["correct"])]])]


def shown(rank):
    """What an observer is shown on this rank, the accuracies that it logs, and the pixels of the eval images."""
    world = ranks_world(rank)
    config = typed({"train": {"steps": 4, "eval_every": 2, "log_every": 4}})
    parts = build(config, world)
    training = assemble(replace(parts, task=Counting(classes=parts.data.classes)), config, world)
    seen, accuracies = [], []

    class Observer:
        def show(self, step, shown):
            seen.append((step, [(picture.image, picture.caption) for picture in shown.pictures], shown.charts))

        def stepped(self, step): ...
        def evaluating(self, step): ...

        def log(self, step, figures, reading=None):
            accuracies.extend(value for name, value in figures.items() if name == "eval/accuracy")

    loop.fit(training, config.train, world, Observer())
    images = training.data.eval.loader.dataset.images
    return seen, accuracies, [images[i * len(images) // SHOWN][0] for i in range(SHOWN)]


def test_the_same_samples_are_shown_at_each_evaluation_on_every_rank_and_charts_of_all():
    first, *others = run_ranks(shown, 2)
    seen, accuracies, images = first
    assert [step for step, *_ in seen] == [2, 4]
    for _, pictures, _ in seen:
        assert all(
            torch.equal(each, image.expand(3, -1, -1)) for (each, _), image in zip(pictures, images, strict=True)
        )
    for other, *_ in others:
        assert [[caption for _, caption in pictures] for _, pictures, _ in other] == [
            [caption for _, caption in pictures] for _, pictures, _ in seen
        ]
    # 360 images of both ranks: charts are of the sums that the figures are of
    rights = [chart.values[0][0] for *_, (chart,) in seen]
    assert [right / 360 for right in rights] == accuracies
    assert rights[-1] > 0
