"""Models of a user's own, named on the command line by the tests."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from syncbn.trainer.models.residual import SmallResNet


def group_norm(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, num_classes))


def shrinking(num_classes):
    """Maps of 1×1 from images of 8×8, in the second of two blocks."""
    blocks = [
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4, num_classes))


class Branching(nn.Module):
    """What it does depends on a value, so that no one graph holds it."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(192, num_classes)

    def forward(self, x):
        scores = self.fc(x.flatten(1))
        if scores.sum() > 0:
            scores = -scores
        return scores


def explosive(num_classes):
    """Linear layers and no norm: a high rate soon drives the weights to infinity."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 64), nn.Linear(64, num_classes))


class Fatal(nn.Module):
    """A small network in which a rank kills itself once: SYNCBN_TEST_DEATH=place:rank:file, which tells that it did."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = SmallResNet(8, num_classes)
        place, rank, file = os.environ["SYNCBN_TEST_DEATH"].split(":")
        self.place, self.rank, self.file, self.calls = place, int(rank), Path(file), 0
        self._register_state_dict_hook(self.saved)

    def die_in(self, place, call=0):
        here = (self.place, self.rank) == (place, int(os.environ["RANK"])) and self.calls >= call
        if here and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, x):
        self.calls += self.training
        self.die_in("step" if self.training else "eval", 14)
        scores = self.net(x)
        if self.training and scores.requires_grad:
            scores.register_hook(lambda _: self.die_in("backward", 14))
        return scores

    @staticmethod
    def saved(self, *_):
        self.die_in("save", 14)


class SlowEval(nn.Module):
    """A network whose evaluation takes a second a batch."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = SmallResNet(8, num_classes)

    def forward(self, x):
        if not self.training:
            time.sleep(1)
        return self.net(x)


class Greedy(nn.Module):
    """A network that asks for more memory than there is, on rank 1, in its third step."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc, self.calls = nn.Linear(192, num_classes), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            torch.empty(2**50)
        return self.fc(x.flatten(1))


class Held(nn.Module):
    """A small network whose steps take so many seconds more as a file says, while it is there: SYNCBN_TEST_HOLD."""

    def __init__(self, num_classes):
        super().__init__()
        self.net, self.hold = SmallResNet(8, num_classes), Path(os.environ["SYNCBN_TEST_HOLD"])

    def forward(self, x):
        with suppress(FileNotFoundError):
            time.sleep(float(self.hold.read_text()) if self.training else 0)
        return self.net(x)


def of_one_channel(num_classes):
    """For images of one channel: ours have three."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes))
