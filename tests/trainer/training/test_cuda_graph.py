"""A captured training is the eager one, bit by bit. On a CPU a tape stands for the CUDA graph: see tape.py."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import syncbn
from syncbn import collectives, kernels
from syncbn.drift import observer
from syncbn.trainer.config import typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.training import cuda_graph, loop
from syncbn.trainer.training.cuda_graph import Captured
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of
from tests.trainer.tape import tape
from tests.trainer.trained import SEGMENTATION

TIMES = {"train/images_per_s", "train/step_ms", "train/data_wait_share"}


class Dropping(nn.Module):
    """A small network that draws at random in training."""

    def __init__(self, num_classes):
        super().__init__()
        self.net, self.drop = SmallResNet(8, num_classes, width=4), nn.Dropout2d(0.2)

    def forward(self, x):
        return self.net(self.drop(x))


def settings(*, data=None, optim=None, norm="sync", **train):
    return {
        "data": {"batch_per_rank": 4, "augment": {"pad": 1}, **(data or {})},
        # A power of two times shares of it that float32 holds: the rates on a device have no more digits
        "optim": {"lr": 0.125, "scaling": "none", **(optim or {})},
        "schedule": {"warmup_epochs": 0.1},
        "norm": {"name": norm},
        "model": {"name": f"{__name__}:Dropping"},
        "train": {"steps": 18, "log_every": 3, "eval_every": 8, **train},
    }


def train(rank, overrides, captured):
    """Everything that a training leaves, and the steps that were done when something was captured."""
    config, world, log = typed(overrides), world_of(rank), Log()
    parts = build(config, world)
    config = replace(config, train=replace(config.train, cuda_graph=True))
    training = assemble(parts, config, world)
    training.schedule.lr_lambdas = [in_float32(share) for share in training.schedule.lr_lambdas]
    captures = []

    def capture(work):
        replay = tape(work)
        captures.append((training.step, weakref.ref(replay)))
        return replay

    with syncbn.DriftMonitor(parts.model) as training.drift, pytest.MonkeyPatch.context() as patch:
        # As on a GPU that captures: each forward adds to the same tensors, and keeps no count on the host; and all work
        # and all messages are torch's, of which a tape knows
        patch.setattr(observer, "is_recorded", lambda x: True)
        patch.setattr(kernels, "choose", lambda x: kernels.eager)
        patch.setattr(collectives.messages, "may_share_memory", lambda message, reduction: False)
        loop.fit(training, replace(config.train, cuda_graph=captured), world, log, log, capture=capture)
    assert all(replay() is None for _, replay in captures), "NCCL would wait for the graph that fit has left behind"
    log.lines = [(step, {k: v for k, v in figures.items() if k not in TIMES}) for step, figures in log.lines]
    return {
        "model": training.model.module.state_dict(),
        "average": training.average and training.average.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "log": log.lines,
        "saved": log.saved,
    }, [step for step, _ in captures]


def in_float32(share):
    return lambda step: torch.tensor(share(step)).item()


TRAININGS = {
    "sgd": settings(),
    "sgd-accumulate-ema-clip-mixup": settings(
        data={"augment": {"mixup": 0.2}}, accumulate=2, ema=0.75, clip_norm=0.5, precision="bf16"
    ),
    "adamw-ema": settings(optim={"name": "adamw", "lr": 2**-7}, ema=0.75, channels_last=True),
    "adamw-clip-mixup-local": settings(
        optim={"name": "adamw", "lr": 2**-7}, data={"augment": {"mixup": 0.2}}, norm="local", clip_norm=0.5
    ),
    "segmentation": settings(ema=0.75) | SEGMENTATION,
}


@pytest.mark.plain("sgd", "adamw-clip-mixup-local", "segmentation")
@pytest.mark.parametrize("overrides", TRAININGS.values(), ids=TRAININGS)
def test_captured_is_eager_bit_by_bit(overrides):
    eager = run_ranks(train, 2, overrides, False)
    captured = run_ranks(train, 2, overrides, True)

    assert [captures for _, captures in eager] == [[]] * 2
    assert [captures for _, captures in captured] == [[11]] * 2  # the eager steps that torch asks for under DDP
    for (got, _), (want, _) in zip(captured, eager, strict=True):
        for name in want:
            assert same(got[name], want[name]), name


def same(got, want):
    """Whether two nests of dicts, lists and tensors are equal to the last bit and in type."""
    if type(got) is not type(want):
        return False
    if isinstance(want, torch.Tensor):
        return got.dtype == want.dtype and torch.equal(got, want)
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(same, got, want))
    return got == want


def test_a_run_no_longer_than_the_warm_up_captures_nothing():
    for _, captures in run_ranks(train, 2, settings(steps=cuda_graph.WARM_UP), True):
        assert captures == []


class Looks(Dropping):
    """A network whose host wants to know."""

    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum().item() > 0 else 2.0)


def refused(rank, overrides):
    try:
        train(rank, overrides, True)
    except UserError as error:
        return str(error), error.on_every_rank


def test_a_model_that_reads_a_value_is_refused_in_one_line():
    looking = {**settings(), "model": {"name": f"{__name__}:Looks"}}
    for line, on_every_rank in run_ranks(refused, 2, looking):
        assert line.startswith("train.cuda_graph=true and a step that cannot be captured (operation not permitted")
        assert line.endswith("must not read a tensor's value (.item(), print, if), or train.cuda_graph=false")
        assert "\n" not in line
        assert on_every_rank


def warm(*, capture=tape):
    """A captured step that is about to be, and what its step was given so far."""
    seen = []

    def step(batches):
        seen.extend(batches)
        return torch.zeros((), dtype=torch.bool), [({"loss": b.images.sum()}, b.samples, b.skipped) for b in batches]

    captured = Captured(step, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), capture)
    for _ in range(cuda_graph.WARM_UP):
        captured([batch(4)])
    return captured, seen


def batch(n, labels=torch.int64):
    return Batch(torch.full((n, 3, 2, 2), float(n)), torch.ones(n, dtype=labels))


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        (batch(1), "images [1, 3, 2, 2] float32 after [4, 3, 2, 2] float32"),
        (batch(4, torch.float32), "labels [4] float32 after [4] int64"),
    ],
    ids=["smaller", "mixed"],
)
def test_a_batch_of_another_kind_is_refused_in_one_line(other, kinds):
    captured, _ = warm()
    captured([batch(4)])
    with pytest.raises(UserError) as error:
        captured([other])
    assert str(error.value) == (
        f"train.cuda_graph=true and {kinds}: one shape is all a graph takes; "
        "data.size=N makes images alike, or train.cuda_graph=false"
    )


def test_the_graph_reads_memory_of_its_own_in_the_layout_of_the_batches():
    captured, seen = warm()
    first = Batch(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last), torch.ones(4))
    captured([first])
    kept = seen[-1].images
    assert kept.is_contiguous(memory_format=torch.channels_last)
    assert kept.data_ptr() != first.images.data_ptr()
    _, [(sums, _, _)] = captured([first._replace(images=first.images + 1)])
    assert torch.equal(kept, first.images + 1)
    assert sums["loss"] == kept.sum()


def out_of_memory(work):
    raise torch.OutOfMemoryError("no room")


def test_no_room_for_the_graph_is_told_as_that():
    captured, _ = warm(capture=out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        captured([batch(4)])


def test_cpus_have_no_graphs():
    with pytest.raises(
        UserError, match=r"^train.cuda_graph=true on cpu: only GPUs have CUDA graphs; train.cuda_graph=false$"
    ):
        build(typed({"train": {"cuda_graph": True}}), loop.World(0, 1, torch.device("cpu")))


def test_images_left_out_would_change_the_shape():
    with pytest.raises(UserError, match=r"^train.cuda_graph=true with data.skip_broken=true: .*choose one of the two$"):
        typed({"train": {"cuda_graph": True}, "data": {"skip_broken": True}})
