"""Object detection in Pascal VOC's layout: lists of images, and an XML file of boxes for each.

Source: Everingham et al. 2010. Its pixels are counted from 1, and the last one of a box belongs to it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from syncbn.trainer.data.sets import archives, folders
from syncbn.trainer.data.sets.boxes import Annotated, Annotations, Box, label_of, number, refuse_no_box, size_of
from syncbn.trainer.data.sets.xml import Element, read_xml
from syncbn.trainer.errors import UserError, first_line, some

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig

FOLDERS = ("Annotations", "JPEGImages", "ImageSets/Main")
LAYOUT = "Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/train.txt and val.txt (or test.txt)"
BELOW = ("VOCdevkit/VOC20[0-9][0-9]", "VOC20[0-9][0-9]")  # where else the layout may lie
SIDES = ("xmin", "ymin", "xmax", "ymax")


class Drawn(NamedTuple):
    """An annotated image. path: of the annotation; size: width and height."""

    file: str
    path: Path
    size: tuple[int, int]
    objects: Sequence[Element]


def voc_detection(config: "DataConfig") -> tuple[Annotated, Annotated]:
    """The images of train.txt, and those of val.txt or test.txt.

    Each annotation is read once, and no image opened but a few whose size is looked at. Classes are those of the
    training annotations, in order of name, unless classes.txt in data.root has them.
    """
    if config.download:
        _fetch(config)
    root = layout_of(Path(config.root))
    files = _files(root / "JPEGImages")
    train, test = ([_read(root, name, where, files) for name, where in names] for names in lists_of(root))
    named = next((path / "classes.txt" for path in (Path(config.root), root) if (path / "classes.txt").exists()), None)
    if named:
        classes, listed = folders.read_classes(named, 1, 10**4), str(named)
    else:
        names = {name for drawn in train for each in drawn.objects if (name := _class_of(each, drawn.path))}
        classes, listed = sorted(names), "train"
    labels = {name: label for label, name in enumerate(classes, 1)}
    parts = [_annotated(root, part, labels, listed, config.skip_broken) for part in (train, test)]
    refuse_no_box(parts[0], f"{root}/ImageSets/Main/train.txt")
    return parts[0].checked(), parts[1].checked()


def no_voc(config: "DataConfig") -> None:
    """Raise UserError if data.root does not hold the layout, and nothing is to be fetched."""
    if not config.download:
        layout_of(Path(config.root))


def _fetch(config: "DataConfig") -> None:
    try:
        archives.fetch_voc(Path(config.root))
    except Exception as error:  # of many kinds
        why = first_line(error).partition(" You can use")[0].rstrip(".")
        raise archives.no_archive("VOC 2012", config, why) from error


def layout_of(root: Path) -> Path:
    """The folder with the layout: root, or the one below it. Raises UserError if there is none, or more than one."""
    places = [root, *sorted(place for pattern in BELOW for place in root.glob(pattern))]
    holding = [place for place in places if all((place / name).is_dir() for name in FOLDERS)]
    if len(holding) == 1 or holding[:1] == [root]:
        return holding[0]
    if holding:
        raise UserError(f"data.root={root} holds {some([*map(str, holding)], 4)}: point data.root to one of them")
    raise UserError(
        f"data.root={root} holds no Pascal VOC: looked there, in VOC20xx/ and in VOCdevkit/VOC20xx/ for {LAYOUT}"
    )


def lists_of(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The names of the images to train on and of those for evaluation, each with where it stands."""
    folder = root / "ImageSets" / "Main"
    evaluation = next((folder / name for name in ("val.txt", "test.txt") if (folder / name).exists()), None)
    if evaluation is None:
        raise UserError(f"{folder} has neither val.txt nor test.txt: {LAYOUT}")
    return _names(folder / "train.txt"), _names(evaluation)


def _names(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read ({why}): write the name of an image in each line") from error
    # Lists of one class have 1 or -1 behind the name
    names = [(line.split()[0], f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not names:
        raise UserError(f"{path} names no image: write one in each line, without its ending")
    count = Counter(name for name, _ in names)
    for name, where in reversed(names):
        if count[name] > 1:
            raise UserError(f"{where} names {name!r}, which stands above it already: remove one")
    return names


def _files(folder: Path) -> Mapping[str, str]:
    """Image files by their names without ending."""
    try:
        paths = folders.files_below(folder, folders.ENDINGS, Counter())
        return {Path(path).stem: path for path in reversed([*paths])}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}: {error.filename})") from error


def _read(root: Path, name: str, where: str, files: Mapping[str, str]) -> Drawn:
    path = root / "Annotations" / f"{name}.xml"
    for lacking, place in (not path.exists(), path), (name not in files, root / "JPEGImages" / f"{name}.jpg"):
        if lacking:
            raise UserError(f"{where} names {name!r}, and there is no {place}: put it there, or remove that line")
    tree = read_xml(path)
    size = _child(tree, "size", path)
    width, height = (_child(size, side, path).text.strip() for side in ("width", "height"))
    pixels = size_of(width, height)
    if pixels is None:
        raise UserError(
            f"{path}, line {size.line}: the image has {width}×{height} pixels: write its width and height there, as "
            "whole numbers"
        )
    return Drawn(files[name], path, pixels, [each for each in tree.children if each.tag == "object"])


def _annotated(
    root: Path, part: Sequence[Drawn], labels: Mapping[str, int], listed: str, skip_broken: bool
) -> Annotated:
    annotations = Annotations(skip_broken=skip_broken)
    for file, path, size, objects in part:
        annotations.add_image(file, size, str(path))
        for each in objects:
            name = _class_of(each, path)
            box, sides = _box(_child(each, "bndbox", path), path)
            label = label_of(name, labels, f"{path}, line {each.line}", listed)
            annotations.add(
                box,
                label,
                lambda path=path, sides=sides: f"{path}, line {sides.line}: the box of {_shown(sides)}",
                crowd=each.text_of("difficult") == "1",
            )
    return Annotated(root, annotations, [*labels])


def _box(sides: Element, path: Path) -> tuple[Box, Element]:
    left, top, right, bottom = (number(_child(sides, side, path).text) for side in SIDES)
    return (left - 1, top - 1, right, bottom), sides


def _shown(sides: Element) -> str:
    return " ".join(f"{side}={sides.text_of(side)}" for side in SIDES)


def _class_of(each: Element, path: Path) -> str:
    name = _child(each, "name", path)
    if not name.text.strip():
        raise UserError(f"{path}, line {name.line}: <name> is empty: write the class of the object there")
    return name.text.strip()


def _child(element: Element, tag: str, path: Path) -> Element:
    if (child := element.child(tag)) is None:
        raise UserError(
            f"{path}, line {element.line}: <{element.tag}> has no <{tag}>: an annotation has <size> with <width> and "
            "<height>, and each <object> has <name> and <bndbox>"
        )
    return child
