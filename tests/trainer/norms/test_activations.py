"""A norm with a nonlinearity of its own takes the place of the activation after it, wherever that can be known."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from syncbn.trainer import models, norms
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.norms import NormConfig, Place

CPU = Place(torch.device("cpu"))


def converted(model, word="frn"):
    """The model, and what was told."""
    model, (changed, layers, notes) = norms.convert(model, NormConfig(word), CPU)
    assert changed == layers
    return model, notes


def forms(model):
    """name -> whether the layer has a nonlinearity of its own in some call, and in one that does not say so."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, norms.activations.Activated)}
    return {n: (getattr(m, m.own) is not None, m.activates) for n, m in layers.items()}


ASKED, ALWAYS, NEVER = (True, False), (True, True), (False, False)


class Block(nn.Module):
    """A residual block as torchvision's."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(x))
        y = self.bn2(y)
        y += x
        return self.relu(y)


def test_in_a_residual_block_the_norm_before_the_addition_has_none():
    block, notes = converted(Block())
    assert notes == []
    assert forms(block) == {"bn1": ASKED, "bn2": NEVER}
    x = torch.randn(2, 4, 3, 3)
    y = torch.maximum(block.bn1.linear(x), block.bn1.tau.view(-1, 1, 1))
    assert_close(block(x.clone()), F.relu(block.bn2.linear(y) + x))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU], ids=lambda a: a.__name__)
def test_in_a_chain_the_activation_goes(activation):
    shared = activation()
    chain, notes = converted(nn.Sequential(nn.BatchNorm2d(4), shared, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shared))
    assert notes == []
    assert forms(chain) == {"0": ALWAYS, "3": ALWAYS}
    assert [type(m) for m in (chain[1], chain[4])] == [nn.Identity] * 2


def test_in_a_chain_a_norm_before_anything_else_has_none():
    chain, notes = converted(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    assert notes == []
    assert forms(chain) == {"0": NEVER, "3": NEVER}
    assert type(chain[2]) is nn.ReLU


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(x)) if x.sum() > 0 else x


class Gated(nn.Module):
    """An activation that is no ReLU, in a forward."""

    def __init__(self):
        super().__init__()
        self.bn, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(F.silu(self.bn(x)))


def hooked():
    chain = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    chain[1].register_forward_hook(lambda *_: None)
    return chain


class Own(nn.ReLU):
    pass


STAYS = {
    "branch": (Branches, "bn", "its forward branches on a value"),
    "another-activation": (Gated, "bn", "it is no ReLU of the layer's alone, or has hooks"),
    "hook": (hooked, "0", "it has hooks, or is of a class of its own"),
    "own-class": (lambda: nn.Sequential(nn.BatchNorm2d(4), Own()), "0", "it has hooks, or is of a class of its own"),
}


@pytest.mark.parametrize(("build", "name", "why"), STAYS.values(), ids=STAYS)
def test_what_cannot_be_known_stays_and_is_told(build, name, why):
    model, notes = converted(build())
    assert notes == [f"1 layers do their own nonlinearity and the model's activation stays ({name}): {why}"]
    assert forms(model)[name] == ALWAYS
    assert [form for other, form in forms(model).items() if other != name] in ([], [NEVER])
    assert model(torch.rand(2, 4, 3, 3)).isfinite().all()


def test_a_layer_in_two_places_that_differ_keeps_the_activation():
    bn = nn.BatchNorm2d(4)
    model, notes = converted(nn.Sequential(nn.Sequential(bn, nn.ReLU()), nn.Sequential(bn, nn.Conv2d(4, 4, 1))))
    assert "shared with places where that is not so" in notes[0]
    assert type(model[0][1]) is nn.ReLU
    assert model[0][0] is model[1][0]


COUNTS = {  # layers with a nonlinearity of their own, those without, and activations that stay
    "resnet8": (4, 3, False),
    "vgg11_bn": (8, 0, False),
    "googlenet": (57, 0, False),
    "mobilenet_v2": (35, 17, False),
    "resnet34": (17, 19, False),
    "densenet121": (120, 1, True),
    "efficientnet_b0": (33, 16, False),
}


@pytest.mark.plain("resnet8-frn", "vgg11_bn-evonorm_s0", "densenet121-frn")
@pytest.mark.parametrize("word", ["frn", "evonorm_s0"])
@pytest.mark.parametrize("name", COUNTS)
def test_models_have_the_forms_that_their_forwards_ask_for(name, word):
    with torch.device("meta"):
        model = models.build(ModelConfig(name), 10) if name != "googlenet" else torchvision.models.googlenet(
            aux_logits=False, init_weights=False
        )  # fmt: skip
    model, (_, _, notes) = norms.convert(model, NormConfig(word), Place(torch.device("meta")))
    own = [nonlinear for nonlinear, _ in forms(model).values()]
    assert (sum(own), len(own) - sum(own), bool(notes)) == COUNTS[name]


@pytest.mark.plain("resnet8-frn")
@pytest.mark.parametrize("word", ["frn", "evonorm_s0", "ws_group", "none"])
@pytest.mark.parametrize("name", ["resnet8", "densenet121", "efficientnet_b0"])
def test_figures_are_finite(name, word):
    model = models.build(ModelConfig(name), 10)
    norms.convert(model, NormConfig(word), CPU)
    scores = model(torch.randn(2, 3, 64, 64))
    scores.square().sum().backward()
    assert scores.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "backend"), [*((w, "aot_eager") for w in norms.NORMS if w != "torch"), ("batch_renorm", "inductor")]
)
def test_it_compiles_as_one_graph(word, backend):
    torch._dynamo.reset()
    model = norms.convert(models.build(ModelConfig("resnet8"), 10), NormConfig(word, **_small(word)), CPU)[0].double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    want = model.eval()(x)
    model.compile(fullgraph=True, backend=backend)
    assert_close(model.eval()(x), want)
    assert model.train()(x).isfinite().all()


def _small(word):
    return {"sub_batch": 2} if word == "ghost" else {}
