"""Batches as they reach the device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from syncbn.trainer.data.sampler import EvalSampler
from syncbn.trainer.data.samples import Batch
from syncbn.trainer.data.structure import mapped
from syncbn.trainer.data.workers import signals_held
from syncbn.trainer.errors import UserError


class Batches:
    """Batches of a DataLoader on the device: images [B, 3, H, W] normalised, labels as they are.

    Args:
        normalisation: mean and standard deviation of pixels in 0..1, for each colour or for all.
    """

    def __init__(
        self,
        loader: DataLoader,
        normalisation: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
        memory_format: torch.memory_format,
    ):
        self.loader, self.device, self.memory_format = loader, device, memory_format
        self.shape: list[int] | None = None  # [3, H, W] of the images of the last batch
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in normalisation)
        self.mean = 255 * mean
        self.scale = 1 / (255 * std)

    @property
    def most(self) -> int:
        """The number of eval batches of the rank that has most."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, EvalSampler)
        return sampler.most

    def __iter__(self) -> Iterator[Batch]:
        with signals_held():
            batches = iter(self.loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            batch = mapped(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
            yield batch._replace(images=mapped(self._normalised, batch.images))

    def _normalised(self, images: Tensor) -> Tensor:
        """Of images [B, 1 or 3, H, W], or of one [1 or 3, H, W]."""
        batch = images if images.ndim == 4 else images[None]
        batch = batch.float().sub(self.mean).mul(self.scale).expand(-1, 3, -1, -1)
        batch = batch.contiguous(memory_format=self.memory_format)
        self.shape = [*batch.shape[1:]]
        return batch if images.ndim == 4 else batch[0]

    def pixels(self, images: Any) -> Any:
        """Images of a batch as they were before they were normalised, uint8 [..., 3, H, W] on the CPU."""

        def restored(images: Tensor) -> Tensor:
            mean, scale = (values.view(-1, 1, 1) for values in (self.mean, self.scale))
            return images.div(scale).add(mean).round().clamp(0, 255).byte().cpu()

        return mapped(restored, images)
