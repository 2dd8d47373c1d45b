"""A task of somebody's own, in one file: how bright an image is, to be read off it; the error is in percent points."""

import torch

from syncbn.trainer.tasks import Loss, Metric, Task


class Brightness(Task):
    """The mean over an image's pixels, by a model of one output; squared error, of images that are not black."""

    weighs = "values"
    outputs = 1
    metrics = (Metric("error", "pp", better="less", headline=True), Metric("bright", "%"))
    shapes = {"absolute": (), "counted": (), "by_tenth": (10,)}  # noqa: RUF012

    def __init__(self, config, classes):
        pass

    def loss(self, model, batch):
        wrong, counts = self._wrong(model, batch)
        return Loss(wrong.square().mul(counts).sum(), counts.sum(), self._sums(wrong, counts, batch))

    def evaluate(self, model, batch):
        return self._sums(*self._wrong(model, batch), batch)

    def figures(self, sums):
        counted = sums["counted"].clamp(min=1)
        return {"error": float(100 * sums["absolute"] / counted), "bright": float(sums["by_tenth"][5:].sum() / counted)}

    def _wrong(self, model, batch):
        bright = batch.images.mean((1, 2, 3)) / 4 + 0.5
        return model(batch.images).flatten() - bright, (bright > 0).to(bright.dtype)

    def _sums(self, wrong, counts, batch):
        bright = batch.images.mean((1, 2, 3)) / 4 + 0.5
        tenths = torch.zeros(10, device=bright.device).index_add(0, (10 * bright).long().clamp(0, 9), counts)
        return {"absolute": wrong.detach().abs().mul(counts).sum(), "counted": counts.sum(), "by_tenth": tenths}
