"""Image folders as people have them, and images of every kind of pixel."""

import shutil

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from syncbn.trainer.data.sets import pixels
from syncbn.trainer.data.sets.folders import Folder, train_and_eval
from syncbn.trainer.errors import UserError
from tests.trainer.images import image_folder, write_image

RAMP = numpy.arange(64).reshape(8, 8)
EIGHT_BITS = torch.tensor(numpy.round(RAMP * 255 / 63).astype("uint8")).expand(3, 8, 8)

# What is in the file, and what is read of it: deep pixels are stretched by the range that they have
DEEP = {
    "16-bit PNG": (RAMP.astype("uint16") * 1000, "png"),
    "12 bits in 16": (RAMP.astype("uint16") * 60 + 100, "png"),
    "16-bit TIFF": (RAMP.astype("uint16") * 1000, "tiff"),
    "16-bit TIFF, big-endian": (RAMP.astype(">u2") * 1000, "tiff"),
    "32-bit TIFF": (RAMP.astype("int32") * 1_000_000 - 5_000_000, "tiff"),
    "float TIFF": (RAMP.astype("float32") / 1000 - 0.01, "tiff"),
    "16-bit PGM": (RAMP.astype("uint16") * 1000, "pgm"),
}


def saved(path, values):
    image = Image.fromarray(values.astype(values.dtype.newbyteorder("="))) if values.dtype.byteorder != ">" else None
    if image is None:
        image = Image.frombytes("I;16B", values.shape[::-1], values.tobytes())
    image.save(path)
    return path


@pytest.mark.parametrize(("values", "ending"), DEEP.values(), ids=DEEP)
def test_pixels_of_more_than_8_bits_are_stretched(tmp_path, values, ending):
    read = pil_to_tensor(pixels.read_image(saved(tmp_path / f"image.{ending}", values)))
    assert torch.equal(read, EIGHT_BITS)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "RGBa", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_read_as_three_colours(mode, tmp_path, monkeypatch):
    """Not all can be written to a file, so they are opened by hand."""
    grey = Image.fromarray(RAMP.astype("uint8") * 4)
    with_alpha = {"RGBa": "RGBA", "PA": "P"}.get(mode)
    image = grey.convert("RGB") if with_alpha or mode not in ("L", "I;16", "I", "F") else grey
    if mode == "LAB":
        image = Image.merge("LAB", [grey, Image.new("L", (8, 8), 128), Image.new("L", (8, 8), 128)])
    elif mode == "PA":
        image = image.convert("P").convert("PA")
    elif with_alpha:
        image = image.convert(with_alpha).convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    monkeypatch.setattr(Image, "open", lambda path: image)
    read = pil_to_tensor(pixels.read_image("image"))
    assert read.shape == (3, 8, 8)
    assert read.dtype == torch.uint8
    assert read.float().std() > 30, "not all white, not all black"


def test_a_mode_that_has_no_way_to_rgb_is_an_error_of_that_image(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda path: Image.new("La", (8, 8)))
    with pytest.raises(ValueError, match="conversion from La to L not supported"):
        pixels.read_image("image")


def test_a_flat_deep_image_is_black_and_one_that_is_not_finite_is_refused(tmp_path):
    flat = saved(tmp_path / "flat.tiff", numpy.full((4, 4), 7.5, "float32"))
    assert not pil_to_tensor(pixels.read_image(flat)).any()
    broken = saved(tmp_path / "broken.tiff", numpy.full((4, 4), numpy.nan, "float32"))
    with pytest.raises(ValueError, match="a pixel is not a finite number"):
        pixels.read_image(broken)


def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2, ".ipynb_checkpoints": 3}, {"a": 1, ".cache": 1})
    shutil.copy(root / "train" / "a" / "0000.jpg", root / "train" / "a" / "._0000.jpg")
    write_image(root / "train" / "b" / ".thumbnails" / "0.jpg", 1)
    train, test = train_and_eval(root)
    assert (train.classes, len(train), len(test)) == (["a", "b"], 4, 1)
    assert not train.notes


def test_each_real_folder_is_taken_once(tmp_path):
    root = image_folder(tmp_path / "data", {"a": 24, "b": 24}, {"a": 1})
    for name in "a", "b":
        (root / "train" / name / "loop").symlink_to(root / "train")
        (root / "train" / name / "self").symlink_to(root / "train" / name)
    assert len(train_and_eval(root)[0]) == 48


def test_a_class_may_be_a_link_and_have_folders_in_it(tmp_path):
    image_folder(tmp_path / "elsewhere", {"c": 3}, {})
    root = image_folder(tmp_path / "data", {"a": 2, "b": 2}, {"c": 1})
    write_image(root / "train" / "a" / "deeper" / "still" / "0.png", 5)
    (root / "train" / "c").symlink_to(tmp_path / "elsewhere" / "train" / "c")
    train, test = train_and_eval(root)
    assert (len(train), train.classes, test[0][1]) == (8, ["a", "b", "c"], 2)
    assert [train.where(i).removeprefix(f"{root}/train/") for i in range(3)] == [
        "a/0000.jpg", "a/0001.jpg", "a/deeper/still/0.png",
    ]  # fmt: skip


def test_what_is_left_out_is_counted(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2}, {"a": 1})
    for number in range(20):
        (root / "train" / "a" / f"{number}.heic").touch()
    (root / "train" / "b" / "labels.csv").touch()
    (root / "train" / "b" / "UPPER.JPG").write_bytes((root / "train" / "b" / "0000.jpg").read_bytes())
    train, _ = train_and_eval(root)
    assert len(train) == 5
    assert train.notes == [f"left out of {root}/train: 21 files that are no images (20 × .heic, 1 × .csv)"]


def test_of_test_and_val_that_is_used_which_has_classes(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2}, {})
    for name in range(9):
        write_image(root / "test" / f"{name}.jpg", name)
    with pytest.raises(UserError, match=r"/test has no class"):
        train_and_eval(root)
    write_image(root / "val" / "b" / "0.jpg", 1)
    _, val = train_and_eval(root)
    assert (len(val), val[0][1]) == (1, 1)
    (note,) = val.notes
    assert note.startswith(f"evaluated on {root}/val, as {root}/test has no class")
    write_image(root / "test" / "a" / "0.jpg", 1)
    _, test = train_and_eval(root)
    assert test.notes == [
        f"evaluated on {root}/test", f"left out of {root}/test: 9 files that lie in no folder of a class",
    ]  # fmt: skip


def test_a_class_may_be_empty_in_evaluation_alone(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2}, {"a": 1})
    (root / "test" / "b").mkdir()
    assert len(train_and_eval(root)[1]) == 1
    (root / "train" / "c").mkdir()
    with pytest.raises(UserError, match=r"/train is incomplete \(no image of class c\)"):
        train_and_eval(root)


def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/missing cannot be read \(No such file or directory"):
        Folder(tmp_path / "missing")
