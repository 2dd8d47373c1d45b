"""Boxes in Pascal VOC's layout: what is read, and one line, with file and line number, for each thing that is wrong."""

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from syncbn.trainer import data
from syncbn.trainer.data import DataConfig
from syncbn.trainer.data.sets.sources import SOURCES, refuse_missing
from syncbn.trainer.data.sets.voc import lists_of
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World
from tests.trainer.detection import EVAL, SIZES, TRAIN, voc, voc_xml, write_photo

CPU = torch.device("cpu")
BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd-voc.tar.xz"


def config_of(root: Path, **options) -> DataConfig:
    return DataConfig(**{"name": "voc_detection", "root": str(root), "batch_per_rank": 1, **options})


def built_of(root: Path, **options):
    return SOURCES["boxes"]["voc_detection"].build(config_of(root, **options))


def test_boxes_are_counted_from_0_and_end_behind_their_last_pixel(tmp_path):
    voc(tmp_path)
    train, test = built_of(tmp_path)
    assert (len(train), len(test), [*train.classes], [*train.notes]) == (3, 2, ["cat", "dog"], [])
    image, target = train[0]
    assert (image.shape, image.dtype, train.size(0)) == ((3, 30, 40), torch.uint8, (40, 30))
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [5, 6, 7, 8]]
    assert target["labels"].tolist() == [2, 1]
    assert target["areas"].tolist() == [1200, 4]
    assert target["crowd"].tolist() == [False, False]
    assert {name: (part.dtype, len(part)) for name, part in train[2][1].items()} == {
        "boxes": (torch.float32, 0), "labels": (torch.int64, 0), "areas": (torch.float32, 0), "crowd": (torch.bool, 0),
    }  # fmt: skip
    assert train[2][1]["boxes"].shape == (0, 4)
    assert test[0][1]["boxes"].tolist() == [[10, 5, 20, 15]]


def test_a_difficult_object_is_of_a_crowd(tmp_path):
    path = voc(tmp_path) / "Annotations/a.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    assert built_of(tmp_path)[0][0][1]["crowd"].tolist() == [True, False]


def test_the_layout_is_found_at_the_root_or_below_it(tmp_path):
    folder = voc(tmp_path)
    for root in tmp_path, tmp_path / "VOCdevkit", folder:
        assert [*built_of(root)[0].classes] == ["cat", "dog"]
    again = voc(tmp_path, year="2012")
    with pytest.raises(UserError) as raised:
        refuse_missing(config_of(tmp_path), "boxes")
    assert str(raised.value) == f"data.root={tmp_path} holds {folder}, {again}: point data.root to one of them"
    assert len(built_of(again)[0]) == 3


def test_test_txt_stands_in_for_val_txt(tmp_path):
    assert [name for name, _ in lists_of(voc(tmp_path, lists="test"))[1]] == [*EVAL]


def test_classes_txt_names_the_classes(tmp_path):
    voc(tmp_path)
    (tmp_path / "classes.txt").write_text("dog\nbird\ncat\n")
    train, _ = built_of(tmp_path)
    assert ([*train.classes], train[0][1]["labels"].tolist()) == (["dog", "bird", "cat"], [1, 3])


def test_a_box_of_a_pixel_over_the_edge_is_cut_off_and_counted(tmp_path):
    """As tools write it that count from 0."""
    folder = voc(tmp_path, {"a": [("dog", (-1, -1, 41, 32))]})
    train, _ = built_of(tmp_path)
    assert train[0][1]["boxes"].tolist() == [[0, 0, 40, 30]]
    assert train.notes == [f"cut off in {folder}: what 1 boxes have beyond the edge, 2 pixels at most"]


def replaced(old: str, new: str, file: str = "Annotations/a.xml") -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return spoil


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> Callable[[Path], object]:
    """In line 9 of a.xml, whose image has 40×30 pixels."""
    return replaced(
        "<xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax>",
        f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>",
    )


A = "{folder}/Annotations/a.xml"
TRAIN_TXT = "{folder}/ImageSets/Main/train.txt"
HAS = "an annotation has <size> with <width> and <height>, and each <object> has <name> and <bndbox>"
MEND = ": correct it, or data.skip_broken=true leaves such boxes out"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no area": (box(5, 9, 4, 20), "{a}, line 9: the box of xmin=5 ymin=9 xmax=4 ymax=20 has no area{mend}"),
    "corners swapped": (
        box(30, 9, 4, 20),
        "{a}, line 9: the box of xmin=30 ymin=9 xmax=4 ymax=20 ends before it begins: its corners are swapped, or its "
        "width or height is below 0{mend}",
    ),
    "outside": (
        box(45, 3, 50, 9),
        "{a}, line 9: the box of xmin=45 ymin=3 xmax=50 ymax=9 lies outside of its image of 40×30 pixels{mend}",
    ),
    "partly outside": (
        box(1, 1, 43, 30),
        "{a}, line 9: the box of xmin=1 ymin=1 xmax=43 ymax=30 reaches 3 pixels over the edge of its image of "
        "40×30{mend}",
    ),
    "a word": (
        box("left", 1, 4, 3), "{a}, line 9: the box of xmin=left ymin=1 xmax=4 ymax=3 is not of four numbers{mend}",
    ),
    "NaN": (box(1, "nan", 4, 3), "{a}, line 9: the box of xmin=1 ymin=nan xmax=4 ymax=3 is not of four numbers{mend}"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_box_is_told_or_left_out(tmp_path, case):
    spoil, said = BROKEN[case]
    folder = voc(tmp_path)
    spoil(folder)
    with pytest.raises(UserError) as raised:
        built_of(tmp_path)
    line = said.format(a=A.format(folder=folder), mend=MEND)
    assert str(raised.value) == line
    train, _ = built_of(tmp_path, skip_broken=True)
    assert train[0][1]["boxes"].tolist() == [[5, 6, 7, 8]]
    assert train.notes == [f"left out of {folder}: 1 broken boxes (the first: {line.removesuffix(MEND)})"]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "malformed": (
        replaced("</name>", "</nam>"),
        A + ", line 7, is no XML (mismatched tag): write that annotation anew",
    ),
    "cut short": (
        lambda folder: (folder / "Annotations/a.xml").write_text("<annotation>\n<size>"),
        A + ", line 2, is no XML (no element found): write that annotation anew",
    ),
    "empty": (
        lambda folder: (folder / "Annotations/a.xml").write_text(""),
        A + ", line 1, is no XML (no element found): write that annotation anew",
    ),
    "no size": (
        lambda folder: [replaced("<size>", "<sizes>")(folder), replaced("</size>", "</sizes>")(folder)],
        A + f", line 1: <annotation> has no <size>: {HAS}",
    ),
    "no width": (replaced("<width>40</width>", ""), A + f", line 2: <size> has no <width>: {HAS}"),
    "no name": (replaced("<name>dog</name>", ""), A + f", line 6: <object> has no <name>: {HAS}"),
    "no bndbox": (
        lambda folder: [replaced("<bndbox>", "<box>")(folder), replaced("</bndbox>", "</box>")(folder)],
        A + f", line 6: <object> has no <bndbox>: {HAS}",
    ),
    "no xmax": (replaced("<xmax>40</xmax>", ""), A + f", line 9: <bndbox> has no <xmax>: {HAS}"),
    "an empty name": (
        replaced("<name>dog", "<name>"), A + ", line 7: <name> is empty: write the class of the object there",
    ),
    "a size of 0": (
        replaced("<width>40", "<width>0"),
        A + ", line 2: the image has 0×30 pixels: write its width and height there, as whole numbers",
    ),
    "another size": (
        replaced("<width>40", "<width>80"),
        "{folder}/JPEGImages/a.jpg has 40×30 pixels, and " + A
        + " says 80×30: correct that, as its boxes may be for another size",
    ),
    "an annotation without an image": (
        lambda folder: (folder / "JPEGImages/b.jpg").unlink(),
        TRAIN_TXT + ", line 2 names 'b', and there is no {folder}/JPEGImages/b.jpg: put it there, "
        "or remove that line",
    ),
    "an image without an annotation": (
        lambda folder: (folder / "Annotations/b.xml").unlink(),
        TRAIN_TXT + ", line 2 names 'b', and there is no {folder}/Annotations/b.xml: put it there, "
        "or remove that line",
    ),
    "a name that is nowhere": (
        replaced("b\n", "b\nz\n", "ImageSets/Main/train.txt"),
        TRAIN_TXT + ", line 3 names 'z', and there is no {folder}/Annotations/z.xml: put it there, "
        "or remove that line",
    ),
    "a name twice": (
        replaced("c\n", "a\n", "ImageSets/Main/train.txt"),
        TRAIN_TXT + ", line 3 names 'a', which stands above it already: remove one",
    ),
    "an empty list": (
        lambda folder: (folder / "ImageSets/Main/val.txt").write_text("\n"),
        "{folder}/ImageSets/Main/val.txt names no image: write one in each line, without its ending",
    ),
    "no train.txt": (
        lambda folder: (folder / "ImageSets/Main/train.txt").unlink(),
        "{folder}/ImageSets/Main/train.txt cannot be read (No such file or directory): write the name of an image in "
        "each line",
    ),
    "no val.txt": (
        lambda folder: (folder / "ImageSets/Main/val.txt").unlink(),
        "{folder}/ImageSets/Main has neither val.txt nor test.txt: Annotations/*.xml, JPEGImages/*.jpg and "
        "ImageSets/Main/train.txt and val.txt (or test.txt)",
    ),
    "a class that train lacks": (
        replaced("dog", "bird", "Annotations/d.xml"),
        "{folder}/Annotations/d.xml, line 6 has the class 'bird', which train lacks: add it there, or correct or "
        "remove it here",
    ),
    "a class that classes.txt lacks": (
        lambda folder: (folder / "classes.txt").write_text("dog\n"),
        A + ", line 14 has the class 'cat', which {folder}/classes.txt lacks: add it there, or correct or remove it "
        "here",
    ),
    "no box": (
        lambda folder: [(folder / f"Annotations/{name}.xml").write_text(voc_xml(SIZES[name], [])) for name in "abd"],
        "{folder}/ImageSets/Main/train.txt has no box in any of its 3 images: there is nothing to learn from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_with_its_file_and_line(tmp_path, case):
    spoil, said = REFUSED[case]
    folder = voc(tmp_path)
    spoil(folder)
    for skip_broken in False, True:
        with pytest.raises(UserError) as raised:
            built_of(tmp_path, skip_broken=skip_broken)
        assert str(raised.value) == said.format(folder=folder)


def test_a_root_without_the_layout_is_refused_at_the_door(tmp_path):
    with pytest.raises(UserError) as raised:
        refuse_missing(config_of(tmp_path), "boxes")
    assert str(raised.value) == (
        f"data.root={tmp_path} holds no Pascal VOC: looked there, in VOC20xx/ and in VOCdevkit/VOC20xx/ for "
        "Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/train.txt and val.txt (or test.txt)"
    )
    refuse_missing(config_of(tmp_path, download=True), "boxes")


def test_images_that_cannot_be_read_or_are_of_another_size_are_told_in_training(tmp_path, monkeypatch):
    folder = voc(tmp_path)
    monkeypatch.setattr("syncbn.trainer.data.sets.boxes.HEADS", 1)
    for name in "b", "c":
        write_photo(folder / f"JPEGImages/{name}.jpg", (8, 8))
    built = data.build(config_of(tmp_path), World(0, 1, CPU), seed=0, targets="boxes", stacked=False)
    with pytest.raises(UserError, match=r"JPEGImages/[bc].jpg has 8×8 pixels, and .*Annotations/[bc].xml says"):
        [next(batches) for batches in [iter(built.train)] for _ in range(3)]
    (folder / "JPEGImages/d.jpg").write_bytes(b"no JPEG")
    with pytest.raises(UserError, match=r"cannot read .*JPEGImages/d.jpg \("):
        next(iter(built.eval))


def test_other_data_has_another_fingerprint(tmp_path):
    def fingerprint(root: Path):
        return data.build(config_of(root), World(0, 1, CPU), seed=0, targets="boxes", stacked=False).fingerprint

    voc(tmp_path / "1")
    voc(tmp_path / "2")
    voc(tmp_path / "3", {**TRAIN, "b": [("cat", (3, 4, 29, 40))]})
    voc(tmp_path / "4", {**TRAIN, "b": [("dog", (3, 4, 30, 40))]})
    one, two, three, four = (fingerprint(tmp_path / str(i)) for i in range(1, 5))
    assert one == two
    assert len({each["digest"] for each in (one, three, four)}) == 3


@pytest.fixture(scope="module")
def bccd(tmp_path_factory):
    if not BCCD.is_file():
        pytest.skip(f"BCCD is not there: {BCCD}")
    root = tmp_path_factory.mktemp("bccd")
    with tarfile.open(BCCD) as archive:
        archive.extractall(root, filter="data")
    return root / "bccd"


def test_blood_cells_are_read_as_they_are_published(bccd):
    train, test = built_of(bccd)
    assert (len(train), len(test), [*train.classes]) == (205, 87, ["Platelets", "RBC", "WBC"])
    assert Counter(train.labels.tolist()) + Counter(test.labels.tolist()) == {1: 292, 2: 3350, 3: 301}
    assert [*train.notes, *test.notes] == []
    # Two of its boxes are of one pixel
    assert sum((part.areas == 1).sum().item() for part in (train, test)) == 2
    for index in range(0, len(train), 40):
        image, target = train[index]
        assert image.shape == (3, 480, 640)
        assert len(target["boxes"]) > 0
