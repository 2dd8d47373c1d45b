"""One value a channel, of which no norm can take a variance, is told in one line: the layer, its input, the mend."""

import pytest

from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.rank.diagnosis import explained
from syncbn.trainer.training.loop import fit
from tests.ranks import run_ranks
from tests.trainer.on_ranks import world_of

SCENES = {
    "data": {"name": "digit_scenes", "scenes": 8, "size": 64, "mean": [0.5] * 3, "std": [0.3] * 3, "batch_per_rank": 1},
    "task": {"name": "segment"},
    "model": {"name": "deeplabv3_mobilenet_v3_large"},
}


def train(rank, norm, batch, more=None):
    """What a training of one step ends with."""
    model = {"name": "tests.launch.nets:shrinking"}
    settings = more or {"data": {"batch_per_rank": batch}, "model": model}
    config = typed({"norm": norm, "train": {"steps": 1}, **settings})
    world = world_of(rank)
    training = assemble(build(config, world), config, world)
    try:
        fit(training, config.train, world)
    except Exception as error:
        error = explained(error, training, config, rank)
        return type(error), str(error), getattr(error, "on_every_rank", None)
    return None


HERE = "one value per channel to take a variance of, at 1.1, whose input is"
REFUSED = {
    "local": (
        {"name": "local"}, 1, 2,
        f"norm=local has {HERE} [1, 4, 1, 1]: raise data.batch_per_rank=1, take norm=sync, over all ranks, give larger "
        "images (data.size=), or norm=group",
    ),
    "ghost": ({"name": "ghost", "sub_batch": 1}, 2, 2, f"norm=ghost has {HERE} [1, 4, 1, 1]: raise data.batch"),
    "sync-alone": (
        {"name": "sync", "group": 1}, 1, 2,
        f"norm=sync has {HERE} (1, 4, 1, 1): raise data.batch_per_rank=1, give larger images (data.size=), or no",
    ),
    "instance": (
        {"name": "instance"}, 4, 2,
        f"norm=instance has {HERE} [4, 4, 1, 1]: give larger images (data.size=), or norm=group",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("norm", "batch", "ranks", "said"), REFUSED.values(), ids=REFUSED)
def test_it_is_told_by_every_rank_in_a_line(norm, batch, ranks, said):
    for kind, line, on_every_rank in run_ranks(train, ranks, norm, batch):
        assert kind is UserError
        assert line.startswith(said)
        assert "\n" not in line
        assert on_every_rank


@pytest.mark.parametrize(
    ("norm", "batch"),
    [({"name": "sync"}, 1), ({"name": "batch_renorm"}, 1), ({"name": "group"}, 1), ({"name": "local"}, 2)],
)
def test_where_there_are_two_it_trains(norm, batch):
    assert run_ranks(train, 2, norm, batch) == [None, None]


def test_behind_a_pooling_larger_images_are_no_mend():
    """DeepLabv3 takes a norm of the image's mean: at one image a rank there is one value, whatever its size."""
    for kind, line, on_every_rank in run_ranks(train, 2, {"name": "local"}, 1, SCENES):
        assert (kind, on_every_rank) == (UserError, True)
        assert line == (
            "norm=local has one value per channel to take a variance of, at classifier.0.convs.4.2, whose input is "
            "[1, 256, 1, 1]: raise data.batch_per_rank=1, take norm=sync, over all ranks, or norm=group"
        )


BOXES = {
    "data": {"name": "digit_scenes", "scenes": 8, "batch_per_rank": 1},
    "task": {"name": "detect"},
    "model": {"name": "ssdlite320_mobilenet_v3_large"},
}


def test_at_the_last_map_of_a_detector_it_is_the_models_size_that_mends():
    for kind, line, on_every_rank in run_ranks(train, 2, {"name": "local"}, 1, BOXES):
        assert (kind, on_every_rank) == (UserError, True)
        assert line == (
            "norm=local has one value per channel to take a variance of, at backbone.extra.3.1.1, whose input is "
            "[1, 64, 1, 1]: raise data.batch_per_rank=1, take norm=sync, over all ranks, give larger images "
            "(model.image_size=), or norm=group"
        )


@pytest.mark.parametrize("settings", [SCENES, BOXES], ids=["scenes", "boxes"])
def test_synchronised_it_trains(settings):
    assert run_ranks(train, 2, {"name": "sync"}, 1, settings) == [None, None]
