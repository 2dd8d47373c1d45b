"""What each rank gets to see: the same samples for any number of ranks, each once, and errors that name the file."""

import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.trainer import data
from syncbn.trainer.data import AugmentConfig, DataConfig
from syncbn.trainer.data.sampler import EvalSampler, TrainSampler, slice_of
from syncbn.trainer.data.sets.images import InMemory, fingerprint
from syncbn.trainer.data.sets.sources import SOURCES
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World
from tests.trainer.images import image_folder, write_image

CPU = torch.device("cpu")
ALL = AugmentConfig(pad=2, flip=True, policy="trivial", erase=0.5, mixup=0.5, cutmix=0.5)


def steps_of(world_size, global_batch, accumulate, steps, start=0):
    """The keys of each optimiser step, all ranks together, in the order of the shuffle."""
    ranks = [
        TrainSampler(
            101,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            seed=7,
            accumulate=accumulate,
            start=start,
        )
        for rank in range(world_size)
    ]
    streams = [iter(rank) for rank in ranks]
    return [[key for _ in range(accumulate) for stream in streams for key in next(stream)] for _ in range(steps)]


@pytest.mark.parametrize(
    ("world_size", "batch", "accumulate"),
    [(1, 8, 1), (2, 8, 1), (3, 8, 1), (4, 8, 1), (5, 8, 1), (7, 8, 1), (2, 4, 2), (3, 4, 2), (1, 1, 8), (3, 1, 8)],
)
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(world_size, batch, accumulate):
    assert steps_of(world_size, batch, accumulate, steps=30) == steps_of(1, 8, 1, steps=30)


SHARES = {(8, 4): [2, 2, 2, 2], (6, 2): [3, 3], (8, 3): [2, 2, 4], (6, 4): [2, 2, 2, 0], (5, 2): [2, 3], (1, 2): [1, 0]}


@pytest.mark.parametrize(("batch", "ranks"), SHARES, ids=str)
def test_ranks_share_a_forward_as_here(batch, ranks):
    assert [len(slice_of(batch, rank, ranks)) for rank in range(ranks)] == SHARES[batch, ranks]


@given(st.integers(1, 300), st.integers(1, 40))
@settings(derandomize=True, deadline=None)
def test_ranks_share_a_forward_evenly_and_in_whole_pairs(batch, ranks):
    slices = [slice_of(batch, rank, ranks) for rank in range(ranks)]
    assert [place for part in slices for place in part] == list(range(batch))
    sizes = [len(part) for part in slices]
    assert sizes[0] > 0
    if batch % ranks == 0:
        assert set(sizes) == {batch // ranks}
    else:
        assert max(sizes) - min(sizes) <= 2
        assert all(part.start % 2 == 0 for part in slices if part)


def test_an_epoch_takes_no_sample_twice_and_the_next_shuffles_anew():
    steps = steps_of(2, 8, 1, steps=24)  # 12 whole steps of 8 in 101
    first, second = [k for s in steps[:12] for k in s], [k for s in steps[12:] for k in s]
    assert len({index for _, index in first}) == len(first) == 96
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in first] != [i for _, i in second]


def test_the_stream_can_start_at_any_step():
    assert steps_of(2, 8, 1, steps=10, start=17) == steps_of(2, 8, 1, steps=27)[17:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_eval_takes_every_sample_exactly_once(world_size):
    samplers = [EvalSampler(13, batch_per_rank=2, rank=r, world_size=world_size) for r in range(world_size)]
    taken = Counter(index for sampler in samplers for batch in sampler for _, index in batch)
    assert taken == Counter(range(13))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def batches_of(config, rank=0, size=1, count=3, seed=3, **options):
    built = data.build(config, World(rank, size, CPU), seed=seed, **options)
    return list(islice(iter(built.train), count))


def test_augmentation_of_a_sample_does_not_depend_on_rank_or_workers():
    one = batches_of(DataConfig(batch_per_rank=8, augment=ALL))
    two = [
        batches_of(DataConfig(batch_per_rank=4, augment=ALL, workers=w), rank=r, size=2) for r, w in ((0, 0), (1, 2))
    ]
    for step, whole in enumerate(one):
        for field in "images", "labels":
            shares = torch.cat([getattr(rank[step], field) for rank in two])
            assert torch.equal(getattr(whole, field), shares), field


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_a_run_keeps_its_steps_on_another_number_of_ranks(size):
    config = DataConfig(batch_per_rank=12, augment=ALL)
    whole = batches_of(config, count=4)
    ranks = [batches_of(config, rank, size, 2, global_batch=12, start=2) for rank in range(size)]
    for step in range(2):
        for field in "images", "labels":
            shares = [getattr(rank[step], field) for rank in ranks if len(rank[step].images)]
            assert torch.equal(getattr(whole[2 + step], field), torch.cat(shares)), field


def test_a_global_batch_is_told_to_be_even_or_not():
    config = DataConfig(batch_per_rank=4)
    for size, want in ((2, {True}), (3, {False}), (6, {False})):
        built = [data.build(config, World(rank, size, CPU), seed=0, global_batch=8) for rank in range(size)]
        assert {rank.even for rank in built} == want
        assert {rank.global_batch for rank in built} == {8}
    alone = data.build(config, World(1, 3, CPU), seed=0)
    assert (alone.global_batch, alone.even) == (12, True)


def test_a_rank_without_images_has_an_empty_batch_of_their_shape():
    built = data.build(DataConfig(batch_per_rank=1), World(1, 2, CPU), seed=0, global_batch=1)
    batch = next(iter(built.train))
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.labels.shape == (0,)


def test_the_sample_of_training_is_the_same_wherever_the_run_goes_on():
    built = data.build(DataConfig(), World(0, 1, CPU), seed=0, start=400)
    sample, first = next(iter(built.sample)), next(iter(data.build(DataConfig(), World(0, 1, CPU), seed=0).train))
    assert torch.equal(sample.images, first.images)
    assert not torch.equal(sample.images, next(iter(built.train)).images)


def test_augmentation_differs_between_epochs_and_seeds():
    config = DataConfig(name="fake", fake_samples=4, batch_per_rank=4, augment=AugmentConfig(pad=4))
    first, second = (batch.images.sort(0).values for batch in batches_of(config, count=2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, batches_of(config, seed=4)[0].images.sort(0).values)


def test_augmentation_leaves_the_process_random_state_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    batches_of(DataConfig(augment=ALL))
    assert torch.equal(torch.rand(3), want)


def test_images_arrive_normalised_and_in_colour():
    config = DataConfig(batch_per_rank=1437, mean=[0.305], std=[0.376])
    images = batches_of(config, count=1)[0].images
    assert images.shape == (1437, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.mean().abs() < 0.01
    assert (images.std() - 1).abs() < 0.01


def test_digits_are_the_uci_scans_split_for_good():
    train, test = SOURCES["classes"]["digits"].build(DataConfig())
    assert (len(train), len(test), len(train.classes)) == (1437, 360, 10)
    counts = Counter(label for part in (train, test) for _, label in (part[i] for i in range(len(part))))
    assert [counts[d] for d in range(10)] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's class sizes
    first = torch.tensor([0, 0, 5, 13, 9, 1, 0, 0])  # the top row of UCI's first scan, a 0
    assert torch.equal(test[0][0][0, 0], (first * 255 / 16).round().to(torch.uint8))
    assert test[0][1] == 0


def test_an_image_folder_takes_its_classes_from_train(tmp_path):
    root = image_folder(tmp_path, {"ant": 3, "bee": 2, "cat": 2}, {"bee": 2, "cat": 1})
    train, test = SOURCES["classes"]["image_folder"].build(DataConfig(root=str(root)))
    assert train.classes == ["ant", "bee", "cat"]
    assert [test[i][1] for i in range(len(test))] == [1, 1, 2]
    assert train[0][0].dtype == torch.uint8
    assert train[0][0].shape == (3, 8, 8)


def test_fewer_images_are_of_each_class_its_share(tmp_path):
    root = image_folder(tmp_path, {"ant": 6, "bee": 4, "cat": 2}, {"bee": 2, "cat": 1})
    config = DataConfig(name="image_folder", root=str(root), train_images=6, batch_per_rank=6)
    built = data.build(config, World(0, 1, CPU), seed=0)
    (batch,) = islice(built.train, 1)
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 2]
    assert (built.steps_per_epoch, built.fingerprint["train"], built.fingerprint["eval"]) == (1, 6, 3)
    with pytest.raises(UserError, match=r"data\.train_images=13: there are 12 training images"):
        data.build(replace(config, train_images=13), World(0, 1, CPU), seed=0)


def test_images_of_different_sizes_are_brought_to_one(tmp_path):
    root = image_folder(tmp_path, {"a": 2, "b": 2}, {"a": 1})
    write_image(root / "train" / "a" / "large.png", 9, size=20)
    config = DataConfig(name="image_folder", root=str(root), batch_per_rank=5)
    with pytest.raises(UserError, match=r"different shapes \(3, 8, 8\) and \(3, 20, 20\): data.size=N"):
        batches_of(config, count=1)
    config.size = 6
    assert batches_of(config, count=1)[0].images.shape == (5, 3, 6, 6)


BAD_FOLDERS = {
    "missing": (lambda root: None, "has no folder 'train': an image folder holds"),
    "no-test": (lambda root: write_image(root / "train" / "a" / "1.jpg", 1), "has one class, 'a': there is nothing"),
    "empty": (lambda root: [(root / part).mkdir(parents=True) for part in ("train", "test")], "/train has no class"),
    "empty-class": (
        lambda root: [image_folder(root, {"a": 2}, {"a": 1}), (root / "train" / "b").mkdir()],
        "is incomplete (no image of class b)",
    ),
    "strange-class": (
        lambda root: image_folder(root, {"a": 2, "b": 1}, {"a": 1, "zebra": 1}),
        "has the class 'zebra' that",
    ),
}


@pytest.mark.parametrize(("make", "said"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_told_in_one_line(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(UserError) as raised:
        SOURCES["classes"]["image_folder"].build(DataConfig(root=str(tmp_path)))
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, workers):
    root = image_folder(tmp_path, {"a": 4, "b": 4}, {"a": 1})
    (root / "train" / "b" / "0002.jpg").write_bytes(b"\xff\xd8\xff half a JPEG")
    config = DataConfig(name="image_folder", root=str(root), batch_per_rank=8, workers=workers)
    with pytest.raises(UserError, match=r"cannot read .*train/b/0002.jpg \(.*data.skip_broken=true") as raised:
        batches_of(config, count=1)
    assert "\n" not in str(raised.value)

    config.skip_broken = True
    (batch,) = batches_of(config, count=1)
    assert len(batch.images) == len(batch.labels) == 7
    assert batch.skipped == 1


def test_a_batch_of_broken_images_alone_is_empty(tmp_path):
    root = image_folder(tmp_path, {"a": 1, "b": 1}, {"a": 1})
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    (batch,) = batches_of(DataConfig(name="image_folder", root=str(root), batch_per_rank=2, skip_broken=True), count=1)
    assert len(batch.images) == 0
    assert batch.skipped == 2


def test_cached_images_are_the_same_images(tmp_path):
    root = image_folder(tmp_path, {"a": 3, "b": 3}, {"a": 1})
    plain, cached = (
        batches_of(DataConfig(name="image_folder", root=str(root), batch_per_rank=6, cache=cache, augment=ALL))
        for cache in (False, True)
    )
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, cached, strict=True))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "imagenet"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(UserError, match=rf"data.root={tmp_path} holds no .*data"):
        SOURCES["classes"][name].build(DataConfig(name=name, root=str(tmp_path)))


def test_fashion_mnist_is_read_from_its_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 2)):
        pixels, labels = bytes(range(n)) * 28 * 28, bytes(i % 10 for i in range(n))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            b"\x00\x00\x08\x03" + b"".join(v.to_bytes(4) for v in (n, 28, 28)) + pixels
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + n.to_bytes(4) + labels)
    built = data.build(DataConfig(name="fashion_mnist", root=str(tmp_path)), World(0, 1, CPU), seed=0)
    assert next(iter(built.train)).images.shape == (4, 3, 28, 28)
    assert len(built.classes) == 10


def test_imagenet_is_read_from_its_folders(tmp_path):
    image_folder(tmp_path, {"n01440764": 3, "n01443537": 2}, {}, size=16)
    for wnid in "n01440764", "n01443537":
        write_image(tmp_path / "val" / wnid / "1.jpg", 1, size=16)
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}
    torch.save((names, ["n01440764"]), tmp_path / "meta.bin")
    built = data.build(DataConfig(name="imagenet", root=str(tmp_path), size=8), World(0, 1, CPU), seed=0)
    assert built.classes == ["tench", "goldfish"]
    assert next(iter(built.train)).images.shape == (4, 3, 8, 8)


def fingerprint_of(**options):
    return data.build(DataConfig(**{"batch_per_rank": 1, **options}), World(0, 1, CPU), seed=0).fingerprint


def test_a_fingerprint_is_the_same_wherever_the_data_lies(tmp_path, monkeypatch):
    for root in "here", "else where/é/":
        image_folder(tmp_path / root, {"ant": 2, "bee": 3}, {"bee": 1})
    monkeypatch.chdir(tmp_path)
    first, *others = (
        fingerprint_of(name="image_folder", root=root)
        for root in ("here", "./here/", f"{tmp_path}//here", "else where/é/")
    )
    assert (first["train"], first["eval"], first["classes"]) == (5, 1, 2)
    assert others == [first] * 3
    assert fingerprint_of() == {"train": 1437, "eval": 360, "classes": 10, "digest": "4ce10edef835fddd51ccca05d5823693"}


OTHER_FOLDERS = {
    "a file more": lambda root: write_image(root / "train" / "ant" / "more.jpg", 1),
    "a file of another name": lambda root: (root / "train" / "ant" / "0000.jpg").rename(root / "train/ant/zero.jpg"),
    "a file in another class": lambda root: (root / "train/bee/0002.jpg").rename(root / "train/ant/0002.jpg"),
    "a class of another name": lambda root: (root / "train/ant").rename(root / "train/aunt"),
    "another file for eval": lambda root: (root / "test/bee/0000.jpg").rename(root / "test/bee/0001.jpg"),
}


@pytest.mark.parametrize("change", OTHER_FOLDERS.values(), ids=OTHER_FOLDERS)
def test_a_fingerprint_tells_other_data(tmp_path, change):
    root = image_folder(tmp_path, {"ant": 2, "bee": 3}, {"bee": 1})
    config = {"name": "image_folder", "root": str(root)}
    before = fingerprint_of(**config)
    change(root)
    assert fingerprint_of(**config)["digest"] != before["digest"]


def test_a_fingerprint_tells_other_labels_and_noise():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    of = [
        fingerprint(InMemory(images, labels, "ab"), InMemory(images, [0, 0, 0], "ab"))
        for labels in ([0, 1, 1], [1, 0, 1])
    ]
    of += [fingerprint_of(name="fake", fake_samples=n, fake_classes=k) for n, k in ((50, 10), (51, 10), (51, 11))]
    assert len({each["digest"] for each in of}) == 5


def test_too_few_images_for_one_step():
    with pytest.raises(UserError, match="takes 4000 images and there are 1437"):
        data.build(DataConfig(batch_per_rank=1000), World(0, 2, CPU), seed=0, accumulate=2)
    with pytest.raises(UserError, match="a global batch of 800, 2 times a step, takes 1600 images and there are 1437"):
        data.build(DataConfig(), World(0, 3, CPU), seed=0, accumulate=2, global_batch=800)


CIFAR = Path(__file__).parents[4] / "shared" / "data" / "cifar10-jpeg.tar.xz"


@pytest.mark.skipif(not CIFAR.is_file(), reason="the real CIFAR-10 is not beside this checkout")
def test_real_images_are_read(tmp_path):
    with tarfile.open(CIFAR) as archive:
        for member in islice((m for m in archive if m.isfile()), 20):
            archive.extract(member, tmp_path, filter="data")
    root = tmp_path / "cifar10"
    (part,) = root.iterdir()  # the archive begins with one of train and test
    (root / ("test" if part.name == "train" else "train")).symlink_to(part)
    (of_class,) = part.iterdir()
    shutil.copytree(of_class, part / "another")
    built = data.build(DataConfig(name="image_folder", root=str(root)), World(0, 1, CPU), seed=0)
    assert next(iter(built.train)).images.shape == (4, 3, 32, 32)
    assert sum(len(batch.images) for batch in built.eval) == 40
