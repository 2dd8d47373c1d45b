"""One batch of samples from their keys: decoded, augmented, stacked and mixed, each by its own seed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from syncbn.trainer.data.sampler import Key, seed_of
from syncbn.trainer.data.sets.images import Images
from syncbn.trainer.data.sets.pixels import Unreadable, unreadable
from syncbn.trainer.errors import UserError

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Batch(NamedTuple):
    """Samples of one rank: any structure of tensors, as the task takes it.

    Of classification: images [B, 1 or 3, H, W] in 0..255, labels [B], or [B, K] weights after mixing. Images of
    different sizes are a list, and so are targets with boxes. skipped: broken images that were left out. places: those
    of the samples in the data set.
    """

    images: Any
    labels: Any
    skipped: int = 0
    places: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.images)


class Samples(torch.utils.data.Dataset):
    """Images as a data set of whole batches: `__getitems__` takes the keys of a batch.

    What is drawn at random for a sample depends on (seed, epoch, index) alone: not on its rank, worker or neighbours.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Tensor, Any], tuple[Tensor, Any]],
        *,
        seed: int,
        mix: "v2.Transform | None" = None,
        skip_broken: bool = False,
        cache: bool = False,
        stacked: bool = True,
        targets: str = "classes",
    ):
        """
        transform: of an image and its target. targets: what these are, one of TARGETS.
        stacked: whether the images of a batch, and masks, are one tensor, or a list, each of its own size.
        """
        self.images, self.transform, self.mix = images, transform, mix
        self.seed, self.skip_broken, self.stacked, self.targets = seed, skip_broken, stacked, targets
        self.shape: torch.Size | None = None  # of the images so far: what an empty batch pretends to hold
        self.decoded: dict[int, tuple[Tensor, Any]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        state = torch.get_rng_state()
        try:
            return self._batch(keys)
        except UserError as error:
            return error  # a DataLoader's worker would wrap a raised one in its traceback
        finally:
            torch.set_rng_state(state)

    def _batch(self, keys: list[Key]) -> Batch:
        images, targets, kept = [], [], []
        for epoch, index in keys:
            try:
                image, target = self._load(index)
            except Unreadable:
                if not self.skip_broken:
                    raise
                continue
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            image, target = self.transform(image, target)
            images.append(image)
            targets.append(target)
            kept.append((epoch, index))
        places = tuple(index for _, index in kept)
        batch = Batch(
            self._stacked(images) if self.stacked else images,
            self._joined(targets),
            len(keys) - len(kept),
            places,
        )
        return batch if self.mix is None else self._mixed(batch, kept, self.mix)

    def _stacked(self, images: list[Tensor]) -> Tensor:
        if len({image.shape for image in images}) > 1:
            shapes = " and ".join(str(tuple(s)) for s in sorted({image.shape for image in images})[:2])
            raise UserError(f"images have different shapes {shapes}: data.size=N brings them to N×N")
        if not images:
            return torch.zeros(0, *self._shape(), dtype=torch.uint8)
        self.shape = images[0].shape
        return torch.stack(images)

    def _joined(self, targets: list[Any]) -> Any:
        if self.targets == "classes":
            return torch.tensor(targets, dtype=torch.int64)
        if not self.stacked or self.targets in ("boxes", "instances"):
            return targets
        return torch.stack(targets) if targets else torch.zeros(0, *self._shape()[1:], dtype=torch.uint8)

    def _mixed(self, batch: Batch, keys: list[Key], mix: "v2.Transform") -> Batch:
        # In neighbouring pairs, so that what is mixed does not depend on how many ranks share a step's samples
        images, labels = batch.images.float(), []
        for begin in range(0, len(keys), 2):
            torch.default_generator.manual_seed(seed_of(self.seed, *keys[begin], 1))
            images[begin : begin + 2], pair = mix(images[begin : begin + 2], batch.labels[begin : begin + 2])
            labels.append(pair)
        return batch._replace(images=images, labels=torch.cat(labels) if labels else batch.labels)

    def _shape(self) -> torch.Size:
        if self.shape is None:
            try:
                self.shape = self.transform(*self._load(0))[0].shape
            except UserError:  # it is broken, and another rank's to tell
                return torch.Size([3, 32, 32])
        return self.shape

    def _load(self, index: int) -> tuple[Tensor, Any]:
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        try:
            sample = self.images[index]
        except UserError:
            raise
        except Exception as error:  # decoders raise many kinds
            raise unreadable(self.images.where(index), error) from error
        if self.decoded is not None:
            self.decoded[index] = sample
        return sample
