"""A short training on real ranks, of which a run's folder with its checkpoints is left."""

import torch
import torch.distributed as dist

from syncbn.trainer.config import Config, as_dict, typed
from syncbn.trainer.environment import threads
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.runs.checkpoint import Checkpoints
from syncbn.trainer.training.loop import fit
from syncbn.trainer.training.resume import Keeper
from syncbn.trainer.world import World

# Settings of a small segmentation with all that its loss can have
SEGMENTATION = {
    "data": {
        "name": "digit_scenes", "scenes": 24, "size": 64, "augment": {"flip": True},
        "mean": [0.5] * 3, "std": [0.28] * 3,
    },
    "task": {"name": "segment", "class_weights": "auto", "dice": 0.5, "ohem": 0.9},
    "model": {"name": "unet", "options": {"depth": 2, "width": 2}},
}  # fmt: skip

# Of a small detection, whose images have each its own size
DETECTION = {
    "data": {
        "name": "digit_scenes",
        "scenes": 24,
        "eval_batch_per_rank": 1,
        "augment": {"flip": True, "iou_crop": True},
    },
    "task": {"name": "detect"},
    "model": {"name": "small_ssd", "image_size": 48, "options": {"width": 2}},
}


class Shelf:
    def __init__(self, folder, config):
        self.config = as_dict(config)
        folder.mkdir(parents=True)
        self.checkpoints = Checkpoints(folder)

    def keep(self, step, state, *, best):
        self.checkpoints.save(step, {**state, "config": self.config, "watch": None}, best=best)


def ranks_world(rank):
    size = dist.get_world_size()
    torch.set_num_threads(threads(size))  # as ranks have that are launched: sums depend on it
    return World(rank, size, torch.device("cpu"))


def train(rank, folder, settings):
    """Train on this rank as the settings say, checkpoints going to folder/checkpoints; the figures in the end."""
    config: Config = typed({**settings, "train": {"steps": 3, **settings.get("train", {})}})
    world = ranks_world(rank)
    training = assemble(build(config, world), config, world)
    training.recalibrate = config.eval.recalibrate
    shelf = Shelf(folder / "checkpoints", config) if rank == 0 else None
    return fit(training, config.train, world, keeper=Keeper(world, shelf), save_every=config.checkpoint.every)
