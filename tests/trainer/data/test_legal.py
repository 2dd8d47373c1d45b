"""Data sets that are bad and yet legal train to figures that are numbers, or are refused in one line."""

import math
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.training.loop import fit
from tests.ranks import run_ranks
from tests.trainer.images import image_folder
from tests.trainer.trained import ranks_world


def flat(root: Path, value: int) -> None:
    """Every image of one colour."""
    for path in root.rglob("*.jpg"):
        to_pil_image(torch.full((3, 8, 8), value, dtype=torch.uint8)).save(path)


DATA = {
    "prime numbers of images": lambda root: image_folder(root, {"a": 7, "b": 6}, {"a": 3, "b": 2}),
    "all images black": lambda root: flat(image_folder(root, {"a": 4, "b": 4}, {"a": 2}), 0),
    "one eval image for three ranks": lambda root: image_folder(root, {"a": 6, "b": 6}, {"b": 1}),
    "a class that eval lacks": lambda root: [image_folder(root, {"a": 6, "b": 6}, {"b": 3}), (root / "test/a").mkdir()],
    "nearly all of one class": lambda root: image_folder(root, {"a": 12, "b": 1}, {"a": 2, "b": 1}),
}


def trained_on(rank, root, batch):
    data = {"name": "image_folder", "root": str(root), "batch_per_rank": batch}
    settings = {"data": data, "model": {"name": "resnet8"}, "train": {"steps": 3}, "launch": {"device": "cpu"}}
    config, world = typed(settings), ranks_world(rank)
    training = assemble(build(config, world), config, world)
    return fit(training, config.train, world), training.model.module.state_dict()


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_such_data_trains(tmp_path, make):
    make(tmp_path)
    for figures, state in run_ranks(trained_on, 3, tmp_path, 2):
        assert all(math.isfinite(value) for value in figures.values())
        assert all(tensor.isfinite().all() for tensor in state.values())


def refused(rank, root):
    with pytest.raises(UserError) as raised:
        trained_on(rank, root, 1)
    return str(raised.value)


def test_fewer_images_than_ranks_are_refused_by_every_rank(tmp_path):
    image_folder(tmp_path, {"a": 1, "b": 1}, {"a": 1})
    for said in run_ranks(refused, 3, tmp_path):
        assert said.startswith("data.batch_per_rank=1 on 3 ranks, 1 times a step, takes 3 images and there are 2")
