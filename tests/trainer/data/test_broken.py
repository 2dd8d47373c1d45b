"""Files that are cut short, flipped or forged: one line that names the mend, and never code that is run."""

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from syncbn.trainer import data
from syncbn.trainer.data import DataConfig
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World
from tests.trainer.images import image_folder


class Forged:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def refusal(config: DataConfig) -> str:
    """The line with which the data is refused, when it is built or when it is read."""

    def read() -> None:
        built = data.build(config, World(0, 1, torch.device("cpu")), seed=0)
        for part in islice(built.train, built.steps_per_epoch), built.eval:
            list(part)

    with pytest.raises(UserError) as raised:
        read()
    line = str(raised.value)
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def fashion_mnist(root: Path) -> Path:
    """Six images to train from and two for eval, in torchvision's layout."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 2)):
        sizes = b"".join(v.to_bytes(4) for v in (n, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes(n * 28 * 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4) + bytes(range(n)))
    return raw


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FASHION_MNIST: dict[str, Callable[[Path], object]] = {
    "images cut short": lambda raw: cut(raw / IMAGES, 2000),
    "images without a header": lambda raw: cut(raw / IMAGES, 3),
    "images empty": lambda raw: cut(raw / IMAGES, 0),
    "labels cut short": lambda raw: cut(raw / LABELS, 10),
    "labels for fewer images": lambda raw: (raw / LABELS).write_bytes(b"\0\0\x08\x01\0\0\0\x02\1\1"),
    "a label of no class": lambda raw: flip(raw / LABELS, -1),
    "another kind of file": lambda raw: (raw / IMAGES).write_bytes(b"<html>404</html>"),
    "a flipped header": lambda raw: flip(raw / IMAGES, 3),
    "no file for eval": lambda raw: (raw / "t10k-images-idx3-ubyte").unlink(),
    "a forged legacy file": lambda raw: forge_legacy(raw.parent),
}


def forge_legacy(folder: Path) -> None:
    (folder / "processed").mkdir()
    for name in "training.pt", "test.pt":
        torch.save(Forged(folder / "executed"), folder / "processed" / name)


@pytest.mark.parametrize("spoil", FASHION_MNIST.values(), ids=FASHION_MNIST)
def test_broken_files_of_fashion_mnist_are_told(tmp_path, spoil):
    spoil(fashion_mnist(tmp_path))
    line = refusal(DataConfig(name="fashion_mnist", root=str(tmp_path)))
    assert line.startswith(f"data.root={tmp_path} holds no FashionMNIST that can be read (")
    assert "remove its files there and data.download=true fetches it" in line
    assert not (tmp_path / "FashionMNIST" / "executed").exists()


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda archive: archive[:-10],
    "flipped": lambda archive: archive[:20] + b"\xff\xff\xff" + archive[23:],
    "no archive": lambda archive: b"<html>404</html>",
    "empty": lambda archive: b"",
}


@pytest.mark.parametrize("spoil", ARCHIVES.values(), ids=ARCHIVES)
def test_a_broken_archive_of_fashion_mnist_is_told(tmp_path, monkeypatch, spoil):
    # Its checksum is right here, so that it is unpacked; else torchvision would fetch it anew
    whole = tmp_path / "whole"
    raw = fashion_mnist(whole)
    here = tmp_path / "data" / "FashionMNIST" / "raw"
    here.mkdir(parents=True)
    for name in sorted(each.name for each in raw.iterdir()):
        (here / f"{name}.gz").write_bytes(spoil(gzip.compress((raw / name).read_bytes())))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", [(f"{n}.gz", None) for n in (IMAGES, LABELS)])
    line = refusal(DataConfig(name="fashion_mnist", root=str(tmp_path / "data"), download=True))
    assert "holds no FashionMNIST that can be read (" in line
    assert "remove its files there, so that they are fetched anew" in line


def cifar(root: Path) -> Path:
    """The files of CIFAR-10 with two images each: their checksums are wrong, as nothing but the real ones' is right."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": bytes(2 * 3072), "labels": [0, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    return folder


CIFAR: dict[str, Callable[[Path], object]] = {
    "a batch cut short": lambda folder: cut(folder / "data_batch_3", 100),
    "a batch flipped": lambda folder: flip(folder / "data_batch_3", 50),
    "a batch forged": lambda folder: (folder / "data_batch_1").write_bytes(pickle.dumps(Forged(folder / "executed"))),
    "names forged": lambda folder: (folder / "batches.meta").write_bytes(pickle.dumps(Forged(folder / "executed"))),
    "a batch gone": lambda folder: (folder / "test_batch").unlink(),
}


@pytest.mark.parametrize("spoil", CIFAR.values(), ids=CIFAR)
def test_broken_or_forged_files_of_cifar_are_told_and_never_executed(tmp_path, spoil):
    folder = cifar(tmp_path)
    spoil(folder)
    line = refusal(DataConfig(name="cifar10", root=str(tmp_path)))
    assert line.startswith(f"data.root={tmp_path} holds no CIFAR10 that can be read (Dataset not found or corrupted):")
    assert not (folder / "executed").exists()
    pickle.loads(pickle.dumps(Forged(folder / "executed")))  # what would have happened
    assert (folder / "executed").is_dir()


@pytest.mark.parametrize(
    ("content", "kind"), [(b"\x80\x05", EOFError), (b"cos\nnothing\n.", AttributeError), (b"nonsense", Exception)]
)
def test_whatever_a_batch_of_cifar_raises_is_told(tmp_path, monkeypatch, content, kind):
    folder = cifar(tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda _: True)  # as if the checksums were right
    with pytest.raises(kind):
        datasets.CIFAR10(str(tmp_path))
    assert "holds no CIFAR10 that can be read (" in refusal(DataConfig(name="cifar10", root=str(tmp_path)))


@pytest.mark.parametrize("spoil", ARCHIVES.values(), ids=ARCHIVES)
def test_a_broken_archive_of_cifar_is_told(tmp_path, monkeypatch, spoil):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(cifar(tmp_path / "whole"), "cifar-10-batches-py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / datasets.CIFAR10.filename).write_bytes(spoil(content.getvalue()))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", None)  # as if the checksum were right
    line = refusal(DataConfig(name="cifar10", root=str(tmp_path / "data"), download=True))
    assert "remove its files there, so that they are fetched anew" in line


def test_a_forged_meta_file_of_imagenet_is_not_executed(tmp_path):
    image_folder(tmp_path, {"n01440764": 1}, {})
    torch.save(Forged(tmp_path / "executed"), tmp_path / "meta.bin")
    assert "holds no ImageNet (" in refusal(DataConfig(name="imagenet", root=str(tmp_path)))
    assert not (tmp_path / "executed").exists()


JPEGS: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: cut(path, path.stat().st_size // 2),
    "empty": lambda path: cut(path, 0),
    "no image": lambda path: path.write_bytes(b"<html>404</html>"),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing.jpg")),
}


@pytest.mark.parametrize("spoil", JPEGS.values(), ids=JPEGS)
def test_a_broken_jpeg_is_named_or_left_out_and_counted(tmp_path, spoil):
    root = image_folder(tmp_path, {"a": 4, "b": 4}, {"a": 2}, size=32)
    spoil(root / "train" / "b" / "0002.jpg")
    config = DataConfig(name="image_folder", root=str(root), batch_per_rank=8)
    line = refusal(config)
    assert line.startswith(f"cannot read {root}/train/b/0002.jpg (")
    assert "data.skip_broken=true leaves such images out" in line

    config.skip_broken = True
    built = data.build(config, World(0, 1, torch.device("cpu")), seed=0)
    batch = next(iter(built.train))
    assert (len(batch.images), len(batch.labels), batch.skipped) == (7, 7, 1)
    assert sum(batch.skipped for batch in built.eval) == 0


def test_an_empty_class_folder_is_named(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2}, {"a": 1})
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "notes.txt").touch()
    line = refusal(DataConfig(name="image_folder", root=str(root)))
    assert line.startswith(f"{root}/train is incomplete (no image of class c")
