"""train.compile=true: the whole model in one graph, the same training, and the same names in what is saved."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn.trainer.config import typed
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.rank.diagnosis import graph_break
from syncbn.trainer.training import loop
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of


def small(num_classes):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes)]
    return nn.Sequential(*layers).double()


class Double(nn.Module):
    """As small, and lets its input in."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = small(num_classes)

    def forward(self, x):
        return self.net(x.double())


class Branches(Double):
    def forward(self, x):
        scores = super().forward(x)
        if scores.sum() > 0:
            scores = -scores
        return scores


class Prints(Double):
    def forward(self, x):
        print("here")
        return super().forward(x)


def settings(model, **train):
    return {
        "data": {"batch_per_rank": 4},
        "model": {"name": f"{__name__}:{model.__name__}"},
        "train": {"steps": 4, "log_every": 1, "eval_every": 2, **train},
    }


def train(rank, overrides):
    torch._dynamo.reset()
    config, world, log = typed(overrides), world_of(rank), Log()
    training = assemble(build(config, world), config, world)
    try:
        figures = loop.fit(training, config.train, world, log)
    except Exception as error:
        broken = graph_break(error)
        if broken is None:
            raise
        return str(broken), broken.on_every_rank
    states = [training.model.module.state_dict(), training.best_model.state_dict()]
    return states, [lines["train/loss"] for _, lines in log.lines if "train/loss" in lines], figures


@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "ema": 0.5}], ids=["plain", "accumulate-ema"])
def test_compiled_is_eager_and_its_weights_keep_their_names(more):
    eager = run_ranks(train, 2, settings(Double, **more))
    compiled = run_ranks(train, 2, settings(Double, compile=True, **more), timeout_s=600)

    assert_close(compiled, eager, rtol=1e-9, atol=1e-9)  # float64: what differs is the order of sums
    assert list(compiled[0][0][0]) == list(Double(10).state_dict())


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [(Branches, "if scores.sum() > 0:", "Data-dependent branching"), (Prints, 'print("here")', "print")],
    ids=["branch", "print"],
)
def test_a_graph_break_is_told_in_one_line_with_place_and_mend(model, code, reason):
    for line, on_every_rank in run_ranks(train, 2, settings(model, compile=True), timeout_s=600):
        assert line.startswith("train.compile=true makes one graph of the model, and it breaks at ")
        assert f"test_compile.py:{line_of(model, code)}, {code!r} (" in line
        assert reason in line
        assert line.endswith("): write that without a graph break, or train.compile=false")
        assert "\n" not in line
        assert on_every_rank


def line_of(model, code):
    import inspect

    lines, first = inspect.getsourcelines(model)
    return first + next(i for i, line in enumerate(lines) if code in line)


def test_other_errors_are_no_graph_breaks():
    assert graph_break(RuntimeError("shape '[1, 3]' is invalid")) is None
