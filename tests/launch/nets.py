"""Models of a user's own, named on the command line by the tests."""

from torch import nn


def group_norm(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, num_classes))


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
