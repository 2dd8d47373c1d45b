"""What a task asks of its batches: targets that the data has, and images as a tensor or as a list of any sizes."""

import pytest
import torch

from syncbn.trainer.config import typed
from syncbn.trainer.data.sets import sources
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.batch_size import stepper
from syncbn.trainer.rank.build import build
from syncbn.trainer.tasks import Loss
from syncbn.trainer.training import loop
from tests.launch.jobs import PYTHON, finished
from tests.ranks import run_ranks
from tests.trainer.images import write_image
from tests.trainer.tasks.brightness import Brightness
from tests.trainer.trained import ranks_world


class OfAnySize(Brightness):
    """Images each of its own size, which the model takes one after another."""

    stacked = False

    def loss(self, model, batch):
        total, _, sums = super().loss(model, batch)
        return Loss(total, torch.tensor(batch.samples), sums)

    def _wrong(self, model, batch):
        bright = torch.stack([image.mean() for image in batch.images])
        small = torch.stack([image[:, :6, :6] for image in batch.images])
        return model(small).flatten() - bright, torch.ones(batch.samples)

    def _sums(self, wrong, counts, batch):
        total = wrong.detach().abs().sum()
        return {"absolute": total, "counted": counts.sum(), "by_tenth": torch.zeros(10)}


@pytest.fixture
def sizes(tmp_path):
    """A folder of images of 6 to 13 pixels."""
    for part, count in ("train", 8), ("test", 3):
        for index in range(count):
            write_image(tmp_path / part / "ab"[index % 2] / f"{index}.png", index, 6 + index)
    return {"name": "image_folder", "root": str(tmp_path), "batch_per_rank": 2}


def trained(rank, data):
    world, shapes = ranks_world(rank), []
    config = typed({"data": data, "task": {"name": f"{__name__}:OfAnySize"}, "train": {"steps": 2}})
    parts = build(config, world)
    for batch in parts.data.eval:
        shapes += [tuple(image.shape) for image in batch.images]
    training = assemble(parts, config, world)
    figures = loop.fit(training, config.train, world)
    stepper(build(config, world), config, world)(5)  # as data.batch_per_rank=auto probes
    return shapes, figures["eval/images"]


def test_images_may_each_have_their_own_size(sizes):
    (first, images), (second, _) = run_ranks(trained, 2, sizes)
    assert (first, second) == ([(3, 6, 6), (3, 7, 7)], [(3, 8, 8)])
    assert images == 3


def refused(rank, data):
    with pytest.raises(UserError) as error:
        build(typed({"data": data, "task": {"name": f"{__name__}:OfAnySize"}}), ranks_world(rank))
    return str(error.value)


def test_images_of_different_sizes_cannot_be_mixed(sizes):
    (text,) = run_ranks(refused, 1, {**sizes, "augment": {"mixup": 0.2}})
    assert text.endswith("mix images of one size, and those of this task have each its own: set both to 0")


class OfDepths(Brightness):
    targets = "depths"


def test_data_without_the_targets_of_a_task_is_refused_before_any_rank_starts(tmp_path, monkeypatch):
    code, said = finished(PYTHON, f"task.name={__name__}:OfDepths", "run.name=r", root=tmp_path)
    assert code == 2
    assert "has targets='depths': choose one of classes" in said
    monkeypatch.setitem(sources.SOURCES, "depths", {"image_folder": sources.SOURCES["classes"]["image_folder"]})
    with pytest.raises(UserError, match=r"data.name=digits has no depths, .*: choose one of image_folder"):
        sources.refuse_missing(typed({}).data, OfDepths.targets)
