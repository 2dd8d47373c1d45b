"""Images for training and evaluation: a source by name, shared out over the ranks, delivered on the device."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from syncbn.trainer.data.batches import Batches as Batches
from syncbn.trainer.data.options import AUTO, DataConfig, normalisation, refuse_of_others
from syncbn.trainer.data.options import AugmentConfig as AugmentConfig
from syncbn.trainer.data.sampler import EvalSampler, Key, TrainSampler
from syncbn.trainer.data.samples import Batch as Batch
from syncbn.trainer.data.samples import Samples
from syncbn.trainer.data.sets.images import Images, Spread, fingerprint, wide_or_high
from syncbn.trainer.data.sets.masks import IGNORED as IGNORED
from syncbn.trainer.data.sets.masks import class_pixels as class_pixels
from syncbn.trainer.data.sets.sources import TARGETS as TARGETS
from syncbn.trainer.data.sets.sources import refuse_missing as refuse_missing
from syncbn.trainer.data.sets.sources import source_of
from syncbn.trainer.data.workers import HeedRankAlone
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World

SHOWN = 8  # eval images, of which tasks make pictures


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
    refuse_of_others(config, targets)
    train, test = _images(config, targets)
    ranks = {"rank": world.rank, "world_size": world.size}
    batch = f"data.batch_per_rank={config.batch_per_rank} on {world.size} ranks"
    if global_batch is None:
        assert isinstance(config.batch_per_rank, int)
        global_batch = config.batch_per_rank * world.size
    elif config.batch_per_rank == AUTO or global_batch != config.batch_per_rank * world.size:
        batch = f"a global batch of {global_batch}"
    stream: dict[str, Any] = {"global_batch": global_batch, "seed": seed, "accumulate": accumulate, **ranks}
    if config.group_by_aspect_ratio:
        stream["groups"] = wide_or_high(train)
    sampler = TrainSampler(len(train), start=start, **stream)
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"{batch}, {accumulate} times a step, takes {sampler.step_size} images and there are {len(train)}: lower it"
        )
    training, evaluation = _samples(config, train, test, seed=seed, targets=targets, stacked=stacked)
    eval_sampler = EvalSampler(len(test), batch_per_rank=config.eval_batch_per_rank, **ranks)
    shown = min(SHOWN, len(test))

    def batches(samples: Samples, sampler: Iterable[list[Key]], workers: int = config.workers) -> Batches:
        loader = _loader(samples, sampler, workers, world.device)
        return Batches(loader, normalisation(config, targets), world.device, memory_format)

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
    source = source_of(config, targets)
    source.refuse(config)
    train, test = source.build(config)
    if config.train_images > len(train):
        raise UserError(f"data.train_images={config.train_images}: there are {len(train)} training images")
    return Spread(train, config.train_images) if config.train_images else train, test


def _samples(
    config: DataConfig, train: Images, test: Images, *, seed: int, targets: str, stacked: bool
) -> tuple[Samples, Samples]:
    """The same, as they go into batches."""
    from syncbn.trainer.data import transforms  # only now: torchvision takes seconds

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
    # With masks or boxes, images are evaluated as they are, each at its own size
    return training, Samples(test, for_eval, stacked=stacked and targets == "classes", **common)


def _as_they_are(batch: Any) -> Any:
    return batch
