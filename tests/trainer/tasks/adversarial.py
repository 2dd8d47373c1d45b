"""A task of two parts, and a model that has them: a generator of images, and a critic of what it generates."""

import torch
from torch import nn
from torch.nn import functional as F

from syncbn.trainer.tasks import Loss, Metric, Task


class Pair(nn.Module):
    """Scores, in float64, of images and of as many generated ones; the noise is made of the images themselves."""

    def __init__(self, num_classes):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 64)).double()
        self.critic = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)).double()

    def forward(self, images):
        real = images.double().mean(1).flatten(1)
        made = self.generator(real[:, 24:28])
        return self.critic(real), self.critic(made)


class Adversarial(Task):
    """The critic learns which images are real, then the generator to make such as it takes for real."""

    outputs = 1
    metrics = (Metric("gap", better="less", headline=True), Metric("critic_loss"), Metric("generator_loss"))
    shapes = {"gap": (), "critic_loss": (), "generator_loss": (), "samples": ()}  # noqa: RUF012

    def __init__(self, config, classes):
        pass

    @property
    def parts(self):
        return {"critic": self.critic_loss, "generator": self.loss}

    def critic_loss(self, model, batch):
        real, made = model(batch.images)
        total = F.softplus(-real).sum() + F.softplus(made).sum()
        return Loss(total, torch.tensor(batch.samples), {"critic_loss": total.detach()})

    def loss(self, model, batch):
        real, made = model(batch.images)
        total, samples = F.softplus(-made).sum(), torch.tensor(batch.samples)
        gap = (real - made).detach().sum().abs()
        return Loss(total, samples, {"generator_loss": total.detach(), "gap": gap, "samples": samples})

    def evaluate(self, model, batch):
        real, made = model(batch.images)
        zero = torch.zeros(())
        losses = {"critic_loss": zero, "generator_loss": zero}
        return {**losses, "gap": (real - made).sum(), "samples": torch.tensor(batch.samples)}

    def figures(self, sums):
        samples = sums["samples"].clamp(min=1)
        return {metric.name: float(sums[metric.name].abs() / samples) for metric in self.metrics}
