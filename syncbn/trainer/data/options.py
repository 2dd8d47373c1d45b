"""The keys of data.*, what each may be, and what does not fit what images come with."""

from dataclasses import dataclass, field

from syncbn.trainer.data.sets.masks import IGNORED
from syncbn.trainer.data.sets.sources import NAMES
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option

# Augmentations that do not fit every image, and what those come with that go through them
OF_TARGETS = {
    **dict.fromkeys(("pad", "policy", "erase", "mixup", "cutmix"), ("classes",)),
    **dict.fromkeys(("scale", "photometric"), ("masks", "boxes", "instances")),
    "iou_crop": ("boxes", "instances"),
}
WITH_BOXES = ("boxes", "instances")
AUTO = "auto"  # data.batch_per_rank, to be found out on the ranks: rank/batch_size.py


@dataclass
class AugmentConfig:
    pad: int = option(0, "pixels of black border before a random crop to the old size")
    flip: bool = option(False, "left-right, half the time")
    vertical_flip: bool = option(False, "upside down, half the time")
    scale: list[float] = option(lambda: [1.0, 1.0], "with masks or boxes: a factor of the size, drawn from this range")
    photometric: bool = option(False, "with masks or boxes: brightness, contrast, saturation and hue, by chance")
    iou_crop: bool = option(False, "with boxes: crop so that some object overlaps with it by a drawn share (SSD)")
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
    skip_broken: bool = option(False, "leave unreadable images and broken boxes out, counted, instead of stopping")
    size: int = option(
        0, "side in pixels to crop to (classes: random scale in training, centre in eval); 0: as they are"
    )
    mean: list[float] = option(lambda: [0.5], "of pixels in 0..1, per colour")
    std: list[float] = option(lambda: [0.25], "of pixels in 0..1, per colour; a pixel becomes (pixel - mean) / std")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    group_by_aspect_ratio: bool = option(
        False, "with boxes: training batches of wide or of high images alone, as far as they come out, to pad less"
    )
    train_images: int = option(0, "train on so many only, evenly spread over the data set; 0: all")
    ignore_index: int = option(IGNORED, "with masks: the number of pixels that count for nothing, and of no class")
    scenes: int = option(1200, "data=digit_scenes: training scenes; a quarter as many for eval")
    fake_samples: int = option(512, "data=fake: training images; a fifth as many for eval")
    fake_classes: int = option(10, "data=fake: classes")

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"data.name={self.name}: choose one of {', '.join(NAMES)}")
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


def refuse_of_others(config: DataConfig, targets: str) -> None:
    """Raise UserError for a key that images with these targets have no use for."""
    plain, plain_augment = DataConfig(), AugmentConfig()
    for key, kinds in OF_TARGETS.items():
        if targets not in kinds and getattr(config.augment, key) != getattr(plain_augment, key):
            raise UserError(
                f"data.augment.{key}={getattr(config.augment, key)} is for images with {' or '.join(kinds)}, and those "
                f"of this task come with {targets}: leave it out"
            )
    if targets in WITH_BOXES and (config.mean, config.std) != (plain.mean, plain.std):
        raise UserError(
            f"data.mean={config.mean} data.std={config.std}: images with {targets} reach the model in 0..1, as "
            "detectors normalise them: leave both out, or undo those of a file with data.mean=[0.5] data.std=[0.25]"
        )
    if config.group_by_aspect_ratio and (targets not in WITH_BOXES or config.size):
        why = f"data.size={config.size} gives all one size" if targets in WITH_BOXES else f"these have {targets}"
        raise UserError(
            f"data.group_by_aspect_ratio=true is for images with boxes that keep their own sizes, and {why}: leave it "
            "out"
        )


def normalisation(config: DataConfig, targets: str) -> tuple[list[float], list[float]]:
    """What is taken from a pixel in 0..1, and what it is then divided by. With boxes: nothing, as detectors do that."""
    return ([0.0], [1.0]) if targets in WITH_BOXES else (config.mean, config.std)
