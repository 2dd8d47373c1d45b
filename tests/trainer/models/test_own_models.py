"""Models of a user's own: whatever they return that holds scores trains, and what cannot is told in one line."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from syncbn.trainer import models
from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.rank.diagnosis import explained
from syncbn.trainer.tasks.classify import find_scores
from syncbn.trainer.training.loop import fit
from tests.ranks import run_ranks
from tests.trainer.on_ranks import world_of

SCORES, OTHER = torch.zeros(2, 10), torch.ones(2, 5)
Auxiliary = namedtuple("Auxiliary", ["aux", "logits"])


class ModelOutput(OrderedDict):
    """As transformers has it: a dict, and a tuple by its values."""


@dataclass
class Output:
    loss: Tensor | None
    hidden: Tensor
    logits: Tensor


HOLDING = {
    "tensor": SCORES,
    "torchvision's segmentation": {"aux": OTHER, "out": SCORES},
    "torchvision's inception": Auxiliary(aux=OTHER, logits=SCORES),
    "transformers": ModelOutput(loss=None, hidden=OTHER, logits=SCORES),
    "dataclass": Output(None, OTHER, SCORES),
    "tuple": (SCORES, OTHER),
    "list": [None, SCORES, OTHER],
    "dict without a name": {"scores": SCORES, "hidden": OTHER},
}


@pytest.mark.parametrize("output", HOLDING.values(), ids=HOLDING)
def test_the_scores_are_found_in_what_a_model_returns(output):
    assert find_scores(output) is SCORES


class Net(nn.Module):
    """A model that returns what `of` makes of its scores; a second head takes part on demand."""

    def __init__(self, num_classes, of=lambda scores, spare: scores):
        super().__init__()
        self.head, self.spare, self.of = nn.Linear(192, num_classes), nn.Linear(192, 3), of

    def forward(self, x):
        return self.of(self.head(x.flatten(1)), self.spare)


def sparing(num_classes):
    return Net(num_classes)


def whole(num_classes):
    net = Net(num_classes)
    net.spare = nn.Identity()
    return net


def in_a_dict(num_classes):
    net = whole(num_classes)
    net.of = lambda scores, _: {"features": torch.ones(3), "logits": scores}
    return net


def two_heads(num_classes):
    net = Net(num_classes)
    net.of = lambda scores, spare: (scores, spare.weight.sum())
    return net


def frozen(num_classes):
    return whole(num_classes).requires_grad_(False)


def short(num_classes):
    return whole(num_classes - 3)


def wide(num_classes):
    net = whole(num_classes)
    net.of = lambda scores, _: scores[..., None, None]
    return net


def text(num_classes):
    net = whole(num_classes)
    net.of = lambda scores, _: {"said": "cat"}
    return net


def train(rank, name, settings):
    """What a training of three steps ends with; None: well."""
    config = typed({"model": {"name": f"{__name__}:{name}"}, "train": {"steps": 3, **settings}})
    world = world_of(rank)
    training = None
    try:
        training = assemble(build(config, world), config, world)
        fit(training, config.train, world)
    except Exception as error:
        explanation = explained(error, training, config, rank) if training else error
        return type(explanation), str(explanation)
    return None


FIND = {"find_unused_parameters": True}
REFUSED = {
    "unused": ("sparing", {}, "2 of the model's parameters took no part in the loss of a step (spare.weight, sp"),
    "unused-mend": ("sparing", {}, "or train.find_unused_parameters=true, if it is meant so"),
    "frozen": ("frozen", {}, "has no parameter to train"),
    "fewer": ("short", {}, "gives scores [4, 7] for images [4, 3, 8, 8]: its forward must return scores [4, 10]"),
    "shape": ("wide", {}, "gives scores [4, 10, 1, 1] for images"),
    "none": ("text", {}, "gives a dict of said: str and no tensor for images"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_train_is_told_by_every_rank_in_a_line(name, settings, said):
    for kind, line in run_ranks(train, 2, name, settings):
        assert kind is UserError, line
        assert said in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "settings"), [("whole", {}), ("in_a_dict", {}), ("sparing", FIND), ("two_heads", FIND)]
)
def test_what_can_trains(name, settings):
    assert run_ranks(train, 2, name, settings) == [None, None]


def narrow(classes, width):
    return nn.Linear(width, classes)


class Forwarding(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = narrow(**options)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(num_classes))


def shown(num_classes):
    model = lazy(num_classes)
    model(torch.zeros(2, 3, 8, 8))
    return model


def wrong_inside(num_classes):
    return nn.Linear(num_classes, "three")


NO_MODEL = {
    "other-arguments": ("narrow", "cannot be called (narrow() got an unexpected keyword argument 'num_classes')"),
    "handed-on": ("Forwarding", "it must be a function or a class that takes num_classes=, as in builder(num"),
    "no-function": ("SCORES", "cannot be called ('Tensor' object is not callable)"),
    "lazy": ("lazy", "lazy layers, which take their shapes from the first images (1.weight, 1.bias, 2.weig"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "said"), NO_MODEL.values(), ids=NO_MODEL)
def test_a_builder_that_builds_no_model_is_told_in_a_line(name, said):
    with pytest.raises(UserError) as raised:
        models.build(ModelConfig(f"{__name__}:{name}"), num_classes=4)
    assert said in str(raised.value)


def test_lazy_layers_that_have_seen_a_batch_are_as_others():
    assert models.build(ModelConfig(f"{__name__}:shown"), num_classes=4)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_an_error_inside_a_builder_is_its_own():
    with pytest.raises(TypeError, match="empty"):
        models.build(ModelConfig(f"{__name__}:wrong_inside"), num_classes=4)
