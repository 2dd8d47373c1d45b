"""What a test of training needs on a rank: a network in float64, the rank's world, an observer that remembers."""

import torch
import torch.distributed as dist
from torch import nn

from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.training import drift
from syncbn.trainer.world import World


class Exact(nn.Module):
    """A small network that computes in float64."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = SmallResNet(8, num_classes, width=4).double()

    def forward(self, x):
        return self.net(x.double())


class Log:
    """An observer that remembers, and a keeper too."""

    def __init__(self):
        self.lines, self.saved, self.shown = [], [], []

    def stepped(self, step):
        pass

    def evaluating(self, step):
        pass

    def log(self, step, figures, reading=None):
        self.lines.append((step, {**figures, **drift.flat(reading.layers)} if reading else figures))

    def show(self, step, pictures):
        self.shown.append((step, pictures))

    def save(self, training, *, best=False):
        self.saved.append(training.step)


def world_of(rank):
    return World(rank, dist.get_world_size(), torch.device("cpu"))
