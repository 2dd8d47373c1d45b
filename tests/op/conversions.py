"""Layers that convert is given, what it reports, and all there is to say of a model."""

from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's does."""

    def __init__(self, channels, drop=None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, w):
        return 2 * w

    def right_inverse(self, w):
        return w / 2


def conversion_of(change, model, **options):
    """The report of convert or revert."""
    reports = []
    assert change(model, **options, report=reports.append) is model
    return reports.pop()


def tensors(model):
    return {name: (id(t), t.dtype, t.device) for name, t in model.state_dict(keep_vars=True).items()}


def state(model):
    """All there is to say of each module, by identity."""
    return [
        (type(m), {name: id(value) for name, value in vars(m).items()}, tensors(m), m.training) for m in model.modules()
    ]
