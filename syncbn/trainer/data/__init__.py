"""Images for training and evaluation: a source by name, shared out over the ranks, delivered on the device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from syncbn.trainer.data.images import Images, Spread, fingerprint
from syncbn.trainer.data.masks import IGNORED as IGNORED
from syncbn.trainer.data.masks import class_pixels as class_pixels
from syncbn.trainer.data.sampler import EvalSampler, Key, TrainSampler
from syncbn.trainer.data.samples import Batch, Samples
from syncbn.trainer.data.sources import SOURCES, refuse_missing
from syncbn.trainer.data.sources import TARGETS as TARGETS
from syncbn.trainer.data.structure import mapped
from syncbn.trainer.data.workers import HeedRankAlone, signals_held
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option
from syncbn.trainer.world import World

SHOWN = 8  # eval images, of which tasks make pictures
# Augmentations that only images with these targets go through
OF_TARGETS = {"classes": ("pad", "policy", "erase", "mixup", "cutmix"), "masks": ("scale", "photometric")}
AUTO = "auto"  # data.batch_per_rank, to be found out on the ranks: rank/batch_size.py


@dataclass
class AugmentConfig:
    pad: int = option(0, "pixels of black border before a random crop to the old size")
    flip: bool = option(False, "left-right, half the time")
    scale: list[float] = option(lambda: [1.0, 1.0], "with masks: a factor of the size, drawn from this range")
    photometric: bool = option(False, "with masks: brightness, contrast, saturation and hue, by chance")
    policy: str = option("none", "none, rand (RandAugment) or trivial (TrivialAugmentWide)")
    erase: float = option(0.0, "probability of blanking a random rectangle")
    mixup: float = option(0.0, "alpha of the Beta distribution; 0 is off")
    cutmix: float = option(0.0, "alpha of the Beta distribution; 0 is off; with mixup too, one of both is drawn")

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"data.augment.scale={self.scale}: give two factors above 0, the smaller first: [0.5,2.0]")
        if self.policy not in ("none", "rand", "trivial"):
            raise UserError(f"data.augment.policy={self.policy}: choose one of none, rand, trivial")
        for name in "pad", "mixup", "cutmix":
            if getattr(self, name) < 0:
                raise UserError(f"data.augment.{name}={getattr(self, name)}: give 0 (off) or more")
        if not 0 <= self.erase <= 1:
            raise UserError(f"data.augment.erase={self.erase}: give a probability between 0 and 1")


@dataclass
class DataConfig:
    name: str = option("digits", "one of the sources")
    root: str = option("data", "folder of the data set")
    download: bool = option(False, "fetch it into root if it is not there (torchvision's sets)")
    batch_per_rank: int | str = option(
        4, "training images on each rank in each forward; auto: what fits a GPU, or is fastest"
    )
    eval_batch_per_rank: int = option(256, "eval statistics are fixed, so its batch is only a matter of speed")
    workers: int = option(0, "processes per rank that decode and augment; 0: the rank itself")
    cache: bool = option(False, "keep decoded images in memory")
    skip_broken: bool = option(False, "leave unreadable images out, counted, instead of stopping")
    size: int = option(
        0, "side in pixels to crop to (classes: random scale in training, centre in eval); 0: as they are"
    )
    mean: list[float] = option(lambda: [0.5], "of pixels in 0..1, per colour")
    std: list[float] = option(lambda: [0.25], "of pixels in 0..1, per colour; a pixel becomes (pixel - mean) / std")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train_images: int = option(0, "train on so many only, evenly spread over the data set; 0: all")
    ignore_index: int = option(IGNORED, "with masks: the number of pixels that count for nothing, and of no class")
    scenes: int = option(1200, "data=digit_scenes: training scenes; a quarter as many for eval")
    fake_samples: int = option(512, "data=fake: training images; a fifth as many for eval")
    fake_classes: int = option(10, "data=fake: classes")

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise UserError(f"data.name={self.name}: choose one of {', '.join(SOURCES)}")
        if self.batch_per_rank != AUTO and (not isinstance(self.batch_per_rank, int) or self.batch_per_rank < 1):
            raise UserError(f"data.batch_per_rank={self.batch_per_rank}: give 1 or more, or auto")
        for name in "eval_batch_per_rank", "scenes", "fake_samples", "fake_classes":
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: give 1 or more")
        for name in "workers", "size", "train_images":
            if getattr(self, name) < 0:
                raise UserError(f"data.{name}={getattr(self, name)}: give 0 or more")
        if not 0 <= self.ignore_index <= 255:
            raise UserError(f"data.ignore_index={self.ignore_index}: give a number from 0 to 255")
        if not (len(self.mean) == len(self.std) and len(self.mean) in (1, 3) and min(self.std) > 0):
            raise UserError(f"data.mean={self.mean} data.std={self.std}: give 1 or 3 of each, std above 0")


class Batches:
    """Batches of a DataLoader on the device: images [B, 3, H, W] normalised, labels as they are."""

    def __init__(
        self, loader: DataLoader, config: DataConfig, device: torch.device, memory_format: torch.memory_format
    ):
        self.loader, self.device, self.memory_format = loader, device, memory_format
        self.shape: list[int] | None = None  # [3, H, W] of the images of the last batch
        self.mean = 255 * torch.tensor(config.mean, device=device).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(config.std, device=device).view(1, -1, 1, 1))

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


class Data(NamedTuple):
    """train: endless batches of this rank; eval: this rank's share of every eval image, once per iteration.

    sample: the first batches of training, from step 0 with each iteration, which leaves train as it is.
    shown: one batch of SHOWN eval images, evenly spread over all, on every rank the same.
    global_batch: training images of one forward of all ranks together. even: whether each rank has as many of them.
    skips: whether a batch may lack some. fingerprint: what the data set holds, the same wherever it lies. notes: what
    of it is left out, in words. training: the images that train takes its samples of.
    """

    train: Batches
    eval: Batches
    sample: Batches
    shown: Batches
    steps_per_epoch: int
    classes: list[str]
    global_batch: int
    even: bool
    skips: bool
    fingerprint: dict[str, Any]
    notes: list[str]
    training: Images


def build(
    config: DataConfig,
    world: World,
    *,
    seed: int,
    accumulate: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
    global_batch: int | None = None,
    start: int = 0,
    targets: str = "classes",
    stacked: bool = True,
) -> Data:
    """The data set of the config, shared out over the world's ranks.

    Args:
        global_batch: training images of one forward of all ranks together; None: config.batch_per_rank on each. With
            it, a run that goes on with another number of ranks keeps its steps. Required if that is auto.
        start: the optimiser step that train begins with.
        targets: what images must come with, one of TARGETS.
        stacked: whether the images of a batch are one tensor, or a list.
    """
    train, test = _images(config, targets)
    ranks = {"rank": world.rank, "world_size": world.size}
    batch = f"data.batch_per_rank={config.batch_per_rank} on {world.size} ranks"
    if global_batch is None:
        assert isinstance(config.batch_per_rank, int)
        global_batch = config.batch_per_rank * world.size
    elif config.batch_per_rank == AUTO or global_batch != config.batch_per_rank * world.size:
        batch = f"a global batch of {global_batch}"
    stream = {"global_batch": global_batch, "seed": seed, "accumulate": accumulate, **ranks}
    sampler = TrainSampler(len(train), start=start, **stream)
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"{batch}, {accumulate} times a step, takes {sampler.step_size} images and there are {len(train)}: lower it"
        )
    training, evaluation = _samples(config, train, test, seed=seed, targets=targets, stacked=stacked)
    eval_sampler = EvalSampler(len(test), batch_per_rank=config.eval_batch_per_rank, **ranks)
    shown = min(SHOWN, len(test))

    def batches(samples: Samples, sampler: Iterable[list[Key]], workers: int = config.workers) -> Batches:
        return Batches(_loader(samples, sampler, workers, world.device), config, world.device, memory_format)

    return Data(
        batches(training, sampler),
        batches(evaluation, eval_sampler),
        batches(training, TrainSampler(len(train), **stream), workers=0),
        batches(evaluation, [[(0, i * len(test) // shown) for i in range(shown)]], workers=0),
        sampler.steps_per_epoch,
        [*train.classes],
        global_batch,
        len(sampler.mine) * world.size == global_batch,
        config.skip_broken,
        fingerprint(train, test),
        [*dict.fromkeys([*train.notes, *test.notes])],
        train,
    )


def _loader(samples: Samples, sampler: Iterable[list[Key]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]  (any iterable of keys)
        num_workers=workers,
        collate_fn=_as_they_are,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=HeedRankAlone(),
        generator=torch.Generator(),  # or the loader would draw from the process's
    )


def _images(config: DataConfig, targets: str) -> tuple[Images, Images]:
    """Those to train on, and those for evaluation."""
    refuse_missing(config, targets)
    train, test = SOURCES[config.name](config)
    if config.train_images > len(train):
        raise UserError(f"data.train_images={config.train_images}: there are {len(train)} training images")
    return Spread(train, config.train_images) if config.train_images else train, test


def _samples(
    config: DataConfig, train: Images, test: Images, *, seed: int, targets: str, stacked: bool
) -> tuple[Samples, Samples]:
    """The same, as they go into batches."""
    from syncbn.trainer.data import transforms  # only now: torchvision takes seconds

    _refuse_of_others(config.augment, targets)
    mix = transforms.for_batches(config.augment, len(train.classes))
    if mix and not stacked:
        raise UserError(
            "data.augment.mixup and data.augment.cutmix mix images of one size, and those of this task have each its "
            "own: set both to 0"
        )
    common: dict[str, Any] = {
        "seed": seed,
        "skip_broken": config.skip_broken,
        "cache": config.cache,
        "targets": targets,
    }
    for_training, for_eval = transforms.of_targets(config, targets)
    training = Samples(train, for_training, mix=mix, stacked=stacked, **common)
    # With masks, images are evaluated as they are, each at its own size
    return training, Samples(test, for_eval, stacked=stacked and targets == "classes", **common)


def _refuse_of_others(augment: AugmentConfig, targets: str) -> None:
    """Raise UserError for an augmentation that images with these targets do not go through."""
    plain = AugmentConfig()
    for kind, keys in OF_TARGETS.items():
        for key in keys:
            if kind != targets and getattr(augment, key) != getattr(plain, key):
                raise UserError(
                    f"data.augment.{key}={getattr(augment, key)} is for images with {kind}, and those of this task "
                    f"come with {targets}: leave it out"
                )


def _as_they_are(batch: Any) -> Any:
    return batch
