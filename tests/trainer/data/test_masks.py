"""Images with masks: which files are read, what their numbers mean, and one line for each thing that is wrong."""

import os
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torchvision import datasets

from syncbn.trainer import data
from syncbn.trainer.data import AugmentConfig, DataConfig, class_pixels
from syncbn.trainer.data.sets.masks import VOC_CLASSES, train_and_eval
from syncbn.trainer.data.sets.sources import SOURCES, refuse_missing
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World
from tests.trainer.images import write_image

CPU = torch.device("cpu")
WITH_MASKS = SOURCES["masks"]
CLASSES = ("sky", "road", "tree", "void")
SIDE = 8
CAMVID = Path(__file__).parents[4] / "shared" / "data" / "camvid-small.tar.xz"


def write_mask(path: Path, numbers: numpy.ndarray, mode: str | None = None) -> None:
    """A PNG, or a TIFF of numbers that PNG lacks, whatever the path ends in. mode: Pillow's, if not as the numbers'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    assert mode in (None, image.mode)
    image.save(path, "TIFF" if image.mode in ("F", "I") else "PNG")


def numbers_of(index: int, most: int = 3) -> numpy.ndarray:
    return numpy.random.default_rng(index).integers(0, most + 1, (SIDE, SIDE), dtype=numpy.uint8)


def mask_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), number: int = 4) -> Path:
    """Images with masks of the numbers 0 to 3, of which the last is void."""
    for part in parts:
        for i in range(number):
            write_image(root / part / "images" / f"{i}.jpg", i, SIDE)
            write_mask(root / part / "masks" / f"{i}.png", numbers_of(i))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def config_of(root: Path, **options) -> DataConfig:
    return DataConfig(**{"name": "mask_folder", "root": str(root), "ignore_index": 3, "batch_per_rank": 1, **options})


def built_of(config: DataConfig) -> data.Data:
    return data.build(config, World(0, 1, CPU), seed=0, targets="masks")


def samples_of(built: data.Data) -> list:
    return [*islice(built.train, built.steps_per_epoch), *built.eval]


def test_a_folder_is_read_by_name_and_what_is_ignored_is_no_class(tmp_path):
    train, test = WITH_MASKS["mask_folder"].build(config_of(mask_folder(tmp_path)))
    assert (len(train), len(test), [*train.classes]) == (4, 4, ["sky", "road", "tree"])
    assert train.notes == ["void (3) is data.ignore_index, and no class"]
    for i in range(4):
        image, mask = train[i]
        want = torch.from_numpy(numbers_of(i)).where(torch.from_numpy(numbers_of(i) < 3), 255)
        assert (image.dtype, image.shape, mask.dtype) == (torch.uint8, (3, SIDE, SIDE), torch.uint8)
        assert torch.equal(mask, want)
        assert train.where(i) == f"{tmp_path}/train/images/{i}.jpg"


def test_classes_behind_the_ignored_number_close_up(tmp_path):
    train, _ = WITH_MASKS["mask_folder"].build(config_of(mask_folder(tmp_path), ignore_index=1))
    assert [*train.classes] == ["sky", "tree", "void"]
    table = torch.tensor([0, 255, 1, 2], dtype=torch.uint8)
    assert torch.equal(train[0][1], table[torch.from_numpy(numbers_of(0)).long()])


# Each holds the same numbers; the palette's colours are of no account
KINDS: dict[str, tuple[Callable[[numpy.ndarray], numpy.ndarray], str]] = {
    "grey": (lambda numbers: numbers, "L"),
    "a palette": (lambda numbers: numbers, "P"),
    "16 bits": (lambda numbers: numbers.astype("uint16"), "I;16"),
    "32 bits": (lambda numbers: numbers.astype("int32"), "I"),
    "1 bit": (lambda numbers: numbers > 0, "1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_whole_numbers_are_read_as_they_are(tmp_path, kind):
    as_kind, mode = KINDS[kind]
    numbers = numbers_of(0, most=1)
    root = mask_folder(tmp_path)
    write_mask(root / "train" / "masks" / "0.png", as_kind(numbers) if mode != "P" else numbers, mode)
    train, _ = train_and_eval(root, 3)
    assert torch.equal(train.mask(0), torch.from_numpy(numbers))


def test_images_may_lie_in_folders_and_have_any_ending(tmp_path):
    root = mask_folder(tmp_path, number=1)
    write_image(root / "train" / "images" / "ulm" / "0.png", 5, SIDE)
    write_mask(root / "train" / "masks" / "ulm" / "0.PNG", numbers_of(5))
    (root / "train" / "images" / "._0.jpg").touch()
    (root / "train" / "masks" / "readme.txt").touch()
    train, _ = train_and_eval(root, 3)
    assert [os.path.relpath(train.where(i), root) for i in range(len(train))] == [
        "train/images/0.jpg", "train/images/ulm/0.png",
    ]  # fmt: skip
    assert f"left out of {root}/train/masks: 1 files that are no masks (1 × .txt)" in train.notes


def test_of_test_and_val_that_is_used_which_has_masks(tmp_path):
    root = mask_folder(tmp_path, ("train", "val"))
    assert train_and_eval(root, 3)[1].where(0).startswith(f"{root}/val/")
    write_image(root / "test" / "images" / "0.jpg", 0)
    _, val = train_and_eval(root, 3)
    assert val.where(0).startswith(f"{root}/val/")
    assert val.notes[0].startswith(f"evaluated on {root}/val, as {root}/test has no folder 'masks'")
    write_mask(root / "test" / "masks" / "0.png", numbers_of(0))
    assert train_and_eval(root, 3)[1].notes[0] == f"evaluated on {root}/test"


def without(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def emptied(*folders: str) -> Callable[[Path], object]:
    return lambda root: [file.unlink() for folder in folders for file in (root / folder).iterdir()]


def mask_of(numbers: numpy.ndarray, file: str = "train/masks/1.png") -> Callable[[Path], object]:
    return lambda root: write_mask(root / file, numbers)


WRONG = numpy.full((SIDE, SIDE), 3, dtype=numpy.uint8)
WRONG[4, 5] = 7

# What is done to a whole folder, and what the line says of it; at the door, before any rank starts
LISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no train": (lambda root: (root / "train").rename(root / "tr"), "data.root={root} has no folder 'train': a mask"),
    "no masks": (lambda root: (root / "train/masks").rename(root / "m"), "{root}/train has no folder 'masks': a mask"),
    "no images": (lambda root: (root / "train/images").rename(root / "i"), "{root}/train has no folder 'images'"),
    "no eval": (lambda root: (root / "test").rename(root / "t"), "data.root={root} has no folder 'test' (or 'val')"),
    "an empty split": (emptied("train/images", "train/masks"), "{root}/train/images has no image"),
    "an empty eval split": (emptied("test/images", "test/masks"), "{root}/test/images has no image"),
    "no images for masks": (emptied("train/images"), "{root}/train/images has no image"),
    "a mask without an image": (
        without("train/images/2.jpg"), "{root}/train/masks/2.png has no file of its name in {root}/train/images",
    ),
    "an image without a mask": (
        without("train/masks/2.png"), "{root}/train/images/2.jpg has no file of its name in {root}/train/masks",
    ),
    "images without masks": (
        emptied("test/masks"), "{root}/test/images/0.jpg (and 3 more) has no file of its name in {root}/test/masks",
    ),
    "masks as JPEG": (
        lambda root: (root / "train/masks/1.png").rename(root / "train/masks/1.jpg"),
        "{root}/train/images/1.jpg has no file of its name in {root}/train/masks",
    ),
    "two images of a name": (
        lambda root: write_image(root / "train/images/1.png", 1),
        "{root}/train/images/1.jpg has a second image beside it with its name: remove one",
    ),
    "no classes.txt": (without("classes.txt"), "{root}/classes.txt cannot be read (No such file or directory): write"),
    "classes.txt in Latin 1": (
        lambda root: (root / "classes.txt").write_bytes(b"stra\xdfe\nhimmel\n"), "cannot be read (it is not UTF-8)",
    ),
    "an empty classes.txt": (lambda root: (root / "classes.txt").write_text("\n"), "names 0 classes: give 2 to 255"),
    "one class": (lambda root: (root / "classes.txt").write_text("sky\n"), "names 1 classes: give 2 to 255, a line"),
    "a class twice": (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), "names a twice: give each class a"),
    "too many classes": (
        lambda root: (root / "classes.txt").write_text("\n".join(map(str, range(256)))), "names 256 classes: give 2 to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_files_that_do_not_fit_are_refused_at_the_door(tmp_path, case):
    spoil, said = LISTS[case]
    spoil(mask_folder(tmp_path))
    with pytest.raises(UserError) as raised:
        refuse_missing(config_of(tmp_path), "masks")
    assert said.format(root=tmp_path) in str(raised.value)


def test_one_class_and_what_is_ignored_are_refused(tmp_path):
    (mask_folder(tmp_path) / "classes.txt").write_text("sky\nvoid\n")
    with pytest.raises(UserError, match=r"/classes.txt has one class, sky: there is nothing to tell it from"):
        refuse_missing(config_of(tmp_path, ignore_index=1), "masks")


# What a file of training holds, and the line on it; whether it is seen before anything is decoded
FILES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "RGB": (
        mask_of(numpy.zeros((SIDE, SIDE, 3), "uint8")),
        "has RGB pixels, and those of a mask are numbers of classes: save the index of the class in each pixel", True,
    ),
    "RGBA": (mask_of(numpy.zeros((SIDE, SIDE, 4), "uint8")), "has RGBA pixels", True),
    "grey with alpha": (mask_of(numpy.zeros((SIDE, SIDE, 2), "uint8")), "has LA pixels", True),
    "floats": (mask_of(numpy.zeros((SIDE, SIDE), "float32")), "has F pixels", True),
    "another size": (
        mask_of(numbers_of(0)[:, :5]),
        "has 5×8 pixels and its image {root}/train/images/1.jpg 8×8: make them one size", True,
    ),
    "turned": (mask_of(numpy.zeros((4, SIDE), "uint8")), "has 8×4 pixels and its image", True),
    "beyond the classes": (
        mask_of(WRONG),
        "has pixels of the number 7, of no class: the 3 classes are 0 to 2, and 3 counts for nothing (data.ignore_i",
        False,
    ),
    "255, which is not what is ignored": (mask_of(WRONG + 248), "has pixels of the number 251, of no class", False),
    "beyond 8 bits": (mask_of(WRONG.astype("uint16") * 100), "has pixels of the number 300, of no class", False),
    "below 0": (mask_of(WRONG.astype("int32") - 4), "has pixels of the number -1, of no class", False),
}  # fmt: skip


@pytest.mark.parametrize("skip_broken", [False, True], ids=["", "skip_broken"])
@pytest.mark.parametrize("case", FILES)
def test_a_mask_of_another_kind_ends_the_run_with_its_file(tmp_path, case, skip_broken):
    spoil, said, at_once = FILES[case]
    spoil(mask_folder(tmp_path))
    if at_once:
        with pytest.raises(UserError) as raised:
            built_of(config_of(tmp_path, skip_broken=skip_broken))
    else:
        built = built_of(config_of(tmp_path, skip_broken=skip_broken))
        with pytest.raises(UserError) as raised:
            samples_of(built)
    assert f"{tmp_path}/train/masks/1.png {said.format(root=tmp_path)}" in str(raised.value)


def test_what_no_head_shows_is_refused_when_its_turn_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("syncbn.trainer.data.sets.masks.HEADS", 1)
    for case in "RGB", "another size":
        spoil, said, _ = FILES[case]
        spoil(mask_folder(tmp_path))
        with pytest.raises(UserError) as raised:
            samples_of(built_of(config_of(tmp_path)))
        assert said.format(root=tmp_path) in str(raised.value)


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "cut in its head": lambda path: path.write_bytes(path.read_bytes()[:12]),
    "empty": lambda path: path.write_bytes(b""),
    "no image": lambda path: path.write_bytes(b"<html>404</html>"),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing.png")),
}


@pytest.mark.parametrize("file", ["masks/1.png", "images/1.jpg"])
@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_or_left_out_and_counted(tmp_path, spoil, file):
    spoil(mask_folder(tmp_path) / "train" / file)
    with pytest.raises(UserError, match=rf"^cannot read {tmp_path}/train/{file} \(.*data.skip_broken=true"):
        samples_of(built_of(config_of(tmp_path)))
    built = built_of(config_of(tmp_path, skip_broken=True))
    assert [batch.skipped for batch in samples_of(built)].count(1) == 1
    if file.startswith("masks"):
        assert class_pixels(built.training).sum() == sum((numbers_of(i) < 3).sum() for i in (0, 2, 3))


def test_pixels_are_counted_by_class_without_their_images(tmp_path):
    root = mask_folder(tmp_path, number=7)
    built = built_of(config_of(root))
    counts = [numpy.bincount(numbers_of(i).ravel(), minlength=4)[:3] for i in range(7)]
    emptied("train/images")(root)
    assert class_pixels(built.training).tolist() == sum(counts).tolist()
    assert class_pixels(built.training).dtype == torch.int64
    evenly = [counts[i] for i in (0, 2, 4)]
    assert class_pixels(built.training, most=3).tolist() == sum(evenly).tolist()


def test_pixels_are_counted_of_the_images_that_are_trained_on(tmp_path):
    built = built_of(config_of(mask_folder(tmp_path, number=7), train_images=2))
    counts = [numpy.bincount(numbers_of(i).ravel(), minlength=4)[:3] for i in (0, 3)]
    assert class_pixels(built.training).tolist() == sum(counts).tolist()


def test_pixels_are_counted_of_scenes_too():
    built = built_of(DataConfig(name="digit_scenes", scenes=3, batch_per_rank=1))
    masks = [built.training[i][1].flatten() for i in range(3)]
    assert class_pixels(built.training).tolist() == torch.cat(masks).bincount(minlength=11).tolist()


def test_an_image_smaller_than_the_crop_is_padded_and_what_is_added_counts_for_nothing(tmp_path):
    config = config_of(mask_folder(tmp_path), size=12, mean=[0.5] * 3, std=[0.25] * 3, batch_per_rank=4)
    batch = next(iter(built_of(config).train))
    assert (batch.images.shape, batch.labels.shape) == ((4, 3, 12, 12), (4, 12, 12))
    for mask, place in zip(batch.labels, batch.places, strict=True):
        assert (mask != 255).sum() == (numbers_of(place) < 3).sum()


def test_the_fingerprint_tells_names_and_classes_but_not_where_a_set_lies(tmp_path):
    roots = [mask_folder(tmp_path / name) for name in "ab"]
    digests = [built_of(config_of(root)).fingerprint for root in roots]
    assert digests[0] == digests[1]
    assert built_of(config_of(roots[0], ignore_index=1)).fingerprint != digests[0]
    for part in "images/3.jpg", "masks/3.png":
        path = roots[1] / "train" / part
        path.rename(path.with_stem("4"))
    assert built_of(config_of(roots[1])).fingerprint != digests[0]


def voc(root: Path) -> Path:
    """Two training images and one for eval in torchvision's layout, of the classes 0 to 3, with a border of 255."""
    base = root / "VOCdevkit" / "VOC2012"
    for i, (part, names) in enumerate((("train", ["a", "b"]), ("val", ["c"]))):
        for name in names:
            write_image(base / "JPEGImages" / f"{name}.jpg", i, SIDE)
            write_mask(base / "SegmentationClass" / f"{name}.png", numpy.where(WRONG == 7, 255, numbers_of(i)), "P")
        lists = base / "ImageSets" / "Segmentation" / f"{part}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(names) + "\n")
    return base


def cityscapes(root: Path) -> Path:
    """Every label id of Cityscapes in two training images and one for eval, of two towns."""
    for part, names in (("train", ["ulm/ulm_0", "bonn/bonn_0"]), ("val", ["jena/jena_0"])):
        for name in names:
            write_image(root / "leftImg8bit" / part / f"{name}_leftImg8bit.png", 1, SIDE)
            ids = numpy.arange(SIDE * SIDE, dtype=numpy.uint8).reshape(SIDE, SIDE)
            write_mask(root / "gtFine" / part / f"{name}_gtFine_labelIds.png", numpy.where(ids > 33, 0, ids))
    return root


def test_voc_has_its_classes_and_its_borders_count_for_nothing(tmp_path):
    voc(tmp_path)
    train, val = WITH_MASKS["voc_segmentation"].build(config_of(tmp_path, name="voc_segmentation", ignore_index=255))
    assert (len(train), len(val), [*train.classes]) == (2, 1, [*VOC_CLASSES])
    image, mask = train[1]
    assert image.shape == (3, SIDE, SIDE)
    assert torch.equal(mask, torch.from_numpy(numpy.where(WRONG == 7, 255, numbers_of(0)).astype("uint8")))
    assert len(samples_of(built_of(config_of(tmp_path, name="voc_segmentation", ignore_index=255)))) == 3


def test_what_else_is_ignored_of_a_set_of_torchvision_is_no_class_of_it(tmp_path):
    voc(tmp_path)
    train, _ = WITH_MASKS["voc_segmentation"].build(config_of(tmp_path, name="voc_segmentation", ignore_index=0))
    assert [*train.classes] == [*VOC_CLASSES[1:]]
    assert {*train[0][1].unique().tolist()} <= {0, 1, 2, 255}
    train, _ = WITH_MASKS["cityscapes"].build(config_of(cityscapes(tmp_path), name="cityscapes", ignore_index=7))
    assert [*train.classes][:2] == ["sidewalk", "building"]
    assert train[0][1].flatten()[6:12].tolist() == [255, 255, 0, 255, 255, 1]


def test_voc_is_fetched_once(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "torchvision.datasets.voc.download_and_extract_archive", lambda *_, **__: fetched.append(voc(root))
    )
    root = tmp_path / "data"
    config = config_of(root, name="voc_segmentation", ignore_index=255, download=True)
    for _ in range(2):
        train, val = WITH_MASKS["voc_segmentation"].build(config)
        assert (len(train), len(val), len(fetched)) == (2, 1, 1)


def test_ids_of_cityscapes_become_those_of_training(tmp_path):
    train, val = WITH_MASKS["cityscapes"].build(config_of(cityscapes(tmp_path), name="cityscapes", ignore_index=255))
    assert (len(train), len(val), len(train.classes)) == (2, 1, 19)
    assert [*train.classes][:3] == ["road", "sidewalk", "building"]
    assert "/bonn/" in train.where(0), "in order, whatever that of the disk is"
    want = {label.id: label.train_id for label in datasets.Cityscapes.classes if label.id >= 0}
    assert train[0][1].flatten()[:34].tolist() == [want[i] for i in range(34)]
    assert not train.notes


# What is done to the whole set, and what stands in the brackets of the line on it
SETS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "VOC is not there": ("voc_segmentation", lambda root: (root / "VOCdevkit").rename(root / "v"), "not found or corr"),
    "no list": (
        "voc_segmentation",
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink(), "No such file or directory",
    ),
    "an empty list": (
        "voc_segmentation",
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text(""), "it has no image",
    ),
    "a mask of VOC is missing": (
        "voc_segmentation",
        lambda root: (root / "VOCdevkit/VOC2012/SegmentationClass/b.png").unlink(), "Class/b.png is missing",
    ),
    "Cityscapes is not there": ("cityscapes", lambda root: (root / "gtFine").rename(root / "g"), "not found or incom"),
    "a town has no image": (
        "cityscapes", lambda root: emptied("leftImg8bit/val/jena")(root), "it has no image",
    ),
    "a mask of Cityscapes is missing": (
        "cityscapes",
        lambda root: (root / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png").unlink(), "labelIds.png is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_sets_that_are_not_whole_are_refused_in_a_line(tmp_path, case):
    name, spoil, said = SETS[case]
    {"voc_segmentation": voc, "cityscapes": cityscapes}[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as raised:
        built_of(config_of(tmp_path, name=name, ignore_index=255))
    line = str(raised.value)
    assert line.startswith(f"data.root={tmp_path} holds no ")
    assert said in line
    assert line.endswith({"voc_segmentation": "fetches it", "cityscapes": "or what they hold"}[name])


@pytest.mark.parametrize("name", ["voc_segmentation", "cityscapes"])
def test_a_root_that_is_not_there_is_refused_at_the_door(tmp_path, name):
    with pytest.raises(UserError, match=r"holds no \w+.* \(there is no such folder\): "):
        refuse_missing(config_of(tmp_path / "none", name=name), "masks")
    if name == "voc_segmentation":
        refuse_missing(config_of(tmp_path / "none", name=name, download=True), "masks")


OF_OTHERS = {
    "erase": (
        "masks",
        AugmentConfig(erase=0.5),
        "data.augment.erase=0.5 is for images with classes, and those of this",
    ),
    "pad": ("masks", AugmentConfig(pad=2), "data.augment.pad=2 is for images with classes"),
    "mixup": ("masks", AugmentConfig(mixup=0.2), "data.augment.mixup=0.2 is for images with classes"),
    "scale": (
        "classes",
        AugmentConfig(scale=[0.5, 2.0]),
        "is for images with masks or boxes or instances, and those of this task come with",
    ),
}


@pytest.mark.parametrize(("targets", "augment", "said"), OF_OTHERS.values(), ids=OF_OTHERS)
def test_an_augmentation_of_other_targets_is_refused(targets, augment, said):
    config = DataConfig(name={"masks": "digit_scenes", "classes": "digits"}[targets], augment=augment)
    with pytest.raises(UserError, match=said):
        data.build(config, World(0, 1, CPU), seed=0, targets=targets)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    if not CAMVID.is_file():
        pytest.skip(f"CamVid is not there: {CAMVID}")
    root = tmp_path_factory.mktemp("camvid")
    with tarfile.open(CAMVID) as archive:
        archive.extractall(root, filter="data")
    return root / "camvid"


def test_camvid_is_read_with_its_11_classes(camvid):
    config = config_of(camvid, ignore_index=11, size=320, augment=AugmentConfig(scale=[0.5, 2.0], photometric=True))
    built = built_of(config)
    assert (len(built.training), built.classes[0], built.classes[-1]) == (75, "sky", "bicyclist")
    assert len(built.classes) == 11
    batch = next(iter(built.train))
    assert (batch.images.shape, batch.labels.shape) == ((1, 3, 320, 320), (1, 320, 320))
    shown = next(iter(built.shown))
    assert {image.shape for image in shown.images} == {(3, 360, 480)}
    share = class_pixels(built.training).double() / (75 * 360 * 480)
    assert 0.9 < share.sum() < 1, "the rest is unlabelled"
    assert share.min() > 0
    assert built.classes[int(share.argmax())] in ("road", "building")
