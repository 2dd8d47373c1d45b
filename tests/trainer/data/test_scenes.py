"""Digit scenes: real scans on textured canvases, with masks, each drawn from its number alone."""

import torch

from syncbn.trainer import data
from syncbn.trainer.data import AugmentConfig, DataConfig
from syncbn.trainer.data.sets.scenes import LARGEST, SMALLEST, Scenes
from syncbn.trainer.data.sets.sources import digit_scenes, digits
from syncbn.trainer.world import World

CPU = torch.device("cpu")


def config(**options):
    return DataConfig(name="digit_scenes", scenes=40, mean=[0.5] * 3, std=[0.25] * 3, **options)


def test_a_scene_depends_on_seed_and_number_alone():
    train, test = digit_scenes(config())
    assert (len(train), len(test), train.classes[:2]) == (40, 10, ("background", "0"))
    again, _ = digit_scenes(config())
    for i in 3, 0:
        assert all(map(torch.equal, train[i], again[i]))
    assert not torch.equal(train[1][1], Scenes(train.scans, train.labels, 40, seed=2)[1][1])


def test_masks_are_of_the_classes_and_lie_on_their_digits():
    train, _ = digit_scenes(config())
    seen = set()
    for i in range(40):
        image, mask = train[i]
        assert (image.dtype, mask.dtype, image.shape[1:]) == (torch.uint8, torch.uint8, mask.shape)
        assert all(SMALLEST <= side <= LARGEST for side in mask.shape)
        covered = mask > 0
        assert 0.02 < covered.double().mean() < 0.5
        # A digit stands out from its canvas, so that a mask that is not its own would show
        difference = image.double()[:, covered].mean(1) - image.double()[:, ~covered].mean(1)
        seen |= set(mask.unique().tolist())
        assert difference.abs().max() > 3
    assert seen == set(range(11))


def test_boxes_are_around_the_digits_of_a_scene():
    train, _ = digit_scenes(config())
    for i in range(40):
        scene = train.scene(i)
        assert torch.equal(scene.mask, train[i][1])
        assert (scene.boxes.shape, scene.boxes.dtype) == ((len(scene.labels), 4), torch.int64)
        covered = torch.zeros_like(scene.mask)
        for (left, top, right, bottom), label in zip(scene.boxes.tolist(), scene.labels, strict=True):
            digit = scene.mask[top:bottom, left:right] == label
            assert all(edge.any() for edge in (digit[0], digit[-1], digit[:, 0], digit[:, -1])), "it is no larger"
            covered[top:bottom, left:right] = 1
        assert not scene.mask[covered == 0].any(), "and no smaller"


def test_scans_of_training_and_of_eval_do_not_mix():
    train, test = digit_scenes(config())
    of_digits = digits(config())
    assert (len(train.scans), len(test.scans)) == tuple(map(len, of_digits))
    assert not {scan.numpy().tobytes() for scan in test.scans} & {scan.numpy().tobytes() for scan in train.scans}


def batches_of(**options):
    built = data.build(config(**options), World(0, 1, CPU), seed=3, targets="masks")
    return next(iter(built.train)), next(iter(built.eval))


def test_an_image_and_its_mask_go_through_the_same_augmentation():
    """Where the image is padded the mask counts for nothing; a flip that only one of both had would show."""
    augment = AugmentConfig(scale=[0.5, 2.0], flip=True)
    train, _ = batches_of(size=128, batch_per_rank=16, augment=augment)
    assert train.images.shape == (16, 3, 128, 128)
    assert (train.labels.shape, train.labels.dtype) == ((16, 128, 128), torch.uint8)
    assert set(train.labels.unique().tolist()) <= {*range(11), 255}
    padded = train.images.abs().amax(1) < 0.02  # the mean, normalised
    ignored = train.labels == 255
    assert 0.2 < ignored.double().mean() < 0.9
    assert (padded == ignored).double().mean() > 0.99
    for image, mask in zip(train.images, train.labels, strict=True):
        digit, canvas = (mask > 0) & (mask < 255), mask == 0
        if digit.sum() > 50:
            edges = (image[:, 1:, 1:] - image[:, :-1, :-1]).abs().mean(0)
            assert edges[digit[1:, 1:]].mean() > edges[canvas[1:, 1:]].mean()


def test_eval_scenes_keep_their_own_sizes():
    _, evaluation = batches_of(size=64)
    images, masks = evaluation.images, evaluation.labels
    assert len({image.shape for image in images}) > 1
    assert [image.shape[1:] for image in images] == [mask.shape for mask in masks]
